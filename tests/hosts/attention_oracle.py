"""What models with alpha are compared with: their own code, around an attention written out in float64."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def oracle(model, alphas):
    """A copy of the model in which I + alpha follows the softmax of each named layer, whoever calls it.

    transformers' layers run their eager code; scaled_dot_product_attention is written out.
    """
    copied = copy.deepcopy(model)
    if hasattr(copied, "set_attn_implementation"):
        copied.set_attn_implementation("eager")
    inside, softmax, attention = [], nn.functional.softmax, nn.functional.scaled_dot_product_attention

    def mixed(scores, dim=-1, *_, **__):  # without dtype=float32, which eager code asks for
        maps = softmax(scores, dim=dim)
        if not inside or dim not in (-1, maps.dim() - 1):
            return maps
        alpha = alphas[inside[-1]]
        split = maps.view(-1, len(alpha), *maps.shape[-2:])
        coeff = torch.eye(len(alpha), dtype=maps.dtype) + alpha
        return torch.einsum("hg,bgqk->bhqk", coeff, split).reshape(maps.shape).contiguous()

    def written_out(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_):
        key, value = (heads.repeat_interleave(query.shape[1] // heads.shape[1], 1) for heads in (key, value))
        scores = query @ key.transpose(-1, -2) * (scale or 1 / math.sqrt(query.shape[-1]))
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            boolean = attn_mask.dtype == torch.bool
            scores = scores.masked_fill(~attn_mask, -math.inf) if boolean else scores + attn_mask
        return mixed(scores) @ value

    for name in alphas:
        layer = copied.get_submodule(name)
        layer.register_forward_pre_hook(lambda *_, name=name: inside.append(name))
        layer.register_forward_hook(lambda *_: inside.pop() and None)
    nn.functional.softmax, nn.functional.scaled_dot_product_attention = mixed, written_out
    try:
        yield copied
    finally:
        nn.functional.softmax, nn.functional.scaled_dot_product_attention = softmax, attention


def sharpened(model):
    """In float64 and eval mode, far from the start values, so that attention is sharp and biases count."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return model.double().eval()


def fill(alphas, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for alpha in alphas.values():
            alpha.copy_(torch.randn(alpha.shape, generator=generator) * 0.3)


def tensors(out):
    """All float tensors of a model's output."""
    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, dict):
        return [t for key, part in out.items() if key != "past_key_values" for t in tensors(part)]
    return [t for part in out for t in tensors(part)] if isinstance(out, tuple) else []


def flat(out):
    """As one vector."""
    return torch.cat([t.flatten() for t in tensors(out)])
