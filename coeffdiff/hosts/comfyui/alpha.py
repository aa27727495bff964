"""Alpha in ComfyUI: a wrapper around each call of the UNet that puts mixed attention into its attention slots.

The slots are filled in a copy of the call's options, so that nothing is changed that a model or another node owns, and
what other nodes have put there, earlier or later in the graph, is seen.
Letters: H heads, T tokens, D width of a head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from coeffdiff.hosts.comfyui.layers import Slot
from coeffdiff.method.attention import mixed_attention, mixed_values

KEY = "coeffdiff"  # of our wrapper among a model's
_ALWAYS = float("inf")
Patch = Callable[[Tensor, Tensor, Tensor, Mapping[str, Any]], Tensor]


class Deviations(NamedTuple):
    """What the adapters of one layer add to the identity, [H, H] float32 on the CPU, by what they mix."""

    maps: Tensor | None = None
    values: Tensor | None = None

    def plus(self, other: Deviations) -> Deviations:
        return Deviations(_sum(self.maps, other.maps), _sum(self.values, other.values))


class MixedAttention:
    """A patch of ComfyUI for one attention layer: attention with coeff = I + deviation, never changed afterwards.

    The coefficients are float32 whatever the model's type: I + alpha rounded to bf16 loses a small alpha.
    """

    def __init__(self, deviations: Deviations) -> None:
        self.maps, self.values = (None if d is None else torch.eye(len(d)) + d.float() for d in deviations)
        self._moved: dict[torch.device, tuple[Tensor | None, Tensor | None]] = {}

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, extra_options: Mapping[str, Any]) -> Tensor:
        """q, k, v [B, T, H * D] -> [B, T, H * D]."""
        of_maps, of_values = self._on(q.device)
        q, k, v = (x.unflatten(-1, (extra_options["n_heads"], -1)).transpose(1, 2) for x in (q, k, v))
        if of_values is not None:
            v = mixed_values(v, of_values)
        if of_maps is not None:
            out = mixed_attention(q, k, v, of_maps)
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return out.transpose(1, 2).flatten(2)

    def _on(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        if device not in self._moved:
            maps, values = (None if c is None else c.to(device) for c in (self.maps, self.values))
            self._moved[device] = maps, values
        return self._moved[device]


class AlphaWrapper:
    """The wrapper for WrappersMP.DIFFUSION_MODEL that applies the alphas of all adapters of a model."""

    def __init__(self, deviations: Mapping[Slot, Deviations]) -> None:
        self.deviations = dict(deviations)
        self._layers = {slot: MixedAttention(d) for slot, d in self.deviations.items()}
        self._reported: set[str] = set()

    def plus(self, other: AlphaWrapper) -> AlphaWrapper:
        """Both together: on each layer the deviations add up."""
        slots = dict.fromkeys((*self.deviations, *other.deviations))
        none = Deviations()
        return AlphaWrapper(
            {s: self.deviations.get(s, none).plus(other.deviations.get(s, none)) for s in slots}
        )

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        timesteps: Any = None,
        context: Any = None,
        y: Any = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        options = dict(transformer_options or {})
        used: set[Slot] = set()
        options["patches_replace"], left = self._filled(options.get("patches_replace", {}), used)
        out = executor(x, timesteps, context, y, control, options, **kwargs)
        self._report(left, used)
        return out

    def _filled(
        self, replaced: Mapping[str, Mapping[Any, Patch]], used: set[Slot]
    ) -> tuple[dict[str, dict[Any, Patch]], dict[Slot, Patch]]:
        """patches_replace with our layers, and what keeps alpha out of others of them."""
        filled = {kind: dict(patches) for kind, patches in replaced.items()}
        left: dict[Slot, Patch] = {}
        for slot, own in self._layers.items():
            patches = filled.setdefault(slot.kind, {})
            there = patches.get(slot.block, patches.get(slot.block[:2]))
            if there is None:
                patches[slot.block] = _noting(own, slot, used)
            elif _adds_to_attention(there):
                patches[slot.block] = _noting(_with_callbacks(own, there), slot, used)
            else:
                left[slot] = there
        return filled, left

    def _report(self, left: Mapping[Slot, Patch], used: set[Slot]) -> None:
        """One line for each other owner of layers, and one for layers that something skipped; each once."""
        for owner in sorted({_owner(patch) for patch in left.values()}):
            theirs = [slot for slot, patch in left.items() if _owner(patch) == owner]
            self._say(theirs, f"{owner} computes the attention there")
        lost = [slot for slot in self._layers if slot not in left and slot not in used]
        if lost:
            self._say(lost, "another node skipped these layers or put its own attention there")

    def _say(self, slots: list[Slot], why: str) -> None:
        shown = "; ".join(map(str, slots[:3])) + ("; ..." if len(slots) > 3 else "")
        share = f"{len(slots)} of {len(self._layers)} attention layers"
        sentence = f"coeffdiff: alpha is left out of {share}: {why} ({shown})."
        if sentence not in self._reported:
            self._reported.add(sentence)
            logging.warning(sentence)


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _noting(patch: Patch, slot: Slot, used: set[Slot]) -> Patch:
    """The patch, which notes that the model called it."""

    def noted(q: Tensor, k: Tensor, v: Tensor, extra_options: Mapping[str, Any]) -> Tensor:
        used.add(slot)
        return patch(q, k, v, extra_options)

    return noted


def _adds_to_attention(patch: Any) -> bool:
    """Whether a patch is plain attention to which callbacks add, as IP-Adapter, PuLID and InstantID nodes have it."""
    callbacks, kwargs = getattr(patch, "callback", None), getattr(patch, "kwargs", None)
    return isinstance(callbacks, list) and isinstance(kwargs, list) and len(callbacks) == len(kwargs)


def _with_callbacks(own: Patch, theirs: Any) -> Patch:
    """Our attention, then what each of their callbacks adds to it in its range of noise."""

    def both(q: Tensor, k: Tensor, v: Tensor, extra_options: Mapping[str, Any]) -> Tensor:
        out = own(q, k, v, extra_options)
        sigmas = extra_options.get("sigmas")
        sigma = None if sigmas is None else float(sigmas[0])
        for callback, kwargs in zip(theirs.callback, theirs.kwargs, strict=True):
            start, end = kwargs.get("sigma_start", _ALWAYS), kwargs.get("sigma_end", -_ALWAYS)
            if sigma is None or end <= sigma <= start:
                out = out + callback(out, q, k, v, extra_options, **kwargs)
        return out.to(q.dtype)

    return both


def _owner(patch: Any) -> str:
    """Whose a patch is: PerturbedAttentionGuidance (comfy_extras.nodes_pag)."""
    named = patch if hasattr(patch, "__qualname__") else type(patch)
    module = str(getattr(named, "__module__", "")).replace("\\", "/").rpartition("/")[2]
    return f"{named.__qualname__.split('.')[0]} ({module})"
