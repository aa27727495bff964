"""The alphas of all adapters on one attention layer, which add up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coeffdiff.method.attention import mixed_attention, mixed_values
from coeffdiff.method.coefficients import Coefficients, Mixes


class SummedAlphas(nn.Module):
    """Alphas by the names of their adapters, and which of them are active."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()

    def coeff(self, mixes: Mixes) -> Tensor | None:
        """The recombination of maps or of values now in force, [H, H] float32; None where no active adapter has one."""
        layers = [c for c in map(self.coefficients, self.active) if c.mixes == mixes]
        if not layers:
            return None
        total = layers[0].identity
        for coefficients in layers:
            total = total + coefficients()
        return total

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        scale: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Attention with what is active: values are mixed first, and the maps, mixed or not, meet what they leave.

        q [B, H, Q, D], k and v [B, H, K, D] -> [B, H, Q, D]; mask and scale as in scaled_dot_product_attention.
        """
        of_values, of_maps = self.coeff("values"), self.coeff("maps")
        if of_values is not None:
            v = mixed_values(v, of_values)
        if of_maps is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return mixed_attention(q, k, v, of_maps, mask=mask, scale=scale, backend=backend)

    def set_scale(self, name: str, scale: float) -> None:
        coefficients = self.coefficients(name)
        if coefficients.scale.is_inference() and not torch.is_inference_mode_enabled():
            # It was moved in inference mode, as offloading does in the middle of a picture, and could not be written to
            coefficients.scale = coefficients.scale.clone()
        coefficients.scale.fill_(scale)
        on = {*self.active, name} if scale else {*self.active} - {name}
        self.active = tuple(
            other for other in self.adapters if other in on
        )  # always summed in the same order

    def coefficients(self, name: str) -> Coefficients:
        module = self.adapters[name]
        assert isinstance(module, Coefficients)
        return module


def alphas_on(network: nn.Module) -> dict[str, SummedAlphas]:
    """The alphas of each layer of an unwrapped network that has any, by its name: the registry itself.

    Kept on the network, so that it travels with it.
    """
    if not hasattr(network, "_coeffdiff_layers"):
        network._coeffdiff_layers = {}
    registry: dict[str, SummedAlphas] = network._coeffdiff_layers
    return registry
