"""What makes the same computation faster changes nothing that it computes."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from coeffdiff.errors import ConfigError
from coeffdiff.hosts.lora.layers import add_lora
from coeffdiff.hosts.unet import inject, set_scale
from coeffdiff.method.attention import mixed_attention
from coeffdiff.method.coefficients import draw_dropout
from coeffdiff.utils.torch_setup import compile_blocks, copied, prepare_kernels

CPU = torch.device("cpu")


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at what it is given
def test_compiled_blocks_train_and_sample_alike_and_are_compiled_once(
    micro_pipeline, unet_inputs, fresh_compiler
):
    """Under gradient checkpointing, as SDXL is trained: the same loss and gradients; new masks, new scales and a
    second step compile nothing anew, and the UNet keeps its names."""
    unet = micro_pipeline.unet.requires_grad_(False)
    layers = inject(unet)
    alphas = [c.alpha.requires_grad_() for c in layers.values()]
    with torch.no_grad():
        for alpha in alphas:
            alpha.copy_(torch.randn(alpha.shape, generator=torch.Generator().manual_seed(len(alpha))) / 10)
    unet.enable_gradient_checkpointing()
    unet.train()
    inputs = unet_inputs(unet)

    def step(number):
        draw_dropout(layers, 0.3, seed=0, step=number)
        loss = unet(**inputs).sample.square().mean()
        return loss, *torch.autograd.grad(loss, alphas)

    names, expected = list(unet.state_dict()), [step(number) for number in (1, 2)]
    compile_blocks(unet, CPU, backend="aot_eager")
    compiled = [step(1)]
    graphs = counters["stats"]["unique_graphs"]
    compiled.append(step(2))
    assert graphs and counters["stats"]["unique_graphs"] == graphs
    assert not counters["graph_break"]
    for run, other in zip(expected, compiled, strict=True):
        assert max(float(gradient.abs().max()) for gradient in run[1:]) > 1e-4
        for one, two in zip(run, other, strict=True):
            torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-6)
    assert list(unet.state_dict()) == names

    unet.eval()
    pictures = []
    with torch.no_grad():
        for scale in (1.0, 0.5, -1.5):
            set_scale(unet, scale)
            pictures.append(unet(**inputs).sample)
            graphs = graphs if len(pictures) > 1 else counters["stats"]["unique_graphs"]
    assert counters["stats"]["unique_graphs"] == graphs
    assert not torch.allclose(pictures[0], pictures[1])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_compiled_blocks_go_back_in_the_precision_that_they_came_in(
    micro_pipeline, unet_inputs, fresh_compiler
):
    """Under autocast maps are mixed in float32, and so are their gradients, compiled or not."""
    unet = micro_pipeline.unet.requires_grad_(False)
    alphas = [c.alpha.requires_grad_() for c in inject(unet).values()]
    inputs = unet_inputs(unet)

    def gradients():
        with torch.autocast("cpu", torch.bfloat16):
            loss = unet(**inputs).sample.square().mean()
        return torch.autograd.grad(loss, alphas)

    expected = gradients()
    compile_blocks(unet, CPU, backend="aot_eager")
    for one, two in zip(expected, gradients(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_dora_is_compiled_in_parts(micro_pipeline, unet_inputs, fresh_compiler):
    """PEFT's code for it cannot be one graph: the same loss and gradients all the same, and nothing anew for a
    second step."""
    unet = micro_pipeline.unet.requires_grad_(False)
    learned = list(add_lora(unet, rank=2, alpha=2, targets=["to_q"], dora=True).values())
    unet.enable_gradient_checkpointing()
    unet.train()
    inputs = unet_inputs(unet)

    def step():
        loss = unet(**inputs).sample.square().mean()
        return loss, *torch.autograd.grad(loss, learned)

    expected = step()
    compile_blocks(unet, CPU, backend="aot_eager")
    compiled = step()
    graphs = counters["stats"]["unique_graphs"]
    step()
    assert graphs and counters["stats"]["unique_graphs"] == graphs
    for one, two in zip(expected, compiled, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-6)


def test_where_nothing_can_be_compiled_it_is_said(micro_pipeline, monkeypatch):
    monkeypatch.setattr("coeffdiff.utils.torch_setup._can_compile", lambda device: False)
    with pytest.raises(ConfigError, match=r"no compiler here.*leave compile off"):
        compile_blocks(micro_pipeline.unet, CPU)


def test_a_cpu_is_left_alone(micro_pipeline):
    """Other memory formats or precisions would change pictures in their last bits."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    prepare_kernels(CPU, torch.bfloat16, micro_pipeline.unet, micro_pipeline.vae)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert micro_pipeline.unet.conv_in.weight.is_contiguous()
    tensor = torch.arange(3.0)
    assert copied(tensor, CPU) is tensor


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_convolutions_are_channels_last_and_mixing_stays_exact(micro_pipeline):
    """1 + 2^-12 on the diagonal: TF32 would round it to one, and the output would not change."""
    device, before = torch.device("cuda"), torch.get_float32_matmul_precision()
    try:
        prepare_kernels(device, torch.bfloat16, micro_pipeline.unet)
        assert torch.get_float32_matmul_precision() == "high"
        assert micro_pipeline.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        tensors = torch.randn(3, 1, 4, 32, 16, device=device)
        plain, moved = (
            mixed_attention(*tensors, torch.eye(4, device=device) * (1 + a)) for a in (0.0, 2**-12)
        )
        torch.testing.assert_close(moved / plain, torch.full_like(plain, 1 + 2**-12), rtol=2e-5, atol=0)
        prepare_kernels(device, torch.float32, micro_pipeline.unet)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_copies_to_a_gpu_do_not_wait():
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = copied(torch.arange(1000.0), "cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert moved.sum().item() == 499_500
