"""Names of optimizers, and the learning rates that "auto" means for them."""

from __future__ import annotations

from typing import Any

from coeffdiff.errors import ConfigError

# Each moves a number by about its learning rate a step, as AdamW does
_LIKE_ADAMW = ("adamw", "adamw8bit", "adam", "adamax", "nadam", "radam", "adafactor")
# Lion's paper (arXiv 2302.06675, section 5) names a third to a tenth of AdamW's rate
_SHARE_OF_ADAMW = dict.fromkeys(_LIKE_ADAMW, 1.0) | {"lion": 0.2}
_FINDS_ITS_OWN = ("prodigy",)  # the rate is a factor on what it finds; its authors say 1


def has_one_rate(optimizer: str) -> bool:
    """Whether it wants the same learning rate for all that learns."""
    return optimizer in _FINDS_ITS_OWN


def auto_rate(optimizer: str, adamw: float) -> float | None:
    """The learning rate where AdamW's would be `adamw`; None if nothing is known of this optimizer."""
    if optimizer in _FINDS_ITS_OWN:
        return 1.0
    share = _SHARE_OF_ADAMW.get(optimizer)
    return None if share is None else float(f"{share * adamw:g}")


def refuse_unknown_rates(optimizer: str, rates: dict[str, Any]) -> None:
    """Raises: ConfigError for rates that are still "auto" with an optimizer of which no rate is known.

    rates: of what learns, by dotted name.
    """
    missing = [name for name, rate in rates.items() if rate == "auto"]
    if missing and auto_rate(optimizer, 1.0) is None:
        settings = " and ".join(f"{name}=..." for name in missing)
        raise ConfigError(f"Which learning rate suits {optimizer} is not known here: set {settings}.")


def refuse_unequal_rates(optimizer: str, rates: dict[str, Any]) -> None:
    """Raises: ConfigError for several learning rates with an optimizer that takes one. rates: by dotted name."""
    if has_one_rate(optimizer) and len(set(rates.values())) > 1:
        given = ", ".join(f"{name} is {rate:g}" for name, rate in rates.items())
        raise ConfigError(
            f"{optimizer} finds the learning rate itself and takes one factor for all that learns, but {given}. "
            "Leave them out; the factor is then 1."
        )
