"""Live updates: a stream of events for a page, one for each of its fragments whose HTML has changed."""

import json
import time
from collections.abc import AsyncIterator

from starlette.requests import Request
from starlette.responses import StreamingResponse

from updraft_chassis.errors import InvalidInput, UpdraftError
from updraft_cli.ui.pages import PAGES, Place, fragments, frame_fragments
from updraft_cli.ui.site import OLD_S, Site


def stream(request: Request) -> StreamingResponse:
    """Answer with events until the browser leaves or the console ends."""
    site: Site = request.app.state.site
    query = request.query_params
    page = query.get("page", "")
    if page not in PAGES:
        raise InvalidInput(f"there is no page {page!r}")
    place = Place(name=query.get("speculator", ""), argument=query.get("argument", ""))
    return StreamingResponse(_events(site, page, place), media_type="text/event-stream")


async def _events(site: Site, page: str, place: Place) -> AsyncIterator[str]:
    observer, sent, revision = site.observer, dict[str, str](), -1
    with observer.watched():
        while not observer.is_closed:
            is_new, began_s = await observer.wait(revision, OLD_S), time.monotonic()
            if is_new:
                revision = observer.revision
                current = await _current(site, page, place)
            else:  # the page says that its state is old; and the comment finds out whether the browser is still there
                yield ": still here\n\n"
                current = frame_fragments(site, page, place)
            for name, html in current.items():
                if sent.get(name) != html:
                    sent[name] = html
                    yield event(f"live-{name}", html)
            if is_new:
                names = [one.name for one in observer.snapshot.speculators]
                yield event("series", json.dumps({"revision": revision, "names": names}))
            await observer.rest(
                time.monotonic() - began_s
            )  # a page with calls of its own leaves the backend half of the time


async def _current(site: Site, page: str, place: Place) -> dict[str, str]:
    try:
        return await fragments(site, page, place)
    except UpdraftError as error:  # a pod that has gone, for example; the page keeps its last state
        return frame_fragments(site, page, place, problem=str(error))


def event(name: str, data: str) -> str:
    """Return one event as it is sent; every line of `data` is a field of its own."""
    lines = "".join(f"data: {line}\n" for line in data.splitlines() or [""])
    return f"event: {name}\n{lines}\n"
