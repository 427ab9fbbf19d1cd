"""Which store the settings ask for."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from updraft_registry.settings import RegistrySettings
from updraft_registry.storage.stores.bucket import BucketStore, open_bucket
from updraft_registry.storage.stores.folder import FolderStore
from updraft_registry.storage.stores.port import Store


def store_of(config: RegistrySettings) -> Callable[[Path], Store]:
    """What opens the store of these settings, given the data folder; that may raise InvalidInput or Unavailable."""
    if not config.store_url:
        return FolderStore

    def open_store(folder: Path) -> Store:
        link_for = timedelta(seconds=config.store_redirect_seconds) if config.store_redirect else None
        scratch = folder / "bucket"  # beside the blobs of a store that was a folder before: those are no copies
        return BucketStore(
            open_bucket(config.store_url), scratch, cache_bytes=config.store_cache_bytes, link_for=link_for
        )

    return open_store
