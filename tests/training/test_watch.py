"""What is watched while a run goes on: pictures that `sample` makes too, scores, the best adapter, trackers, curves."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from forking import fork_ranks
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.config.fields import EVALUATION_FIRST_SEED, VALIDATION_SEEDS
from coeffdiff.config.loading import load_settings
from coeffdiff.data.photos import read_photos
from coeffdiff.errors import ConfigError, ModelError
from coeffdiff.method.adapter_file import read_header
from coeffdiff.metrics.encoders import Encoders, load_clip, load_dino
from coeffdiff.metrics.pictures import references_of, score_pictures
from coeffdiff.pocket import POCKET_CLIP, POCKET_DINO
from coeffdiff.pocket.model import save_random
from coeffdiff.sampling.output import write_pictures
from coeffdiff.training import loop, trackers
from coeffdiff.training import step as step_module
from coeffdiff.training.curves import draw_curves, smoothed
from coeffdiff.training.judge import Judge, selection_score
from coeffdiff.training.resuming import settings_to_resume
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.training.trackers import check_watching, scalars, start_trackers, trackers_for

PROMPTS = ["a photo of {token} {class_word}", "<V> at night"]


@pytest.fixture(scope="module")
def micro_folder(tmp_path_factory) -> Path:
    return save_random("micro", tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for i, size in enumerate(((90, 80), (64, 64), (50, 110))):
        picture = Image.radial_gradient("L").resize(size).convert("RGB").rotate(30 * i)
        picture.save(tmp_path / f"photos/{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def settings_for(model: Path | str, output: str, **values):
    values = {
        "model.name": str(model),
        "subject.images": "photos",
        "subject.token": "sks",
        "subject.class_word": "ball",
        "output": output,
        "training.steps": 6,
        "training.batch_size": 2,
        "method.kind": "coeff+lora",
        "method.lora.rank": 3,
        "method.coeff.dropout": 0.3,
        "validation.prompts": PROMPTS[:1],
        "validation.every": 2,
        "validation.seeds": [7],
        "validation.steps": 1,
        **values,
    }
    return load_settings(None, values)


@pytest.fixture
def scored(micro_folder, vit, clip):
    """scored(output, **values): settings with both encoders."""
    judges = {"validation.dino": vit, "validation.clip": clip}
    return lambda output, **values: settings_for(micro_folder, output, **(judges | values))


def logged(run: str) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def scores_of(run: str) -> dict[int, dict[str, float]]:
    return {line["step"]: line["scores"] for line in logged(run) if "scores" in line}


def weights(run: str) -> dict[str, torch.Tensor]:
    return {
        k: t for file in sorted(Path(run).glob("adapter/*.safetensors")) for k, t in load_file(file).items()
    }


def assert_same(one: str, other: str) -> None:
    first, second = weights(one), weights(other)
    assert first
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key]), key


def pixels(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("0*.png"))]


def broken_off(call: int, real):
    """What raises KeyboardInterrupt at its call-th call, as a kill would end it."""
    calls = []

    def maybe(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    return maybe


@pytest.mark.parametrize("more", [[], ["--set", "training.ema=0.9"]], ids=["plain", "averaged"])
def test_the_final_pictures_are_those_of_sample(micro_folder, more):
    """Train by command line, then sample with the same prompts, seeds, steps and guidance: equal to the last bit."""
    line = [
        "train",
        "--model",
        str(micro_folder),
        "--images",
        "photos",
        "--token",
        "sks",
        "--class-word",
        "ball",
        "--method",
        "coeff+lora",
    ]
    line += [
        "--output",
        "run",
        "--steps",
        "4",
        "--set",
        "training.batch_size=2",
        "--set",
        "method.lora.rank=3",
    ]
    line += [
        "--set",
        "validation.seeds=[7, 8]",
        "--set",
        "validation.steps=3",
        "--set",
        "validation.guidance=3.5",
    ]
    line += ["--set", "method.lora.learning_rate=0.01", "--set", "validation.every=2"]
    line += ["--set", 'validation.prompts=["a photo of <V> {class_word}", "sks at night"]']
    trained = CliRunner().invoke(app, [*line, *more])
    assert trained.exit_code == 0, trained.output
    line = ["sample", "--adapter", "run", "--prompt", "a photo of <V> ball", "--prompt", "sks at night"]
    line += ["--seed", "7", "-n", "2", "--steps", "3", "--guidance", "3.5", "--output", "sampled"]
    sampled = CliRunner().invoke(app, line)
    assert sampled.exit_code == 0, sampled.output
    expected = pixels(Path("sampled"))
    assert len(expected) == 4
    for folder in (Path("run/samples/step-000004"), Path("run/adapter")):
        assert all(np.array_equal(a, b) for a, b in zip(pixels(folder), expected, strict=True))
    before = pixels(Path("run/samples/step-000002"))
    assert not any(np.array_equal(a, b) for a, b in zip(before, expected, strict=True))


def test_each_validation_is_scored_in_the_log(scored, vit, clip, whole_runs):
    """Steps 2, 4 and 6: what metrics make of the files, texts without the token, and their geometric mean."""
    loop.train(scored("run", **{"validation.prompts": PROMPTS}))
    found = scores_of("run")
    assert list(found) == [2, 4, 6] and [line["step"] for line in logged("run")] == [1, 2, 3, 4, 5, 6]
    encoders = Encoders(load_dino(vit), load_clip(clip))
    references = references_of(encoders, [photo.open() for photo in read_photos(Path("photos")).photos])
    for step, scores in found.items():
        files = sorted(Path(f"run/samples/step-{step:06d}").glob("0*.png"))
        texts = ["a photo of ball", "at night"]
        expected = score_pictures(encoders, references, [Image.open(file) for file in files], texts)
        expected["score"] = math.sqrt(max(0, expected["dino"]) * max(0, expected["clip_t"]))
        assert scores == pytest.approx(expected, abs=1e-4)
    assert found[2]["dino"] != found[6]["dino"]
    shown = ", ".join(f"{name} {value:.3f}" for name, value in found[6].items())
    assert f"| {shown}, by" in Path("run/adapter/README.md").read_text()
    assert Image.open("run/curves.png").size[0] == 792


def test_masks_count_in_scores_as_in_an_evaluation(scored, vit, clip, capsys):
    """One photo of three has a mask: fidelity to it without its background is scored beside fidelity to all three
    whole, and chooses the adapter. With training.masked_loss=false masks are not looked at here either."""
    with Image.open("photos/1.png") as photo:
        mask = Image.new("L", photo.size)
        mask.paste(255, (0, 0, 20, 64))
        mask.save("photos/1.mask.png")
    loop.train(scored("run", **{"training.steps": 2}))
    found = scores_of("run")[2]
    photos = read_photos(Path("photos")).photos
    pictures = [Image.open(file) for file in sorted(Path("run/samples/step-000002").glob("0*.png"))]
    encoders = Encoders(load_dino(vit), load_clip(clip))
    references = references_of(encoders, [p.open() for p in photos], [p.open_mask() for p in photos])
    assert references.masked["dino"].shape[0] == 1
    expected = score_pictures(encoders, references, pictures, ["a photo of ball"])
    assert expected["dino_masked"] != pytest.approx(expected["dino"], abs=1e-3)
    expected["score"] = math.sqrt(max(0, expected["dino_masked"]) * max(0, expected["clip_t"]))
    assert found == pytest.approx(expected, abs=1e-4)
    loop.train(scored("ignored", **{"training.steps": 2, "training.masked_loss": False}))
    assert scores_of("ignored")[2].keys() == {"dino", "clip_i", "clip_t", "score"}


def test_scores_change_nothing_that_is_trained_and_resume_is_exact(scored, micro_folder):
    """6 steps unwatched, 6 watched, and 6 broken off twice: while step 4's pictures are made, then in step 6."""
    loop.train(settings_for(micro_folder, "blind", **{"validation.prompts": [], "validation.every": 0}))
    loop.train(scored("whole"))
    assert_same("blind", "whole")
    run = RunFolder(Path("broken"))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("coeffdiff.training.preview.write_pictures", broken_off(2, write_pictures))
        loop.train(scored("broken", **{"training.checkpoint_every": 1}))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            "coeffdiff.training.step.denoising_loss", broken_off(3, step_module.denoising_loss)
        )  # of 4, 5, 6
        loop.train(run.settings(), resume=run)
    loop.train(run.settings(), resume=run)
    assert_same("whole", "broken")
    assert scores_of("whole") == scores_of("broken")
    assert [line["loss"] for line in logged("whole")] == [line["loss"] for line in logged("broken")]


def prescribed(scores: dict[int, float]):
    """In place of Judge.scores: the score that a step is to have."""

    def give(self, files):
        step = int(files[0].parent.name.removeprefix("step-"))
        return {"dino": scores[step], "clip_t": scores[step], "score": scores[step]}

    return give


def test_the_best_adapter_is_kept_as_it_was(scored, micro_folder, monkeypatch):
    """Scores .3, .3, .1 at 2, 4, 6: kept is step 2, the first of equals; it is the adapter of a run of 2 steps, says
    so, and its pictures come with it. Two more steps that score .5 are kept instead; a worse one after a kill is not."""
    monkeypatch.setattr(Judge, "scores", prescribed({2: 0.3, 4: 0.3, 6: 0.1, 8: 0.5, 10: 0.4}))
    loop.train(settings_for(micro_folder, "two", **{"training.steps": 2}))
    loop.train(scored("run", **{"validation.keep": "best"}))
    assert_same("two", "run")
    run = RunFolder(Path("run"))
    header = read_header(run.adapter)
    assert (header.trained_steps, header.run_steps) == (2, 6) and run.finished
    card = Path("run/adapter/README.md").read_text()
    assert "| 2 steps (kept of 6: the best of the validations), batch" in card
    assert f"| last loss | {logged('run')[1]['loss']:.4f} |" in card
    shown, two = pixels(run.adapter), pixels(Path("two/adapter"))
    assert len(shown) == 1 and all(np.array_equal(a, b) for a, b in zip(shown, two, strict=True))

    loop.train(settings_to_resume(run, None, {"training.steps": 8}, []), resume=run)
    assert read_header(run.adapter).trained_steps == 8
    loop.train(settings_for(micro_folder, "eight", **{"training.steps": 8}))
    assert_same("eight", "run")  # the last weights had stayed what they were

    longer = settings_to_resume(run, None, {"training.steps": 10}, [])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("coeffdiff.training.step.denoising_loss", broken_off(2, step_module.denoising_loss))
        loop.train(longer, resume=run)
    loop.train(run.settings(), resume=run)
    header = read_header(run.adapter)
    assert (header.trained_steps, header.run_steps) == (8, 10)
    assert_same("eight", "run")


def test_a_best_that_was_found_otherwise_is_no_measure(scored, monkeypatch, capsys):
    """Resumed with another seed for its pictures: the .9 of step 2 is forgotten, and that is said."""
    monkeypatch.setattr(Judge, "scores", prescribed({2: 0.9, 4: 0.3, 6: 0.2}))
    loop.train(scored("run", **{"validation.keep": "best", "training.steps": 2}))
    run = RunFolder(Path("run"))
    loop.train(settings_to_resume(run, None, {"training.steps": 6}, ["validation.seeds=[8]"]), resume=run)
    assert read_header(run.adapter).trained_steps == 4
    assert "validation was changed, so the best adapter is looked for anew" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [6, 8])
def test_until_the_last_validation_a_run_that_keeps_its_best_is_unfinished(scored, monkeypatch, steps):
    """Killed in the pictures of the last step: the best so far is there, and --resume chooses for good. With more
    steps to go those pictures are made first, so that no validation is missing."""
    monkeypatch.setattr(Judge, "scores", prescribed({2: 0.1, 4: 0.2, 6: 0.3, 8: 0.1}))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("coeffdiff.training.preview.write_pictures", broken_off(3, write_pictures))
        loop.train(scored("run", **{"validation.keep": "best"}))
    run = RunFolder(Path("run"))
    assert read_header(run.adapter).trained_steps == 4 and not run.finished
    loop.train(settings_to_resume(run, None, {"training.steps": steps}, []), resume=run)
    header = read_header(run.adapter)
    assert (header.trained_steps, header.run_steps) == (6, steps) and run.finished
    assert list(scores_of("run")) == list(range(2, steps + 1, 2))


def events(run: str):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(f"{run}/tensorboard", size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def test_tensorboard_has_every_step_once_across_a_resume(scored):
    """Broken off in step 6 after the checkpoint of step 4: step 5 is logged twice and counts once; pictures too."""
    values = {"tracking.tensorboard": True, "training.checkpoint_every": 4}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("coeffdiff.training.step.denoising_loss", broken_off(6, step_module.denoising_loss))
        loop.train(scored("run", **values))
    assert [e.step for e in events("run").Scalars("loss")] == [1, 2, 3, 4, 5]
    run = RunFolder(Path("run"))
    loop.train(run.settings(), resume=run)
    found = events("run")
    assert [e.step for e in found.Scalars("loss")] == [1, 2, 3, 4, 5, 6]
    lines = logged("run")
    for tag, value in (
        ("loss", lambda line: line["loss"]),
        ("alpha", lambda line: line["alpha"]),
        ("lr/coeff", lambda line: line["lr"][0]),
        ("lr/lora", lambda line: line["lr"][1]),
        ("grad_norm/lora", lambda line: line["grad_norm"]["lora"]),
    ):
        assert [e.value for e in found.Scalars(tag)] == pytest.approx(
            [value(line) for line in lines], rel=1e-5
        )
    scores = scores_of("run")
    assert {e.step: e.value for e in found.Scalars("scores/dino")} == pytest.approx(
        {step: of["dino"] for step, of in scores.items()}, rel=1e-5
    )
    tag = "samples/001-a-photo-of-sks-ball-seed7"
    pictures = found.Images(tag)
    assert [e.step for e in pictures] == [2, 4, 6]
    assert (pictures[0].width, pictures[0].height) == (64, 64)


def test_a_run_killed_before_its_first_checkpoint_begins_its_log_anew(micro_folder):
    """Step 1 logged by two processes, both of which began at 0: the second counts."""
    settings, run = (
        settings_for(micro_folder, "run", **{"tracking.tensorboard": True}),
        RunFolder(Path("run")),
    )
    for value in (1.0, 2.0):
        accelerator = Accelerator(cpu=True, log_with=trackers_for(settings, run))
        start_trackers(accelerator, settings, run, 0)
        accelerator.log({"loss": value}, step=1)
        accelerator.trackers[0].finish()
    assert [(e.step, e.value) for e in events("run").Scalars("loss")] == [(1, 2.0)]


def test_weights_and_biases_offline(scored, monkeypatch):
    """WANDB_MODE=offline: one run, begun and continued under one id, in the run folder."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    values = {"tracking.wandb": True, "training.steps": 2}
    loop.train(scored("run", **values))
    run = RunFolder(Path("run"))
    loop.train(settings_to_resume(run, None, {"training.steps": 4}, []), resume=run)
    names = [path.name for path in Path("run/wandb").glob("offline-run-*")]
    own = Path("run/wandb/run-id.txt").read_text()
    assert len(names) == 2 and all(name.endswith(own) for name in names)
    stored = b"".join(path.read_bytes() for path in Path("run/wandb").glob("offline-run-*/*.wandb"))
    assert b"grad_norm/lora" in stored and b"scores/dino" in stored
    assert list(Path("run/wandb").glob("offline-run-*/files/media/images/samples/*.png"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused_at_the_start(micro_folder, monkeypatch, name):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(
        ConfigError, match=rf"tracking\.{name} needs the package {name}, which is not installed"
    ):
        loop.train(settings_for(micro_folder, "run", **{f"tracking.{name}": True}))
    assert not Path("run").exists()


@pytest.mark.parametrize("newer", [True, False], ids=["login(prompt=False)", "api.api_key"])
def test_weights_and_biases_without_an_account_is_refused_at_the_start(micro_folder, monkeypatch, newer):
    """A stand-in for the package, newer and older: installed, nobody logged in; then somebody, then offline."""
    module = type(sys)("wandb")
    known: list[str] = []
    if newer:
        module.login = lambda prompt=True: bool(known)
    else:
        module.login = lambda key=None: pytest.fail("would ask the person")
        module.api = type("Api", (), {"api_key": property(lambda self: known[0] if known else None)})()
    module.__spec__ = type("Spec", (), {"name": "wandb"})()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    settings = settings_for(micro_folder, "run", **{"tracking.wandb": True})
    with pytest.raises(ConfigError, match=r"tracking\.wandb needs an account: run `wandb login`"):
        loop.train(settings)
    assert not Path("run").exists()
    known.append("key")
    check_watching(settings)
    known.clear()
    monkeypatch.setenv("WANDB_MODE", "offline")
    check_watching(settings)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"validation.dino": None, "validation.clip": None}, "needs scores, so name an encoder"),
        ({"validation.every": 0}, r"so it needs validation\.every"),
        ({"validation.prompts": []}, r"so it needs validation\.prompts"),
    ],
)
def test_a_best_that_nothing_could_find_is_refused_at_the_start(scored, values, sentence):
    with pytest.raises(ConfigError, match=sentence):
        loop.train(scored("run", **{"validation.keep": "best"}, **values))
    assert not Path("run").exists()


def test_an_encoder_that_is_not_there_is_told_before_anything_is_written(scored):
    with pytest.raises(ModelError, match="The encoder nowhere/at/all cannot be loaded"):
        loop.train(scored("run", **{"validation.clip": "nowhere/at/all"}))
    assert not Path("run").exists()


def test_pocket_brings_its_own_judges_and_other_models_none(micro_folder):
    """One step of pocket, one small picture; the names are in config.yaml, so that the run can be repeated."""
    values = {
        "training.steps": 1,
        "validation.every": 0,
        "validation.prompts": PROMPTS[:1],
        "validation.steps": 1,
    }
    loop.train(settings_for("pocket", "own", **values))
    validation = RunFolder(Path("own")).settings().validation
    assert (validation.dino, validation.clip) == (POCKET_DINO, POCKET_CLIP)
    assert {"dino", "clip_i", "clip_t", "score"} == scores_of("own")[1].keys()
    loop.train(settings_for(micro_folder, "none", **values))
    validation = RunFolder(Path("none")).settings().validation
    assert (validation.dino, validation.clip) == (None, None)
    assert scores_of("none") == {}


def test_the_seeds_of_evaluation_choose_no_adapter():
    """No number is in both ranges, and the settings hold to it."""
    assert max(VALIDATION_SEEDS) < EVALUATION_FIRST_SEED
    assert load_settings(None, {"validation.seeds": [EVALUATION_FIRST_SEED - 1]})
    with pytest.raises(ConfigError, match="must lie below 100000, where the seeds of evaluation begin"):
        load_settings(None, {"validation.seeds": [0, EVALUATION_FIRST_SEED]})


def test_two_processes_make_one_set_of_pictures(micro_folder, vit):
    """Two gloo ranks: pictures, scores and curves once; the other rank waits, and both come to the end."""
    line = ["train", "--model", str(micro_folder), "--images", "photos", "--token", "sks", "--output", "run"]
    line += ["--method", "coeff+lora"]
    for setting in (
        "training.steps=2", "training.batch_size=1", "method.lora.rank=3", "validation.every=1",
        "validation.steps=1", "validation.seeds=[7]", 'validation.prompts=["<V>"]', f"validation.dino={vit}",
        "validation.keep=best", "tracking.tensorboard=true",
    ):  # fmt: skip
        line += ["--set", setting]
    done, other = fork_ranks("-m", "coeffdiff", *line)
    assert done.returncode == other.returncode == 0, done.stderr + other.stderr
    assert list(scores_of("run")) == [1, 2]
    assert len(list(Path("run/samples/step-000001").glob("*.png"))) == 2
    assert (done.stderr + other.stderr).count("scores   step 1:") == 1
    assert [e.step for e in events("run").Scalars("loss")] == [1, 2]
    assert read_header(Path("run/adapter")).run_steps == 2


# --- by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"dino": 0.64, "clip_i": 0.9, "clip_t": 0.25}, 0.4),
        ({"clip_i": 0.81, "clip_t": 0.25}, 0.45),
        ({"dino": 0.64}, 0.64),
        ({"dino": 0.64, "dino_masked": 0.36, "clip_i": 0.9, "clip_i_masked": 0.8, "clip_t": 0.25}, 0.3),
        ({"clip_i": 0.81, "clip_i_masked": 0.49, "clip_t": 0.25}, 0.35),
        ({"dino": 0.0, "clip_t": 0.3}, 0.0),
        ({"dino": -0.2, "clip_t": 0.3}, -0.2),
        ({"dino": -0.2, "clip_t": -0.3}, -0.3),
        ({"dino": 0.5, "clip_t": float("nan")}, -1.0),
        ({}, 0.0),
    ],
)
def test_the_score_is_a_geometric_mean(scores, expected):
    """sqrt(.64 * .25) = .4: DINO before CLIP-I, without background before whole; below zero the lower one."""
    assert selection_score(scores) == pytest.approx(expected)


def test_an_overfitted_step_scores_less():
    """Two per cent nearer to the photos for ten per cent less of the prompt is a bad bargain."""
    before, after = {"dino": 0.70, "clip_t": 0.31}, {"dino": 0.714, "clip_t": 0.279}
    assert selection_score(before) > selection_score(after)


def test_lines_of_the_log_become_scalars():
    line = {
        "step": 3,
        "loss": 0.5,
        "alpha": None,
        "lr": [1e-2, 1e-3],
        "grad_norm": {"coeff": 2.0, "lora": math.inf},
    }
    assert scalars(line | {"skipped": False}) == {
        "loss": 0.5, "lr/coeff": 1e-2, "lr/lora": 1e-3, "grad_norm/coeff": 2.0, "skipped": 0.0,
    }  # fmt: skip
    assert scalars({"step": 1, "lr": [0.1, 0.2], "grad_norm": {"coeff": 1}}).keys() == {
        "lr/0", "lr/1", "grad_norm/coeff",
    }  # fmt: skip


def test_smoothing_by_hand():
    """Width 2 halves the weight each step: 4, (4/2 + 1)/(1/2 + 1) = 2, (4/4 + 1/2 + 9)/(1/4 + 1/2 + 1) = 6."""
    assert smoothed([4.0, 1.0, 9.0], 2) == pytest.approx([4.0, 2.0, 6.0])
    assert smoothed([4.0, 1.0], 1) == [4.0, 1.0]


def test_curves_show_what_the_log_has(tmp_path):
    """A panel each for loss, alpha and scores; with loss alone one; with nothing no file."""
    log, file = tmp_path / "log.jsonl", tmp_path / "curves.png"
    log.write_text("")
    draw_curves(log, file)
    assert not file.exists()
    lines = [{"step": s, "loss": 1 / s, "alpha": None} for s in range(1, 9)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(log, file)
    small = Image.open(file).size
    lines = [line | {"alpha": 0.1 * line["step"]} for line in lines]
    lines[3]["scores"] = {"dino": 0.4, "dino_masked": 0.3, "clip_i": 0.5, "clip_i_masked": 0.45}
    lines[3]["scores"] |= {"clip_t": 0.2, "score": 0.28}
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw_curves(log, file, kept=4)
    large = Image.open(file)
    assert large.size[1] > 2 * small[1] and large.size[0] == small[0]
    colours = {colour for _, colour in large.convert("RGB").getcolors(1 << 20)}
    assert {(0xB4, 0x58, 0x2A), (0x3B, 0x6E, 0xA5)} <= colours
