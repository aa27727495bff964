"""What "auto" becomes on a device that this machine may not have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from coeffdiff.config.loading import load_settings
from coeffdiff.data.photos import NO_PHOTOS
from coeffdiff.errors import ConfigError
from coeffdiff.models.finding import find_backbone
from coeffdiff.training.refusals import refuse_early
from coeffdiff.training.resolve import check_names, resolve


@pytest.mark.parametrize(("native", "precision"), [(True, "bf16"), (False, "fp16")])
def test_a_gpu_trains_in_bfloat16_only_where_it_does_not_imitate_it(native, precision, monkeypatch):
    """CUDA says of every card that it can; of a T4 or a V100 no more, asked without imitation."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
    )
    settings = load_settings(None, {"model.name": "pocket"})
    base = find_backbone(settings.model)
    resolved, chosen = resolve(settings, base, SimpleNamespace(device=torch.device("cuda")))
    assert resolved.training.precision == chosen["training.precision"] == precision


@pytest.mark.parametrize("setting", ["vae", "config", "variant"])
@pytest.mark.parametrize(("text", "says"), [
    ("my\u00a0model", r"has a character that cannot be printed \(U\+00A0\)"),
    ("my\u3000model", r"has a character that cannot be printed \(U\+3000\)"),
    ("m" * 1001, "has more than 100"),
])  # fmt: skip
def test_what_an_adapter_could_not_name_is_refused_before_weights_are_read(setting, text, says):
    """Its header holds printable text of some length; the base model's name is checked alike."""
    settings = load_settings(None, {"model.name": "pocket", f"model.{setting}": text})
    base = find_backbone(load_settings(None, {"model.name": "pocket"}).model)
    with pytest.raises(ConfigError, match=rf"model\.{setting} .*{says}"):
        refuse_early(settings, NO_PHOTOS, base)
    with pytest.raises(ConfigError, match=f"The name of the model .*{says}"):
        check_names(text, load_settings().model)


def test_names_that_an_adapter_can_hold_pass():
    check_names("m" * 1000, load_settings(None, {"model.vae": "é" * 900, "model.variant": "fp16"}).model)
