"""Batches: every subject ends in a run of its own that equals one made alone; nothing is lost or trained twice."""

from __future__ import annotations

import functools
import inspect
import json
import os
import shutil
import signal
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from coeffdiff.batch import subject_worker
from coeffdiff.batch.batch import batch
from coeffdiff.batch.entries import write_entry
from coeffdiff.batch.finished import check_contents
from coeffdiff.batch.plan import Scoring, plan_batch
from coeffdiff.batch.results import as_text, gather, write_results
from coeffdiff.batch.subject_worker import SubjectWorker
from coeffdiff.cli.evaluate import evaluate
from coeffdiff.cli.root import app
from coeffdiff.config.loading import load_settings
from coeffdiff.errors import Interrupted, NonFiniteLoss, OutOfMemory, ResumeError
from coeffdiff.execution.local import LocalExecutor
from coeffdiff.pocket.model import save_random
from coeffdiff.training import loop
from coeffdiff.training.run_folder import RunFolder, claim
from coeffdiff.training.step_log import read_log
from coeffdiff.utils.locks import lock, try_lock

LOCAL = LocalExecutor()
COLOURS = {"mug": "red", "cat": "green", "sloth": "blue"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> Path:
    """A model, photos of three subjects, and a file that names a fourth whose folder is not there."""
    folder = tmp_path_factory.mktemp("shop")
    save_random("micro", folder / "model")
    for name, colour in COLOURS.items():
        (folder / name).mkdir()
        Image.new("RGB", (64, 64), colour).save(folder / name / "0.png")
    lines = [f"- {{images: {name}, class_word: toy}}" for name in ("mug", "cat", "ghost", "sloth")]
    (folder / "subjects.yaml").write_text("\n".join(lines) + "\n")
    return folder


def shared(shop: Path, **values):
    return load_settings(None, {
        "model.name": str(shop / "model"), "subject.token": "ohwx", "training.steps": 2, "training.batch_size": 1,
        "method.kind": "coeff+lora", "method.lora.rank": 2, "validation.prompts": [],
        "photos.cache": str(shop / "cache"), **values,
    })  # fmt: skip


def plan_for(shop: Path, output: Path, scoring: Scoring | None = None, **values):
    return plan_batch(shop / "subjects.yaml", shared(shop, **values), output, scoring)


def adapters(output: Path) -> dict[str, bytes]:
    """The bytes of every tensor; the order of a file's metadata is chance."""
    files = [file for name in COLOURS for file in (output / name / "adapter").glob("*.safetensors")]
    return {
        f"{file.parts[-3]} {file.name} {name}": tensor.numpy().tobytes()
        for file in files
        for name, tensor in load_file(file).items()
    }


def states(results) -> dict[str, str]:
    return {entry["name"]: entry.get("how", entry["state"]) for entry in results["subjects"]}


@pytest.fixture(scope="module")
def done(shop, tmp_path_factory):
    """The whole batch, in this process: its plan and results."""
    plan = plan_for(shop, tmp_path_factory.mktemp("done") / "out")
    return plan, batch(plan, LOCAL)


def forbidden(*_: object, **__: object) -> None:
    raise AssertionError("nothing is left to be trained")


def test_each_subject_has_a_run_and_a_broken_one_its_sentence(done):
    """Read once for all: the second and the third training read no network."""
    plan, results = done
    assert states(results) == {"mug": "trained", "cat": "trained", "ghost": "failed", "sloth": "trained"}
    assert [entry.get("networks_read") for entry in results["subjects"]] == [4, 0, None, 0]
    assert "There is no folder" in results["subjects"][2]["error"] and not (plan.output / "ghost").exists()
    for name in COLOURS:
        run = RunFolder(plan.output / name)
        assert run.finished and [line["step"] for line in read_log(run.log)] == [1, 2]
        assert "run      " in (plan.output / "tasks" / f"{name}.log").read_text()
    assert json.loads((plan.output / "batch.json").read_text()) == results
    table = (plan.output / "batch.txt").read_text()
    assert "ghost: PhotoError: There is no folder" in table and "4 subjects: 3 done, 1 failed" in table


def test_the_same_command_trains_nothing_again(shop, done, monkeypatch):
    plan, _ = done
    monkeypatch.setattr(subject_worker, "train", forbidden)
    again = batch(plan, LOCAL)
    assert states(again) == dict.fromkeys(COLOURS, "unchanged") | {"ghost": "failed"}


def test_a_finished_run_that_is_asked_for_otherwise_is_said(shop, done, tmp_path, monkeypatch):
    """Another rank, a photo that was added: one sentence each, and the runs stay as they were."""
    plan, _ = done
    before = adapters(plan.output)
    monkeypatch.setattr(subject_worker, "train", forbidden)
    other = batch(plan_for(shop, plan.output, **{"method.lora.rank": 3}), LOCAL)
    assert "method.lora.rank was 2, now 3" in other["subjects"][0]["error"]
    extra = shop / "mug" / "1.png"
    Image.new("RGB", (64, 64), "pink").save(extra)
    changed = batch(plan, LOCAL)
    extra.unlink()
    assert states(changed)["mug"] == "failed" and states(changed)["cat"] == "unchanged"
    assert "have changed since" in changed["subjects"][0]["error"] and adapters(plan.output) == before


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        ((), ("training.snr_gamma=null",), "training.snr_gamma was 5.0, now None"),
        (("training.ema=0.99",), (), "training.ema was 0.99, now None"),
        (("method.coeff.blocks=[mid]",), (), r"method.coeff.blocks was \['mid'\], now None"),
        (("training.optimizer_args.eps=1e-6",), (), r"optimizer_args was {'eps': 1e-06}, now {}"),
        (
            ("training.optimizer_args={eps: 1e-6, amsgrad: true}",),
            ("training.optimizer_args={eps: 1e-6}",),
            r"optimizer_args was {'eps': 1e-06, 'amsgrad': True}, now {'eps': 1e-06}",
        ),
    ],
)
def test_null_and_an_empty_mapping_are_other_settings_too(tmp_path, monkeypatch, before, now, says):
    monkeypatch.setattr(subject_worker, "train", forbidden)
    names = ("subject.token=ohwx", "method.kind=coeff", "training.steps=2", f"output={tmp_path / 'run'}")
    run = RunFolder(tmp_path / "run")
    claim(run, load_settings(assignments=[*names, *before]))
    with pytest.raises(ResumeError, match=says):
        SubjectWorker()._trained(run, load_settings(assignments=[*names, *now]))


def test_a_finished_run_whose_checkpoint_is_damaged_is_one_sentence(tmp_path):
    for content in (None, "{", "[]"):
        run = RunFolder(tmp_path / str(content))
        run.checkpoint(2).mkdir(parents=True)
        if content:
            (run.checkpoint(2) / "state.json").write_text(content)
        with pytest.raises(ResumeError, match=r"None of the checkpoints of .* can be read"):
            check_contents(run, load_settings())


def test_more_steps_are_trained_on(shop, done, tmp_path):
    """From the second step; then the adapters are those of three steps at once."""
    one = plan_for(shop, tmp_path / "one", **{"training.steps": 1})
    batch(one, LOCAL)
    two = plan_for(shop, tmp_path / "one")
    assert states(batch(two, LOCAL)) == dict.fromkeys(COLOURS, "continued") | {"ghost": "failed"}
    assert adapters(tmp_path / "one") == adapters(done[0].output)


def test_stopped_it_goes_on_and_comes_to_the_same(shop, done, tmp_path, monkeypatch):
    """Ctrl-C in the second subject's first step: it is saved, the third never begins, and both follow."""
    plan = plan_for(shop, tmp_path / "out")
    calls = []

    def interrupted(step, plan, *rest):
        if plan.run.path.name == "cat" and not calls:
            calls.append(step)
            signal.raise_signal(signal.SIGINT)
        return make_step(step, plan, *rest)

    make_step = loop.make_step
    monkeypatch.setattr(loop, "make_step", interrupted)
    with pytest.raises(Interrupted, match="Stopped with 1 of 4 subjects done"):
        batch(plan, LOCAL)
    assert states(gather(plan, ["mug", "cat", "sloth"])) == {
        "mug": "trained",
        "cat": "stopped",
        "sloth": "missing",
    }
    monkeypatch.undo()
    assert states(batch(plan, LOCAL)) == {
        "mug": "unchanged", "cat": "continued", "ghost": "failed", "sloth": "trained"
    }  # fmt: skip
    assert adapters(plan.output) == adapters(done[0].output)


def test_what_an_earlier_batch_had_done_does_not_count(shop, tmp_path, monkeypatch):
    """Ctrl-C, then a kill, in the first subject after one more step was asked for."""
    batch(plan_for(shop, tmp_path / "out", **{"training.steps": 1}), LOCAL)
    plan = plan_for(shop, tmp_path / "out")

    def ended(error, *_, **__):
        raise error

    monkeypatch.setattr(subject_worker, "train", functools.partial(ended, Interrupted("Saved.")))
    with pytest.raises(Interrupted, match="Stopped with 0 of 4 subjects done"):
        batch(plan, LOCAL)
    assert states(gather(plan, ["mug"])) == {"mug": "stopped"}
    monkeypatch.setattr(subject_worker, "train", functools.partial(ended, KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        batch(plan, LOCAL)
    table = (plan.output / "batch.txt").read_text()
    assert "4 subjects: 1 begun, 2 done, 1 failed" in table and "mug      begun" in table


def test_the_table_waits_for_another_batch_that_writes_it(shop, tmp_path):
    plan = plan_for(shop, tmp_path / "out")
    plan.output.mkdir()
    writing = threading.Thread(target=write_results, args=(plan,))
    with lock(plan.output):
        writing.start()
        writing.join(0.3)
        assert writing.is_alive() and not (plan.output / "batch.json").exists()
        write_entry(plan.outcome("mug"), {"name": "mug", "state": "done"})
    writing.join()
    assert json.loads((plan.output / "batch.json").read_text())["counts"] == {"done": 1, "missing": 3}


def test_parts_make_up_the_whole_and_any_of_them_writes_the_table(shop, done, tmp_path):
    plan = plan_for(shop, tmp_path / "out")
    assert [len(plan.tasks((k, 3))) for k in (1, 2, 3)] == [2, 1, 1]
    results = batch(plan, LOCAL, part=(2, 3))
    assert states(results) == {"cat": "trained"}
    assert (
        "1 done" in (plan.output / "batch.txt").read_text()
        and "3 missing" in (plan.output / "batch.txt").read_text()
    )


def test_what_another_batch_trains_is_left_to_it(shop, tmp_path, monkeypatch, capsys):
    plan = plan_for(shop, tmp_path / "out")
    log = plan.tasks()[0].log
    log.parent.mkdir(parents=True)
    log.touch()
    monkeypatch.setattr(subject_worker, "train", forbidden)
    with try_lock(log) as mine:
        assert mine
        results = batch(plan, LOCAL, part=(1, 4))
    assert states(results) == {"mug": "missing"} and not (plan.output / "mug").exists()
    assert "1 subject was left to another batch" in capsys.readouterr().err


def test_a_diverging_subject_is_tried_again(shop, tmp_path, monkeypatch):
    def diverges(settings, **how):
        raise NonFiniteLoss("The loss of step 1 is nan.")

    plan = plan_for(shop, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(subject_worker, "train", diverges)
        assert states(batch(plan, LOCAL, part=(1, 4))) == {"mug": "failed"}
    assert states(batch(plan, LOCAL, part=(1, 4))) == {"mug": "trained"}


def test_what_a_kill_left_before_a_run_began_is_no_run(shop, tmp_path):
    """Whatever else lies there is refused, and stays."""
    plan = plan_for(shop, tmp_path / "out")
    (plan.output / "mug" / "checkpoints").mkdir(parents=True)
    (plan.output / "cat").mkdir()
    (plan.output / "cat" / "letter.txt").write_text("mine")
    results = batch(plan, LOCAL)
    assert states(results)["mug"] == "trained" and "cat is not empty" in results["subjects"][1]["error"]
    assert (plan.output / "cat" / "letter.txt").read_text() == "mine"


def test_folders_without_a_run_that_hold_somebodys_files_stay(shop, tmp_path):
    """A checkpoint of another program, a repository, a hidden file; an unfinished config.yaml alone is a kill's."""
    plan = plan_for(shop, tmp_path / "out")
    mine = [
        "mug/checkpoints/mine.ckpt",
        "cat/.git/config",
        "cat/.config.yaml.0123abcd",
        "ghost/.notes.0123abcd",
    ]
    for file in (*mine, "sloth/.config.yaml.89abcdef"):
        (plan.output / file).parent.mkdir(parents=True, exist_ok=True)
        (plan.output / file).write_text("mine")
    for name in ("mug", "cat", "ghost", "sloth"):
        subject_worker._clear_unclaimed(RunFolder(plan.output / name))
    assert all((plan.output / file).read_text() == "mine" for file in mine)
    assert not any((plan.output / "sloth").iterdir())


def test_a_failed_training_is_freed_at_once(shop, tmp_path, monkeypatch):
    """What its functions held, also those of the first error, is gone when memory is given back."""
    held = []

    class Tensors:
        pass

    def inner():
        tensors = Tensors()
        held.append(weakref.ref(tensors))
        raise RuntimeError("CUDA out of memory")

    def runs_out(settings, **how):
        tensors = Tensors()
        held.append(weakref.ref(tensors))
        try:
            inner()
        except RuntimeError:
            raise OutOfMemory("The GPU has too little memory.") from None

    monkeypatch.setattr(subject_worker, "train", runs_out)
    alive = []
    monkeypatch.setattr(subject_worker, "free_memory", lambda state: alive.append([one() for one in held]))
    with pytest.raises(OutOfMemory):
        SubjectWorker()(plan_for(shop, tmp_path / "out").tasks()[0])
    assert alive == [[None, None]]


@pytest.fixture
def scored(shop, vit, clip, done, tmp_path, monkeypatch):
    """Scores the finished batch's first subject in few steps, as `how` says; the prompts are in tmp_path."""
    (tmp_path / "prompts.txt").write_text("a {token} {class_word} at sea\n")
    few = {"pictures": 1, "drift_pictures": 0, "denoising_steps": 1, "dino": vit, "clip": clip}
    monkeypatch.setattr(subject_worker, "train", forbidden)

    def score(**how):
        scoring = Scoring(prompts=str(tmp_path / "prompts.txt"), **few | how)
        return batch(plan_for(shop, done[0].output, scoring), LOCAL, part=(1, 4))["subjects"][0]

    yield score
    shutil.rmtree(done[0].output / "mug" / "evaluation")


def test_scores_are_made_once_for_an_adapter_its_prompts_and_encoders(scored, done, clip, tmp_path):
    """Again for a prompts file with other lines and for a CLIP with other weights, though their names are the same."""
    plan, _ = done
    file = plan.output / "mug" / "evaluation" / "evaluation.json"

    def made():
        return file.stat().st_mtime_ns

    judge = shutil.copytree(clip, tmp_path / "clip")
    killed = file.parents[1] / ".evaluation.0123abcd"
    killed.mkdir()
    first = scored(clip=str(judge))
    before = made()
    assert {"dino", "clip_i", "clip_t"} <= first["scores"].keys() and not killed.exists()
    assert scored(clip=str(judge))["scores"] == first["scores"] and made() == before
    (tmp_path / "prompts.txt").write_text("a {token} {class_word} in snow\n")
    other_prompts = scored(clip=str(judge))["scores"]
    assert made() > before and other_prompts["clip_t"] != first["scores"]["clip_t"]
    before = made()
    weights = load_file(judge / "model.safetensors")
    weights["visual_projection.weight"] *= torch.linspace(-1, 2, len(weights["visual_projection.weight"]))[
        :, None
    ]
    save_file(weights, judge / "model.safetensors", metadata={"format": "pt"})
    other_judge = scored(clip=str(judge))["scores"]
    assert made() > before and other_judge["clip_i"] != other_prompts["clip_i"]
    assert "DINO" in as_text(gather(plan, ["mug"]))


def test_an_evaluation_that_no_batch_has_made_stays(scored, done):
    """A user's own, and a note in one of a batch's that is out of date."""
    folder = done[0].output / "mug" / "evaluation"
    folder.mkdir()
    (folder / "evaluation.json").write_text("mine")
    assert "holds what this batch has not made (evaluation.json)" in scored()["error"]
    assert (folder / "evaluation.json").read_text() == "mine"
    (folder / "evaluation.json").unlink()
    assert scored()["state"] == "done"
    (folder / "note.txt").write_text("mine")
    assert scored()["state"] == "done"  # nothing is made anew
    assert "(note.txt)" in scored(pictures=2)["error"] and (folder / "note.txt").read_text() == "mine"


def test_scores_are_asked_for_as_in_evaluate():
    """All that both have: one default."""
    theirs = {name: one.default for name, one in inspect.signature(evaluate).parameters.items()}
    ours = Scoring().model_dump()
    ours["steps"] = ours.pop("denoising_steps")
    assert ours == {name: theirs[name] for name in ours}


def test_two_workers_of_which_one_is_killed_make_the_same(shop, tmp_path):
    """Real Ray: after the first checkpoint of the subject that is trained first its worker gets SIGKILL. It goes on from
    there, no step is made twice in any log, and all adapters are bit for bit those of one undisturbed process."""
    pytest.importorskip("ray", reason="Ray is the extra coeffdiff[ray]")
    from coeffdiff.execution.ray_executor import RayExecutor

    often = {"training.checkpoint_every": 1, "training.steps": 12}
    calm = plan_for(shop, tmp_path / "calm", **often)
    batch(calm, LOCAL)
    plan = plan_for(shop, tmp_path / "out", **often)
    killed: list[int] = []
    watching = threading.Thread(target=_kill_the_first, args=(plan.output, killed), daemon=True)
    watching.start()
    results = batch(plan, RayExecutor(workers=2))
    assert len(killed) == 1, "no worker was killed in the middle"
    assert results["counts"] == {"done": 3, "failed": 1}
    again = [entry for entry in results["subjects"] if entry["starts"] > 1]
    assert [(entry["starts"], entry["how"]) for entry in again] == [(2, "continued")]
    for name in COLOURS:
        assert [line["step"] for line in read_log(plan.output / name / "log.jsonl")] == list(range(1, 13))
    assert adapters(plan.output) == adapters(calm.output)


def _kill_the_first(output: Path, killed: list[int]) -> None:
    """The process that the log of a subject names, as soon as that has a checkpoint."""
    while not killed:
        time.sleep(0.005)
        for checkpoint in output.glob("*/checkpoints/step-*/state.json"):
            name = checkpoint.parts[-4]
            first = (output / "tasks" / f"{name}.log").read_text().split("\n")[0]
            os.kill(int(first.split("process ")[1].split()[0]), signal.SIGKILL)
            killed.append(1)
            return


def command(shop: Path, *more: str):
    plain = ["batch", str(shop / "subjects.yaml"), "--model", str(shop / "model"), "--steps", "2"]
    sets = [
        "training.batch_size=1",
        "method.kind=coeff+lora",
        "method.lora.rank=2",
        "validation.prompts=[]",
        f"photos.cache={shop / 'cache'}",
    ]
    return CliRunner().invoke(app, [*plain, *(word for one in sets for word in ("--set", one)), *more])


def test_the_command_prints_the_table_and_ends_with_1_if_some_failed(shop, done):
    plan, _ = done
    output = ["--token", "ohwx", "--output", str(plan.output)]
    result = command(shop, *output)
    assert result.exit_code == 1 and "4 subjects: 3 done, 1 failed" in result.stdout, result.output
    result = command(shop, *output, "--part", "1/4", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["counts"] == {"done": 1}
    result = command(shop, *output, "--table")
    assert result.exit_code == 1 and "unchanged" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "mug has no token; give it one, or all of them one with --token"),
        (["--token", "ohwx", "--workers", "2"], "--workers is for --executor ray"),
        (["--token", "ohwx", "--score", "limit=1"], "--score is for --evaluate"),
        (["--token", "ohwx", "--evaluate", "--score", "limt=1"], "Unknown setting limt"),
        (["--token", "ohwx", "--part", "5/4"], "--part takes a share"),
        (["--token", "ohwx", "--part", "1/4", "--table"], "--table gathers all subjects"),
        (["--token", "ohwx", "--set", "training.stps=1"], "Unknown setting training.stps"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(shop, tmp_path, arguments, sentence):
    result = command(shop, "--output", str(tmp_path / "out"), *arguments)
    assert result.exit_code == 2 and sentence in result.output.replace("\n", " "), result.output
    assert not (tmp_path / "out").exists()


def test_several_processes_of_one_launch_are_refused(shop, tmp_path, monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    result = command(shop, "--token", "ohwx", "--output", str(tmp_path / "out"))
    assert result.exit_code == 2 and "--executor ray --workers N" in result.output


def test_a_file_in_the_way_is_one_sentence(shop, tmp_path):
    (tmp_path / "out").write_text("mine")
    result = command(shop, "--token", "ohwx", "--output", str(tmp_path / "out"))
    assert result.exit_code == 2 and "is a file" in result.output and (tmp_path / "out").read_text() == "mine"
