"""Other nodes beside an adapter in a real ComfyUI: both at work in either order, or a line that says what is not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui_twins import relative

from comfyui_host import comfyui_folder

pytestmark = pytest.mark.skipif(comfyui_folder() is None, reason="COMFYUI names no ComfyUI")


def pag(model):
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    return PerturbedAttentionGuidance.execute(model, 2.0).args[0]


def sag(model):
    from comfy_extras.nodes_sag import SelfAttentionGuidance

    return SelfAttentionGuidance.execute(model, 0.5, 2.0).args[0]


def free_u(model):
    """FreeU's slot; its own node does nothing at other numbers of channels than SDXL's."""
    model = model.clone()
    model.set_model_output_block_patch(lambda h, skip, options: (1.1 * h, 0.8 * skip))
    return model


class PlainAttentionAndCallbacks:
    """What IP-Adapter nodes put into a slot: attention, to which each callback adds in its range of noise."""

    def __init__(self, callback, **kwargs):
        self.callback, self.kwargs = [callback], [kwargs]

    def __call__(self, q, k, v, extra_options):
        raise AssertionError("attention without alpha")


def add_query(out, q, k, v, extra_options, weight, **_):
    return weight * q


def ip_adapter(model):
    model = model.clone()
    patch = PlainAttentionAndCallbacks(add_query, weight=0.5, sigma_start=999.0, sigma_end=0.0)
    for block in (("input", 4, 0), ("middle", 0, 1)):
        model.set_model_attn2_replace(patch, *block)
    return model


@pytest.mark.parametrize(
    ("node", "layers"),
    [(pag, {"PerturbedAttentionGuidance (comfy_extras.nodes_pag)": 2}), (sag, {"SelfAttentionGuidance (comfy_extras.nodes_sag)": 1}),
     (free_u, {}), (ip_adapter, {})],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_other_nodes_before_or_after(small, make, caplog, node, layers):
    """The same in either order, both at work; where the other node computes attention itself, one line says so."""
    path = make()
    alone = [small.sampled(small.with_adapters(path))]
    if node is not ip_adapter:  # whose patch here is one that only mixed attention may take the place of
        alone.append(small.sampled(node(small.model)))
    caplog.clear()
    before = small.sampled(small.with_adapters(path, model=node(small.model)))
    lines = [record.message for record in caplog.records if "alpha is left out" in record.message]
    after = small.sampled(node(small.with_adapters(path)))
    assert relative(before, after) < 1e-6
    for one in alone:
        assert relative(before, one) > 1e-3
    assert len(lines) == len(layers)
    for owner, count in layers.items():
        assert f"left out of {count} of 34 attention layers: {owner} computes the attention there" in lines[0]
        assert "middle block 0, transformer block 0, attn1" in lines[0]


def test_callbacks_add_to_mixed_attention_in_their_range_of_noise(on_path):
    from coeffdiff.hosts.comfyui.alpha import Deviations, MixedAttention, _with_callbacks

    q, k, v = torch.randn(3, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    own = MixedAttention(Deviations(maps=torch.tensor([[0.0, 1.0], [2.0, -2.0]])))
    both = _with_callbacks(
        own, PlainAttentionAndCallbacks(add_query, weight=0.5, sigma_start=3.0, sigma_end=1.0)
    )
    for sigma, weight in ((4.0, 0.0), (3.0, 0.5), (2.0, 0.5), (0.5, 0.0)):
        options = {"n_heads": 2, "sigmas": torch.tensor([sigma])}
        torch.testing.assert_close(both(q, k, v, options), own(q, k, v, options) + weight * q)


def test_a_controlnet_adds_what_it_adds_in_diffusers(small, make):
    """Residuals of a ControlNet for the nine skips and the middle."""
    from coeffdiff.hosts.diffusers import load_adapter

    path, draw = make(), torch.Generator().manual_seed(3)
    sides = [(8, 16)] * 3 + [(4, 8)] * 3 + [(2, 4)] * 3
    skips = [0.3 * torch.randn(2, 32, *side, generator=draw) for side in sides]
    middle = 0.3 * torch.randn(2, 32, 2, 4, generator=draw)
    adapter = load_adapter(SimpleNamespace(unet=small.unet), path)
    with torch.no_grad():
        wanted = small.unet(
            small.x, small.t, encoder_hidden_states=small.context,
            added_cond_kwargs={"text_embeds": small.pooled, "time_ids": small.ids},
            down_block_additional_residuals=skips, mid_block_additional_residual=middle,
        ).sample  # fmt: skip
    adapter.remove()
    made = small.comfyui(small.with_adapters(path), control={"output": list(skips), "middle": [middle]})
    assert relative(made, wanted) < 1e-5


def test_layers_that_a_node_skips_are_named(small, make, caplog):
    """A patch that another wrapper puts in alpha's place during the call."""

    def thief(executor, x, timesteps, context, y, control, options, **kwargs):
        taken = {("middle", 0, 0): lambda q, k, v, extra: v}
        replaced = {**options["patches_replace"], "attn1": {**options["patches_replace"]["attn1"], **taken}}
        return executor(x, timesteps, context, y, control, {**options, "patches_replace": replaced}, **kwargs)

    model = small.with_adapters(make())
    model.add_wrapper_with_key("diffusion_model", "thief", thief)
    small.comfyui(model)
    small.comfyui(model)
    assert caplog.text.count("alpha is left out of 1 of 34 attention layers: another node skipped") == 1
