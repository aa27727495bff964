"""All that is printed: messages while something runs on standard error, by one process; results on standard output.

Where a terminal or pipe lacks a letter, it is written out, as \\u732b."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol, TextIO

QUIET_SECONDS = 10.0  # where no bar can be drawn, at most one line in this time
_JOINERS = "\u200c\u200d"  # shape letters and emoji, move nothing
_ACTS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})  # controls, format marks, surrogates, line separators

_muted = False


class Bar(Protocol):
    def __call__(self, done: float, status: str = "") -> None: ...


class Listener(Protocol):
    """Who hears what is said for the user, beside standard error; lines are as print_info got them."""

    def line(self, text: str) -> None: ...

    def progress(self, title: str, done: float, total: float, status: str) -> None: ...


_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


def is_main_process() -> bool:
    """Whether this is the only process or the first of several, by the launcher's variables: torch is not needed.

    A rank without a number of processes is left over from something else: this process is alone.
    """
    alone = os.environ.get("WORLD_SIZE", "").strip() in ("", "1")
    return alone or os.environ.get("RANK", "0").strip() == "0"


def hush_bitsandbytes() -> None:
    """Silence bitsandbytes, which diffusers imports where it is installed: on some CPUs it recommends kernels."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def hush_torchao() -> None:
    """Silence torchao, which diffusers imports where it is installed, on kernels for other GPUs, and torch on it."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def visible(text: str) -> str:
    """The text on one line, with all that a terminal would obey or hide written out: \\x1b, \\n, \\u202e.

    The one place where names of files and text out of files are made harmless; everything that this module prints
    passes it. Markup of any kind is ordinary text here and stays as it is.
    """
    if text.isprintable():
        return text
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in _ACTS and c not in _JOINERS else c
        for c in text
    )


@contextmanager
def muted() -> Iterator[None]:
    """Suppress info messages inside; bars and errors stay."""
    global _muted
    before, _muted = _muted, True
    try:
        yield
    finally:
        _muted = before


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let `listener` hear the info messages and bars of this thread or task inside."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def print_info(*lines: str) -> None:
    """Lines for the user. A line break inside one of them is written out: it may come out of a file's name."""
    if is_main_process() and not _muted:
        print_error(*lines)
        if listener := _listener.get():
            for line in lines:
                listener.line(line)


def print_error(*lines: str, file: TextIO | None = None) -> None:
    """Like print_info, from whichever process it is. file: in place of standard error."""
    for line in lines:
        print(visible(line), file=_lenient(file or sys.stderr), flush=True)


def print_result(text: str) -> None:
    """A result on standard output, such as a path: harmless on a terminal, byte for byte into a pipe or a file."""
    if sys.stdout.isatty():
        text = visible(text)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a name that is no text, or a pipe that is not UTF-8
        sys.stdout.flush()
        sys.stdout.buffer.write(os.fsencode(text) + b"\n")
        sys.stdout.buffer.flush()
    else:
        print(text, flush=True)


def print_text(text: str) -> None:
    """A result for the user on standard output, in as many lines as it has."""
    for line in text.split("\n"):
        print(visible(line), file=_lenient(sys.stdout), flush=True)


def print_json(tree: Any, **options: Any) -> None:
    """A result for a program on standard output: one line of ASCII, whatever names it holds."""
    print(json.dumps(tree, **options), file=_lenient(sys.stdout), flush=True)


def print_table(table: Any) -> None:
    """One of rich's renderables on standard output, 120 wide where there is no terminal."""
    from rich.console import Console

    Console(file=_lenient(sys.stdout), width=None if sys.stdout.isatty() else 120).print(table)


def error_stream() -> TextIO:
    """Standard error as it is now; print_error and a later redirection take it as `file`."""
    return sys.stderr


def error_console() -> Any:
    """A rich Console on standard error, for bars."""
    from rich.console import Console

    return Console(file=_lenient(sys.stderr))


def recording_console(width: int) -> Any:
    """A rich Console that shows nothing and keeps what it is given, to be exported."""
    from rich.console import Console

    return Console(record=True, width=width, file=io.StringIO())


def be_lenient() -> None:
    """Write out letters that an output lacks, also in what other libraries print, such as help and usage errors."""
    for stream in (sys.stdout, sys.stderr):
        _lenient(stream)


def _lenient(stream: Any) -> Any:
    """The stream, which from here on writes letters that its encoding lacks as backslashes and numbers."""
    if isinstance(stream, io.TextIOWrapper) and stream.errors != "backslashreplace":
        stream.reconfigure(errors="backslashreplace")
    return stream


@contextmanager
def progress(title: str, total: float) -> Iterator[Bar]:
    """A bar on a terminal, an occasional line elsewhere; the yielded function takes what is done and a status."""
    if not is_main_process():
        yield lambda done, status="": None
        return
    with _shown_progress(title, total) as bar:
        yield _heard(bar, title, total)


def _heard(bar: Bar, title: str, total: float) -> Bar:
    """The bar, which a listener hears as well."""
    listener = _listener.get()
    if listener is None:
        return bar

    def move(done: float, status: str = "") -> None:
        bar(done, status)
        listener.progress(title, done, total, status)

    return move


@contextmanager
def _shown_progress(title: str, total: float) -> Iterator[Bar]:
    if not sys.stderr.isatty():
        yield _lines(title, total)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=error_console()) as bars:
        task = bars.add_task(title, total=total, status="")
        yield lambda done, status="": bars.update(task, completed=done, status=visible(status))


def _lines(title: str, total: float) -> Bar:
    begun = last = time.monotonic()
    first: float | None = None

    def print_text(done: float, status: str = "") -> None:
        nonlocal last, first
        now = time.monotonic()
        first = done if first is None else first
        if done < total and now - last < QUIET_SECONDS:
            return
        last = now
        rate = (done - first) / (now - begun) if done > first else 0
        left = f"  {duration((total - done) / rate)} left" if rate and done < total else ""
        print_error(f"{title} {round(done, 1):g}/{total:g}  {status}{left}".rstrip())

    return print_text


def duration(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars and no messages from diffusers and transformers inside; afterwards all is as it was.

    Their notes on loading and saving are about their own defaults, and the user reads them as faults of the model or
    of the installation. Errors are raised all the same.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    loggers: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [(logger, logger.get_verbosity(), logger.is_progress_bar_enabled()) for logger in loggers]
    try:
        for logger, verbosity, _ in before:
            if verbosity != logging.CRITICAL:  # each change of a level walks all loggers of the process
                logger.set_verbosity(logging.CRITICAL)
            logger.disable_progress_bar()
        yield
    finally:
        for logger, verbosity, bars in before:
            if verbosity != logging.CRITICAL:
                logger.set_verbosity(verbosity)
            if bars:
                logger.enable_progress_bar()
