"""Settings that take no part in a run, since its method has no such part."""

from __future__ import annotations

from coeffdiff.config.schema import Settings


def idle_parts(settings: Settings) -> list[str]:
    """Of coeff, lora and token those that a run does not train."""
    kind = settings.method.kind
    learning = {"coeff": "coeff" in kind, "lora": "lora" in kind, "token": settings.learns_token}
    return [part for part, learns in learning.items() if not learns]


def idle_settings(settings: Settings) -> tuple[str, ...]:
    """Beginnings of the names of settings that decide nothing."""
    idle = tuple(
        name for part in idle_parts(settings) for name in (f"method.{part}.", f"training.clip_{part}")
    )
    on_text = settings.method.on_text_encoders
    return idle + tuple(
        f"method.{part}.text_learning_rate" for part in ("coeff", "lora") if part not in on_text
    )
