"""Serve the page: a port of this machine, a guard before it, a folder of its own for what passes through."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from coeffdiff.errors import ConfigError
from coeffdiff.ui.guard import LOCAL_HOSTS, Guard, new_token

LARGEST_UPLOAD = "200mb"  # of one file
_TOKEN = re.compile(r"[A-Za-z0-9_-]{8,200}")


def serve(host: str, port: int, token: str | None, announce: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM; no file that was dropped on the page stays behind.

    Args:
        host: any but this machine's own names needs a token, which is made where none is given.
        announce: called with the page's address once it can be opened.
    Raises: ConfigError without gradio, for a token that is too short, or a port that cannot be had; KeyboardInterrupt.
    """
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("The page needs gradio, which is not installed: pip install 'coeffdiff[ui]'.")
    if token is not None and not _TOKEN.fullmatch(token):
        raise ConfigError("--token must be 8 to 200 letters, digits, - and _.")
    if host not in LOCAL_HOSTS and token is None:
        token = new_token()
    with (
        _ended_as_by_ctrl_c(),
        _listening(host, port) as opened,
        tempfile.TemporaryDirectory(prefix="coeffdiff-ui-") as folder,
    ):
        port = opened.getsockname()[1]
        name = f"[{host}]" if ":" in host else host
        address = f"http://{name}:{port}/" + (f"?token={token}" if token else "")
        _run(opened, Path(folder), token, port, lambda: announce(address))


@contextmanager
def _ended_as_by_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM and the end of the terminal raise KeyboardInterrupt; a signal that is ignored stays so."""
    names = ("SIGTERM", "SIGHUP") if threading.current_thread() is threading.main_thread() else ()
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    before = {number: handler for number, handler in before.items() if handler == signal.SIG_DFL}
    for number in before:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens already, so that a port in use is said before anything slow."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        opened = socket.socket(family, socket.SOCK_STREAM)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            opened.bind(address)
            opened.listen()  # two may bind to a port, and one may listen
        except OSError:
            opened.close()
            raise
    except ValueError:  # of the codec for names
        raise ConfigError(f"--host {host!r} is no address and no name of a machine.") from None
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"The page cannot be served at {host}, port {port}: {reason}. Name another --port."
        ) from None
    return opened


def _run(
    opened: socket.socket, folder: Path, token: str | None, port: int, on_ready: Callable[[], None]
) -> None:
    # Both are read when gradio is imported
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio as gr
    import uvicorn
    from fastapi import FastAPI

    from coeffdiff.ui.app import build_page, theme
    from coeffdiff.ui.markup import CSS

    app = gr.mount_gradio_app(
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        build_page(folder),
        path="",
        footer_links=[],
        show_error=False,
        max_file_size=LARGEST_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        theme=theme(),
        css=CSS,
    )

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            on_ready()

    config = uvicorn.Config(
        Guard(app, token, port), log_level="warning", server_header=False, timeout_graceful_shutdown=2
    )
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    Server(config).run(sockets=[opened])


def _is_news(record: logging.LogRecord) -> bool:
    """Whether the terminal should hear of it: a browser that closes in the middle of an upload is none."""
    return not (record.exc_info and type(record.exc_info[1]).__name__ == "ClientDisconnect")
