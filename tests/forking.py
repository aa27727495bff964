"""Command lines in forks of the tests' process: processes of their own, which need not load torch once more.

A fork that starts this Python in its turn, as launchers and benchmarks do, forks as well.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import inspect
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

_LIBRARIES_HIDE = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


class Fork:
    """`python *arguments`: a script, -m and a module or -c and code, with what they are given; used as a Popen is.

    What the tests have patched is patched in it, too. Its standard output and error are kept in files.
    """

    def __init__(self, *arguments: str, cwd: Path | None = None, env: Mapping[str, str] | None = None):
        """env: variables beside those of this process."""
        self.arguments = arguments
        self.returncode: int | None = None
        # Closed with this object, or never by a child that is killed
        self._files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            _become(arguments, cwd, os.environ | dict(env or {}), [file.fileno() for file in self._files])

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """Raises: TimeoutExpired, after the process is killed."""
        deadline = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                self.send_signal(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise subprocess.TimeoutExpired(list(self.arguments), timeout, *self.printed())
            time.sleep(0.01)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """What it printed on standard output and on standard error, once it has ended."""
        self.wait(timeout)
        out, err = self.printed()
        return out.decode(), err.decode()

    def printed(self) -> list[bytes]:
        """What it has printed so far on either."""
        return [os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0) for file in self._files]


def fork_run(*arguments: str, **place) -> subprocess.CompletedProcess[str]:
    """The end of Fork(...), as subprocess.run gives it."""
    process = Fork(*arguments, **place)
    out, err = process.communicate()
    return subprocess.CompletedProcess(list(arguments), process.returncode or 0, out, err)


def fork_ranks(
    *arguments: str, folders: Sequence[Path | None] = (None, None), env: Mapping[str, str] | None = None
) -> list[subprocess.CompletedProcess[str]]:
    """The same of one process a folder, which find each other on the CPU as a launcher's processes do."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    launch |= {"ACCELERATE_USE_CPU": "true"} | dict(env or {})
    ranks = [
        Fork(*arguments, cwd=folder, env=launch | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank, folder in enumerate(folders)
    ]
    ended = [rank.communicate() for rank in ranks]
    return [
        subprocess.CompletedProcess(list(arguments), rank.returncode or 0, *texts)
        for rank, texts in zip(ranks, ended, strict=True)
    ]


def _become(
    arguments: Sequence[str], cwd: Path | None, env: Mapping[str, str], streams: Sequence[int]
) -> None:
    """env: all of its variables. Does not return."""
    code = 1
    gc.freeze()  # a collection would walk, and so copy, all that was inherited
    try:
        _take_environment(env)
        _forget_the_tests(streams)
        subprocess.Popen._execute_child = _fork_python
        if cwd is not None:
            os.chdir(cwd)
        _run(arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:  # whoever was to read may be gone
            os._exit(code)


def _forget_the_tests(streams: Sequence[int]) -> None:
    """What a process has as it starts: streams, signals, filters of warnings, no group of processes."""
    import torch
    from accelerate.state import AcceleratorState

    # torch makes its pool of threads anew in a fork, at the first use; two threads at once would find none
    torch.set_num_threads(torch.get_num_threads())
    atexit._clear()
    faulthandler.disable()
    for number, stream in enumerate(streams, start=1):
        os.dup2(stream, number)
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    warnings.resetwarnings()
    for category in _LIBRARIES_HIDE:
        warnings.simplefilter("ignore", category)
    AcceleratorState._reset_state(reset_partial_state=True)


def _take_environment(env: Mapping[str, str]) -> None:
    for name in os.environ.keys() - env.keys():
        del os.environ[name]
    os.environ.update(env)


_execute_child = subprocess.Popen._execute_child
_ITS_ARGUMENTS = inspect.signature(_execute_child)


def _fork_python(popen: subprocess.Popen, *arguments) -> None:
    """Popen's way to start a process; a fork where that would be this Python."""
    asked = _ITS_ARGUMENTS.bind(popen, *arguments).arguments
    command = asked["args"]
    if asked["shell"] or isinstance(command, str | bytes | os.PathLike) or command[0] != sys.executable:
        return _execute_child(popen, *arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    popen.pid = os.fork()
    if not popen.pid:
        if asked["start_new_session"]:
            os.setsid()
        _take_ends(asked)
        env = os.environ if asked["env"] is None else asked["env"]
        _become([str(part) for part in command[1:] if part != "-u"], asked["cwd"], dict(env), ())
    popen._child_created = True
    popen._close_pipe_fds(*(asked[end] for ends in _PIPES for end in ends))
    return None


_PIPES = (("p2cread", "p2cwrite"), ("c2pread", "c2pwrite"), ("errread", "errwrite"))


def _take_ends(asked: Mapping[str, int]) -> None:
    """The child's ends of the pipes become its streams, and its parent's are closed (-1: there is no pipe)."""
    for number, own in enumerate(("p2cread", "c2pwrite", "errwrite")):
        if asked[own] != -1:
            os.dup2(asked[own], number)
    for its_parents in ("p2cwrite", "c2pread", "errread"):
        if asked[its_parents] != -1:
            os.close(asked[its_parents])


def _run(arguments: Sequence[str]) -> None:
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        exec(arguments[1], {"__name__": "__main__"})
    elif arguments[0] == "-m":
        module, sys.argv = arguments[1], list(arguments[1:])
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(arguments)
        runpy.run_path(arguments[0], run_name="__main__")
