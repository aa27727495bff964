"""Launches that are not what they look like are refused, by what the launcher leaves in the environment."""

from __future__ import annotations

import pytest
import torch

from coeffdiff.errors import LaunchError
from coeffdiff.training import launch
from coeffdiff.training.launch import refuse_lonely_processes, refuse_shared_gpus, start_processes


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


def test_more_processes_than_gpus_are_refused_before_any_of_them_starts(monkeypatch):
    """Three processes, one GPU; PartialState would end in CUDA's "invalid device ordinal"."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(launch, "PartialState", None)
    with pytest.raises(LaunchError, match=r"3 processes on this machine.*CUDA sees 1 GPU here.*Start 1"):
        start_processes({"LOCAL_WORLD_SIZE": "3", "WORLD_SIZE": "6", "RANK": "0", "LOCAL_RANK": "0"})


@pytest.mark.parametrize("environ", [{}, {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "4"}])
def test_a_gpu_for_each_process_is_enough(environ):
    """Two GPUs here: one process or two here, and others on another machine."""
    refuse_shared_gpus(2, environ)


def test_processes_on_the_cpu_are_not_counted_against_gpus(monkeypatch):
    """Two processes beside one GPU that they leave alone go on to Accelerate."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    def partial_state(**_):
        raise RuntimeError("Accelerate was reached")

    monkeypatch.setattr(launch, "PartialState", partial_state)
    with pytest.raises(RuntimeError, match="Accelerate was reached"):
        start_processes({"LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"})
