import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.support.checkpoints import draft

from updraft_artifacts import model_files, safetensors_header
from updraft_artifacts.model_folder import PART_OF, describe, target_fingerprint, tokenizer_fingerprint
from updraft_chassis.errors import InvalidInput


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 8, "transformers_version": "5.0"}))
    (tmp_path / "model.safetensors").write_bytes(draft(1).data)
    return tmp_path


def test_a_resave_by_another_transformers_is_the_same_target(folder: Path) -> None:
    before = target_fingerprint(folder)
    (folder / "config.json").write_text(json.dumps({"transformers_version": "6.0", "hidden_size": 8}))
    assert target_fingerprint(folder) == before


def test_other_weights_or_sizes_are_another_target(folder: Path) -> None:
    before = target_fingerprint(folder)
    (folder / "model.safetensors").write_bytes(draft(2).data)
    weights = target_fingerprint(folder)
    (folder / "config.json").write_text(json.dumps({"hidden_size": 16}))
    assert len({before, weights, target_fingerprint(folder)}) == 3


def test_a_tokenizer_is_known_by_its_file(folder: Path) -> None:
    none = tokenizer_fingerprint(folder)
    (folder / "tokenizer.json").write_text("{}")
    assert tokenizer_fingerprint(folder) != none


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_a_folder_that_holds_no_model_is_refused(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(InvalidInput):
        target_fingerprint(folder)
    with pytest.raises(InvalidInput):
        target_fingerprint(folder / "nowhere")


def test_a_part_of_a_model_has_the_fingerprint_that_it_states_or_none(folder: Path) -> None:
    (folder / PART_OF).write_text(json.dumps({"fingerprint": "sha256:whole"}))
    assert target_fingerprint(folder) == "sha256:whole"
    (folder / PART_OF).write_text("{}")
    with pytest.raises(InvalidInput, match="states no fingerprint: remove"):
        target_fingerprint(folder)


class FineTuned:
    """Shards of 5 GB of zeros, with one run of other bytes in each: its begin, as a share of what does not change.

    Beside them `num_small` files that never change.
    """

    place = "nowhere"

    def __init__(self, runs: Mapping[str, float], share: float, num_small: int = 0) -> None:
        rest = 5_000_000_000
        small = [f"model-small-{i}.safetensors" for i in range(num_small)]
        self._header = safetensors_header.header([("model.layers.0.mlp.experts", "U8", (rest,))])
        self._length = int(rest * share)
        self._runs = {name: len(self._header) + int(at * (rest - self._length)) for name, at in runs.items()}
        self._small = safetensors_header.header([("bias", "U8", (10_000,))]) + bytes(10_000)
        self.sizes: Mapping[str, int] = {
            "config.json": 2,
            **dict.fromkeys(runs, len(self._header) + rest),
            **dict.fromkeys(small, len(self._small)),
        }

    def read(self, name: str, begin: int, end: int) -> bytes:
        if name == "config.json":
            return b"{}"[begin:end]
        if name not in self._runs:
            return self._small[begin:end]
        head, first = self._header[begin:end], self._runs[name]
        at = [min(max(one, begin + len(head)), end) for one in (first, first + self._length)]
        return head + bytes(at[0] - begin - len(head)) + b"\1" * (at[1] - at[0]) + bytes(end - at[1])


def test_a_fine_tune_of_a_hundredth_of_the_bytes_of_many_shards_is_another_target() -> None:
    rng, names = random.Random(1), [f"model-{i:05}-of-00032.safetensors" for i in range(32)]
    before = model_files.fingerprint(FineTuned(dict.fromkeys(names, 0.0), 0.0))
    tuned = [FineTuned({name: rng.random() for name in names}, 0.01) for _ in range(40)]
    assert sum(model_files.fingerprint(one) == before for one in tuned) <= 2


def test_small_files_take_no_samples_from_a_large_one() -> None:
    rng, name = random.Random(1), "model-large.safetensors"
    before = model_files.fingerprint(FineTuned({name: 0.0}, 0.0, num_small=31))
    tuned = [FineTuned({name: rng.random()}, 0.01, num_small=31) for _ in range(40)]
    assert sum(model_files.fingerprint(one) == before for one in tuned) <= 2


def test_shards_whose_headers_differ_are_another_target(folder: Path) -> None:
    before, weights = target_fingerprint(folder), folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes().replace(b"weight", b"wieght"))
    assert target_fingerprint(folder) != before


@pytest.mark.attack(boundary="models", attack="a config.json or an index of 100 MB", outcome="refused unread")
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_file_that_would_fill_the_memory_is_refused_unread(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.truncate(101_000_000)
    with pytest.raises(InvalidInput, match=rf"{name} has 101,000,000 bytes, supported are 100?,000,000"):
        describe(folder)


@pytest.mark.attack(boundary="models", attack="a safetensors header that fills memory", outcome="refused unread")
def test_a_header_that_would_fill_the_memory_is_refused_unread(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write((50_000_000).to_bytes(8, "little"))
        file.truncate(60_000_000)
    with pytest.raises(InvalidInput, match=r"its header has 50,000,000 bytes, supported are 33,554,432"):
        target_fingerprint(folder)
