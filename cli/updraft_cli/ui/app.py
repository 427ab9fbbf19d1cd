"""The console's routes."""

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import urlencode

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from updraft_chassis.errors import Forbidden, InvalidInput, NotFound, UpdraftError
from updraft_cli.ui import actions, events
from updraft_cli.ui.observer import Observer
from updraft_cli.ui.pages import PAGES, Place, charts, number_of
from updraft_cli.ui.security import Access, Guard
from updraft_cli.ui.site import FOLDER, Site
from updraft_cli.ui.views.charts import CHARTS, content

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

_STATUS: dict[type[UpdraftError], int] = {NotFound: 404, InvalidInput: 400, Forbidden: 403}


def application(observer: Observer, access: Access) -> Starlette:
    """Return the console of an observer that has read its first state."""
    one = "/s/{name}"
    app = Starlette(
        routes=[
            Route("/", _page("overview")),
            *(
                Route(f"{one}/{page}", _page(page))
                for page in ("rollout", "versions", "learning", "fleet", "traffic", "history")
            ),
            Route(f"{one}/versions/{{argument}}", _page("version")),
            Route(f"{one}/versions/{{old}}/diff/{{new}}", _diff),
            Route(f"{one}/diff", _choose_diff),
            Route(f"{one}/fleet/{{argument:path}}", _page("pod")),
            Route(f"{one}/charts/{{chart}}.json", _chart),
            Route(f"{one}/confirm/{{verb}}", actions.confirm),
            Route(f"{one}/decide/{{verb}}", actions.decide, methods=["POST"]),
            Route("/events", _events),
            Mount("/static", StaticFiles(directory=FOLDER / "static")),
        ],
        middleware=[Middleware(Guard, access=access)],
        exception_handlers={UpdraftError: _failed, HTTPException: _missing},
        lifespan=_observing,
    )
    app.state.site = Site(observer, access)
    return app


@asynccontextmanager
async def _observing(app: Starlette) -> AsyncIterator[None]:
    observer: Observer = app.state.site.observer
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(observer.run())
        try:
            yield
        finally:
            observer.close()
            reading.cancel()  # it may wait for a backend that does not answer


def _page(page: str) -> Handler:
    async def answer(request: Request) -> Response:
        argument = request.path_params.get("argument", request.query_params.get("by", ""))
        return await _shown(request, page, Place(name=request.path_params.get("name", ""), argument=argument))

    return answer


async def _diff(request: Request) -> Response:
    name, old, new = (request.path_params[key] for key in ("name", "old", "new"))
    return await _shown(request, "diff", Place(name=name, argument=f"{old}/{new}"))


async def _shown(request: Request, page: str, place: Place) -> Response:
    site: Site = request.app.state.site
    await site.observer.refresh()
    view = await PAGES[page].view(site, place)
    query = {"page": page, "speculator": place.name, "argument": place.argument}
    result = site.take_result(place.name) if page == "history" else ""
    values = {**view, "charts": charts(site, page, place), "events": f"/events?{urlencode(query)}", "result": result}
    return site.answer(PAGES[page].template, values, page=page, name=place.name)


async def _choose_diff(request: Request) -> Response:
    """Lead a form that names two versions to the page about them."""
    old, new = (number_of(request.query_params.get(key, "")) for key in ("old", "new"))
    name = request.path_params["name"]
    request.app.state.site.one(name)
    return RedirectResponse(f"/s/{name}/versions/{old}/diff/{new}", status_code=303)


async def _events(request: Request) -> Response:
    return events.stream(request)


async def _chart(request: Request) -> Response:
    site: Site = request.app.state.site
    chart, one = CHARTS.get(request.path_params["chart"]), site.one(request.path_params["name"])
    if chart is None:
        raise NotFound(f"there is no chart {request.path_params['chart']}")
    try:
        since_s = float(request.query_params.get("since", "-inf"))
    except ValueError:
        since_s = math.nan
    if math.isnan(since_s):
        raise InvalidInput("since is a time in Unix seconds")
    return JSONResponse(content(chart, site.observer.samples(one.name), one, since_s=since_s))


async def _failed(request: Request, error: Exception) -> Response:
    site: Site = request.app.state.site
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), 502)
    return site.answer("failed.html", {"error": str(error)}, page="", status=status)


async def _missing(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    site: Site = request.app.state.site
    why = "there is no such page" if error.status_code == HTTPStatus.NOT_FOUND else error.detail
    return site.answer("failed.html", {"error": why}, page="", status=error.status_code)
