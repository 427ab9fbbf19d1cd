"""A bounded folder: what was not used for longest goes first, what came last stays."""

import os
from pathlib import Path

import pytest

from updraft_registry.storage.stores.cache import Cache


def fill(cache: Cache, name: str, num_bytes: int) -> None:
    with cache.create(name) as file:
        file.write(bytes(num_bytes))


def age(folder: Path, name: str, seconds: int) -> None:
    """As if it had been used that long ago."""
    now = (folder / name).stat().st_mtime
    os.utime(folder / name, (now - seconds, now - seconds))


def test_the_least_recently_used_files_make_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=100)
    for seconds, name in ((3, "a"), (2, "b"), (1, "c")):
        fill(cache, name, 30)
        age(tmp_path, name, seconds)
    used = cache.open("a")
    assert used is not None
    used.close()
    fill(cache, "d", 60)
    assert sorted(cache.names()) == ["a", "d"]


def test_a_file_larger_than_the_cache_stays_until_the_next_one(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=10)
    fill(cache, "large", 1000)
    assert cache.names() == ["large"]
    fill(cache, "small", 1)
    assert cache.names() == ["small"]


def test_what_was_not_filled_to_its_end_is_not_here(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=100)

    def break_off() -> None:
        with cache.create("half") as file:
            file.write(b"12")
            raise KeyError

    with pytest.raises(KeyError):
        break_off()
    assert cache.open("half") is None
    assert list(tmp_path.iterdir()) == []


def test_what_a_crash_left_is_deleted_at_the_next_start(tmp_path: Path) -> None:
    fill(Cache(tmp_path, max_bytes=100), "whole", 1)
    (tmp_path / "half.part").write_bytes(b"12")
    assert Cache(tmp_path, max_bytes=100).names() == ["whole"]
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_who_reads_a_file_that_is_deleted_reads_it_to_its_end(tmp_path: Path) -> None:
    cache = Cache(tmp_path, max_bytes=100)
    fill(cache, "a", 10)
    file = cache.open("a")
    assert file is not None
    with file:
        cache.delete(lambda name: name == "a")
        assert file.read() == bytes(10)
    assert cache.open("a") is None
