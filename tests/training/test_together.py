"""Parts that were built apart, in one run: it trains, its adapter loads in diffusers, and goes without a trace."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from coeffdiff import load_adapter
from coeffdiff.config.loading import load_settings
from coeffdiff.method.adapter_file import read_header
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.loading import load_pipeline
from coeffdiff.pocket.model import save_random
from coeffdiff.training import loop

TEXT = {"method.coeff.text_encoders": True, "method.lora.text_encoders": True}


@pytest.mark.parametrize(
    ("size", "values"),
    [
        ("sd15-micro", TEXT | {"training.ema": 0.9, "training.optimizer": "adafactor"}),
        ("micro", TEXT | {"subject.learn_token": True, "training.ema": 0.9, "prior.weight": 0.5, "subjects": True}),
        ("sd15-micro", {"subject.learn_token": True, "subjects": True}),
    ],
    ids=["sd15-text-ema", "subjects-text-token-ema-prior", "sd15-subjects-token"],
)  # fmt: skip
def test_a_run_with_many_parts(tmp_path, monkeypatch, size, values):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for number, folder in enumerate(("one", "two")):
        Path(folder).mkdir()
        for i in range(2):
            picture = Image.radial_gradient("L").resize((64, 64)).convert("RGB").rotate(40 * i + 9 * number)
            picture.save(f"{folder}/{i}.png")
    first = {"images": "one", "token": "ohwx", "class_word": "mug"}
    second = {"images": "two", "token": "zwx", "class_word": "dog"}
    several = values.get("subjects", False)
    values = {name: value for name, value in values.items() if name != "subjects"} | (
        {"subjects": [first, second]}
        if several
        else {f"subject.{key}": value for key, value in first.items()}
    )
    values |= {
        "model.name": str(save_random(size, tmp_path / "model")),
        "output": "run",
        "method.kind": "coeff+lora",
        "method.lora.rank": 2,
    }
    values |= {"training.steps": 2, "training.batch_size": 2, "validation.prompts": []}
    settings = load_settings(None, values)
    loop.train(settings)
    header = read_header(Path("run/adapter"))
    assert header.tokens == (("ohwx", "zwx") if several else ("ohwx",))
    assert bool(header.encoders) == ("method.lora.text_encoders" in values)

    pipe = load_pipeline(find_backbone(settings.model), dtype=torch.float32)
    seen = pipe.encode_prompt("a photo of ohwx mug", "cpu", 1, False)[0] if size != "micro" else None
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    adapter = load_adapter(pipe, "run")
    adapter.verify()
    if seen is not None:
        assert not torch.equal(pipe.encode_prompt("a photo of ohwx mug", "cpu", 1, False)[0], seen)
    adapter.remove()
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())
    if seen is not None:
        assert torch.equal(pipe.encode_prompt("a photo of ohwx mug", "cpu", 1, False)[0], seen)
