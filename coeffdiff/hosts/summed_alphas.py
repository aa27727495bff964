"""The alphas of all adapters on one attention layer, which add up."""

from __future__ import annotations

from torch import Tensor, nn

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

    def set_scale(self, name: str, scale: float) -> None:
        self.coefficients(name).scale.fill_(scale)
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
