"""Blobs in a folder keep the contract of a store; readers are sent nowhere else."""

from pathlib import Path

import pytest
from tests.contract.store_contract import StoreContract, put

from updraft_registry.storage.stores.folder import FolderStore


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path)


class TestFolderStore(StoreContract):
    pass


def test_a_folder_has_no_address(store: FolderStore) -> None:
    assert store.link(put(store)) is None
