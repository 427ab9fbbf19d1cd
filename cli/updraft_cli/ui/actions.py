"""Decisions by form: a confirmation that says what will happen, then a POST that carries it out as the commands do."""

from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response

from updraft_chassis.errors import Forbidden, InvalidInput, UpdraftError
from updraft_cli.backends.protocol import Verb
from updraft_cli.ui.pages import number_of
from updraft_cli.ui.site import Site
from updraft_cli.ui.views.decisions import confirmation

_MAX_BYTES = 10_000
_ABOUT_ONE = frozenset({Verb.PIN, Verb.PROMOTE})


async def confirm(request: Request) -> Response:
    """Show what a decision will do."""
    site: Site = request.app.state.site
    name, verb = request.path_params["name"], _verb(request)
    await site.observer.refresh()
    text = request.query_params.get("version")
    version = None if text is None or verb not in _ABOUT_ONE else number_of(text)
    shown = confirmation(site.one(name), verb, version, await site.refusal(name))
    return site.answer("confirm.html", {"view": shown}, page="history", name=name)


async def decide(request: Request) -> Response:
    """Carry a decision out, then show the history."""
    site: Site = request.app.state.site
    name, verb = request.path_params["name"], _verb(request)
    fields = await _form(request)
    if not site.access.is_form_secret(fields.get("csrf", "")):
        return PlainTextResponse("Refused: this form is not one of the console's.\n", status_code=403)
    site.one(name)
    if refusal := await site.refusal(name):
        raise Forbidden(refusal)
    version = number_of(fields.get("version", "")) if verb in _ABOUT_ONE else None
    backend = site.observer.backend.about(name, fields.get("reason", "").strip())
    try:
        decision = await site.observer.call(backend.decide, verb, version)
    except UpdraftError as error:
        return site.answer("failed.html", {"error": str(error)}, page="history", name=name, status=409)
    await site.observer.renew()
    site.keep_result(name, " ".join(filter(None, (decision.message, decision.warning))))
    return RedirectResponse(f"/s/{name}/history", status_code=303)


def _verb(request: Request) -> Verb:
    try:
        return Verb(request.path_params["verb"])
    except ValueError:
        raise InvalidInput(f"there is no decision {request.path_params['verb']!r}") from None


async def _form(request: Request) -> dict[str, str]:
    """Return the fields of a form, the first of each name."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BYTES:
            raise InvalidInput(f"a form of more than {_MAX_BYTES} bytes")
    try:
        fields = parse_qs(body.decode(), keep_blank_values=True, max_num_fields=10)
    except ValueError as error:
        raise InvalidInput(f"this is not a form: {error}") from error
    return {name: values[0] for name, values in fields.items()}
