"""How OpenMP's threads wait for each other: chosen before torch is loaded, by the load of the machine."""

from __future__ import annotations

import os

# Thread barriers are some hundred microseconds apart. Threads that sleep between them take half as long again on a
# quiet machine; threads that spin without end keep a core from the very thread that they wait for, once another
# program wants one: pocket's training step then took 10 to 20 times as long on two cores. So many turns are a middle
# way: as fast as spinning where the machine is quiet, twice as slow as sleeping where it is not.
SPINS = "2000"
BUSY_CORES = 0.5  # in use by others, from which on threads sleep
LOOK_SECONDS = 0.1

_NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

_chosen = "as torch was loaded"
_own: dict[str, str] = {}  # what was set here, and by no user


def choose_waiting() -> str:
    """Set OMP_WAIT_POLICY and GOMP_SPINCOUNT for this process, and return what was chosen, in words.

    To be called before torch is loaded, when libgomp reads both. What the user has set stays; several processes of one
    launch share the cores, so their threads sleep.
    """
    global _chosen
    given = [name for name in _NAMES if name in os.environ]
    if given:
        _chosen = f"waiting as {given[0]}={os.environ[given[0]]} says"
        return _chosen
    _set("OMP_WAIT_POLICY", "PASSIVE")
    if os.environ.get("WORLD_SIZE", "1") != "1":
        _chosen = "sleeping while they wait, as several processes share the cores"
    elif (busy := _busy_cores()) >= BUSY_CORES:
        _chosen = f"sleeping while they wait, as other programs keep {busy:.1f} cores busy"
    else:
        _set("GOMP_SPINCOUNT", SPINS)
        _chosen = "spinning for a moment while they wait, as the machine is quiet"
    return _chosen


def waiting() -> str:
    """The choice of choose_waiting, in words."""
    return _chosen


def users_environment() -> dict[str, str]:
    """The environment for a process that is to choose by itself: as the user set it, without this process's choice."""
    return {name: value for name, value in os.environ.items() if _own.get(name) != value}


def _set(name: str, value: str) -> None:
    os.environ[name] = _own[name] = value


def _busy_cores() -> float:
    """How many cores are busy now; this process only waits meanwhile."""
    import psutil

    return psutil.cpu_percent(interval=LOOK_SECONDS) / 100 * (psutil.cpu_count() or 1)
