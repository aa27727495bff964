"""Processes that share a command: the pictures of one process, and one sentence when one of them fails."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from forking import fork_ranks
from PIL import Image
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import ConfigError, LaunchError
from coeffdiff.hosts.diffusers import save_adapter
from coeffdiff.hosts.lora.layers import add_lora
from coeffdiff.hosts.unet import inject
from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader
from coeffdiff.pocket.model import save_random
from coeffdiff.utils.distributed import DistributedContext, process_group
from coeffdiff.utils.png import read_recipe

WORKER = str(Path(__file__).with_name("team_worker.py"))


@pytest.fixture(scope="module")
def studio(built_micro, tmp_path_factory) -> Path:
    """A folder with the tiny model and an adapter of both kinds with large random values, token sks."""
    folder = tmp_path_factory.mktemp("studio")
    save_random("micro", folder / "model")
    unet, generator = copy.deepcopy(built_micro.unet), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for weight in add_lora(unet, rank=2, alpha=2.0).values():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.3)
        layers = inject(unet)
        for c in layers.values():
            c.alpha.copy_(torch.randn(c.alpha.shape, generator=generator))
    header = AdapterHeader(
        format_version=1,
        kind="coeff+lora",
        base_model=str(folder / "model"),
        token="sks",
        heads={name: c.heads for name, c in layers.items()},
        lora=LoraHeader(rank=2, alpha=2.0),
        trained_steps=7,
        resolution=64,
    )
    save_adapter(folder / "adapter", unet, header)
    return folder


def test_two_processes_make_the_pictures_of_one(studio, tmp_path, monkeypatch):
    """2 prompts x 3 seeds x scales 0 and 1 in batches of 4: per scale 4 + 2, so each rank makes one of either.

    Names, pixels, recipes, grid and the printed list are those of one process, bit for bit.
    """
    prompts = ["--prompt", "a photo of <V> ball", "--prompt", "snow"]
    drawing = ["sample", "--adapter", str(studio / "adapter"), *prompts, "-n", "3", "--steps", "2"]
    drawing += ["--scales", "0,1", "--batch-size", "4", "--output", "pictures"]
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    alone.mkdir()
    shared.mkdir()
    monkeypatch.chdir(alone)
    one = CliRunner().invoke(app, drawing)
    assert one.exit_code == 0, one.output
    two, other = fork_ranks("-m", "coeffdiff", *drawing, folders=(shared, shared))
    assert (two.returncode, other.returncode, other.stdout) == (0, 0, ""), two.stderr + other.stderr
    assert "in 2 processes" in two.stderr
    assert two.stdout == one.stdout
    names = sorted(file.name for file in (alone / "pictures").iterdir())
    assert len(names) == 13
    assert [file.name for file in sorted((shared / "pictures").iterdir())] == names
    for name in names:
        pixels = [np.asarray(Image.open(place / "pictures" / name)) for place in (alone, shared)]
        np.testing.assert_array_equal(*pixels, err_msg=name)
        if name != "grid.png":
            assert read_recipe(alone / "pictures" / name) == read_recipe(shared / "pictures" / name)


def test_what_one_lacks_ends_all_with_one_sentence(studio, tmp_path):
    """An adapter that the second machine does not have: it says so, the first ends quietly, nothing is written."""
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    (here / "adapter").symlink_to(studio / "adapter")
    line = ("-m", "coeffdiff", "sample", "--adapter", "adapter", "--prompt", "sks", "--steps", "2")
    first, second = fork_ranks(*line, folders=(here, there))
    assert (first.returncode, second.returncode) == (2, 2)
    assert first.stdout == "" and "Error" not in first.stderr and "adapter" not in first.stderr
    assert second.stderr.startswith("[rank 1] AdapterError: ") and second.stderr.count("\n") == 1
    assert sorted(path.name for path in (*here.iterdir(), *there.iterdir())) == ["adapter"]


def test_processes_end_together_whatever_happens():
    """Two ranks through every way to fail: one speaks, with its own error, and the other leaves with that exit code."""
    ways = ["first_fails", "second_fails", "both_fail", "second_has_a_defect"]
    told = [
        dict(map(json.loads, rank.stdout.splitlines()))
        for rank in fork_ranks(WORKER, *ways, "second_is_killed")
    ]
    assert [heard.get("first_fails") for heard in told] == ["ConfigError: no folder", "exit 2"]
    assert [heard.get("second_fails") for heard in told] == ["exit 2", "AdapterError: no adapter here"]
    assert [heard.get("both_fail") for heard in told] == ["Interrupted: mistake seen by 0", "exit 130"]
    assert [heard.get("second_has_a_defect") for heard in told] == ["exit 1", "KeyError: 'absent'"]
    assert told[0]["second_is_killed"].startswith("LaunchError: Another process of this launch is gone")
    assert "second_is_killed" not in told[1]


def test_each_takes_leave_of_the_group_however_it_ends():
    """Left to the interpreter's end, gloo's threads now and then abort the process, finished or not."""
    for rank in fork_ranks(WORKER, "second_fails"):
        assert rank.returncode == 0
        assert dict(map(json.loads, rank.stdout.splitlines()))["group_at_exit"] is False


def test_one_process_alone_starts_no_group_before_it_must(monkeypatch):
    """Nothing is started for gather, on_main or an error; the device is asked of what start returns, once."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    started = []

    class State:
        device = "cpu"

    def start():
        started.append(1)
        return State

    with process_group(start) as team:
        assert (team.gather(3), team.on_main(lambda: 5), team.is_main) == ([3], 5, True)
        assert not started
        assert (team.device, team.device) == ("cpu", "cpu")
    assert len(started) == 1
    with pytest.raises(ConfigError, match="mine"), process_group(start):
        raise ConfigError("mine")


def test_a_launch_that_only_looks_parallel_is_refused(monkeypatch):
    """WORLD_SIZE 2 without a group: refused as in training, at once."""
    from coeffdiff.training.launch import refuse_lonely_processes

    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=r"believes to be alone and would write the same files"):
        DistributedContext(lambda: refuse_lonely_processes(1, os.environ))
