"""Start Accelerate, and refuse launches that are not what they look like."""

from __future__ import annotations

import atexit
import os
import threading
from collections.abc import Mapping
from datetime import timedelta

import torch.distributed
from accelerate import PartialState
from accelerate.utils import DistributedType

from coeffdiff.errors import LaunchError
from coeffdiff.utils.console import duration, print_error
from coeffdiff.utils.distributed import destroy_process_group
from coeffdiff.utils.launch_environment import Launch, left_over, read_launch

# Rank 0 may encode 200 photos while the others wait; the launcher still ends them all when one dies.
PATIENCE = timedelta(days=1)
# For all of them to be there at first. COEFFDIFF_WAIT sets other seconds, where machines start far apart
_WAIT_SECONDS = 300.0
_SAID_AFTER = 4.0  # seconds of waiting

_SHARDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_SUPPORTED = {
    DistributedType.NO,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_CPU,
}


def start_processes(environ: Mapping[str, str] = os.environ) -> PartialState:
    """The process group of this launch. Raises: LaunchError if it would shard the model or only looks parallel."""
    for variable, name in _SHARDED.items():
        if _is_on(environ, variable):
            raise LaunchError(
                f"{name} shards the UNet, and coeffdiff's adapters are too small to need it: "
                "use plain data parallelism (accelerate launch --multi_gpu, or configs/accelerate/)."
            )
    launch = read_launch(environ)
    on_cpu = _is_on(environ, "ACCELERATE_USE_CPU")
    if torch.cuda.is_available() and not on_cpu:
        refuse_shared_gpus(torch.cuda.device_count(), environ)
    state = _met(launch, on_cpu, environ)
    refuse_lonely_processes(state.num_processes, environ)
    if state.distributed_type not in _SUPPORTED:
        raise LaunchError(
            f"{state.distributed_type.value} is not supported; use plain data parallelism (DDP)."
        )
    if state.backend == "gloo":
        atexit.unregister(destroy_process_group)
        atexit.register(destroy_process_group)
    return state


def _met(launch: Launch, on_cpu: bool, environ: Mapping[str, str]) -> PartialState:
    """Accelerate's state, when all processes are there. Raises: LaunchError if some do not come in time."""
    if torch.distributed.is_initialized() or (launch.size == 1 and "LOCAL_RANK" not in environ):
        return PartialState(cpu=on_cpu)  # they have met before, or there is nobody to meet
    seconds = _wait_seconds(environ)
    advice = left_over(environ)  # before Accelerate adds variables of its own
    me = f"Process {launch.rank} of {launch.size}"
    others = "the other" if launch.size == 2 else f"the {launch.size - 1} others"
    told = threading.Timer(
        _SAID_AFTER,
        lambda: print_error(
            f"{me} waits for {others} at {launch.place}, for up to {duration(seconds)}. {advice}"
        ),
    )
    told.daemon = True
    told.start()
    try:
        state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=seconds))
        if torch.distributed.is_initialized():
            # Everybody is there and can be reached, or this fails in time; from here on long work is waited for
            torch.distributed.barrier()
            group = torch.distributed.distributed_c10d
            group._set_pg_timeout(PATIENCE)
            group._get_default_store().set_timeout(PATIENCE)
    except (
        RuntimeError,
        ValueError,
        OSError,
    ) as error:  # torch's store and its backends have errors of their own
        reason = " ".join(str(error).split("\n")[0].split())[:200].rstrip(".")
        raise LaunchError(
            f"{me} did not meet {others} at {launch.place} within {duration(seconds)} ({reason}). Start all of them, "
            f"with COEFFDIFF_WAIT=SECONDS to wait longer. {advice}."
        ) from None
    finally:
        told.cancel()
    return state


def _wait_seconds(environ: Mapping[str, str]) -> float:
    text = environ.get("COEFFDIFF_WAIT", "")
    try:
        seconds = float(text) if text else _WAIT_SECONDS
    except ValueError:
        seconds = 0.0
    if not 1 <= seconds <= PATIENCE.total_seconds():
        raise LaunchError(f"COEFFDIFF_WAIT is {text!r}, where seconds from 1 to 86400 are expected.")
    return seconds


def refuse_shared_gpus(gpus: int, environ: Mapping[str, str]) -> None:
    """Raise LaunchError if this machine was given more processes than it has GPUs: CUDA's own error names neither."""
    processes = int(environ.get("LOCAL_WORLD_SIZE", "1"))  # read_launch has seen to it that it is one
    if processes > gpus:
        raise LaunchError(
            f"The launcher started {processes} processes on this machine, and CUDA sees {gpus} GPU"
            f"{'' if gpus == 1 else 's'} here; each process needs one of its own. Start {gpus} a machine with "
            "--num_processes (which counts those of all machines), or check CUDA_VISIBLE_DEVICES."
        )


def refuse_lonely_processes(processes: int, environ: Mapping[str, str]) -> None:
    """Raise LaunchError if several copies each believe to be alone, or several were asked for and one runs.

    processes is what Accelerate found; what was asked for is in the environment.
    """
    if processes > 1:
        return
    world_size = int(environ.get("WORLD_SIZE", "1"))
    if world_size > 1:
        raise LaunchError(
            f"The launcher started {world_size} processes, but each of them believes to be alone and would write "
            "the same files. Without GPUs, set ACCELERATE_USE_CPU=true before accelerate launch --multi_gpu."
        )
    if _is_on(environ, "ACCELERATE_USE_CPU") and "MASTER_PORT" in environ and "WORLD_SIZE" not in environ:
        raise LaunchError(
            "accelerate launch --cpu starts one process whatever --num_processes says. For several, use "
            "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N -m coeffdiff ..."
        )


def _is_on(environ: Mapping[str, str], variable: str) -> bool:
    return environ.get(variable, "").lower() in ("1", "true", "yes", "y", "on", "t")
