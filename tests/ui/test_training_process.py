"""A training is a process of its own: found again, stopped as by Ctrl-C, one at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from coeffdiff.errors import ConfigError
from coeffdiff.ui import training_process
from coeffdiff.ui.form import Form
from coeffdiff.ui.training_process import Training, last_training, log_of, resume_training, start_training
from coeffdiff.utils.threads import choose_waiting

# In the place of coeffdiff train: says what it was called with, and ends at Ctrl-C as a training does
_STAND_IN = """
import signal, sys, time
def end(*_):
    print("saved", flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, end)
print("called", *sys.argv[1:], flush=True)
time.sleep(30)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Trainings are this file's stand-in; what still runs afterwards is ended."""
    monkeypatch.chdir(tmp_path)
    begun = []
    popen = subprocess.Popen

    def start(command, **options):
        assert command[:4] == [sys.executable, "-m", "coeffdiff", "train"]
        begun.append(popen([sys.executable, "-c", _STAND_IN, *command[4:]], **options))
        return begun[-1]

    monkeypatch.setattr(training_process.subprocess, "Popen", start)
    yield begun
    for process in begun:
        process.kill()
        process.wait()


def said(run, text):
    """Wait until the log of a run holds the text."""
    for _ in range(200):
        if text in log_of(Path(run)).read_text():
            return log_of(Path(run)).read_text()
        time.sleep(0.05)
    raise AssertionError(log_of(Path(run)).read_text())


def ended(training):
    for _ in range(200):
        if not training.running:
            return True
        time.sleep(0.05)
    return False


def test_start_find_stop_and_resume(stand_in):
    training = start_training(Form("photos", "ohwx", model="pocket"))
    assert training.run == "runs/ohwx"
    assert "--images=photos --token=ohwx --model=pocket --output=runs/ohwx" in said(training.run, "called")
    found = last_training()  # as a page does that starts anew
    assert found == training and found.running
    with pytest.raises(ConfigError, match=r"A training runs already in runs/ohwx"):
        start_training(Form("photos", "other"))
    with pytest.raises(ConfigError, match="A training runs already"):
        resume_training(Path("runs/ohwx"))
    found.stop()
    assert ended(found)
    said(training.run, "saved")
    assert stand_in[0].wait() in (130, 0) and len(stand_in) == 1
    resumed = resume_training(Path("runs/ohwx"))
    text = said("runs/ohwx", "--resume --output=runs/ohwx")
    assert text.startswith("called --images") and resumed.running


def test_it_chooses_for_itself_how_its_threads_wait(stand_in, monkeypatch):
    """What the page's process has chosen would look like the user's wish."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    choose_waiting()
    assert "OMP_WAIT_POLICY" in os.environ
    start_training(Form("photos", "ohwx"))
    assert "OMP_WAIT_POLICY" not in psutil.Process(stand_in[0].pid).environ()


def test_it_outlives_the_page_and_ctrl_c_in_its_terminal(stand_in):
    """Its own session: a signal to the group of the page does not reach it."""
    start_training(Form("photos", "ohwx"))
    assert os.getsid(stand_in[0].pid) == stand_in[0].pid != os.getsid(0)


def test_another_process_with_its_number_is_not_taken_for_it(stand_in):
    training = start_training(Form("photos", "ohwx"))
    other = Training(training.run, training.pid, training.created - 60)
    assert training.running and not other.running
    said(training.run, "called")
    other.stop()
    assert training.running
    stand_in[0].send_signal(signal.SIGKILL)
    assert ended(training)


def test_a_second_run_of_a_token_gets_its_own_folder(stand_in, tmp_path):
    (tmp_path / "runs" / "ohwx").mkdir(parents=True)
    (tmp_path / "runs" / "ohwx" / "config.yaml").write_text("")
    assert start_training(Form("photos", "ohwx")).run == "runs/ohwx-2"


def test_settings_that_are_refused_start_nothing(stand_in):
    with pytest.raises(ConfigError, match="must be at least 1"):
        start_training(Form("photos", "ohwx", steps="0"))
    assert stand_in == [] and last_training() is None


def test_a_damaged_record_is_none(stand_in):
    training_process.RECORDS.mkdir(parents=True)
    for text in ("", "{", "[]", '{"run": "a"}', "null"):
        (training_process.RECORDS / "training.json").write_text(text)
        assert last_training() is None


def test_it_is_asked_to_stop_once(stand_in, monkeypatch):
    """A second Ctrl-C would end it without saving."""
    training = start_training(Form("photos", "ohwx"))
    sent = []
    monkeypatch.setattr(training_process.psutil.Process, "send_signal", lambda _, number: sent.append(number))
    for _ in range(2):
        last_training().stop()
    assert sent == [signal.SIGINT] and last_training().stopping
    assert training.running and not training.stopping


def test_without_a_record_nothing_trains(stand_in, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training_process.json, "dumps", full)
    with pytest.raises(ConfigError, match=r"The record .* No space left"):
        start_training(Form("photos", "ohwx"))
    assert len(stand_in) == 1 and stand_in[0].returncode == -signal.SIGKILL


def test_a_run_elsewhere_has_a_log_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [log_of(Path(run)).name for run in ("runs/ohwx", "other/ohwx", "third/ohwx", "runs/deeper/ohwx")]
    assert names[0] == "ohwx.log" and len(set(names)) == 4
    assert log_of(tmp_path / "runs" / "ohwx") == log_of(Path("runs/ohwx"))
    assert log_of(tmp_path / "other" / "ohwx") == log_of(Path("other/ohwx"))
