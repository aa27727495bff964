"""A kept model: read once, lent bit for bit, whatever was done on the loans before."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from coeffdiff.config.loading import load_settings
from coeffdiff.config.schema import ModelSettings
from coeffdiff.errors import Interrupted
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.fingerprints import network_fingerprint
from coeffdiff.models.kept import KeptModel
from coeffdiff.models.loading import load_pipeline
from coeffdiff.pocket.model import save_random
from coeffdiff.training import loop

NETWORKS = ("unet", "vae", "text_encoder", "text_encoder_2")


@pytest.fixture
def micro(tmp_path):
    save_random("micro", tmp_path / "model")
    return tmp_path / "model"


def base_of(folder: Path, **settings):
    return find_backbone(ModelSettings(name=str(folder), **settings))


def settings_for(micro: Path, name: str, colour: str, **values):
    (micro.parent / name).mkdir(exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(micro.parent / name / "0.png")
    return load_settings(None, {
        "subject.images": str(micro.parent / name), "subject.token": "ohwx", "subject.class_word": "toy",
        "model.name": str(micro), "training.steps": 2, "training.batch_size": 1, "method.kind": "coeff+lora",
        "method.lora.rank": 2,
        "validation.prompts": ["a {token}"], "validation.steps": 1, "validation.seeds": [3],
        "output": str(micro.parent / f"run-{name}-{len(values)}"), **values,
    })  # fmt: skip


def tensors_of(adapter: Path) -> dict[str, bytes]:
    """The bytes of every tensor; the order of a file's metadata is chance."""
    files = adapter.glob("*.safetensors")
    return {
        f"{file.name} {name}": t.numpy().tobytes() for file in files for name, t in load_file(file).items()
    }


EVERYTHING = {
    "subject.learn_token": True,
    "method.coeff.text_encoders": True,
    "method.lora.text_encoders": True,
    "training.gradient_checkpointing": True,
}


def test_a_subject_after_others_is_what_it_is_alone(micro, monkeypatch):
    """After a training of everything that can be trained, and one that was broken off, subject B's adapter is bit for
    bit that of a process that trains B alone; and the kept networks are what is read from the files."""
    kept = KeptModel()
    loop.train(settings_for(micro, "a", "red", **EVERYTHING), load=kept.load)
    assert kept.reads == len(NETWORKS)

    def broken(*_, **__):
        raise Interrupted("Stopped.")

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(loop, "_loop", broken)
        loop.train(settings_for(micro, "c", "green"), load=kept.load)
    after = loop.train(settings_for(micro, "b", "blue"), load=kept.load)
    alone = loop.train(settings_for(micro, "b", "blue", **{"output": str(micro.parent / "alone")}))
    assert tensors_of(after.adapter) == tensors_of(alone.adapter) != {}
    assert next(after.run.glob("samples/*/*.png")).read_bytes() != b""
    assert kept.reads == len(NETWORKS)
    base = base_of(micro)
    lent, fresh = kept.load(base, dtype=torch.float32), load_pipeline(base, dtype=torch.float32)
    for name in NETWORKS:
        one, other = getattr(lent, name), getattr(fresh, name)
        assert network_fingerprint(one) == network_fingerprint(other)
        assert [type(module) for module in one.modules()] == [type(module) for module in other.modules()]
        assert not one.training and not any(p.requires_grad for p in one.parameters())
        assert not any(getattr(module, "gradient_checkpointing", False) for module in one.modules())
        assert "forward" not in vars(one)  # Accelerate's autocast


def test_loans_share_numbers_and_nothing_else(micro):
    kept, base = KeptModel(), base_of(micro)
    one, other = (kept.load(base, dtype=torch.float32, parts={"unet"}).unet for _ in range(2))
    first, second = next(one.parameters()), next(other.parameters())
    assert first.data_ptr() == second.data_ptr() and first is not second
    one.requires_grad_(True).train()
    assert not second.requires_grad and not other.training
    one.to(torch.bfloat16)  # as a move to a GPU, the loan's own
    assert second.dtype == torch.float32 and kept.reads == 1


def test_another_precision_or_a_file_that_changed_is_read(micro, tmp_path):
    """Another variant of the settings is no other model; other weights under the same name are."""
    kept = KeptModel()
    kept.load(base_of(micro), dtype=torch.float32)
    kept.load(base_of(micro, variant=None), dtype=torch.float32)
    assert kept.reads == 4
    file = next((micro / "unet").glob("*.safetensors"))
    os.utime(file, (1, 1))
    kept.load(base_of(micro), dtype=torch.float32)
    assert kept.reads == 5
    assert kept.load(base_of(micro), dtype=torch.bfloat16).unet.dtype == torch.bfloat16
    assert kept.reads == 9


def test_a_quantized_model_is_lent_too(micro):
    pytest.importorskip("torchao")
    kept, base = KeptModel(), base_of(micro, quantize="int8")
    fresh = load_pipeline(base, dtype=torch.float32, parts={"unet"}).unet
    for _ in range(2):
        lent = kept.load(base, dtype=torch.float32, parts={"unet"}).unet
        assert network_fingerprint(lent) == network_fingerprint(fresh)
    assert kept.reads == 1
