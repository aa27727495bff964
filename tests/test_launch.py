"""Launches that are not what they look like are refused, by what the launcher leaves in the environment."""

from __future__ import annotations

import pytest

from coeffdiff.errors import LaunchError
from coeffdiff.training.launch import refuse_lonely_processes, start_processes


def test_copies_that_believe_to_be_alone_are_refused():
    """WORLD_SIZE 2 and one Accelerate process: accelerate launch --multi_gpu without GPUs."""
    with pytest.raises(
        LaunchError, match=r"started 2 processes.*believes to be alone.*ACCELERATE_USE_CPU=true"
    ):
        refuse_lonely_processes(1, {"WORLD_SIZE": "2"})


def test_processes_that_were_never_started_are_refused():
    """accelerate launch --cpu --num_processes 2 sets a port for two and starts one."""
    with pytest.raises(LaunchError, match="starts one process whatever --num_processes says"):
        refuse_lonely_processes(1, {"ACCELERATE_USE_CPU": "True", "MASTER_PORT": "29500"})


@pytest.mark.parametrize(
    ("processes", "environ"),
    [
        (1, {}),
        (1, {"ACCELERATE_USE_CPU": "true"}),
        (1, {"WORLD_SIZE": "1", "MASTER_PORT": "29500"}),
        (2, {"WORLD_SIZE": "2", "MASTER_PORT": "29500", "ACCELERATE_USE_CPU": "true"}),
    ],
)
def test_honest_launches_pass(processes, environ):
    """One process alone, with or without a launcher, and two that know of each other."""
    refuse_lonely_processes(processes, environ)


@pytest.mark.parametrize(
    ("variable", "name"), [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")]
)
def test_sharding_is_refused_before_anything_is_loaded(variable, name):
    with pytest.raises(LaunchError, match=f"{name} shards the UNet.*plain data parallelism"):
        start_processes({variable: "true"})
