"""training.ema and training.optimizer in whole runs: what is averaged, where the average goes, and exact resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from coeffdiff.config.loading import load_settings
from coeffdiff.errors import ConfigError, ResumeError
from coeffdiff.pocket.model import save_random
from coeffdiff.training import loop
from coeffdiff.training.resuming import settings_to_resume
from coeffdiff.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def micro_folder(tmp_path_factory) -> Path:
    return save_random("micro", tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for i in range(2):
        Image.radial_gradient("L").resize((64, 64)).convert("RGB").rotate(30 * i).save(
            tmp_path / f"photos/{i}.png"
        )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def train(model: Path, output: str, steps: int = 4, **values) -> RunFolder:
    settings = {
        "model.name": str(model),
        "subject.images": "photos",
        "subject.token": "sks",
        "subject.class_word": "ball",
        "output": output,
        "training.steps": steps,
        "training.batch_size": 1,
        "method.kind": "coeff+lora",
        "method.lora.rank": 2,
        "validation.prompts": [],
        **values,
    }
    loop.train(load_settings(None, settings))
    return RunFolder(Path(output))


def resumed(run: RunFolder, steps: int) -> RunFolder:
    loop.train(settings_to_resume(run, None, {"training.steps": steps}, []), resume=run)
    return run


def learned(run: RunFolder, step: int, file: str = "trainables") -> dict[str, torch.Tensor]:
    return load_file(run.checkpoint(step) / f"{file}.safetensors")


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return {k: t for file in sorted(folder.glob("*.safetensors")) for k, t in load_file(file).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_adapters_are_the_average_of_all_steps(micro_folder):
    """Its definition by hand over the values after each step; those who learn are those of a run without it."""
    every = {
        "training.checkpoint_every": 1,
        "training.keep_checkpoints": 4,
        "training.keep_adapters_every": 2,
    }
    run = train(micro_folder, "averaged", **every, **{"training.ema": 0.2, "subject.learn_token": True})
    plain = train(micro_folder, "plain", **{"subject.learn_token": True})
    assert same(learned(run, 4), learned(plain, 4))
    average = learned(run, 1)
    for step in range(2, 5):
        decay = min(0.2, step / (9 + step))
        average = {k: decay * average[k] + (1 - decay) * t for k, t in learned(run, step).items()}
        torch.testing.assert_close(learned(run, step, "average"), average)
    alphas = load_file(run.adapter / "coeff.safetensors")
    torch.testing.assert_close(alphas, {name: average[name] for name in alphas})
    assert not same(alphas, load_file(plain.adapter / "coeff.safetensors"))
    tokens = load_file(run.adapter / "learned_embeds.safetensors")
    torch.testing.assert_close(tokens, {name: average[f"learned_token.{name}"] for name in tokens})
    assert same(adapter(run.adapter), adapter(run.checkpoint(4) / "adapter"))
    assert same(adapter(run.kept_adapter(2)), adapter(run.checkpoint(2) / "adapter"))
    again = learned(run, 2, "average")
    torch.testing.assert_close(
        load_file(run.kept_adapter(2) / "coeff.safetensors"), {k: again[k] for k in alphas}
    )


@pytest.mark.parametrize("optimizer", ["prodigy", "adafactor"])
def test_average_and_optimizer_resume_exactly(micro_folder, optimizer):
    """Two steps and two more are four, bit for bit, the average and what Prodigy found included."""
    if optimizer == "prodigy":
        pytest.importorskip("prodigyopt")
    values = {"training.ema": 0.9, "training.optimizer": optimizer}
    whole = train(micro_folder, "whole", **values)
    broken = resumed(train(micro_folder, "broken", steps=2, **values), 4)
    assert same(adapter(whole.adapter), adapter(broken.adapter))
    assert same(learned(whole, 4), learned(broken, 4))
    rates = [line["lr"] for line in map(json.loads, whole.log.read_text().splitlines())]
    assert rates == [line["lr"] for line in map(json.loads, broken.log.read_text().splitlines())]
    if optimizer == "prodigy":
        assert rates[-1][0] == rates[-1][1] and rates[-1][0] > rates[0][0]  # it has found a larger one


def test_another_average_is_another_run(micro_folder):
    run = train(micro_folder, "run", steps=1, **{"training.ema": 0.5})
    with pytest.raises(ResumeError, match=r"training\.ema was 0\.5, now 0\.9"):
        settings_to_resume(run, None, {"training.ema": 0.9}, [])
    with pytest.raises(ResumeError, match=r"training\.optimizer was 'adamw', now 'lion'"):
        settings_to_resume(run, None, {"training.optimizer": "lion"}, [])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"training.optimizer": "sgd"}, "suits sgd is not known here: set method.coeff.learning_rate=... and method.lora"),
        ({"training.optimizer": "prodigy", "method.lora.learning_rate": 0.5, "method.coeff.learning_rate": 1.0},
         "one factor for all that learns, but method.coeff.learning_rate is 1, method.lora.learning_rate is 0.5."),
        ({"training.optimizer": "prodogy"}, "Did you mean prodigy?"),
        ({"training.optimizer_args": {"beta": 1}}, "adamw takes no beta."),
        ({"training.optimizer_args": 3}, "training.optimizer_args"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_before_anything_is_written(micro_folder, values, said):
    with pytest.raises(ConfigError) as error:
        train(micro_folder, "run", **values)
    assert said in str(error.value)
    assert not Path("run").exists()
