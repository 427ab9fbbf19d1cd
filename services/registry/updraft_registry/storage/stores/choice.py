"""The store that the settings select."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from updraft_registry.settings import RegistrySettings
from updraft_registry.storage.stores.bucket import BucketStore, open_bucket
from updraft_registry.storage.stores.folder import FolderStore
from updraft_registry.storage.stores.port import Store


def store_of(config: RegistrySettings) -> Callable[[Path], Store]:
    """A function that opens the store, given the data folder. It may raise InvalidInput or Unavailable."""
    if not config.store_url:
        return FolderStore

    def open_store(folder: Path) -> Store:
        link_for = timedelta(seconds=config.store_redirect_seconds) if config.store_redirect else None
        scratch = folder / "bucket"  # apart from blobs of an earlier folder store, which are not copies
        return BucketStore(
            open_bucket(config.store_url), scratch, cache_bytes=config.store_cache_bytes, link_for=link_for
        )

    return open_store
