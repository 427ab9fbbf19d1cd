"""The addresses of the console's pages, and how to see that one is complete."""

from dataclasses import dataclass
from urllib.parse import quote

from updraft_cli.backends.snapshot import Snapshot


@dataclass(frozen=True, slots=True, kw_only=True)
class Pages:
    """Pages about one speculator of a console."""

    address: str
    """With the token, as `updraft ui` prints it."""
    name: str
    version: int
    """One that has a parent."""
    pod: str

    @property
    def origin(self) -> str:
        return self.address.partition("/?")[0]

    @property
    def paths(self) -> dict[str, str]:
        """By the name of the page."""
        mine = f"/s/{quote(self.name)}"
        return {
            "overview": "/",
            "rollout": f"{mine}/rollout",
            "versions": f"{mine}/versions",
            "version": f"{mine}/versions/{self.version}",
            "diff": f"{mine}/versions/{self.version - 1}/diff/{self.version}",
            "learning": f"{mine}/learning",
            "fleet": f"{mine}/fleet",
            "pod": f"{mine}/fleet/{quote(self.pod, safe='')}",
            "traffic": f"{mine}/traffic",
            "history": f"{mine}/history",
            "confirm": f"{mine}/confirm/pin?version={self.version}",
        }

    def __getitem__(self, page: str) -> str:
        return self.origin + self.paths[page]


NAMES = tuple(Pages(address="", name="", version=1, pod="").paths)

DRAWN = "[...document.querySelectorAll('.chart-plot')].every(place => place.hasChildNodes())"
"""JavaScript: whether all charts of the page are there."""


def pages_of(address: str, snapshot: Snapshot) -> Pages:
    """The pages about the first speculator of a snapshot."""
    one = snapshot.speculators[0]
    newest = max(draft.version or 0 for draft in one.drafts)
    return Pages(address=address, name=one.name, version=newest, pod=one.pods[0].name)
