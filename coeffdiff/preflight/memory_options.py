"""Settings that reduce the memory of a training run: a check predicts their effect, out-of-memory errors name them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coeffdiff.config.schema import MethodSettings, TrainingSettings
from coeffdiff.utils.oom import smaller_side
from coeffdiff.utils.torch_setup import half_precision


@dataclass(frozen=True)
class MemoryOption:
    """One change of settings that lowers the peak.

    values: dotted names of settings with their new values.
    note: what it costs, in brackets after its name.
    flag: how the command line sets it, where it has an option of its own.
    predicted: a check predicts the peak with it; it leaves alone what is learned and how.
    suggested: the out-of-memory error of a training run names it; validation pictures take no memory in a step.
    """

    values: Mapping[str, Any]
    note: str = ""
    flag: str = ""
    predicted: bool = True
    suggested: bool = True

    def named(self, prefix: str = "") -> str:
        """The option as the user writes it, `prefix` before each of its settings."""
        texts = {
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in self.values.items()
        }
        name = self.flag or " ".join(f"{prefix}{name}={text}" for name, text in texts.items())
        return f"{name} ({self.note})" if self.note else name


def memory_options(
    training: TrainingSettings,
    method: MethodSettings,
    prompts: Sequence[str],
    device_type: str,
    *,
    quantize: str | None,
) -> list[MemoryOption]:
    """The options that a run does not use yet, the mildest first. The settings are resolved.

    A smaller micro-batch that is accumulated, recomputed activations and chunked attention cost time alone;
    precision and weights in 8 bits cost a little, resolution and rank what the adapter can learn.

    prompts: of the validation pictures. quantize: of the base model's settings.
    """
    batch_size, accumulate = int(training.batch_size), int(training.accumulate)
    resolution = int(training.resolution)
    options = []
    if not training.gradient_checkpointing:
        options.append(MemoryOption({"training.gradient_checkpointing": True}))
    if batch_size > 1:
        values = {"training.batch_size": 1, "training.accumulate": batch_size * accumulate}
        options.append(MemoryOption(values, note="the same result"))
    if "coeff" in method.kind and method.coeff.backend != "auto":
        options.append(MemoryOption({"method.coeff.backend": "auto"}, predicted=False))
    if training.precision == "no":
        options.append(MemoryOption({"training.precision": half_precision(device_type)}))
    if quantize is None and device_type in ("cpu", "cuda"):
        note = "frozen weights in 8 bits; needs pip install 'coeffdiff[quant]'"
        options.append(MemoryOption({"model.quantize": "int8"}, note=note))
    if prompts:
        options.append(
            MemoryOption({"validation.prompts": []}, note="no validation pictures", suggested=False)
        )
    if (smaller := smaller_side(resolution)) < resolution:
        options.append(MemoryOption({"training.resolution": smaller}, flag=f"--resolution {smaller}"))
    if on_text := method.on_text_encoders:
        off = {f"method.{part}.text_encoders": False for part in on_text}
        options.append(
            MemoryOption(off, note="the text encoders leave memory, and learn nothing", predicted=False)
        )
    if "lora" in method.kind and method.lora.rank > 4:
        options.append(MemoryOption({"method.lora.rank": 4}, predicted=False))
    return options
