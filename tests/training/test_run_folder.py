"""The run folder: claimed once, written atomically, exact to resume."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from coeffdiff.config.loading import load_settings
from coeffdiff.config.schema import Settings
from coeffdiff.errors import ConfigError, NonFiniteLoss, ResumeError, TrainingError
from coeffdiff.method.adapter_header import AdapterHeader, LoraHeader
from coeffdiff.training import resuming
from coeffdiff.training import run_folder as state
from coeffdiff.training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from coeffdiff.training.finite import check_learned
from coeffdiff.training.resuming import run_to_resume, settings_to_resume
from coeffdiff.training.run_folder import RunFolder, claim, lock_run, new_run, store
from coeffdiff.training.step_log import StepLog
from coeffdiff.utils import atomic
from coeffdiff.utils.atomic import _exchange, atomic_write, sweep


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def checkpoint(step: int) -> Checkpoint:
    """A checkpoint whose every number tells its step."""
    parameter = torch.nn.Parameter(torch.full((3,), float(step)))
    optimizer = torch.optim.AdamW([parameter], lr=step / 1000)
    parameter.grad = torch.ones(3)
    optimizer.step()
    return Checkpoint(
        step,
        {"a": parameter.detach()},
        optimizer.state_dict(),
        {"last_epoch": step},
        {},
        ["digest"],
        4,
        step / 10,
    )


def finish(run: RunFolder, steps: int) -> None:
    """An adapter that says it was trained for so many steps."""
    header = AdapterHeader(
        format_version=1,
        kind="lora",
        base_model="tiny",
        token="sks",
        lora=LoraHeader(rank=1, alpha=1),
        trained_steps=steps,
        resolution=64,
    )
    run.adapter.mkdir(exist_ok=True)
    save_file({}, run.adapter / "coeff.safetensors", {"coeffdiff": header.model_dump_json()})


def begun(path: Path, **values) -> RunFolder:
    run = RunFolder(path)
    claim(run, load_settings(None, {"subject.token": "sks", **values}))
    return run


def test_runs_are_named_after_the_token_and_nothing_is_overwritten():
    """runs/sks, then runs/sks-2 and runs/sks-3; an empty folder is free."""
    assert new_run("auto", "sks").path == Path("runs/sks")
    begun(Path("runs/sks"))
    assert new_run("auto", "sks").path == Path("runs/sks-2")
    Path("runs/sks-2").mkdir()
    assert new_run("auto", "sks").path == Path("runs/sks-2")
    begun(Path("runs/sks-2"))
    assert new_run("auto", "sks").path == Path("runs/sks-3")


def test_an_output_that_holds_something_is_refused():
    """A run is to be resumed, anything else is left alone."""
    begun(Path("mine"))
    with pytest.raises(ConfigError, match=r"mine holds a run; continue it with --resume"):
        new_run(Path("mine"), "sks")
    Path("other").mkdir()
    Path("other/notes.txt").write_text("keep me")
    with pytest.raises(ConfigError, match="other is not empty"):
        new_run(Path("other"), "sks")
    assert new_run(Path("fresh"), "sks").path == Path("fresh")


@given(st.text(min_size=1))
def test_any_token_gives_a_folder_below_runs(token):
    """No token climbs out of runs/, whatever slashes and dots it holds."""
    path = new_run("auto", token).path
    assert path.parent == Path("runs")
    assert path.name not in ("", ".", "..")


def test_of_two_runs_with_one_name_the_second_fails():
    """Both chose runs/sks; whoever claims it second is told so."""
    first, second = new_run("auto", "sks"), new_run("auto", "sks")
    claim(first, Settings())
    with pytest.raises(ConfigError, match="has just been taken by another run"):
        claim(second, Settings())


def test_a_checkpoint_reads_back_exactly():
    """Tensors, optimizer, schedule, photos and loss: every one as it was."""
    run = begun(Path("run"))
    saved = checkpoint(7)
    save_checkpoint(run, saved, keep=2)
    loaded = load_checkpoint(run)
    assert loaded is not None
    assert torch.equal(loaded.tensors["a"], saved.tensors["a"])
    assert torch.equal(loaded.optimizer["state"][0]["exp_avg"], saved.optimizer["state"][0]["exp_avg"])
    assert loaded.optimizer["param_groups"] == saved.optimizer["param_groups"]
    assert (loaded.step, loaded.schedule, loaded.photos) == (7, {"last_epoch": 7}, ["digest"])
    assert (loaded.samples_a_step, loaded.loss) == (4, 0.7)


def test_only_the_newest_checkpoints_are_kept():
    """Of steps 1 to 5 with keep=2, 5 and 4 remain."""
    run = begun(Path("run"))
    for step in range(1, 6):
        save_checkpoint(run, checkpoint(step), keep=2)
    assert [path.name for path in run.checkpoints()] == ["step-000005", "step-000004"]


@pytest.mark.parametrize("file", ["trainables.safetensors", "optimizer.pt", "state.json"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(file):
    """Truncate any file of step 2: step 1 is loaded."""
    run = begun(Path("run"))
    for step in (1, 2):
        save_checkpoint(run, checkpoint(step), keep=2)
    damaged = run.checkpoint(2) / file
    damaged.write_bytes(damaged.read_bytes()[:20])
    loaded = load_checkpoint(run)
    assert loaded is not None
    assert loaded.step == 1


def test_a_damaged_checkpoint_is_named_and_never_comes_back(capsys):
    """Step 500 cannot be read: it goes on from 400, a failure names 400, and what is saved at 450 stays."""
    run = begun(Path("run"))
    for step in (400, 500):
        save_checkpoint(run, checkpoint(step), keep=2)
    (run.checkpoint(500) / "state.json").unlink()
    assert load_checkpoint(run).step == 400
    assert "checkpoint step-000500 cannot be read, going on from step-000400" in capsys.readouterr().err
    with pytest.raises(NonFiniteLoss, match=r"last good checkpoint is run/checkpoints/step-000400\."):
        check_learned({"a": torch.tensor([math.nan])}, 401, run)
    save_checkpoint(run, checkpoint(450), keep=1)
    assert [path.name for path in run.checkpoints()] == ["step-000450"]
    assert load_checkpoint(run).step == 450
    assert "cannot be read" not in capsys.readouterr().err


def test_what_a_kill_left_half_written_is_neither_used_nor_kept():
    """A temporary folder of a killed writer is no checkpoint, and the next save clears it away."""
    run = begun(Path("run"))
    litter = run.path / "checkpoints" / ".step-000009.0badcafe"
    litter.mkdir()
    (litter / "state.json").write_text('{"step": 9}')
    assert load_checkpoint(run) is None
    save_checkpoint(run, checkpoint(1), keep=2)
    assert sorted(path.name for path in (run.path / "checkpoints").iterdir()) == ["step-000001"]


def test_a_checkpoint_never_runs_code(tmp_path):
    """A pickle with a payload in place of optimizer.pt is not executed; the checkpoint counts as damaged."""
    run = begun(Path("run"))
    save_checkpoint(run, checkpoint(1), keep=2)

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    torch.save({"optimizer": Payload(), "scaler": {}}, run.checkpoint(1) / "optimizer.pt")
    with pytest.raises(ResumeError, match="None of the checkpoints of run can be read"):
        load_checkpoint(run)
    assert not (tmp_path / "owned").exists()


def test_a_full_disk_is_one_sentence_and_harms_no_older_checkpoint(monkeypatch):
    """The write of step 2 fails half-way: step 1 is whole, no litter is left, the sentence names step 1."""
    run = begun(Path("run"))
    save_checkpoint(run, checkpoint(1), keep=2)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resuming.Path, "write_bytes", full)
    with pytest.raises(
        TrainingError, match=r"step 2 cannot be written.*No space left.*last good checkpoint.*000001"
    ):
        save_checkpoint(run, checkpoint(2), keep=2)
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-000001"]
    loaded = load_checkpoint(run)
    assert loaded is not None
    assert loaded.step == 1


def test_the_log_has_one_line_a_step_and_forgets_what_a_resume_repeats():
    """Steps 1 to 5 logged, a kill, resumed after 3: steps 4 and 5 are written once, a torn line is dropped."""
    file = Path("log.jsonl")
    with StepLog(file, 0) as log:
        for step in range(1, 6):
            log.write(
                {"step": step, "loss": math.inf if step == 2 else 0.5, "grad_norm": {"coeff": math.nan}}
            )
    with file.open("a") as torn:
        torn.write('{"step": 6, "lo')
    with StepLog(file, 3) as log:
        log.write({"step": 4, "loss": 0.25})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[1]["loss"] is None
    assert lines[0]["grad_norm"] == {"coeff": None}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_log_on_a_full_disk_is_one_sentence():
    """The failed line is told once; closing the file, which fails again, adds nothing."""
    with pytest.raises(TrainingError, match=r"The log .* cannot be written: No space left"):  # noqa: SIM117
        with StepLog(Path("log.jsonl"), 0) as log:
            log._file.close()
            log._file = open("/dev/full", "a")  # noqa: PTH123, SIM115
            log.write({"step": 1})


def test_a_run_folder_that_cannot_be_written_is_not_left_behind(monkeypatch):
    """The disk is full when config.yaml is written: one sentence, no empty folder."""

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(state, "save_settings", full)
    with pytest.raises(ConfigError, match="run cannot be written: No space left on device"):
        claim(RunFolder(Path("run")), Settings())
    assert not Path("run").exists()


def test_other_processes_write_no_log():
    """With writes=False nothing appears."""
    with StepLog(Path("log.jsonl"), 0, writes=False) as log:
        log.write({"step": 1})
    assert not Path("log.jsonl").exists()


def test_resume_finds_the_newest_unfinished_run_of_the_token():
    """sks finished, sks-2 not, sks-3 not but newer, cat not: --token sks means sks-3."""
    for i, name in enumerate(("sks", "sks-2", "sks-3", "cat")):
        run = begun(Path("runs") / name, **{"training.steps": 5})
        os.utime(run.config, (time.time() + i, time.time() + i))
    finish(RunFolder(Path("runs/sks")), steps=5)
    assert run_to_resume("auto", "sks").path == Path("runs/sks-3")
    assert run_to_resume("auto", None).path == Path("runs/cat")
    assert run_to_resume(Path("runs/sks"), None).path == Path("runs/sks")


def test_a_run_of_another_version_is_no_run_to_resume():
    """It is passed over, although it is newer; where it is all there is, its own error is told."""
    old = begun(Path("runs/old"))
    old.config.write_text("training: {bygone: 1}\n")
    assert run_to_resume("auto", None).path == old.path
    begun(Path("runs/sks"))
    os.utime(old.config, (time.time() + 5, time.time() + 5))
    assert run_to_resume("auto", None).path == Path("runs/sks")
    finish(old, steps=5)
    assert not old.finished and run_to_resume("auto", None).path == Path("runs/sks")


def test_nothing_to_resume_is_said():
    """No run of that token, or a folder without a run."""
    with pytest.raises(ResumeError, match="There is no run to resume under runs/sks"):
        run_to_resume("auto", "sks")
    with pytest.raises(ResumeError, match="elsewhere holds no run to resume"):
        run_to_resume(Path("elsewhere"), None)


def test_a_resume_takes_the_runs_settings_and_allows_more_steps():
    """Nothing need be repeated; a longer run with a constant rate is the same run."""
    run = begun(Path("run"), **{"training.steps": 10, "training.seed": 3})
    settings = settings_to_resume(run, None, {"training.steps": 20, "output": "run"}, ["validation.every=5"])
    assert (settings.training.steps, settings.training.seed, settings.validation.every) == (20, 3, 5)
    assert settings.subject.token == "sks"


def test_a_resume_with_other_settings_is_refused_with_the_difference():
    """Another seed is another run; so are more steps where the rate depends on their number."""
    run = begun(Path("run"), **{"training.steps": 10, "training.lr_schedule": "cosine"})
    with pytest.raises(ResumeError, match=r"training.seed was 0, now 5"):
        settings_to_resume(run, None, {"training.seed": 5}, [])
    with pytest.raises(ResumeError, match=r"training.steps was 10, now 20"):
        settings_to_resume(run, None, {}, ["training.steps=20"])
    with pytest.raises(ResumeError, match=r"training.snr_gamma was 5.0, now None"):
        settings_to_resume(run, None, {}, ["training.snr_gamma=null"])
    same = settings_to_resume(run, None, {"training.steps": 10}, [])
    assert same == run.settings()


def test_a_resume_with_other_arguments_of_the_optimizer_is_refused():
    """None in place of two, or one of the two otherwise; the same ones are the same run."""
    run = begun(Path("run"), **{"training.optimizer_args": {"eps": 1e-6, "amsgrad": True}})
    for other in ("training.optimizer_args={}", "training.optimizer_args={eps: 1e-6}"):
        with pytest.raises(ResumeError, match=r"training.optimizer_args was .*'amsgrad': True}, now {"):
            settings_to_resume(run, None, {}, [other])
    with pytest.raises(ResumeError, match=r"now {'amsgrad': True, 'eps': 1e-05}"):
        settings_to_resume(run, None, {}, ["training.optimizer_args.eps=1e-5"])
    assert settings_to_resume(run, None, {}, ["training.optimizer_args.eps=1e-6"]) == run.settings()


def test_a_run_is_finished_when_its_adapter_has_all_its_steps():
    """No adapter, an adapter of 5 steps, and then a continuation to 9: open, finished, open again."""
    run = begun(Path("run"), **{"training.steps": 5})
    assert not run.finished
    finish(run, steps=5)
    assert run.finished
    store(run, settings_to_resume(run, None, {"training.steps": 9}, []))
    assert not run.finished
    assert run.settings().training.steps == 9


def test_a_default_that_was_said_counts_at_resume():
    """--method coeff+lora on a coeff run is another run although coeff+lora is the default; so is --seed 0."""
    run = begun(Path("run"), **{"method.kind": "coeff", "training.seed": 5})
    with pytest.raises(ResumeError, match=r"method.kind was 'coeff', now 'coeff\+lora'"):
        settings_to_resume(run, None, {"method.kind": "coeff+lora"}, [])
    with pytest.raises(ResumeError, match=r"training.seed was 5, now 0"):
        settings_to_resume(run, None, {}, ["training.seed=0"])
    assert settings_to_resume(run, None, {}, ["training.steps=auto"]).method.kind == "coeff"


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(monkeypatch):
    """The second of the two renames fails, as on Windows when a file of it is open."""
    Path("adapter").mkdir()
    (Path("adapter") / "old").touch()
    real = Path.rename

    def stubborn(self, target):
        if self.suffix != ".old" and Path(target).name == "adapter":
            raise PermissionError(13, "in use")
        return real(self, target)

    monkeypatch.setattr("coeffdiff.utils.atomic._exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", stubborn)
    with pytest.raises(PermissionError), atomic_write(Path("adapter")) as temporary:
        temporary.mkdir()
    assert [path.name for path in Path().iterdir()] == ["adapter"]
    assert (Path("adapter") / "old").exists()


def test_a_file_appears_whole_or_not_at_all():
    """A failure inside leaves the old content and no litter; success replaces it."""
    file = Path("folder/file.txt")
    with atomic_write(file) as temporary:
        temporary.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    with atomic_write(file, durable=True) as temporary:
        temporary.write_text("new")
    assert file.read_text() == "new"
    assert [path.name for path in file.parent.iterdir()] == ["file.txt"]


def test_a_folder_takes_the_place_of_an_older_one():
    """Files of the old folder do not linger in the new one."""
    for name in ("old", "new"):
        with atomic_write(Path("adapter")) as temporary:
            temporary.mkdir()
            (temporary / name).write_text(name)
    assert [path.name for path in Path("adapter").iterdir()] == ["new"]
    assert [path.name for path in Path().iterdir() if path.name.startswith(".adapter")] == []


def test_a_folder_is_replaced_in_one_step_or_comes_back(monkeypatch):
    """Where two folders cannot be swapped, a kill between the two renames leaves the old one aside; sweep restores it."""
    Path("adapter").mkdir()
    (Path("adapter") / "old").touch()
    monkeypatch.setattr("coeffdiff.utils.atomic._exchange", lambda one, other: False)
    real = Path.rename

    class Killed(BaseException):
        pass

    def dies(self, target):
        real(self, target)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", dies)
        patch.setattr(
            atomic.shutil, "rmtree", lambda *_args, **_options: None
        )  # a dead process cleans nothing up
        with pytest.raises(Killed), atomic_write(Path("adapter")) as temporary:
            temporary.mkdir()
            (temporary / "new").touch()
    assert not Path("adapter").exists()
    sweep(Path())
    assert [path.name for path in Path("adapter").iterdir()] == ["old"]
    assert not list(Path().glob(".*"))


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="needs a system that can swap two names")
def test_two_folders_swap_places():
    for name in ("one", "other"):
        Path(name).mkdir()
        (Path(name) / name).touch()
    assert _exchange(Path("one"), Path("other"))
    assert (Path("one/other").exists(), Path("other/one").exists()) == (True, True)
    assert not _exchange(Path("one"), Path("nowhere"))


def test_sweeping_takes_what_killed_writers_left_and_nothing_else():
    """Names of our own form only, and with older_than only those that nobody can still be writing."""
    for name in (
        ".adapter.0badcafe",
        ".x.safetensors.12345678",
        ".git",
        ".hidden.txt",
        "x.12345678",
        ".y.00000000",
    ):
        Path(name).touch()
    os.utime(".y.00000000", (1, 1))
    sweep(Path(), older_than=3600)
    assert sorted(path.name for path in Path().glob("*") if path.is_file()) == sorted(
        [".adapter.0badcafe", ".x.safetensors.12345678", ".git", ".hidden.txt", "x.12345678"]
    )
    sweep(Path())
    assert sorted(path.name for path in Path().iterdir()) == [".git", ".hidden.txt", "x.12345678"]


def test_a_run_folder_is_held_by_one_process_and_freed_with_it():
    """Held twice: refused; freed when the block ends, also by an error; and what a kill left is cleared away."""
    run = begun(Path("run"))
    (run.path / ".adapter.0badcafe").mkdir()
    with lock_run(run):
        assert not (run.path / ".adapter.0badcafe").exists()
        with pytest.raises(ResumeError, match="Another process is training in run now"), lock_run(run):
            pass
    with pytest.raises(KeyError), lock_run(run):
        raise KeyError
    with lock_run(run):
        pass


def test_a_folder_that_cannot_be_locked_is_used_all_the_same(monkeypatch):
    """Some network disks have no locks."""
    import fcntl

    def refuses(*_args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuses)
    litter = begun(Path("run")).path / ".adapter.0badcafe"
    litter.mkdir()
    with lock_run(RunFolder(Path("run"))):
        assert litter.exists()  # somebody else may be writing it


def test_a_log_that_is_no_text_is_read_as_far_as_it_goes():
    """After a power cut zeros or anything else may stand where lines were."""
    file = Path("log.jsonl")
    file.write_bytes(b'{"step": 1}\n\0\0\0\n\xff\xfe{"step": 2}\n{"step": 3}\n' + b"[" * 100 + b"\n")
    with StepLog(file, 5) as log:
        log.write({"step": 6})
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 3, 6]


@pytest.mark.parametrize("output", ["x" * 300, "a/" * 3000])
def test_an_output_that_no_system_takes_is_one_sentence(output):
    with pytest.raises(ConfigError, match="cannot be: File name too long"):
        new_run(Path(output), "sks")
