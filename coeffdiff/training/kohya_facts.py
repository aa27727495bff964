"""What kohya's metadata says of a training, from the settings of a run."""

from __future__ import annotations

from pathlib import Path

from coeffdiff.config.schema import Settings
from coeffdiff.errors import ConfigError
from coeffdiff.method.adapter_paths import run_of
from coeffdiff.training.run_folder import RunFolder


def kohya_facts(adapter: Path) -> dict[str, str]:
    """ss_... keys of the run that an adapter folder lies in; none for a folder without its run."""
    run = run_of(adapter)
    if run is None:
        return {}
    try:
        return _facts(RunFolder(run).settings())
    except ConfigError:  # of another version: the adapter says enough without
        return {}


def _facts(settings: Settings) -> dict[str, str]:
    training = settings.training
    values = {
        "ss_seed": training.seed,
        "ss_unet_lr": settings.method.lora.learning_rate,
        "ss_batch_size_per_device": training.batch_size,
        "ss_gradient_accumulation_steps": training.accumulate,
        "ss_max_train_steps": training.steps,
        "ss_mixed_precision": training.precision,
        "ss_optimizer": training.optimizer,
        "ss_lr_scheduler": training.lr_schedule,
        "ss_lr_warmup_steps": training.warmup_steps,
        "ss_min_snr_gamma": training.snr_gamma,
        "ss_noise_offset": training.noise_offset or None,
        "ss_gradient_checkpointing": training.gradient_checkpointing,
        "ss_max_grad_norm": training.clip_lora,
    }
    return {key: str(value) for key, value in values.items() if value is not None}
