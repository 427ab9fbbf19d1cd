"""The common parts of all routes: the observer, the access, the templates, and whether this person may decide."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

from updraft_chassis.errors import NotFound, UpdraftError
from updraft_cli import output
from updraft_cli.backends.snapshot import SpeculatorSnapshot
from updraft_cli.ui.observer import Observer
from updraft_cli.ui.security import Access

FOLDER = Path(__file__).parent

OLD_S = 5.0
"""A page whose state is older says so."""

REFUSAL_S = 30.0
"""How long an answer about a person's rights is remembered."""


def environment() -> Environment:
    """Templates escape everything: names of pods, domains and reasons come from others."""
    made = Environment(
        loader=FileSystemLoader(FOLDER / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["clock"] = lambda at_s: f"{datetime.fromtimestamp(at_s, UTC):%H:%M:%S}"
    made.filters["elapsed"] = lambda seconds: f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
    made.filters["sentence"] = output.sentence
    return made


@dataclass(slots=True)
class Site:
    observer: Observer
    access: Access
    templates: Environment = field(default_factory=environment)
    _refusals: dict[str, tuple[float, str]] = field(default_factory=dict)
    _results: dict[str, str] = field(default_factory=dict)

    def one(self, name: str) -> SpeculatorSnapshot:
        """Return a speculator as it was read last; NotFound if there is none of this name."""
        if (one := self.observer.snapshot.speculator(name)) is None:
            raise NotFound(f"there is no speculator {name}")
        return one

    async def refusal(self, name: str) -> str:
        """Return why this person may not decide on a speculator; empty if they may."""
        now_s = time.monotonic()
        known_s, refusal = self._refusals.get(name, (0.0, ""))
        if not known_s or now_s - known_s > REFUSAL_S:
            backend = self.observer.backend.about(name)
            try:
                refusal = await self.observer.call(backend.refusal)
            except UpdraftError as error:
                refusal = f"it is not known whether you may: {error}"
            self._refusals = {**self._refusals, name: (now_s, refusal)}
        return refusal

    def keep_result(self, name: str, sentence: str) -> None:
        """Keep the result of a decision for the next page of the history."""
        self._results[name] = sentence

    def take_result(self, name: str) -> str:
        """Return the result of the last decision, once; empty afterwards."""
        return self._results.pop(name, "")

    def render(self, template: str, values: Mapping[str, Any]) -> str:
        return self.templates.get_template(template).render(values)

    def answer(
        self, template: str, values: Mapping[str, Any], *, page: str, name: str = "", status: int = 200
    ) -> HTMLResponse:
        """Return a whole page with its frame."""
        return HTMLResponse(self.render(template, {**self.frame(page, name), **values}), status)

    def frame(self, page: str, name: str) -> dict[str, Any]:
        """Return what the frame of every page shows: the place, the speculators, whether the backend answers, and the age."""
        snapshot = self.observer.snapshot
        names = [one.name for one in snapshot.speculators]
        namespace, place = snapshot.installation.namespace, self.observer.backend.place
        return {
            "page": page,
            "name": name,
            "names": names,
            "menu_name": name or (names[0] if names else ""),
            "place": f"namespace {namespace} of {place}" if namespace else place,
            "has_reasons": self.observer.backend.has_reasons,
            "form_secret": self.access.form_secret,
            "problem": self.observer.problem,
            "now": snapshot.time,
            "is_old": self.observer.age_s > OLD_S,
        }
