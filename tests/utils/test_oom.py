"""Out of memory is one sentence, with the switches that are still to be turned and no others."""

from __future__ import annotations

import pytest
import torch

from coeffdiff.config.loading import load_settings
from coeffdiff.errors import OutOfMemory
from coeffdiff.sampling.memory_options import sampling_switches
from coeffdiff.training.memory_options import training_switches
from coeffdiff.utils.oom import is_out_of_memory, oom_hints, oom_sentence

CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "68719476736 bytes. Error code 12 (Cannot allocate memory)"
)
GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 11 GiB"
)


SMALL = {
    "training.batch_size": 1,
    "training.accumulate": 1,
    "training.gradient_checkpointing": True,
    "training.precision": "bf16",
    "training.resolution": 64,
    "method.kind": "coeff+lora",
    "method.lora.rank": 4,
    "model.quantize": "int8",
}


@pytest.fixture(autouse=True)
def gpu_with_bf16(monkeypatch):
    monkeypatch.setattr("coeffdiff.utils.torch_setup.has_bf16", lambda: True)


def test_an_older_gpu_is_offered_what_it_computes_in(monkeypatch):
    """One that only imitates bfloat16: float16; a CPU still has bfloat16."""
    monkeypatch.setattr("coeffdiff.utils.torch_setup.has_bf16", lambda: False)
    plain = settings(**{"training.precision": "no"})
    assert training_switches(plain, "cuda") == ["--set training.precision=fp16"]
    assert training_switches(plain, "cpu") == ["--set training.precision=bf16"]
    drawing = {"batch_size": 1, "offload": "sequential", "precision": "fp32", "size": (64, 64)}
    drawing["quantize"] = None
    assert sampling_switches(**drawing, device_type="cuda") == ["--precision fp16"]


def settings(**values):
    return load_settings(None, SMALL | values)


@pytest.mark.parametrize(
    ("error", "counts"),
    [
        (CPU, True),
        (GPU, True),
        (RuntimeError("could not create a primitive"), True),
        (MemoryError(), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_a_shortage(error, counts):
    assert is_out_of_memory(error) == counts


def test_the_real_allocators_error_is_known():
    """Eight exbibytes: what torch itself raises on this machine."""
    with (
        pytest.raises(
            OutOfMemory, match=r"^This machine has too little memory for this \(.* GiB more were asked"
        ),
        oom_hints(list),
    ):
        torch.empty(2**60)


def test_nothing_that_is_on_is_recommended():
    """Every switch on: none is left, and the sentence says what is."""
    assert training_switches(settings(), "cuda") == []
    assert "a larger GPU or a smaller model" in oom_sentence(GPU, [])
    assert "a larger machine or a smaller model" in oom_sentence(CPU, [])


@pytest.mark.parametrize(
    ("values", "switch"),
    [
        ({"training.gradient_checkpointing": False}, "--set training.gradient_checkpointing=true"),
        (
            {"training.batch_size": 4, "training.accumulate": 2},
            "--set training.batch_size=1 --set training.accumulate=8 (the same result)",
        ),
        ({"training.precision": "no"}, "--set training.precision=bf16"),
        ({"training.resolution": 1024}, "--resolution 768"),
        ({"training.resolution": 128}, "--resolution 64"),
        ({"method.lora.rank": 16}, "--set method.lora.rank=4"),
        ({"method.coeff.backend": "reference"}, "--set method.coeff.backend=auto"),
    ],
)
def test_each_switch_that_is_off_is_named_and_is_a_setting(values, switch):
    """And what it says is accepted, and takes it off the list."""
    before = settings(**values)
    assert training_switches(before, "cuda") == [switch]
    said = switch.partition(" (")[0].replace("--resolution ", "--set training.resolution=")
    assignments = [part.strip() for part in said.split("--set ") if part.strip()]
    turned = load_settings(None, SMALL | values, assignments)
    assert switch not in training_switches(turned, "cuda")


def test_alpha_alone_has_no_rank_and_lora_alone_no_backend():
    both = {"method.lora.rank": 16, "method.coeff.backend": "reference"}
    assert training_switches(settings(**both, **{"method.kind": "coeff"}), "cpu") == [
        "--set method.coeff.backend=auto"
    ]
    assert training_switches(settings(**both, **{"method.kind": "lora"}), "cpu") == [
        "--set method.lora.rank=4"
    ]


def test_what_a_resumed_run_may_not_change_begins_a_new_one():
    """It would be refused at --resume; what changes no result is not."""
    values = {"method.lora.rank": 8, "training.gradient_checkpointing": False}
    free, other = training_switches(settings(**values), "cpu", resumed=True)
    assert free == "--set training.gradient_checkpointing=true"
    assert other == "--set method.lora.rank=4 (begins a new run)"


def test_sampling_has_switches_of_its_own():
    """From the widest to the narrowest; offloading needs a GPU."""
    wide = {"batch_size": 4, "offload": "none", "precision": "fp32", "quantize": None, "size": (1024, 768)}
    every = ["--batch-size 1", "--precision bf16", "--offload model", "--quantize int8"]
    every.append("--width 768 --height 576")
    assert sampling_switches(**wide, device_type="cuda") == every
    assert sampling_switches(**wide, device_type="cpu") == [every[0], every[1], *every[3:]]
    quantized = {"batch_size": 1, "precision": "bf16", "quantize": "int8", "size": (64, 64)}
    assert sampling_switches(**quantized, offload="model", device_type="cuda") == []
    narrow = {**quantized, "quantize": None}
    both = ["--offload sequential", "--quantize int8"]
    assert sampling_switches(**narrow, offload="model", device_type="cuda") == both
    assert sampling_switches(**narrow, offload="sequential", device_type="cuda") == []


def test_the_sentence_by_hand():
    """How much was asked for, and what to turn, in order."""
    assert oom_sentence(GPU, ["--a", "--b 1"]) == (
        "The GPU has too little memory for this (20.00 MiB more were asked for). In this order: --a; --b 1."
    )
    assert oom_sentence(CPU, ["--a"]).startswith(
        "This machine has too little memory for this (64.0 GiB more were asked"
    )
    assert (
        oom_sentence(MemoryError(), ["--a"])
        == "This machine has too little memory for this. In this order: --a."
    )


def test_other_errors_pass():
    with pytest.raises(RuntimeError, match="shapes"), oom_hints(list):
        raise RuntimeError("shapes differ")
