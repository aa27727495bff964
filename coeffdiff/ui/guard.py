"""Who may talk to the page: the host that a request names, where it comes from, and a token.

An ASGI application around another one, so that pages, event streams, uploads and files all pass here. Without a token
only this machine's names are answered: a foreign name that leads to 127.0.0.1 (DNS rebinding) is refused.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import SplitResult, parse_qs, urlsplit

Scope = dict[str, Any]
Application = Callable[[Scope, Any, Any], Awaitable[None]]

LOCAL_HOSTS = frozenset({"127.0.0.1", "localhost", "::1"})
_QUERY = "token"
# The page loads nothing from elsewhere: what a browser would fetch, it does not
_HEADERS = (
    (
        b"content-security-policy",
        b"default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; base-uri 'self'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
)


class Guard:
    """token: what a request must bring, in its address once and as a cookie from then on; None: this machine alone."""

    def __init__(self, app: Application, token: str | None, port: int) -> None:
        self._app, self._token = app, token
        self._cookie = f"coeffdiff-{port}"  # cookies are shared by all ports of a host

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal:
            await _answer(scope, send, 403, refusal)
        elif self._token and self._brings_token(scope):
            await self._welcome(send)
        elif self._token and not self._has_cookie(headers):
            await _answer(
                scope, send, 401, "Open the whole address that coeffdiff ui has printed, with ?token=."
            )
        else:
            await self._app(scope, receive, _with_headers(send))

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> str | None:
        host = headers.get("host", "")
        if not self._token and _split(f"//{host}").hostname not in LOCAL_HOSTS:
            return "This page answers to 127.0.0.1 and localhost alone."
        origin = headers.get("origin")
        if origin and _split(origin).netloc != host:
            return "This page takes no requests from other pages."
        foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
        if foreign and not (headers.get("sec-fetch-mode") == "navigate" and scope.get("method") == "GET"):
            return "This page takes no requests from other pages."
        return None

    def _brings_token(self, scope: Scope) -> bool:
        given = parse_qs(scope.get("query_string", b"").decode("latin-1")).get(_QUERY, [])
        return scope["type"] == "http" and any(self._is_token(text) for text in given)

    def _has_cookie(self, headers: dict[str, str]) -> bool:
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(self._cookie)
        except CookieError:
            return False
        return cookie is not None and self._is_token(cookie.value)

    def _is_token(self, text: str) -> bool:
        return secrets.compare_digest(text.encode(), (self._token or "").encode())

    async def _welcome(self, send: Any) -> None:
        """Keep the token as a cookie, and take it out of the address bar."""
        cookie = f"{self._cookie}={self._token}; Path=/; HttpOnly; SameSite=Lax"
        headers = [(b"location", b"/"), (b"set-cookie", cookie.encode())]
        await send({"type": "http.response.start", "status": 303, "headers": headers})
        await send({"type": "http.response.body", "body": b""})


def _split(address: str) -> SplitResult:
    """Its parts; none of what is no address, which is then nobody's."""
    try:
        return urlsplit(address)
    except ValueError:
        return SplitResult("", "", "", "", "")


def new_token() -> str:
    return secrets.token_urlsafe(24)


async def _answer(scope: Scope, send: Any, status: int, sentence: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": sentence})
        return
    headers = [(b"content-type", b"text/plain; charset=utf-8"), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{sentence}\n".encode()})


def _with_headers(send: Any) -> Any:
    async def send_more(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *_HEADERS]}
        await send(message)

    return send_more
