"""How far a run is, by its folder and by what its training printed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from coeffdiff.config.loading import load_settings
from coeffdiff.training.run_folder import RunFolder, claim
from coeffdiff.ui import run_state
from coeffdiff.ui.markup import status
from coeffdiff.ui.run_state import error_in, find_runs, read_state, validation_pictures
from coeffdiff.ui.training_process import Training, log_of
from coeffdiff.utils.png import save_png


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of 40 steps that has made 12."""
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(Path("runs/ohwx"))
    claim(folder, load_settings(None, {"training.steps": 40, "subject.token": "ohwx"}))
    lines = [{"step": step, "loss": 0.25, "seconds": 2.0} for step in range(1, 13)]
    folder.log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder.path


def trains(monkeypatch, run):
    """As if the page's training of a run were at work."""
    monkeypatch.setattr(Training, "running", property(lambda self: True))
    monkeypatch.setattr(run_state, "last_training", lambda: Training(str(run), 1, 0.0))


def test_a_training_says_where_it_is(run, monkeypatch):
    trains(monkeypatch, run)
    state = read_state(run)
    assert (state.step, state.steps, state.running, state.resumable) == (12, 40, True, False)
    assert state.sentence == "Training: step 12 of 40, loss 0.2500, about 56 s left without pictures."


def test_a_run_that_begins_has_no_folder_yet(run, monkeypatch):
    trains(monkeypatch, Path("runs/new"))
    assert find_runs() == [Path("runs/new"), run]
    assert read_state(Path("runs/new")).sentence == "Starting: photos and model are read."


def test_a_stopped_run_can_be_resumed(run):
    """From a checkpoint, or anew with its settings."""
    assert read_state(run).resumable
    assert read_state(run).sentence == (
        "Stopped after step 12 of 40; Resume begins anew, as there is no checkpoint."
    )
    RunFolder(run).checkpoint(12).mkdir(parents=True)
    log_of(run).parent.mkdir()
    for last in ("", "Interrupted: Stopped after step 12.\n"):
        if last:
            log_of(run).write_text(last)
        state = read_state(run)
        assert state.resumable and not state.finished
        assert state.sentence == "Stopped after step 12 of 40; Resume goes on from the last checkpoint."


@pytest.mark.parametrize("printed", ["", "training 12/40  loss 0.2\n"])
@pytest.mark.parametrize("saved", [True, False])
def test_a_training_that_was_killed_says_so(run, printed, saved):
    """Neither an error nor a word on Ctrl-C is the last that it printed."""
    log_of(run).parent.mkdir()
    log_of(run).write_text(printed)
    if saved:
        RunFolder(run).checkpoint(10).mkdir(parents=True)
    again = "Resume goes on" if saved else "Resume begins anew"
    state = read_state(run)
    assert state.resumable
    assert state.sentence.startswith(
        f"The training ended without a word after step 12 of 40 (killed, out of memory?); {again}"
    )
    assert ("cd-status error" in status(state)) == (not saved)


def test_a_training_that_was_killed_while_it_read_the_model_says_so(run):
    """Before there was a folder; one that was interrupted then was asked to, and nothing is there."""
    log_of(run).parent.mkdir()
    log_of(Path("runs/new")).write_text("photos   5\n")
    state = read_state(Path("runs/new"))
    assert not state.resumable
    assert state.sentence == (
        "The training ended without a word before its first step (killed, out of memory?); Start begins anew."
    )
    log_of(Path("runs/new")).write_text("Interrupted: stopped at once; nothing is lost.\n")
    assert read_state(Path("runs/new")).sentence == "Nothing was trained yet."


def test_a_run_that_was_continued_elsewhere_is_not_taken_for_killed(run):
    """The page's training came to its end, whose last word is where the adapter is."""
    log_of(run).parent.mkdir()
    log_of(run).write_text("done in 5 s, last loss 0.2\nruns/ohwx/adapter\n")
    assert read_state(run).sentence.startswith("Stopped after step 12 of 40")


def test_the_sentence_that_ended_a_training_is_shown(run):
    log_of(run).parent.mkdir()
    log_of(run).write_text("photos 5\nPhotoError: runs/photos/ohwx holds no usable photo.\n")
    assert read_state(run).sentence == "PhotoError: runs/photos/ohwx holds no usable photo."


@pytest.mark.parametrize(
    "text", ["", "training 3/40  loss 0.2", "Interrupted: stopped", "stopping after this step"]
)
def test_other_last_lines_are_no_errors(text):
    assert error_in(text) is None


def test_a_line_that_a_kill_cut_short_is_left_out(run):
    with RunFolder(run).log.open("a") as file:
        file.write('{"step": 13, "lo')
    assert read_state(run).step == 12


def test_pictures_of_the_newest_step_come_first(run):
    for step, name in ((5, "001-a"), (10, "002-b"), (10, "001-a"), (10, "grid")):
        file = run / "samples" / f"step-{step:06d}" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_png(Image.new("RGB", (8, 8)), file)
    shown = validation_pictures(run)
    assert [caption for _, caption in shown] == ["step 10", "step 10", "step 5"]
    assert shown[0][0] == "runs/ohwx/samples/step-000010/001-a.png"


def test_a_training_that_was_asked_to_stop_says_so(run, monkeypatch):
    trains(monkeypatch, run)
    asked = replace(run_state.last_training(), stopping=True)
    monkeypatch.setattr(run_state, "last_training", lambda: asked)
    assert read_state(run).stopping
    assert read_state(run).sentence == "Stopping: this step ends first, then a checkpoint is saved."


@pytest.mark.parametrize("stopping", [False, True])
def test_a_training_that_reads_its_model_has_nothing_to_save(run, monkeypatch, stopping):
    """Its log is an earlier process's: it is resumed."""
    trains(monkeypatch, run)
    began = replace(
        run_state.last_training(), created=RunFolder(run).log.stat().st_mtime + 1, stopping=stopping
    )
    monkeypatch.setattr(run_state, "last_training", lambda: began)
    assert read_state(run).sentence == (
        "Stopping: it has not come to its steps, so there is nothing to save."
        if stopping
        else "Starting: photos and model are read."
    )


def test_pictures_of_a_folder_without_a_step_are_left_out(run):
    for name in ("step-final", "step-000005"):
        (run / "samples" / name).mkdir(parents=True)
        save_png(Image.new("RGB", (8, 8)), run / "samples" / name / "001-a.png")
    assert [caption for _, caption in validation_pictures(run)] == ["step 5"]
