"""Fixtures of the browser test: headless Chromium, which notes every address that it asks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

_PATIENCE = 240_000  # ms, on a busy machine
_CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")

_OPTIONS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"),
    *("--disable-sync", "--disable-component-update"),
)


expect.set_options(timeout=_PATIENCE)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--screenshots", type=Path, help="folder for screenshots; trains longer, so that they show something"
    )


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=_CHROMIUM, args=list(_OPTIONS))
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page of a new, empty profile. Afterwards: nothing was asked of another machine, no script has failed."""
    context = browser.new_context(viewport={"width": 1280, "height": 960}, accept_downloads=True)
    opened, asked, failed = context.new_page(), [], []
    opened.set_default_timeout(_PATIENCE)
    context.on("request", lambda request: asked.append(request.url))
    opened.on("websocket", lambda socket: asked.append(socket.url))
    opened.on("pageerror", lambda error: failed.append(str(error)))
    yield opened
    context.close()
    foreign = [url for url in asked if urlsplit(url).hostname not in ("127.0.0.1", None)]
    assert asked and not foreign, foreign
    assert not failed, failed
