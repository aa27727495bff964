"""Runs without numbers: what the ledger counts, and that it equals what real tensors hold and do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from coeffdiff.method.attention import mixed_attention
from coeffdiff.method.chunked import chunk_shape
from coeffdiff.preflight.dry_run import (
    Learned,
    bytes_of,
    decode_picture,
    encode_photo,
    make_learnable,
    train_step,
)
from coeffdiff.preflight.ledger import Ledger, ledger_for
from coeffdiff.preflight.stopwatch import _UNKNOWN_FLOPS, Stopwatch, _runner, _touched

META = torch.device("meta")


def on_meta(network):
    """Its shapes and types, without its weights."""
    return copy.deepcopy(network).to(META)


@pytest.fixture
def unet(built_micro):
    return on_meta(built_micro.unet)


def step(unet, learned=None, **other):
    values = {"batch": 2, "rows": 8, "columns": 8, "device": "cpu", "narrow": None, "checkpointing": False}
    parameters = make_learnable(unet, learned or Learned(4, targets="both"))
    return train_step(unet, parameters, **values | other)


def test_a_storage_counts_while_anything_refers_to_it():
    """[256] floats are 1 KiB: two of them at most, one after the first is gone, and views are no more."""
    with Ledger() as ledger:
        first = torch.empty(256, device="meta")
        second = first + 1
        view = second[:10]
        assert (ledger.live_bytes, ledger.peak_bytes) == (2048, 2048)
        del first, second
        assert ledger.live_bytes == 1024  # the view still holds its storage
        del view
        assert (ledger.live_bytes, ledger.peak_bytes) == (0, 2048)


def test_what_was_seen_before_is_counted_again():
    """The second of two equal products is not computed but has the same type, size, flops and gradient."""
    with Ledger() as ledger:
        left = torch.empty(3, 5, device="meta", dtype=torch.bfloat16, requires_grad=True)
        right = torch.empty(5, 7, device="meta", dtype=torch.bfloat16)
        one, two = left @ right, left @ right
        assert (two.shape, two.dtype, two.stride()) == (one.shape, one.dtype, one.stride())
        two.sum().backward()
    assert ledger.flops == 3 * (2 * 3 * 5 * 7)  # and one product backward
    assert left.grad.shape == (3, 5)


@pytest.mark.parametrize(
    ("mixes", "narrow", "checkpointing"),
    [
        ("maps", None, False),
        ("maps", None, True),
        ("maps", torch.bfloat16, False),
        ("maps", torch.bfloat16, True),
        ("values", torch.bfloat16, False),
    ],
)
def test_meta_counts_what_real_tensors_hold(built_micro, unet_inputs, mixes, narrow, checkpointing):
    """The same step on the CPU, under its own autocast, recorded by the same ledger: equal peaks within 2 %."""
    real = copy.deepcopy(built_micro.unet)
    learned = Learned(4, targets="both", mixes=mixes)
    predicted = step(on_meta(real), learned, narrow=narrow, checkpointing=checkpointing)
    parameters = make_learnable(real, learned)
    inputs = unet_inputs(real, batch=2)
    if checkpointing:
        real.enable_gradient_checkpointing()
    real.train()
    ledger = Ledger("cpu")
    ledger._made = NothingKept()
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with ledger:
        ledger.hold(real.parameters())
        ledger.hold(real.buffers())
        ledger.hold(parameter.grad for parameter in parameters)
        ledger.hold([inputs["sample"], inputs["encoder_hidden_states"]])
        with torch.autocast("cpu", narrow or torch.bfloat16, enabled=narrow is not None):
            out = real(**inputs).sample
        F.mse_loss(out.float(), inputs["sample"]).backward()
    assert predicted.peak_bytes == pytest.approx(ledger.peak_bytes, rel=0.02)
    assert predicted.flops == pytest.approx(ledger.flops, rel=0.02)


class NothingKept(dict):
    """Real tensors must be computed each time."""

    def get(self, key, default=None):
        return default


def test_recomputing_takes_less_memory_and_more_work(unet, built_micro):
    """Gradient checkpointing: a forward more, and of the activations only a part."""
    kept, again = step(unet), step(on_meta(built_micro.unet), checkpointing=True)
    assert again.peak_bytes < kept.peak_bytes
    assert 1.2 * kept.flops < again.flops < 1.5 * kept.flops


def test_memory_grows_with_the_batch_alone(unet):
    """Weights and gradients stay: the activations of 4 photos are twice those of 2."""
    parameters = make_learnable(unet, Learned(4, targets="both"))
    common = {"rows": 8, "columns": 8, "device": "cpu", "narrow": None, "checkpointing": False}
    fixed = bytes_of(unet) + 4 * sum(p.numel() for p in parameters)
    two, four = (train_step(unet, parameters, batch=batch, **common).peak_bytes - fixed for batch in (2, 4))
    assert four == pytest.approx(2 * two, rel=0.05)
    held = train_step(unet, parameters, batch=2, held=10_000, **common).peak_bytes - fixed
    assert held == two + 10_000


def test_autocast_is_that_of_the_device():
    """CUDA normalizes in float32, a CPU in what comes in; products are narrow on both."""
    for device, expected in (("cuda", torch.float32), ("cpu", torch.bfloat16)):
        with ledger_for(device, torch.bfloat16):
            product = F.linear(torch.empty(2, 6), torch.empty(6, 6))
            assert product.dtype == torch.bfloat16
            assert F.layer_norm(product, (6,)).dtype == expected


def test_attention_stores_no_maps():
    """[2, 3, 64, 8] floats in and out; the maps alone would be 2 * 3 * 64 * 64 * 4 bytes."""
    with ledger_for("cpu") as ledger:
        q = torch.empty(2, 3, 64, 8, requires_grad=True)
        F.scaled_dot_product_attention(q, q, q).sum().backward()
    assert ledger.peak_bytes < 2 * 3 * 64 * 64 * 4
    assert ledger.flops == (2 + 5) * 2 * (2 * 3 * 64 * 64 * 8)


def test_the_buffers_of_mixed_attention_are_those_of_a_chunk():
    """Forward two, backward three of H x rows x K, and the copies in float32; never all the maps where they are many."""
    q = torch.empty(1, 10, 4096, 64)
    _, rows = chunk_shape(q, q)
    assert rows < 4096
    with ledger_for("cpu") as ledger:
        fake = torch.empty(1, 10, 4096, 64, requires_grad=True)
        mixed_attention(fake, fake, fake, torch.empty(10, 10)).sum().backward()
    chunk, copies = 10 * rows * 4096 * 4, q.numel() * 4
    assert ledger.scratch_bytes == 3 * chunk + 5 * copies
    product, mixing = 2 * 10 * 4096 * 4096 * 64, 2 * 10 * 10 * 4096 * 4096
    assert ledger.flops == 7 * product + 4 * mixing


def test_a_decoded_picture_takes_more_than_an_encoded_one(built_micro):
    """And both grow with the picture."""
    vae = on_meta(built_micro.vae)
    small = decode_picture(vae, rows=8, columns=8, device="cpu")
    large = decode_picture(vae, rows=16, columns=8, device="cpu")
    assert large.flops > 1.9 * small.flops and large.peak_bytes > small.peak_bytes
    assert encode_photo(vae, rows=8, columns=8, device="cpu").flops < small.flops


def test_the_stopwatch_runs_each_kind_once(unet):
    """Every operation that does anything is known within the budget, and time adds up over calls."""
    with ledger_for("cpu") as ledger:
        for _ in range(3):
            F.linear(torch.empty(64, 32), torch.empty(16, 32)) * 2
    watch = Stopwatch(torch.device("cpu"), 1.0)
    total = watch.seconds(ledger)
    assert len(watch.known) == len({o for o in ledger.operations if _touched(o) is not None}) >= 2
    assert total == pytest.approx(sum(3 * taken for taken in watch.known.values()))
    watch.seconds_per_call = 1.0
    assert watch.seconds(ledger) == pytest.approx(total + ledger.calls)


def test_memory_is_slower_than_nothing_and_faster_than_a_disk():
    """Between 100 MB and 100 TB a second, on whatever machine."""
    assert 1e-14 < Stopwatch(torch.device("cpu"), 1.0).seconds_to_fetch() < 1e-8


def test_what_the_budget_does_not_reach_is_taken_by_its_work(unet):
    """Nothing measured: flops at the speed of a slow processor, everything else by its bytes."""
    ledger = step(unet)
    watch = Stopwatch(torch.device("cpu"), 0.0)
    assert not watch.known
    assert watch.seconds(ledger) > ledger.flops / _UNKNOWN_FLOPS
    half = Stopwatch(torch.device("cpu"), 0.05)
    assert half.seconds(ledger) > 0
    assert 0 < len(half.known) < len(ledger.operations)
    assert half.left <= 0


def test_every_operation_of_a_step_can_be_run(unet):
    """Of a step of the tiny model in bfloat16 none is left out because its arguments could not be made again."""
    ledger = step(torch.nn.Module.to(unet, torch.bfloat16), narrow=torch.bfloat16)
    for operation in ledger.operations:
        if _touched(operation) is not None:
            _runner(operation, torch.device("cpu"))()
