"""Converts a model in one GGUF file to the Hugging Face folder that every other part reads.

Weights are dequantised tensor by tensor and streamed into `model.safetensors` as bfloat16, so memory holds one tensor at a
time. The safetensors package would need all tensors at once. No torch, because the CLI must work without it.

Only SmolLM's tokenizer is rebuilt. A GGUF file has only the name of other pre-tokenizers, so other models need the tokenizer
and the chat template of the folder in which they were published.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from updraft_artifacts import safetensors_header
from updraft_chassis.errors import InvalidInput
from updraft_cli.models import bfloat16
from updraft_cli.models.architectures import ROPE_TABLE, architecture, model_config, value

_CONTROL_TOKEN = 3
"""`tokenizer.ggml.token_type` of tokens that text never produces."""

_SMOLLM = "smollm"
"""`tokenizer.ggml.pre` of digits one by one, then GPT-2's pattern."""

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")

Progress = Callable[[int, int], None]
"""Called with the number of converted tensors, and of all tensors."""


def convert(source: Path, folder: Path, progress: Progress, *, tokenizer_from: Path | None = None) -> None:
    """Write config, weights and tokenizer of the GGUF `source` into the existing `folder`.

    `tokenizer_from` is a folder whose tokenizer and chat template are copied. InvalidInput for an unknown model.
    """
    reader = _reader(source)
    config = model_config(reader)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", _generation_config(reader, config))
    if tokenizer_from is None:
        (folder / "tokenizer.json").write_text(tokenizer(reader).to_str())
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(reader, config))
    else:
        _copy_tokenizer(tokenizer_from, folder)
    _write_weights(folder / "model.safetensors", reader, config, progress)


def _reader(source: Path) -> gguf.GGUFReader:
    try:
        return gguf.GGUFReader(source)
    except (ValueError, IndexError) as error:  # not a GGUF file, or a truncated one
        raise InvalidInput(f"{source} is not a complete GGUF file: {error}") from error


def _copy_tokenizer(source: Path, folder: Path) -> None:
    if not (source / "tokenizer.json").is_file():
        raise InvalidInput(f"{source} has no tokenizer.json")
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """Rebuild the byte-level BPE tokenizer that the file holds; InvalidInput if it is not SmolLM's."""
    kind = (value(reader, "tokenizer.ggml.model"), value(reader, "tokenizer.ggml.pre", "default"))
    if kind != ("gpt2", _SMOLLM):
        raise InvalidInput(
            f"the tokenizer of this GGUF file ({' '.join(kind)}) cannot be rebuilt from it; use --tokenizer to name a folder"
            " with the model's tokenizer.json"
        )
    tokens: list[str] = value(reader, "tokenizer.ggml.tokens")
    kinds: list[int] = value(reader, "tokenizer.ggml.token_type")
    merges: list[str] = value(reader, "tokenizer.ggml.merges")
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    built = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    built.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    built.decoder = decoders.ByteLevel()
    control = (token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN)
    built.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return built


def weights(reader: gguf.GGUFReader, config: dict[str, Any]) -> Iterator[NDArray[np.float32]]:
    """Yield every tensor of the model in file order, dequantised, as it was published."""
    family = architecture(reader)
    for tensor in _tensors(reader):
        try:
            values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise InvalidInput(
                f"{tensor.name} of the GGUF file is {tensor.tensor_type.name}, which is not supported"
            ) from error
        yield family.published(tensor.name, values, config)


def _tensors(reader: gguf.GGUFReader) -> list[gguf.ReaderTensor]:
    return [tensor for tensor in reader.tensors if tensor.name != ROPE_TABLE]


def _write_weights(path: Path, reader: gguf.GGUFReader, config: dict[str, Any], progress: Progress) -> None:
    family, tensors = architecture(reader), _tensors(reader)
    # GGUF states the fastest dimension first.
    shapes = [tuple(int(size) for size in reversed(tensor.shape)) for tensor in tensors]
    names = [family.hugging_face_name(tensor.name) for tensor in tensors]
    with path.open("wb") as file:
        file.write(safetensors_header.header((name, "BF16", shape) for name, shape in zip(names, shapes, strict=True)))
        for done, values in enumerate(weights(reader, config), start=1):
            file.write(bfloat16.bits(values).data)
            progress(done, len(tensors))


def _generation_config(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, Any]:
    token_ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    end_of_turn = int(value(reader, "tokenizer.ggml.eot_token_id", config["eos_token_id"]))
    return token_ids | (
        {"eos_token_id": [config["eos_token_id"], end_of_turn]} if end_of_turn != token_ids["eos_token_id"] else {}
    )


def _tokenizer_config(reader: gguf.GGUFReader, config: dict[str, Any]) -> dict[str, Any]:
    tokens: list[str] = value(reader, "tokenizer.ggml.tokens")

    def token(role: str) -> str:
        return tokens[int(value(reader, f"tokenizer.ggml.{role}_token_id"))]

    return {
        # Not GPT2Tokenizer: that class would replace the digits rule with its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": token("bos"),
        "chat_template": value(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "eos_token": token("eos"),
        "model_max_length": config["max_position_embeddings"],
        "pad_token": token("padding"),
        "unk_token": token("unknown"),
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
