"""A Secret or ConfigMap in a pod: files that change all at once, as a kubelet changes them."""

from collections.abc import Mapping
from pathlib import Path


class Mount:
    """Files in `folder`, behind a link to the folder of the newest version."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions: list[dict[str, str]] = []
        """All contents so far, the newest last."""
        folder.mkdir(parents=True)

    def sync(self, entries: Mapping[str, str]) -> None:
        if self.versions and self.versions[-1] == entries:
            return
        self.versions.append(dict(entries))
        version = self.folder / f"..{len(self.versions)}"
        version.mkdir()
        for entry, value in entries.items():
            (version / entry).write_text(value)
        (self.folder / "..new").symlink_to(version.name)
        (self.folder / "..new").replace(self.folder / "..data")
        for entry in entries:
            if not (self.folder / entry).is_symlink():
                (self.folder / entry).symlink_to(f"..data/{entry}")
