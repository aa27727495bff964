"""A Ray cluster to work on: one that exists, or one on this machine that ends with the block.

Ray tells its makers nothing from here, and starts no dashboard.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coeffdiff.errors import LaunchError

_STORE_BYTES = 100 * 2**20  # tasks and outcomes are small; Ray would take a third of the memory
# Variables of this process that hold for workers on other machines too
_SHARED = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_VERBOSITY",
    "DIFFUSERS_VERBOSITY",
    "WANDB_MODE",
    "CUBLAS_WORKSPACE_CONFIG",
)


_QUIET = {"log_to_driver": False, "logging_level": logging.CRITICAL}


@dataclass(frozen=True)
class Cluster:
    """ray: the module, connected. workers: how many; options: of their actors."""

    ray: Any
    workers: int
    options: dict[str, Any]


@contextmanager
def cluster(address: str | None, workers: int | None, log: Path) -> Iterator[Cluster]:
    """Connect to a cluster.

    Args:
        address: of a cluster that exists, "auto" for the one that this machine belongs to; None: RAY_ADDRESS, and
            without that a cluster of this machine's own.
        workers: None: one for each GPU of the cluster, or one where it has none.
        log: a file for what Ray prints on standard output, which is for results.
    Raises: LaunchError without Ray, without such a cluster, or for more workers than it has GPUs or cores.
    """
    ray = _imported()
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    with log.open("a", encoding="utf-8") as printed, redirect_stdout(printed):
        (_start if address == "local" else _join)(ray, address)
        try:
            yield _divided(ray, workers, own=address == "local")
        finally:
            ray.shutdown()
    with suppress(FileNotFoundError):  # another batch that shares it was faster
        if not log.stat().st_size:
            log.unlink()


def _join(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, **_QUIET)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise LaunchError(
            f"There is no Ray cluster at {address} ({_reason(error)}). Start one with `ray start`, name another with "
            "--ray-address, or leave that out for one on this machine."
        ) from None


def _start(ray: Any, address: str) -> None:
    """A cluster of this machine; Ray gives its own processes 30 seconds, which a busy machine may need twice."""
    # A worker that imports torch on a busy machine takes longer than Ray's minute, and would be begun anew for ever
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")
    os.environ.setdefault("RAY_worker_niceness", "0")  # as a training without Ray; Ray's own is 15
    for left in (2, 1, 0):
        try:
            ray.init(address=address, include_dashboard=False, object_store_memory=_STORE_BYTES, **_QUIET)
            return
        except Exception as error:  # Ray raises nothing more special
            ray.shutdown()
            if not left:
                raise LaunchError(f"Ray does not start on this machine: {_reason(error)}.") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")


def _imported() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise LaunchError("--executor ray needs Ray: pip install 'coeffdiff[ray]'.") from None
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    return ray


def _divided(ray: Any, workers: int | None, *, own: bool) -> Cluster:
    """The cluster's GPUs, or its cores, divided among the workers. own: they inherit this process's variables."""
    there = ray.cluster_resources()
    gpus, cores = int(there.get("GPU", 0)), int(there.get("CPU", 1))
    number = workers or gpus or 1
    have, what = (gpus, "GPU") if gpus else (cores, "core")
    if number > have:
        raise LaunchError(
            f"The cluster has {have} {what}{'' if have == 1 else 's'}, and each of {number} workers needs one of its "
            f"own. Ask for {have} with --workers."
        )
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores // (gpus or number)))
    variables = {name: os.environ[name] for name in _SHARED if name in os.environ and not own}
    options = {
        "num_cpus": 1,
        "num_gpus": 1 if gpus else 0,
        "scheduling_strategy": "SPREAD",
        "max_restarts": 0,  # see RayPool, which makes another
        "max_task_retries": 0,  # what a worker was at is begun again by whichever is free first
        "concurrency_groups": {"control": 1},
        "runtime_env": {"env_vars": variables | {"OMP_NUM_THREADS": threads}},
    }
    return Cluster(ray, number, options)
