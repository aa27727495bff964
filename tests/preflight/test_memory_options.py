"""The one list of options that reduce a training run's memory: of a check and of out-of-memory errors."""

from __future__ import annotations

import pytest

from coeffdiff.config.loading import load_settings
from coeffdiff.config.tree import with_values
from coeffdiff.preflight.memory_options import MemoryOption, memory_options

LARGE = {
    "training.batch_size": 4,
    "training.accumulate": 2,
    "training.gradient_checkpointing": False,
    "training.precision": "no",
    "training.resolution": 1024,
    "method.kind": "coeff+lora",
    "method.coeff.backend": "reference",
}


def options_of(settings) -> list[MemoryOption]:
    prompts, quantize = settings.validation.prompts, settings.model.quantize
    return memory_options(settings.training, settings.method, prompts, "cpu", quantize=quantize)


def test_check_and_error_differ_in_what_is_listed_here():
    """A check keeps what is learned and how; a step holds no validation pictures. The rest is common."""
    options = options_of(load_settings(None, LARGE))
    assert len(options) == 8
    assert [option.named() for option in options if not option.predicted] == [
        "method.coeff.backend=auto",
        "method.lora.rank=4",
    ]
    assert [option.named() for option in options if not option.suggested] == [
        "validation.prompts=[] (no validation pictures)"
    ]


@pytest.mark.parametrize("number", range(8))
def test_each_option_can_be_set_and_then_leaves_the_list(number):
    """Its values are accepted, and it is not offered again."""
    settings = load_settings(None, LARGE)
    option = options_of(settings)[number]
    after = options_of(with_values(settings, dict(option.values)))
    assert option.named() not in [other.named() for other in after]


def test_an_option_as_the_user_writes_it():
    two = MemoryOption({"training.batch_size": 1, "training.accumulate": 8}, note="the same result")
    assert two.named() == "training.batch_size=1 training.accumulate=8 (the same result)"
    assert two.named("--set ") == "--set training.batch_size=1 --set training.accumulate=8 (the same result)"
    assert (
        MemoryOption({"training.gradient_checkpointing": True}).named()
        == "training.gradient_checkpointing=true"
    )
    assert (
        MemoryOption({"training.resolution": 768}, flag="--resolution 768").named("--set ")
        == "--resolution 768"
    )
