"""What the player fetches: payloads by name, from this machine alone.

GET /probe/run?run=ID                            pictures, maps and curves
GET /probe/heads?run=ID&channel=1                one word in every layer and head
GET /probe/maps?run=ID&of=contribution           maps read in another way
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from probe.dashboard.library import library
from probe.errors import ExperimentError, ProbeError
from probe.figures.bundle import channels, layers_and_heads, payload
from probe.reading.recording import Run

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
HEADERS = {"Cache-Control": "private, no-cache", "X-Content-Type-Options": "nosniff"}


def _whole(request: Request, name: str, default: int = 0) -> int:
    """Return a whole number of the query. Raise ValueError."""
    text = request.query_params.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise ValueError(f"{name} is no whole number")
    return int(text)


def _answer(request: Request) -> Response:  # a plain function: starlette runs it in a thread
    asked = request.query_params
    what = request.url.path.rpartition("/")[2]
    try:
        image = _whole(request, "image")
        make: Callable[[Run], bytes]
        if what == "run":
            given: tuple[Any, ...] = (what, image)
            make = lambda run: payload(run, image)  # noqa: E731
        elif what == "heads":
            channel, branch = _whole(request, "channel"), asked.get("branch", "cond")
            given = (what, image, channel, branch)
            make = lambda run: layers_and_heads(run, channel, branch, image)  # noqa: E731
        else:
            of, branch = asked.get("of", "attention"), asked.get("branch", "cond")
            given = (what, image, of, branch)
            make = lambda run: channels(run, of, branch, image)  # type: ignore[arg-type]  # noqa: E731
        content, tag = library().payload(asked.get("run", ""), given, make)
    except ProbeError as error:
        status = 400 if isinstance(error, ExperimentError) else 404
        return PlainTextResponse(str(error), status, HEADERS)
    except ValueError as error:
        return PlainTextResponse(str(error), 400, HEADERS)
    headers = {**HEADERS, "ETag": f'"{tag}"'}
    if request.headers.get("if-none-match") == headers["ETag"]:
        return Response(status_code=304, headers=headers)
    return Response(content, media_type="application/octet-stream", headers=headers)


ROUTES = [Route(f"/probe/{what}", _answer) for what in ("run", "heads", "maps")]


class Local:
    """Refuse whoever reached this machine under another name, as a page elsewhere that resolves to
    it.
    """

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            host = dict(scope["headers"]).get(b"host", b"").decode("latin-1")
            name = host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host
            client = (scope.get("client") or ("127.0.0.1",))[0]
            if name not in ("127.0.0.1", "localhost", "[::1]") or client not in (
                "127.0.0.1",
                "::1",
                "testclient",
            ):
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008})
                else:
                    await PlainTextResponse("Only this machine is served.", 403)(
                        scope, receive, send
                    )
                return
        await self.app(scope, receive, send)


MIDDLEWARE = [Middleware(Local)]
