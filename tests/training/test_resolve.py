"""What "auto" becomes on a device that this machine may not have."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from coeffdiff.config.loading import load_settings
from coeffdiff.models.finding import find_backbone
from coeffdiff.training.resolve import resolve


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
