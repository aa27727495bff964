"""What is refused before a page is served."""

from __future__ import annotations

import importlib.util
import logging
import signal
import socket

import pytest
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import ConfigError
from coeffdiff.ui import server
from coeffdiff.ui.server import serve


@pytest.fixture
def served(monkeypatch):
    """serve() up to the point where gradio would begin; what the guard would get."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    begun = {}

    def run(opened, folder, token, port, on_ready):
        begun.update(token=token, address=opened.getsockname()[0], mode=folder.stat().st_mode & 0o777)
        on_ready()

    monkeypatch.setattr(server, "_run", run)
    return begun


def ui(*options):
    result = CliRunner().invoke(app, ["ui", *options])
    return result.exit_code, result.output


def test_without_gradio_there_is_one_sentence(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, said = ui()
    assert code == 2
    assert said == (
        "ConfigError: The page needs gradio, which is not installed: pip install 'coeffdiff[ui]'.\n"
    )


def test_this_machine_needs_no_token(served):
    code, said = ui("--port", "0")
    assert code == 0 and served["token"] is None and served["address"] == "127.0.0.1"
    assert served["mode"] == 0o700  # uploads are nobody else's to read
    assert "http://127.0.0.1:" in said and "token" not in said.splitlines()[-1]


def test_any_other_address_gets_one(served):
    _, said = ui("--port", "0", "--host", "0.0.0.0")
    assert len(served["token"]) >= 24
    assert said.splitlines()[-1].endswith(f"/?token={served['token']}")
    tokens = set()
    for _ in range(2):
        serve("0.0.0.0", 0, None, lambda address: tokens.add(address.partition("=")[2]))
    assert len(tokens) == 2


@pytest.mark.parametrize("token", ["short", "with a blank in it", "semi;colon-and-more", ""])
def test_a_token_that_is_none_is_refused(served, token):
    code, said = ui("--port", "0", f"--token={token}")
    assert code == 2 and "--token must be 8 to 200" in said


def test_a_port_in_use_is_one_sentence(served):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, said = ui("--port", str(port))
    assert code == 2 and f"port {port}" in said and "Name another --port" in said


def test_of_two_pages_on_a_port_one_is_served(served):
    """The first may not have begun to answer yet."""
    with server._listening("127.0.0.1", 0) as first:
        code, said = ui("--port", str(first.getsockname()[1]))
    assert code == 2 and "Name another --port" in said


@pytest.mark.parametrize("host", ["192.168..1", "a" * 70 + ".example"])
def test_a_host_that_is_none_is_one_sentence(served, host):
    with pytest.raises(ConfigError, match=r"--host .* is no address"):
        serve(host, 0, None, lambda address: None)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_tidies_up_as_ctrl_c_does(served, monkeypatch, name):
    places = []

    def run(opened, folder, *_):
        places.append(folder)
        (folder / "photo.png").write_text("")
        signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(server, "_run", run)
    before = signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt):
            serve("127.0.0.1", 0, None, lambda address: None)
        assert signal.getsignal(getattr(signal, name)) == signal.SIG_DFL
    finally:
        signal.signal(getattr(signal, name), before)
    assert len(places) == 1 and not places[0].exists()


def test_an_address_that_is_not_this_machines_is_one_sentence(served):
    code, said = ui("--host", "203.0.113.7", "--port", "0")
    assert code == 2 and "cannot be served at 203.0.113.7" in said


def test_a_browser_that_leaves_is_no_news():
    class ClientDisconnect(Exception):  # noqa: N818  # starlette's name
        pass

    def record(error):
        return logging.LogRecord("uvicorn.error", 40, "", 0, "", (), (type(error), error, None))

    assert not server._is_news(record(ClientDisconnect()))
    assert server._is_news(record(KeyError()))
