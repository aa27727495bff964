"""Training on the text encoders: exact to resume, equal however the work is divided, and seen in pictures."""

from __future__ import annotations

from pathlib import Path

import pytest
import test_loop
import torch
from forking import fork_ranks
from PIL import Image
from test_loop import WORKER, assert_close, assert_same, command_line, logged, settings_for, weights
from torch.optim.optimizer import register_optimizer_step_pre_hook

from coeffdiff import load_adapter
from coeffdiff.config.loading import load_settings
from coeffdiff.config.schema import ModelSettings
from coeffdiff.data.batches import Batch
from coeffdiff.data.encoding import encode_texts
from coeffdiff.errors import ConfigError
from coeffdiff.hosts.text_encoders import encoders_on
from coeffdiff.method.adapter_file import read_header
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.loading import load_pipeline
from coeffdiff.sampling.generation import generate
from coeffdiff.sampling.options import Options, Request
from coeffdiff.training import loop
from coeffdiff.training.resuming import settings_to_resume
from coeffdiff.training.run_folder import RunFolder
from coeffdiff.training.text_encoders import TrainedEncoders

micro_folder, here = test_loop.micro_folder, test_loop.here
BOTH = {"method.coeff.text_encoders": True, "method.lora.text_encoders": True}
# All that reads captions, beside what trains on them
ALL = BOTH | test_loop.TAUGHT | {"subject.learn_token": True, "training.ema": 0.5}
LAST = "text_encoder.text_model.encoder.layers.1"  # of micro's first encoder, which SDXL does not read


def fresh(folder: Path, dtype=torch.float32):
    return load_pipeline(find_backbone(ModelSettings(name=str(folder))), dtype=dtype)


def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(micro_folder, monkeypatch):
    """4 steps against 2 + 2, with a token, prior preservation and dropped captions beside; all that can learn moves,
    and what the teacher of the prior reads is the base model's text."""
    seen = []

    def encode(plan):
        seen.append(made := loop_encode(plan))
        return made

    loop_encode = loop.encode
    monkeypatch.setattr(loop, "encode", encode)
    loop.train(settings_for(micro_folder, "whole", **ALL, **{"training.steps": 4}))
    loop.train(settings_for(micro_folder, "broken", **ALL, **{"training.steps": 2}))
    run = RunFolder(Path("broken"))
    loop.train(settings_to_resume(run, None, {"training.steps": 4}, []), resume=run)
    assert_same("whole", "broken")
    lines = logged("whole")
    assert [line["loss"] for line in lines] == [line["loss"] for line in logged("broken")]
    assert lines[0]["lr"][:4] == [3e-3, 1.5e-3, 1e-3, 5e-4]
    assert list(lines[0]["grad_norm"]) == ["coeff", "coeff_text", "lora", "lora_text", "token"]
    assert 0 < lines[0]["text_alpha"] < lines[-1]["text_alpha"]
    header = read_header(Path("whole/adapter"))
    assert (header.kind, header.format_version) == ("coeff+lora+token", 4)
    assert header.encoders == ("text_encoder", "text_encoder_2") == header.lora.encoders
    learned = weights("whole")
    still = {
        key for key, tensor in learned.items() if key.endswith((".alpha", "up.weight")) and not tensor.any()
    }
    assert still == {key for key in learned if key.startswith(LAST) and not key.endswith("down.weight")}
    texts = encode_texts(fresh(micro_folder), ["a photo of ball"])
    for inputs in seen:
        assert torch.equal(inputs.data.texts["a photo of ball"].embeds, texts["a photo of ball"].embeds)


def test_the_work_may_be_divided(micro_folder):
    """4 at once, 1 x 4, and two gloo ranks x 2 x 1: gradients of step 1 within 1e-5, then the adapters."""
    found: list[torch.Tensor] = []

    def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
        learned = [p for group in optimizer.param_groups for p in group["params"]]
        found.extend(p.grad.clone() for p in learned if p.grad is not None)

    values = BOTH | {"training.steps": 2, "prior.weight": 0.7, "method.coeff.learning_rate": 0.01}
    handle = register_optimizer_step_pre_hook(keep)
    loop.train(settings_for(micro_folder, "one", **values, **{"training.batch_size": 4}))
    handle.remove()
    split = {"training.batch_size": 1, "training.accumulate": 4}
    loop.train(settings_for(micro_folder, "split", **values, **split))
    assert_close("one", "split")
    extra = [part for name, value in values.items() for part in ("--set", f"{name}={str(value).lower()}")]
    extra += ["--set", "training.batch_size=1", "--set", "training.accumulate=2"]
    done, _ = fork_ranks(WORKER, "two.pt", *command_line(micro_folder, "two", *extra))
    assert done.returncode == 0, done.stderr
    two = torch.load("two.pt")
    assert len(found) == 2 * len(two)  # of both steps
    for number, gradient in two.items():
        one = found[number]
        assert (one - gradient).norm() <= 1e-5 * one.norm() + 1e-9
    assert_close("one", "two")


def test_pictures_are_made_with_the_encoders_of_their_step(micro_folder):
    """The last validation picture is, pixel for pixel, what the saved adapter makes of its recipe in a fresh
    pipeline; the one before shows other texts; and pictures disturb nothing."""
    values = BOTH | {
        "validation.prompts": ["a <V> in the snow"],
        "validation.seeds": [5],
        "validation.steps": 2,
    }
    values |= {"training.ema": 0.5, "method.coeff.text_learning_rate": 0.3, "training.steps": 4}
    loop.train(settings_for(micro_folder, "run", **values, **{"validation.every": 2}))
    (early,), (late,) = (sorted(Path(f"run/samples/step-00000{n}").glob("0*.png")) for n in (2, 4))
    pipe = fresh(micro_folder)
    load_adapter(pipe, "run")
    options = Options(steps=2, guidance=5.0, width=64, height=64)
    ((_, picture),) = generate(pipe, [Request("a sks in the snow", 5)], options)
    assert Image.open(late).tobytes() == picture.tobytes()
    assert Image.open(early).tobytes() != picture.tobytes()
    loop.train(settings_for(micro_folder, "without", **values | {"validation.prompts": []}))
    assert_same("run", "without")


def test_captions_run_through_the_encoders_as_they_are(micro_pipeline):
    """All but dropped ones, which keep the zeros of guidance, unless the model is guided by the empty text."""
    settings = load_settings(
        None, {"subject.token": "sks", "method.kind": "coeff+lora", "method.lora.alpha": 16, **BOTH}
    )
    trained = TrainedEncoders(micro_pipeline, settings, None)
    for layer in trained.coefficients.values():
        layer.alpha.data += 0.3
    sentinel = torch.full((3, 77, 48), 7.0), torch.full((3, 36), 7.0)
    empty = torch.zeros(3)
    batch = Batch(empty, empty, empty, *sentinel, empty, ("a sks ball", "", "a ball"), class_rows=1)
    embeds, pooled = trained.conditions(batch)
    assert (embeds[1] == 7).all() and (pooled[1] == 7).all() and embeds.dtype == torch.float32
    assert (embeds[[0, 2]] != 7).all() and (pooled[[0, 2]] != 7).all()
    (embeds.sum() + pooled.sum()).backward()
    without = {name for name, p in trained.lora.items() if p.grad is None}
    assert without and all(name.startswith("text_encoder.encoder.layers.1.") for name in without)
    assert all(p.requires_grad for p in trained.lora.values())
    frozen = {p for e in encoders_on(micro_pipeline).values() for p in e.parameters()} - {
        *trained.lora.values(), *(c.alpha for c in trained.coefficients.values()),
    }  # fmt: skip
    assert frozen and not any(p.requires_grad for p in frozen)
    micro_pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    embeds, _ = trained.conditions(batch)
    assert (embeds[1] != 7).all()


def test_one_part_alone_and_bf16(micro_folder):
    """alpha alone on encoders in bfloat16: it stays float32 and moves, and no LoRA is there."""
    values = {"method.kind": "coeff", "method.coeff.text_encoders": True, "training.precision": "bf16"}
    loop.train(settings_for(micro_folder, "run", **values, **{"training.steps": 2}))
    learned = weights("run")
    assert all(tensor.dtype == torch.float32 for tensor in learned.values())
    assert sum(key.startswith("text_encoder") for key in learned) == 5
    assert logged("run")[-1]["text_alpha"] > 0
    pipe = fresh(micro_folder, torch.bfloat16)
    load_adapter(pipe, "run").remove()


@pytest.mark.parametrize(("kind", "part"), [("lora", "coeff"), ("coeff", "lora"), ("token", "coeff")])
def test_a_part_that_is_not_trained_is_refused(kind, part):
    """One sentence, before anything is read."""
    with pytest.raises(
        ConfigError, match=rf"{part}.text_encoders has no effect with method {kind}, which trains no {part}"
    ):
        load_settings(None, {"method.kind": kind, f"method.{part}.text_encoders": True})
