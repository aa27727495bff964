"""One of two processes that fail in every way together: prints what each of them was left with, as JSON."""

from __future__ import annotations

import atexit
import json
import os
import sys

import torch.distributed

from coeffdiff.errors import AdapterError, ConfigError, Interrupted
from coeffdiff.training.launch import start_processes
from coeffdiff.utils.distributed import DistributedContext, process_group

RANK = int(os.environ["RANK"])


def work_together(team: DistributedContext) -> object:
    return [team.gather(10 * (RANK + 1)), team.on_main(lambda: f"decided by {RANK}")]


def first_fails(team: DistributedContext) -> object:
    return team.on_main(lambda: fail(ConfigError("no folder")))


def second_fails(team: DistributedContext) -> object:
    if RANK == 1:
        fail(AdapterError("no adapter here"))
    return team.gather(RANK)


def both_fail(team: DistributedContext) -> object:
    return fail(Interrupted(f"mistake seen by {RANK}"))


def second_has_a_defect(team: DistributedContext) -> object:
    return team.gather({}["absent"] if RANK == 1 else 0)


def second_is_killed(team: DistributedContext) -> object:
    if RANK == 1:
        sys.stdout.flush()
        os._exit(9)
    return team.gather(RANK)


def fail(error: Exception) -> None:
    raise error


def tell(name: str, left: object) -> None:
    print(json.dumps([name, left]), flush=True)


if __name__ == "__main__":
    # Registered first, so called last
    atexit.register(lambda: tell("group_at_exit", torch.distributed.is_initialized()))
    scenarios = {f.__name__: f for f in (first_fails, second_fails, both_fail, second_has_a_defect)}
    scenarios |= {"work_together": work_together, "second_is_killed": second_is_killed}
    for name in sys.argv[1:]:
        scenario = scenarios[name]
        try:
            with process_group(start_processes) as team:
                left: object = scenario(team)
        except SystemExit as end:
            left = f"exit {end.code}"
        except Exception as error:
            left = f"{type(error).__name__}: {error}"
        tell(name, left)
