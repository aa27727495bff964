"""Who is answered: by the host that a request names, where it comes from, and a token. No gradio is needed."""

from __future__ import annotations

import asyncio

import pytest

from coeffdiff.ui.guard import Guard

TOKEN = "a-token-of-some-length"


def answer_of(token=None, kind="http", path="/", query="", method="GET", **headers):
    """(status, headers) of a request; 200 where it passes to the page."""
    sent = []

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    given = {"host": "127.0.0.1:7860"} | {name.replace("_", "-"): value for name, value in headers.items()}
    scope = {
        "type": kind, "method": method, "path": path, "query_string": query.encode(),
        "headers": [(name.encode(), value.encode()) for name, value in given.items()],
    }  # fmt: skip
    asyncio.run(Guard(page, token, 7860)(scope, None, send))
    return sent[0].get("status", sent[0]["type"]), dict(sent[0].get("headers", []))


@pytest.mark.parametrize("host", ["127.0.0.1:7860", "localhost:7860", "localhost", "[::1]:7860"])
def test_this_machine_is_answered_by_its_names(host):
    status, headers = answer_of(host=host)
    assert status == 200
    assert b"default-src 'self'" in headers[b"content-security-policy"]


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "", "10.0.0.1", "[", "[::1", "[x]"],
)
def test_a_foreign_name_that_leads_here_is_refused(host):
    """DNS rebinding: a page of evil.example whose name has become 127.0.0.1."""
    assert answer_of(host=host)[0] == 403
    assert answer_of(host=host, kind="websocket")[0] == "websocket.close"


def test_other_pages_may_link_here_and_do_nothing_else():
    assert answer_of(method="POST", origin="http://evil.example")[0] == 403
    assert answer_of(method="POST", origin="http://127.0.0.1:8000")[0] == 403
    assert answer_of(method="POST", origin="null")[0] == 403
    assert answer_of(method="POST", origin="http://[")[0] == 403
    assert answer_of(sec_fetch_site="cross-site", sec_fetch_mode="no-cors")[0] == 403
    assert answer_of(sec_fetch_site="cross-site", sec_fetch_mode="navigate")[0] == 200
    assert answer_of(method="POST", sec_fetch_site="cross-site", sec_fetch_mode="navigate")[0] == 403
    assert answer_of(method="POST", origin="http://127.0.0.1:7860", sec_fetch_site="same-origin")[0] == 200


def test_with_a_token_nothing_passes_without_it():
    """Files, uploads, event streams and websockets as well; the address brings it once, a cookie from then on."""
    for path in (
        "/",
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/upload",
        "/gradio_api/queue/data",
        "/assets/a.js",
    ):
        assert answer_of(TOKEN, path=path)[0] == 401
        assert answer_of(TOKEN, path=path, query="token=wrong")[0] == 401
        assert answer_of(TOKEN, path=path, cookie=f"coeffdiff-7860={TOKEN}x")[0] == 401
        assert answer_of(TOKEN, path=path, cookie=f"coeffdiff-9999={TOKEN}")[0] == 401
    assert answer_of(TOKEN, kind="websocket")[0] == "websocket.close"
    status, headers = answer_of(TOKEN, path="//evil.example", query=f"token={TOKEN}")
    assert (status, headers[b"location"]) == (303, b"/")
    cookie = headers[b"set-cookie"].decode()
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie
    assert answer_of(TOKEN, cookie=cookie.split(";")[0])[0] == 200


def test_with_a_token_any_name_of_the_machine_is_answered():
    kept = {"host": "workstation.local:7860", "cookie": f"coeffdiff-7860={TOKEN}"}
    assert answer_of(TOKEN, **kept)[0] == 200
    assert answer_of(TOKEN, **kept, origin="http://evil.example")[0] == 403
