"""A tokenizer of 258 tokens whose ids are bytes (and two special tokens), written as a model folder holds it."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

START, END = 256, 257

TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|start|>' + message['role'] + '\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)


def byte_level() -> Tokenizer:
    """Token id b is byte b."""
    tokenizer = Tokenizer(models.BPE(vocab={char: byte for byte, char in enumerate(_alphabet())}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<|start|>", "<|end|>")])
    return tokenizer


def write_tokenizer(folder: Path, *, template: str | None = TEMPLATE) -> Path:
    """Make `folder` hold tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    byte_level().save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|start|>",
        "eos_token": {"__type": "AddedToken", "content": "<|end|>"},
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def _alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the bytes 0..255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    stand_ins = dict(zip(others, range(256, 512), strict=False))
    return [chr(stand_ins.get(byte, byte)) for byte in range(256)]


def few_tokens(folder: Path) -> list[str]:
    """Write a tokenizer of five tokens into `folder`, the last of which ends; return their texts."""
    texts = ['"', "a", "b", "ab", "<|end|>"]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(texts[:-1])}, merges=[("a", "b")]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(texts[-1], special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return texts
