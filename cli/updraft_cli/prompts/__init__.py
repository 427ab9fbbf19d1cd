"""Real requests of five domains, for demos and benchmarks, from installed packages or small generators.

A domain is a fixed catalogue without duplicates; a seed only chooses the order. Every fifth prompt is held
out, so that what is learned from never meets what is measured on, whatever the seeds. No network.
"""

import random
from collections.abc import Callable
from functools import cache
from itertools import islice

from updraft_chassis.errors import InvalidInput
from updraft_cli.prompts import generated, packaged

_SOURCES: dict[str, Callable[[], list[str]]] = {
    "code": packaged.code,
    "math": packaged.math,
    "sql": generated.sql,
    "json": generated.json,
    "chat": generated.chat,
}

DOMAINS = tuple(_SOURCES)

_HELD_OUT_EVERY = 5
"""One in five: enough to measure on (over 100 a domain) and most of it left to learn from."""


def domain_prompts(domain: str, count: int, seed: int = 0, *, held_out: bool = False) -> list[str]:
    """Return `count` different prompts of `domain`, chosen and ordered by `seed`; each is one chat message.

    The held-out prompts and the others are disjoint. InvalidInput when the domain is unknown or has fewer.
    """
    available = _split(domain, held_out)
    if not 0 <= count <= len(available):
        kind = "held-out prompts" if held_out else "prompts"
        raise InvalidInput(f"the domain {domain} has {len(available)} {kind}; {count} were asked for")
    return random.Random(f"{domain}/{seed}").sample(available, count)


def num_prompts(domain: str, *, held_out: bool = False) -> int:
    return len(_split(domain, held_out))


@cache
def _catalogue(domain: str) -> tuple[str, ...]:
    if domain not in _SOURCES:
        raise InvalidInput(f"there is no domain {domain}; there are {', '.join(DOMAINS)}")
    return tuple(dict.fromkeys(_SOURCES[domain]()))


def _split(domain: str, held_out: bool) -> list[str]:  # noqa: FBT001 - private, and a word at its call sites
    prompts = _catalogue(domain)
    if held_out:
        return list(islice(prompts, 0, None, _HELD_OUT_EVERY))
    return [prompt for index, prompt in enumerate(prompts) if index % _HELD_OUT_EVERY]
