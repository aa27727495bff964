"""Tasks in this process: their output, their errors, and how they are stopped."""

from __future__ import annotations

import signal
import weakref
from pathlib import Path

import pytest

from coeffdiff.errors import ConfigError, Interrupted, PhotoError, TaskDefect, TaskError
from coeffdiff.execution.choosing import choose_executor
from coeffdiff.execution.local import LocalExecutor
from coeffdiff.execution.rounds import run_round
from coeffdiff.execution.tasks import Task
from coeffdiff.utils.console import print_info, progress
from coeffdiff.utils.interruptions import stoppable


def round_of(worker, tmp_path, names="abc"):
    tasks = [Task(name, name, tmp_path / f"{name}.log") for name in names]
    with LocalExecutor().open(lambda: worker, tmp_path) as pool:
        return list(run_round(pool, tasks, "letters"))


def test_one_that_fails_does_not_stop_the_others(tmp_path, capsys):
    """A user's mistake keeps its sentence, a defect its traceback; both stand in the task's log, not on the terminal."""

    def worker(letter):
        print_info(f"at {letter}")
        if letter == "a":
            raise PhotoError("There are no photos.")
        if letter == "b":
            raise ZeroDivisionError("by nothing")
        return letter.upper()

    outcomes = round_of(worker, tmp_path)
    assert [one.state for one in outcomes] == ["failed", "failed", "done"] and outcomes[2].result == "C"
    assert isinstance(outcomes[0].error, PhotoError)
    assert "ZeroDivisionError: by nothing" in str(outcomes[1].error)
    assert "There are no photos." in (tmp_path / "a.log").read_text()
    assert "Traceback" in (tmp_path / "b.log").read_text() and "at c" in (tmp_path / "c.log").read_text()
    said = capsys.readouterr()
    assert "at " not in said.err + said.out and "letters 3/3  2 failed" in said.err


@pytest.mark.parametrize(
    ("error", "kind"), [(PermissionError(13, "Permission denied", "x.png"), TaskError), (FileNotFoundError(2, "gone"), TaskDefect)]
)  # fmt: skip
def test_a_refusal_of_the_system_is_a_sentence_and_no_defect(tmp_path, error, kind):
    def worker(letter):
        raise error

    [outcome] = round_of(worker, tmp_path, "a")
    assert type(outcome.error) is kind
    assert ("Traceback" in (tmp_path / "a.log").read_text()) == (kind is TaskDefect)
    if kind is TaskError:
        assert str(outcome.error).startswith("PermissionError: Permission denied: x.png.")


def test_what_a_failed_task_held_is_gone_when_the_next_begins(tmp_path):
    """Whatever the error: a user's mistake that came of another one, or a defect."""
    held = []

    class Tensors:
        pass

    def worker(letter):
        assert [one() for one in held] == [None] * len(held)
        tensors = Tensors()
        tensors.itself = tensors  # as modules with hooks
        held.append(weakref.ref(tensors))
        if letter == "b":
            raise ZeroDivisionError
        try:
            raise ValueError
        except ValueError as error:
            raise PhotoError("There are no photos.") from error

    outcomes = round_of(worker, tmp_path)
    assert len(held) == 3 and held[2]() is None
    assert [type(one.error) for one in outcomes] == [PhotoError, TaskDefect, PhotoError]


def test_a_log_keeps_what_earlier_tries_said(tmp_path):
    for _ in range(2):
        round_of(print_info, tmp_path, "a")
    assert (tmp_path / "a.log").read_text().count("\na\n") == 2


def test_a_log_that_cannot_be_written_is_one_sentence_and_the_others_go_on(tmp_path):
    (tmp_path / "a.log").mkdir()
    outcomes = round_of(str.upper, tmp_path, "ab")
    assert [one.state for one in outcomes] == ["failed", "done"]
    assert "a.log cannot be written: Is a directory." in str(outcomes[0].error)


def test_after_a_signal_no_task_begins_and_bars_end_theirs(tmp_path, capsys):
    def worker(letter):
        with progress("counting", 3) as bar:
            for number in range(3):
                if number == 1:
                    signal.raise_signal(signal.SIGINT)
                bar(number)
        return letter

    before = signal.getsignal(signal.SIGINT)
    [outcome] = round_of(worker, tmp_path)
    assert outcome.state == "stopped" and isinstance(outcome.error, Interrupted)
    assert "stopping: what is being done is saved first" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_what_saves_first_is_not_ended_by_its_bar(tmp_path):
    """As a training, which looks at the flag by itself, makes its checkpoint, and then raises."""

    def worker(letter):
        with stoppable("inner") as stop, stop.saved_first(), progress("steps", 3) as bar:
            signal.raise_signal(signal.SIGINT)
            bar(1)
            assert stop.asked
            (tmp_path / "saved").touch()
            raise Interrupted("Saved.")

    [outcome] = round_of(worker, tmp_path)
    assert outcome.state == "stopped" and (tmp_path / "saved").exists()


def test_options_of_rays_need_ray():
    with pytest.raises(ConfigError, match="--workers is for --executor ray"):
        choose_executor("local", 2, None)
    with pytest.raises(ConfigError, match="--ray-address is for --executor ray"):
        choose_executor("local", None, "auto")
    assert isinstance(choose_executor("local", None, None), LocalExecutor)


def test_progress_is_told_to_the_board(tmp_path, capsys, monkeypatch):
    """Where no bar can be drawn, a line now and then: what is done, and where the running task is."""
    monkeypatch.setattr("coeffdiff.utils.board.QUIET_SECONDS", 0.0)

    def worker(letter):
        with progress("counting", 7) as bar:
            bar(5)

    round_of(worker, Path(tmp_path), "a")
    assert "letters 0/1    a counting 5/7" in capsys.readouterr().err
