"""Base models with quantized linear layers: what is computed, from every kind of file, on which devices."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_base_models import original_layout
from torch import nn

from coeffdiff.config.schema import ModelSettings
from coeffdiff.errors import ConfigError, InjectionError
from coeffdiff.hosts.diffusers import load_adapter
from coeffdiff.hosts.lora.guard import check_fusing
from coeffdiff.hosts.lora.layers import add_lora, lora_parameters, remove_lora
from coeffdiff.hosts.quantized import EightBitLinear, is_quantized, quantized_layers
from coeffdiff.hosts.unet import eject, inject
from coeffdiff.models.finding import find_backbone
from coeffdiff.models.fingerprints import network_fingerprint
from coeffdiff.models.loading import load_pipeline
from coeffdiff.models.quantizing import check_quantizing, quantize, refuse_dora
from coeffdiff.pocket.model import save_random
from coeffdiff.training.network import _leave_out_of_ddp

KINDS = ("int8", "fp8")


@pytest.fixture(autouse=True, scope="module")
def torchao():
    return pytest.importorskip("torchao", reason="needs pip install 'coeffdiff[quant]'")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    return save_random("micro", tmp_path_factory.mktemp("models") / "micro")


@pytest.fixture(scope="module")
def loaded(saved):
    """UNets of that folder by kind; copies are to be changed, not these."""
    kinds = {kind: ModelSettings(name=str(saved), quantize=kind) for kind in (*KINDS, None)}
    return {
        kind: load_pipeline(find_backbone(model), dtype=torch.float32, parts={"unet"}).unet
        for kind, model in kinds.items()
    }


def widened(unet):
    """The same network with the numbers that quantization left, in plain layers."""
    unet = copy.deepcopy(unet)
    for layer in quantized_layers(unet):
        layer.weight = nn.Parameter(layer.weight.dequantize(), requires_grad=False)
        layer.__class__ = nn.Linear
    return unet


def learn(unet, unet_inputs, **lora):
    """Prediction and gradients of alpha and LoRA, which begin at equal random numbers."""
    add_lora(unet, rank=2, alpha=2, **lora)
    alphas = {name: layer.alpha for name, layer in inject(unet).items()}
    learned, noise = {**lora_parameters(unet), **alphas}, torch.Generator().manual_seed(3)
    for parameter in learned.values():
        parameter.requires_grad_(True)
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
    predicted = unet(**unet_inputs(unet, batch=1)).sample
    predicted.square().mean().backward()
    return predicted.detach(), {name: parameter.grad for name, parameter in learned.items()}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_differ_by_the_rounding_of_weights_and_nothing_else(kind, dora, loaded, unet_inputs):
    """Equal to those of plain layers that hold the rounded weights, and near those of the model as it was."""
    quantized, rounded, before = loaded[kind], widened(loaded[kind]), loaded[None]
    assert len(quantized_layers(quantized)) == sum(isinstance(m, nn.Linear) for m in before.modules())
    results = [learn(copy.deepcopy(unet), unet_inputs, dora=dora) for unet in (quantized, rounded, before)]
    (one, grads), (other, same), (plain, first) = results
    torch.testing.assert_close(one, other)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, same[name], rtol=1e-3, atol=1e-6)
    flat, was = (torch.cat([g.flatten() for g in found.values()]) for found in (grads, first))
    assert nn.functional.cosine_similarity(flat, was, dim=0) > (0.999 if kind == "int8" else 0.98)
    assert 0 < (one - plain).norm() / plain.norm() < (0.02 if kind == "int8" else 0.08)


def test_rounding_of_weights_is_bounded(loaded):
    """int8: half a step of a 127th of the row's largest number, with a float's slack; fp8 (3 bits): a 16th of each."""
    plain = dict(loaded[None].named_modules())
    for kind in KINDS:
        for name, layer in loaded[kind].named_modules():
            if not isinstance(layer, EightBitLinear):
                continue
            weight, found = plain[name].weight, layer.weight.dequantize()
            step = weight.abs().amax(1, keepdim=True) / 127
            least = weight.abs().amax(1, keepdim=True) / 448 * 2**-9  # where fp8 has no more bits
            bound = 0.51 * step if kind == "int8" else weight.abs() / 16 + least
            assert ((found - weight).abs() <= bound).all()
            assert layer.weight.qdata.element_size() == 1


def test_a_single_file_gives_the_same_numbers(built_pipeline, tmp_path):
    """Folders are quantized as they are read, files in place; the VAE stays as it is."""
    folder, file = save_random("tiny", tmp_path / "tiny"), tmp_path / "model.safetensors"
    save_file({k: w.contiguous() for k, w in original_layout(built_pipeline).items()}, file)
    models = (ModelSettings(name=str(file), config=str(folder)), ModelSettings(name=str(folder)))
    for kind in KINDS:
        for model in models:
            model.quantize = kind
        pipe, other = (load_pipeline(find_backbone(model), dtype=torch.float32) for model in models)
        theirs = dict(other.unet.named_modules())
        for name, layer in pipe.unet.named_modules():
            if is_quantized(layer):
                assert torch.equal(layer.weight.qdata.float(), theirs[name].weight.qdata.float())
                assert torch.equal(layer.weight.scale, theirs[name].weight.scale)
        assert quantized_layers(pipe.text_encoder) and quantized_layers(pipe.text_encoder_2)
        assert not quantized_layers(pipe.vae)
        assert not any(weight.requires_grad for weight in pipe.unet.parameters())


def test_half_precision_computes_as_its_neighbours_do(saved, unet_inputs):
    """Under autocast every linear layer gives bfloat16, as plain ones do: torchao's own gave what came in."""
    unet = load_pipeline(
        find_backbone(ModelSettings(name=str(saved), quantize="int8")), dtype=torch.bfloat16, parts={"unet"}
    ).unet
    types = set()
    for layer in quantized_layers(unet):
        layer.register_forward_hook(lambda _m, _i, out: types.add(out.dtype))
    inputs = {
        k: v.float() if torch.is_tensor(v) and v.is_floating_point() else v
        for k, v in unet_inputs(unet).items()
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        unet(**inputs)
    assert types == {torch.bfloat16}


def test_without_its_adapter_it_is_the_quantized_model_bit_for_bit(loaded, unet_call):
    unet = copy.deepcopy(loaded["int8"])
    with torch.no_grad():
        before = unet_call(unet)
        add_lora(unet, rank=2, alpha=2)
        for name, parameter in lora_parameters(unet).items():
            parameter.data += 0.1 if name.endswith("lora_B.default.weight") else 0
        layers = inject(unet)
        next(iter(layers.values())).alpha.data += 0.1
        assert not torch.equal(unet_call(unet), before)
        remove_lora(unet, "default")
        eject(unet)
        assert torch.equal(unet_call(unet), before)


def test_a_lora_is_not_fused_into_quantized_weights(loaded):
    unet = copy.deepcopy(loaded["int8"])
    add_lora(unet, rank=2, alpha=2)
    with pytest.raises(InjectionError, match="are quantized: fused into them it would be rounded"):
        check_fusing(unet)


def test_an_adapter_loads_on_a_pipeline_that_diffusers_quantized(small_adapter, built_pipeline, unet_call):
    """Quantized by the user, with torchao's own layers."""
    pipe = copy.deepcopy(built_pipeline)
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(pipe.unet, Int8WeightOnlyConfig())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        before = unet_call(pipe.unet)
        adapter = load_adapter(pipe, small_adapter)
        changed = unet_call(pipe.unet)
        adapter.remove()
        assert torch.equal(unet_call(pipe.unet), before) and not torch.equal(changed, before)


def test_several_processes_do_not_send_quantized_weights(loaded, tmp_path):
    """DDP broadcasts all that it is not told to leave out, and cannot with these."""
    unet = copy.deepcopy(loaded["int8"])
    layers = inject(unet)
    for layer in layers.values():
        layer.alpha.requires_grad_(True)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        _leave_out_of_ddp(unet)
        model = nn.parallel.DistributedDataParallel(unet, broadcast_buffers=False)
        assert len([p for p in model.parameters() if p.requires_grad]) == len(layers)
    finally:
        torch.distributed.destroy_process_group()


def test_fingerprints_in_memory_tell_kinds_apart(loaded):
    found = {network_fingerprint(unet) for unet in loaded.values()}
    assert len(found) == 3
    assert network_fingerprint(copy.deepcopy(loaded["fp8"])) in found


def test_devices_and_packages_that_are_missing_meet_a_sentence(monkeypatch):
    for kind, device, words in (
        ("nf4", "cpu", "nf4 needs an NVIDIA GPU, and this runs on cpu; int8 runs here as well"),
        ("nf4", "mps", "nf4 needs an NVIDIA GPU, and this runs on mps; leave it out"),
        ("int8", "mps", "int8 needs a CUDA GPU or a CPU, and this runs on mps; leave it out"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_quantizing(kind, device)
    with pytest.raises(ConfigError, match=r"method\.lora is a DoRA, which reads the weights below it"):
        refuse_dora("nf4", "method.lora")
    check_quantizing("int8", "cpu")
    refuse_dora("int8", "method.lora")
    check_quantizing(None, "mps")
    monkeypatch.setitem(__import__("sys").modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=r"fp8 needs torchao: pip install 'coeffdiff\[quant\]'"):
        check_quantizing("fp8", "cpu")


def test_quantizing_again_changes_nothing(loaded):
    unet = copy.deepcopy(loaded["int8"])
    numbers = [layer.weight.qdata.clone() for layer in quantized_layers(unet)]
    quantize(unet, "int8")
    after = [layer.weight.qdata for layer in quantized_layers(unet)]
    assert all(torch.equal(one, other) for one, other in zip(numbers, after, strict=True))
