"""How threads wait is chosen by load, before torch is loaded; what the user set stays."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from coeffdiff.utils import threads


@pytest.fixture
def environment(monkeypatch):
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("coeffdiff.utils.threads._chosen", "")
    monkeypatch.setattr("coeffdiff.utils.threads._own", {})
    return monkeypatch


@pytest.mark.parametrize(
    ("busy", "spins", "words"), [(0.0, threads.SPINS, "quiet"), (0.49, threads.SPINS, "quiet"), (1.3, None, "1.3 cores busy")]
)  # fmt: skip
def test_threads_spin_on_a_quiet_machine_and_sleep_on_a_busy_one(environment, busy, spins, words):
    environment.setattr("coeffdiff.utils.threads._busy_cores", lambda: busy)
    assert words in threads.choose_waiting()
    assert threads.waiting() == threads.choose_waiting() or "says" in threads.waiting()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
    assert os.environ.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT"])
def test_what_the_user_set_stays(environment, name):
    environment.setenv(name, "7")
    environment.setattr("coeffdiff.utils.threads._busy_cores", lambda: pytest.fail("nobody needs to look"))
    assert threads.choose_waiting() == f"waiting as {name}=7 says"
    assert {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ) == {name}


def test_a_process_that_chooses_by_itself_gets_the_users_environment(environment):
    """Without what was chosen here, and with what the user set."""
    environment.setenv("SOMETHING", "mine")
    environment.setattr("coeffdiff.utils.threads._busy_cores", lambda: 0.0)
    before = dict(os.environ)
    threads.choose_waiting()
    assert "GOMP_SPINCOUNT" in os.environ and threads.users_environment() == before
    environment.setenv("GOMP_SPINCOUNT", "7")
    assert threads.users_environment() == before | {"GOMP_SPINCOUNT": "7"}


def test_processes_of_one_launch_sleep(environment):
    environment.setenv("WORLD_SIZE", "2")
    environment.setattr("coeffdiff.utils.threads._busy_cores", lambda: 0.0)
    assert "several processes" in threads.choose_waiting()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_the_load_of_another_process_is_seen(environment):
    """A program that computes for as long as it is looked at keeps some of a core busy."""
    environment.setattr("coeffdiff.utils.threads.LOOK_SECONDS", 0.5)
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert threads._busy_cores() > 0.2
    finally:
        other.kill()
        other.wait()
