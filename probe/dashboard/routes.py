"""What the player fetches: payloads by name, from this machine alone.

GET /probe/run?run=ID                            pictures, maps and curves
GET /probe/heads?run=ID&channel=1                one word in every layer and head
GET /probe/maps?run=ID&of=contribution           maps read in another way
GET /probe/maps?run=ID&per=tokens&branch=uncond  a map for each token, of another branch
GET /probe/latents?run=ID&channel=2              one channel of the latents
GET /probe/places?run=ID&row=3&row_to=5&column=8 where some places look
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from probe.dashboard.library import library
from probe.errors import ExperimentError, ProbeError
from probe.figures.bundle import latent_channel, payload
from probe.figures.channels import channels, layers_and_heads, places

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
HEADERS = {
    "Cache-Control": "private, no-cache",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
}
UNFRAMED = (b"content-security-policy", b"frame-ancestors 'self'")


def _whole(request: Request, name: str, default: int = 0) -> int:
    """Return a whole number of the query. Raise ValueError."""
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise ValueError(f"{name} is no whole number")
    return int(text)


def _span(request: Request, name: str) -> tuple[int, int]:
    """Return the first and the last of the rows or columns in the query. Raise ValueError."""
    first = _whole(request, name)
    return first, _whole(request, f"{name}_to", first)


def _nothing(request: Request) -> tuple[Any, ...]:
    del request
    return ()


def _heads(request: Request) -> tuple[Any, ...]:
    query = request.query_params
    return _whole(request, "channel"), query.get("branch", "cond"), query.get("per", "words")


def _maps(request: Request) -> tuple[Any, ...]:
    query = request.query_params
    return query.get("of", "attention"), query.get("branch", "cond"), query.get("per", "words")


def _latents(request: Request) -> tuple[Any, ...]:
    return (_whole(request, "channel"),)


def _places(request: Request) -> tuple[Any, ...]:
    branch = request.query_params.get("branch", "cond")
    return _span(request, "row"), _span(request, "column"), branch


# What is made of a run, and what of it the query asks for; the image comes last.
MADE: dict[str, tuple[Callable[..., bytes], Callable[[Request], tuple[Any, ...]]]] = {
    "run": (payload, _nothing),
    "heads": (layers_and_heads, _heads),
    "maps": (channels, _maps),
    "latents": (latent_channel, _latents),
    "places": (places, _places),
}


def _answer(request: Request) -> Response:  # a plain function: starlette runs it in a thread
    what = request.url.path.rpartition("/")[2]
    make, asked = MADE[what]
    try:
        given = (*asked(request), _whole(request, "image"))
        content, tag = library().payload(
            request.query_params.get("run", ""), (what, *given), lambda run: make(run, *given)
        )
    except ProbeError as error:
        status = 400 if isinstance(error, ExperimentError) else 404
        return PlainTextResponse(str(error), status, HEADERS)
    except ValueError as error:
        return PlainTextResponse(str(error), 400, HEADERS)
    headers = {**HEADERS, "ETag": f'"{tag}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="application/octet-stream", headers=headers)


ROUTES = [Route(f"/probe/{what}", _answer) for what in MADE]


class Local:
    """Refuse whoever is not of this machine or was sent by another page.

    A name elsewhere may resolve to this machine, and a page elsewhere may open a websocket to it.
    Nor may such a page hold ours in a frame, where a reader would press its buttons unseen.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def unframed(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), UNFRAMED]
            await send(message)

        if scope["type"] not in ("http", "websocket") or _is_own(scope):
            await self.app(scope, receive, unframed)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            answer = PlainTextResponse("Only this machine and its own pages are served.", 403)
            await answer(scope, receive, send)


def _is_own(scope: Scope) -> bool:
    """Return whether a request comes from this machine, and from no page but our own."""
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    host, origin = headers.get(b"host", ""), headers.get(b"origin")
    ours = re.fullmatch(r"(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{1,5})?", host)
    client = (scope.get("client") or ("127.0.0.1",))[0]
    return (
        ours is not None
        and client in ("127.0.0.1", "::1", "testclient")
        and origin in (None, f"http://{host}")
    )


MIDDLEWARE = [Middleware(Local)]
