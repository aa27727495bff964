"""The variables of launchers, read in one place: whether this process is one of several, and which."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from coeffdiff.errors import LaunchError

# Variables of torch's launchers, and those of MPI that Accelerate reads
_NUMBERS = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}  # name -> smallest value
_PLACES = ("MASTER_ADDR", "MASTER_PORT")
_OF_MPI = ("PMI_SIZE", "PMI_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE")
_LEFT_OVER = "If nothing was launched here, unset what is left over from something else: {names}"


@dataclass(frozen=True)
class Launch:
    """One process of `size`; place: where they meet, as host:port."""

    rank: int = 0
    size: int = 1
    place: str = ""


def read_launch(environ: Mapping[str, str] = os.environ) -> Launch:
    """This process's place among those of a launch. Raises: LaunchError for variables that contradict each other."""
    numbers = {name: value for name in _NUMBERS if (value := _number(environ, name)) is not None}
    size, rank = numbers.get("WORLD_SIZE"), numbers.get("RANK")
    if size is None and (rank or "LOCAL_RANK" in numbers):
        _refuse(environ, "WORLD_SIZE is not set, which a launcher does")
    if size is not None and size > 1 and not {"RANK", "LOCAL_RANK"} <= numbers.keys():
        missing = next(name for name in ("RANK", "LOCAL_RANK") if name not in numbers)
        _refuse(environ, f"{missing} is not set, which a launcher does")
    if rank is not None and size is not None and rank >= size:
        _refuse(environ, f"ranks of {size} processes end at {size - 1}")
    # LOCAL_WORLD_SIZE is not held against LOCAL_RANK: on CPUs Accelerate itself writes a 1 beside any rank
    host, port = environ.get("MASTER_ADDR", "127.0.0.1"), environ.get("MASTER_PORT", "29500")
    if size is not None and not (port.isdecimal() and int(port) < 65536):
        raise LaunchError(
            f"MASTER_PORT is {port!r}, where a port from 0 to 65535 is expected. {_advice(environ)}"
        )
    return Launch(rank or 0, size or 1, f"{host}:{port}")


def forget_launch(environ: MutableMapping[str, str] = os.environ) -> None:
    """For commands that need one process: remove a launcher's variables."""
    for name in (*_NUMBERS, *_PLACES, *_OF_MPI):
        environ.pop(name, None)


def left_over(environ: Mapping[str, str]) -> str:
    """What to do if nothing was launched here: a clause."""
    names = [name for name in (*_NUMBERS, *_PLACES) if name in environ]
    return _LEFT_OVER.format(names=" ".join(names))


def _advice(environ: Mapping[str, str]) -> str:
    return f"{left_over(environ)}; else start with accelerate launch or torchrun."


def _refuse(environ: Mapping[str, str], what: str) -> None:
    shown = ", ".join(f"{name}={environ[name]}" for name in _NUMBERS if name in environ)
    raise LaunchError(f"This process has {shown}, but {what}. {_advice(environ)}")


def _number(environ: Mapping[str, str], name: str) -> int | None:
    """The value of a variable; None if it is not set, or a rank of -1, as older launchers set it."""
    text = environ.get(name)
    if text is None or (text.strip() == "-1" and name.endswith("RANK")):
        return None
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < _NUMBERS[name]:
        raise LaunchError(
            f"{name} is {text!r}, where a whole number from {_NUMBERS[name]} on is expected. {_advice(environ)}"
        )
    return value
