"""ComfyUI's own HTTP server on a CPU, in a base folder of its own, with an API workflow sent to it.

It runs without the libraries that ComfyUI does not bring: importing diffusers, peft, accelerate or typer fails there.
"""

from __future__ import annotations

import json
import runpy
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FOLDERS = ("custom_nodes", "input", "output", "temp", "user", "frontend")
MODELS = ("diffusion_models", "text_encoders", "vae", "coeffdiff")
_BLOCKED = ("diffusers", "peft", "accelerate", "typer")
_SECONDS = 180  # for starting, and for a workflow


def make_base(base: Path) -> None:
    """The folders that a server works in."""
    for name in (*FOLDERS, *(f"models/{kind}" for kind in MODELS)):
        (base / name).mkdir(parents=True, exist_ok=True)
    (base / "frontend" / "index.html").write_text("<!doctype html>")


class Server:
    """A running server: what it says of its nodes, and what comes of a workflow."""

    def __init__(self, base: Path, address: str, log: Path) -> None:
        self.base, self.address, self.log = base, address, log

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.address + path, timeout=10) as answer:
            return json.load(answer)

    def run(self, workflow: dict[str, Any]) -> dict[str, Any]:
        """What the history says of a workflow that has run: outputs and status.

        Raises: RuntimeError with the server's own words if it refuses the workflow or does not come to an end.
        """
        request = urllib.request.Request(
            f"{self.address}/prompt",
            json.dumps({"prompt": workflow}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                number = json.load(answer)["prompt_id"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()) from None
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end:
            if found := self.get(f"/history/{number}"):
                history: dict[str, Any] = found[number]
                return history
            time.sleep(0.2)
        raise RuntimeError(f"The workflow has not ended after {_SECONDS} s:\n{self.said()}")

    def said(self) -> str:
        """The end of the server's log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-6000:]


@contextmanager
def serving(comfyui: Path, base: Path, site: Path | None = None) -> Iterator[Server]:
    """Inside, a server runs in the folders that make_base made; `site` is the one place where it may find coeffdiff
    beside custom_nodes. Raises: RuntimeError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [
        *(
            "--cpu",
            "--force-fp32",
            "--listen",
            "127.0.0.1",
            "--port",
            str(port),
            "--base-directory",
            str(base),
        ),
        *(
            "--front-end-root",
            str(base / "frontend"),
            "--disable-api-nodes",
            "--database-url",
            "sqlite:///:memory:",
        ),
    ]
    log = base / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, __file__, str(comfyui), str(site or ""), *arguments],
            cwd=base, stdout=out, stderr=subprocess.STDOUT,
        )  # fmt: skip
    server = Server(base, f"http://127.0.0.1:{port}", log)
    try:
        _wait(server, process)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(server: Server, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"ComfyUI has ended with {process.returncode}:\n{server.said()}")
        try:
            server.get("/system_stats")
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise RuntimeError(f"ComfyUI does not answer after {_SECONDS} s:\n{server.said()}")


def main() -> None:
    """The server's process: ComfyUI's folder, the place of an installed coeffdiff or nothing, main.py's arguments."""
    comfyui, site, *arguments = sys.argv[1:]
    sys.path[:] = [place for place in sys.path if not Path(place, "coeffdiff").is_dir()] + [site] * bool(site)
    sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in str(getattr(f, "__module__", f))]
    for name in _BLOCKED:
        sys.modules[name] = None  # type: ignore[assignment]
    from comfyui_host import add_standins

    add_standins()
    sys.path.insert(0, comfyui)
    sys.argv[:] = [str(Path(comfyui, "main.py")), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
