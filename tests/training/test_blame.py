"""Runs that meet numbers that are not finite: they go on where that is right, and else the sentence names the cause."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.errors import NonFiniteLoss
from coeffdiff.method.adapter_file import read_header
from coeffdiff.pocket.model import save_random
from coeffdiff.training import finite
from coeffdiff.training import step as step_module
from coeffdiff.training.breakdown import Breakdown, find_breakdown
from coeffdiff.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_random("micro", tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture(autouse=True)
def model(saved, tmp_path, monkeypatch) -> Path:
    """A copy of the tiny model to break, beside two photos."""
    (tmp_path / "photos").mkdir()
    for turned in (0, 90):
        picture = Image.radial_gradient("L").resize((64, 48)).rotate(turned, expand=True)
        picture.convert("RGB").save(tmp_path / f"photos/{turned}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return Path(shutil.copytree(saved, tmp_path / "model"))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def poison(file: Path, value: float = math.nan) -> str:
    """One number of a weight that everything passes; its name."""
    held = load_file(file)
    left_out = ("embed", "decoder")  # which not every text and no photo passes
    names = (name for name in sorted(held) if name.endswith("weight"))
    name = next(name for name in names if not any(part in name for part in left_out))
    held[name].view(-1)[0] = value
    save_file(held, file, metadata={"format": "pt"})
    return name


def run(command: str, *more: str):
    arguments = [
        "--images",
        "photos",
        "--token",
        "sks",
        "--class-word",
        "ball",
        "--model",
        "model",
        "--method",
        "coeff+lora",
        "--steps",
        "3",
    ]
    if command == "train":
        arguments += ["--output", "run", "--set", "validation.prompts=[]"]
    return CliRunner().invoke(app, [command, *arguments, *more])


def refused(ended) -> str:
    assert ended.exit_code == 2, ended.output + repr(ended.exception)
    assert "Traceback" not in ended.output
    return ended.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_zero_terminal_snr_trains_to_the_end(model, kind, monkeypatch, whole_runs):
    """Every sample of every other step is pure noise, at min-SNR's own gamma; the losses are numbers."""
    edit(model / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True, prediction_type=kind)
    real, seen = step_module.denoising_loss, []

    def at_the_end(predict, latents, noise, timesteps, *more, **named):
        seen.append(1)
        return real(
            predict, latents, noise, timesteps.fill_(999) if len(seen) % 2 else timesteps, *more, **named
        )

    monkeypatch.setattr("coeffdiff.training.step.denoising_loss", at_the_end)
    ended = run("train")
    assert ended.exit_code == 0, ended.output
    losses = [json.loads(line)["loss"] for line in Path("run/log.jsonl").read_text().splitlines()]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    assert (losses[0] == 0) == (kind == "v_prediction")
    assert read_header(Path("run/adapter")).trained_steps == 3
    assert ("hint     model: its scheduler has zero terminal SNR" in ended.stderr) == (kind == "epsilon")


def test_a_run_that_had_died_of_it_goes_on(model, monkeypatch):
    """A checkpoint of step 1, then NaN, as the weights of before gave; resumed, it ends as if nothing had been."""
    real, seen = step_module.denoising_loss, []

    def dies(*arguments, **named):
        seen.append(1)
        return real(*arguments, **named) * (math.nan if len(seen) == 2 else 1)

    monkeypatch.setattr("coeffdiff.training.step.denoising_loss", dies)
    every = ("--set", "training.checkpoint_every=1")
    assert "not finite at step 2" in refused(run("train", *every))
    monkeypatch.setattr("coeffdiff.training.step.denoising_loss", real)
    ended = run("train", "--resume")
    assert ended.exit_code == 0, ended.output
    assert RunFolder(Path("run")).finished


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (
            "unet/diffusion_pytorch_model.safetensors",
            "the base model's UNet holds such numbers in {name}, so it is damaged",
        ),
        (
            "vae/diffusion_pytorch_model.safetensors",
            "The VAE gives values that are not finite in torch.float32",
        ),
        (
            "text_encoder/model.safetensors",
            "The text encoders give values that are not finite in float32: they are damaged",
        ),
        (
            "text_encoder_2/model.safetensors",
            "The text encoders give values that are not finite in float32: they are damaged",
        ),
    ],
)
def test_damaged_weights_are_named_and_no_rate(model, file, words):
    name = poison(model / file)
    said = refused(run("train"))
    assert words.format(name=name) in said
    assert "rate" not in said
    assert not Path("run/adapter").exists()


def test_a_base_model_that_overflows_is_named(model):
    """Every weight is finite, its products are not."""
    file = model / "unet/diffusion_pytorch_model.safetensors"
    held = load_file(file)
    for name in ("conv_in.weight", "conv_out.weight"):
        held[name].fill_(3e38)
    save_file(held, file, metadata={"format": "pt"})
    said = refused(run("train"))
    assert "the base model itself predicts such numbers in precision no" in said
    assert "rate" not in said


def test_a_weight_of_the_loss_is_named():
    """prior.weight beyond float32."""
    said = refused(run("train", "--set", "prior.weight=1e39"))
    assert "prior.weight 1e+39" in said and "learning_rate" not in said


def test_a_backward_pass_that_overflows_at_once_is_not_the_rates_fault(monkeypatch):
    """Nothing has been learned before step 1, so no rate can be at fault."""
    real = step_module.denoising_loss
    monkeypatch.setattr(
        "coeffdiff.training.step.denoising_loss", lambda *a, **k: real(*a, **k) * torch.tensor(1e38) * 1e38
    )
    said = refused(run("train"))
    assert "not finite at step 1; nothing had been learned yet" in said and "rate" not in said


def test_fp16_that_overflows_for_ever_ends_the_run():
    """41 skipped steps in a row: the scaler is at 2^-25 by then. Fewer are its ordinary work."""
    line = {"step": 60, "loss": 0.5, "grad_norm": {"lora": math.inf}}
    folder = RunFolder(Path("run"))
    finite.check_finite(line, folder, "fp16", 40, lambda *_: "")
    with pytest.raises(
        NonFiniteLoss, match=r"overflowed in fp16 at each of the last 41 steps.*precision=bf16"
    ):
        finite.check_finite(line, folder, "fp16", 41, lambda *_: "")


# --- what check knows ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("scheduler/scheduler_config.json", {"beta_end": 1.5}, "which make no noise schedule"),
        ("scheduler/scheduler_config.json", {"beta_end": math.nan}, "which make no noise schedule"),
        ("vae/config.json", {"scaling_factor": 0}, "scales latents by 0"),
        ("vae/config.json", {"scaling_factor": math.inf}, "scales latents by inf"),
        ("vae/config.json", {"latents_mean": [0.0] * 4, "latents_std": [1.0, 1.0, 0.0, 1.0]}, "above zero"),
    ],
)
def test_configs_that_would_give_no_numbers_are_refused_by_both(model, file, change, words):
    edit(model / file, **change)
    said = [refused(run(command)) for command in ("check", "train")]
    assert words in said[0] and said[0] == said[1]
    assert not Path("run").exists()


def test_check_tells_of_rates_and_of_a_schedule_that_does_not_fit(model):
    edit(model / "scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    ended = run("check", "--set", "method.coeff.learning_rate=30")
    assert ended.exit_code == 0, ended.output
    assert "hint     model: its scheduler has zero terminal SNR" in ended.stdout
    assert "problem  rate: method.coeff.learning_rate 30 is far above the usual" in ended.stdout


def test_a_training_that_broke_down_says_so(monkeypatch, whole_runs):
    """Numbers all along, but the loss has risen for good: the run's end says it, the adapter's card, and no card of a
    step before."""
    real, seen = step_module.denoising_loss, []

    def rises(*arguments, **named):
        seen.append(1)
        return real(*arguments, **named) * (4 if len(seen) > 9 else 1)

    monkeypatch.setattr("coeffdiff.training.step.denoising_loss", rises)
    more = ("--steps", "14", "--set", "training.batch_size=32", "--set", "training.keep_adapters_every=8")
    ended = run("train", *more)
    assert ended.exit_code == 0, ended.output
    [said] = [line for line in ended.stderr.splitlines() if "broke down" in line]
    assert re.fullmatch(
        r"hint     from about step 11 on the loss rose from [\d.]+ to [\d.]+: this training broke down. Start anew "
        r"with a lower method.coeff.learning_rate \(.*\) or method.lora.learning_rate \(.*\), or with fewer steps",
        said,
    )
    assert "| the training broke down | from about step 11 on" in Path("run/adapter/README.md").read_text()
    assert "broke down" not in RunFolder(Path("run")).kept_adapter(8).joinpath("README.md").read_text()


@pytest.mark.parametrize(
    ("losses", "found"),
    [
        ([0.05] * 100, None),
        ([0.05] * 60 + [0.09] * 40, None),  # less than twice as much
        ([0.2] * 30 + [0.05] * 70, None),  # it fell
        ([0.05] * 30 + [0.3] * 30 + [0.05] * 40, None),  # and recovered
        ([0.05] * 60 + [0.2] * 40, Breakdown(61, 0.05, 0.2)),
        ([0.05] * 50 + [0.2] * 10 + [0.05] * 20 + [0.2] * 20, Breakdown(81, 0.05, 0.2)),
        ([0.05] * 10 + [0.2] * 8, None),  # too few to tell
        ([0.05] * 10 + [None] * 3 + [0.2] * 20, Breakdown(14, 0.05, 0.2)),  # steps that a scaler skipped
    ],
)
def test_a_breakdown_is_a_rise_for_good(losses, found):
    lines = [{"step": number, "loss": loss} for number, loss in enumerate(losses, start=1)]
    seen = find_breakdown(lines, samples_a_step=13)
    assert (seen and (seen.step, round(seen.before, 6), round(seen.after, 6))) == (
        found and (found.step, found.before, found.after)
    )
