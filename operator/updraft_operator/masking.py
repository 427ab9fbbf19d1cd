"""Foreign text that conditions and Events may show: in one line, and without what looks like a password, key or token.

Whoever may read a resource sees its conditions, and need not be allowed to read Secrets. A program that fails often prints the
address or the header that it used. So it is better to hide too much; a person who may read the pod's log sees all of it.
"""

import re

HIDDEN = "***"

_MAX_CHARACTERS = 4096
"""More than Kubernetes keeps of a container's last words."""

_NAMES = "password|passwd|passphrase|secret|token|api[-_]?key|access[-_]?key|authorization|credential|signature|auth"

_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = (
    # scheme://user:password@host
    (re.compile(r"\b([a-zA-Z][\w+.-]*://)[^\s/@]+@"), rf"\1{HIDDEN}@"),
    # Authorization: Bearer ...
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    # PASSWORD=..., "api_key": "...", &X-Amz-Signature=..., --token ...
    (
        re.compile(
            rf"""((?:{_NAMES})[\w-]*["']?(?:\s*[:=]\s*["']?|\s+(?=\S*\d)))(?!bearer|basic)[^\s"',;&]{{6,}}""",
            re.IGNORECASE,
        ),
        rf"\1{HIDDEN}",
    ),
    # What is known by how it begins: Hugging Face, OpenAI, GitHub, GitLab, Slack, AWS, and JSON Web Tokens.
    (re.compile(r"\b(?:hf_|sk-|gh[pousr]_|github_pat_|glpat-|xox[abprs]-|AKIA|ASIA|eyJ)[\w.=-]{8,}"), HIDDEN),
    # Whatever is long and random, except digests of images and weights.
    (re.compile(r"(?<!sha256:)(?<!\w)(?=[A-Za-z+/=]*\d)(?=[\d+/=]*[A-Za-z])[A-Za-z0-9+=]{32,}"), HIDDEN),
)


def masked(text: str) -> str:
    """The text in one printable line, its secrets replaced."""
    line = "".join(char if char.isprintable() else " " for char in text[:_MAX_CHARACTERS])
    for pattern, instead in _SECRETS:
        line = pattern.sub(instead, line)
    return line
