"""Launcher variables: ignored where one process does the work, else one sentence in time. Real processes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forking import fork_run
from PIL import Image
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import LaunchError
from coeffdiff.pocket.model import save_random
from coeffdiff.utils.launch_environment import Launch, forget_launch, read_launch

LEFT_OVER = {
    "WORLD_SIZE": "2",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29577",
}
RUN = ("-m", "coeffdiff")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("place")
    save_random("micro", folder / "model")
    (folder / "photos").mkdir()
    Image.radial_gradient("L").resize((64, 64)).convert("RGB").save(folder / "photos/1.png")
    return folder


def start(place: Path, *arguments: str, **variables: str) -> subprocess.Popen:
    env = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(place / "cache")} | variables
    command = [sys.executable, *RUN, *arguments]
    return subprocess.Popen(
        command, cwd=place, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


SUBJECT = ("--images", "photos", "--token", "sks", "--class-word", "ball", "--model", "model")


def test_check_needs_no_processes_and_prints_whatever_the_rank(place):
    """It waited for a day, and as rank 1 printed nothing."""
    env = LEFT_OVER | {"XDG_CACHE_HOME": str(place / "cache")}
    checked = fork_run("-m", "coeffdiff", "check", *SUBJECT, "--json", cwd=place, env=env)
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["photos"][0]["name"] == "1.png"


@pytest.mark.parametrize("command", [["inspect", "model"], ["merge", "model", "model", "--output", "out"]])
def test_commands_on_files_ignore_them(place, command, monkeypatch):
    """Their own sentence on a folder that is no adapter, not one on launches."""
    monkeypatch.chdir(place)
    for name, value in (LEFT_OVER | {"WORLD_SIZE": "abc"}).items():
        monkeypatch.setenv(name, value)
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 2 and "AdapterError" in ended.stderr, ended.output


def test_processes_that_never_come_are_waited_for_a_while_and_named(place):
    """The one that hosts the meeting, and the one that looks for it: both say so while they wait, and end.

    Not in forks, in which torch has been loaded before it hears that it is to print no stack.
    """
    waiting = LEFT_OVER | {"ACCELERATE_USE_CPU": "true", "COEFFDIFF_WAIT": "3"}
    begun = time.monotonic()
    runs = []
    for rank in ("0", "1"):  # each at a place of its own
        alone = waiting | {"RANK": rank, "LOCAL_RANK": rank, "MASTER_PORT": f"2957{rank}"}
        runs.append(start(place, "train", *SUBJECT, "--output", f"run{rank}", **alone))
    for rank, run in enumerate(runs):
        said, complained = run.communicate(timeout=300)
        assert time.monotonic() - begun < 250 and run.returncode == 2, complained
        told, *_, last = complained.strip().splitlines()
        other = f"the other at 127.0.0.1:2957{rank}"
        assert told.startswith(f"Process {rank} of 2 waits for {other}, for up to 3 s. If nothing")
        assert f"LaunchError: Process {rank} of 2 did not meet {other} within 3 s (" in last
        assert "unset what is left over" in last and "WORLD_SIZE" in last
        assert "Traceback" not in complained and "frame #" not in complained and said == ""
        assert not (place / f"run{rank}").exists()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc', where a whole number from 1 on is expected"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2", "RANK": "x"}, "RANK is 'x', where a whole number from 0 on"),
        ({"WORLD_SIZE": "2", "RANK": "5", "LOCAL_RANK": "0"}, "RANK=5.* but ranks of 2 processes end at 1"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "LOCAL_RANK is not set"),
        ({"WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK is not set"),
        ({"RANK": "1"}, "RANK=1, but WORLD_SIZE is not set"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
)
def test_variables_that_no_launcher_sets_so_are_one_sentence(variables, words):
    with pytest.raises(LaunchError, match=words) as caught:
        read_launch(variables)
    assert "If nothing was launched here, unset what is left over" in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "launch"),
    [
        ({}, (0, 1)),
        ({"RANK": "0"}, (0, 1)),
        ({"RANK": "-1", "LOCAL_RANK": "-1"}, (0, 1)),
        ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, (0, 1)),
        ({"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, (3, 4)),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"},
            (1, 2),
        ),  # Accelerate's own
    ],
)
def test_what_launchers_do_set_is_read(variables, launch):
    found = read_launch(variables)
    assert (found.rank, found.size) == launch
    assert isinstance(found, Launch)


@pytest.mark.parametrize("command", ["train", "sample", "evaluate", "compare", "demo"])
def test_each_command_that_may_be_shared_refuses_them(command, place, tmp_path, monkeypatch):
    """In one sentence, exit code 2, and whatever the rank: nothing runs and prints nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "abc")
    monkeypatch.setenv("RANK", "1")
    arguments = {
        "train": ["--images", str(place / "photos"), "--token", "sks", "--model", str(place / "model")],
        "sample": ["--prompt", "x"],
        "evaluate": ["nowhere"],
    }
    ended = CliRunner().invoke(app, [command, *arguments.get(command, [])])
    assert ended.exit_code == 2, ended.output
    assert re.search("LaunchError: WORLD_SIZE is 'abc'", ended.stderr), ended.output
    assert not list(tmp_path.iterdir())


def test_what_is_forgotten_is_all_of_it():
    environ = dict(LEFT_OVER, LOCAL_WORLD_SIZE="2", PMI_SIZE="2", HOME="/")
    forget_launch(environ)
    assert environ == {"HOME": "/"}
