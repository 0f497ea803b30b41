"""The explorer's pages over HTTP, for one person on one machine.

    /TOKEN/          GET: the form; POST: the form with an answer
    /TOKEN/export    POST: the answer as a file, without the form

The server listens on the loopback address alone. Whoever does not know the token, which is in the
address that the command prints, is refused; so is a request that names another host, as one does
that another site's page sends through a rebound name. No file is served, and nothing is stored.
"""

from __future__ import annotations

import secrets
import socket
import threading
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qsl

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from ebwm_scale.core.errors import UserError
from ebwm_scale.exploring.page import Explorer, policy

HOST = "127.0.0.1"
MAX_BODY = 2 * 2**20  # bytes: a prompt of the most characters, percent-encoded
FILE_NAME = "explored.html"
HEADERS = {
    "Cache-Control": "no-store",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class RefusedBody(UserError):
    """A body that no form of ours sends."""


def application(explorer: Explorer, token: str) -> Starlette:
    """The pages of an explorer under a secret token."""
    thinking = threading.Lock()  # a model thinks about one thing at a time

    def computed(make: Callable[[], str]) -> str:
        with thinking:
            return make()

    async def start(request: Request) -> Response:
        return HTMLResponse(await run_in_threadpool(computed, explorer.page))

    async def answer(request: Request) -> Response:
        return await _answered(request, served=True)

    async def export(request: Request) -> Response:
        response = await _answered(request, served=False)
        if response.status_code == 200:
            response.headers["Content-Disposition"] = f'attachment; filename="{FILE_NAME}"'
        return response

    async def _answered(request: Request, *, served: bool) -> Response:
        try:
            given = await _fields(request)
        except RefusedBody as error:
            return PlainTextResponse(f"{error}\n", status_code=400)
        try:
            page = await run_in_threadpool(computed, lambda: explorer.page(given, served=served))
        except UserError as error:
            text = str(error)
            page = await run_in_threadpool(computed, lambda: explorer.refusal(given, text))
            return HTMLResponse(page, status_code=400)
        return HTMLResponse(page)

    def guarded(endpoint: Callable[[Request], Awaitable[Response]]):
        async def checked(request: Request) -> Response:
            given = request.path_params["token"]
            if not secrets.compare_digest(given.encode(), token.encode()):
                return PlainTextResponse(
                    "This address is not the one that ebwm explore has printed.\n", status_code=403
                )
            return await endpoint(request)

        return checked

    return Starlette(
        routes=[
            Route("/{token}/", guarded(start), methods=["GET"]),
            Route("/{token}/", guarded(answer), methods=["POST"]),
            Route("/{token}/export", guarded(export), methods=["POST"]),
        ],
        middleware=[
            Middleware(BaseHTTPMiddleware, dispatch=_with_headers),
            Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
        ],
    )


async def _with_headers(
    request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
    response = await call_next(request)
    response.headers.update(HEADERS)
    response.headers["Content-Security-Policy"] = f"{policy()}; frame-ancestors 'none'"
    return response


async def _fields(request: Request) -> dict[str, str]:
    """The fields of a form as browsers send them; RefusedBody for any other body."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise RefusedBody(f"the form has more than {MAX_BODY:,} bytes: give a shorter prompt")
    try:
        pairs = parse_qsl(
            body.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=40
        )
    except (UnicodeDecodeError, ValueError):
        raise RefusedBody("this is no form of UTF-8 text: use the page's own") from None
    return dict(pairs)


def new_token() -> str:
    """128 random bits, for an address."""
    return secrets.token_urlsafe(16)


def listen(port: int) -> socket.socket:
    """A socket on the loopback address; port 0: a free one. UserError where it cannot be had."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen()  # who opens the address before the server runs waits for it
    except (OSError, OverflowError) as error:
        listening.close()
        raise UserError(
            f"--port {port}: {getattr(error, 'strerror', None) or error}; "
            "give another, or 0 for a free one"
        ) from None
    return listening


def serve(app: Starlette, listening: socket.socket) -> None:
    """Until an interrupt."""
    config = uvicorn.Config(app, log_level="warning", access_log=False)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        pass  # uvicorn has ended what was open
    finally:
        listening.close()
