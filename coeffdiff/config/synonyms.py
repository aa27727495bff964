"""The setting that an unknown name may stand for: other trainers' names, and misspellings."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_RATES = "method.lora.learning_rate method.coeff.learning_rate method.token.learning_rate"
# Setting(s) <- what others call them
_WORDS = {
    _RATES: "lr learning_rate unet_lr unet_learning_rate base_lr",
    "method.token.learning_rate": "embedding_lr token_lr",
    "method.lora.text_learning_rate method.coeff.text_learning_rate method.token.learning_rate": "text_encoder_lr "
    "text_encoder_learning_rate te_lr",
    "method.lora.text_encoders method.coeff.text_encoders": "train_text_encoder train_text_encoders text_encoder",
    "method.coeff.learning_rate": "alpha_lr coeff_lr",
    "method.lora.learning_rate": "lora_lr",
    "training.steps": "max_train_steps max_steps num_steps train_steps num_train_steps total_steps iterations iters "
    "epochs epoch num_epochs num_train_epochs max_train_epochs",
    "training.batch_size": "batch bs batchsize train_batch_size micro_batch_size per_device_train_batch_size",
    "training.accumulate": "gradient_accumulation_steps gradient_accumulation grad_accum accumulation accum",
    "training.resolution": "res size image_size pixels px",
    "training.precision": "mixed_precision dtype fp16 bf16 half",
    "training.seed": "random_seed rng",
    "training.gradient_checkpointing": "grad_checkpointing checkpointing activation_checkpointing",
    "training.snr_gamma": "min_snr_gamma min_snr snr",
    "training.masked_loss": "masks mask use_masks",
    "training.optimizer": "optimizer_type optim optimiser use_8bit_adam",
    "training.lr_schedule": "lr_scheduler scheduler lr_scheduler_type",
    "training.warmup_steps": "lr_warmup_steps warmup",
    "training.compile": "torch_compile",
    "training.clip_lora training.clip_coeff training.clip_token": "max_grad_norm grad_clip gradient_clipping clip_grad",
    "training.log_every": "logging_steps log_steps log_interval",
    "training.checkpoint_every": "checkpointing_steps save_every save_steps save_every_n_steps save_interval",
    "training.keep_checkpoints": "checkpoints_total_limit save_total_limit save_last_n_steps",
    "method.kind": "method",
    "method.lora.rank": "r dim lora_rank lora_dim lora_r network_dim network_rank",
    "method.lora.alpha": "lora_alpha network_alpha",
    "method.lora.targets": "target_modules lora_layers",
    "method.lora.dora": "use_dora",
    "method.lora.weight_decay": "adam_weight_decay decay",
    "method.coeff.dropout": "network_dropout lora_dropout",
    "method.token.init": "initializer_token init_word",
    "method.token.vectors": "num_vectors num_vectors_per_token",
    "subject.images": "instance_data_dir train_data_dir image_dir data_dir dataset dataset_name photos_dir folder",
    "subject.token": "placeholder_token trigger trigger_word instance_token keyword",
    "subject.class_word": "class class_name class_prompt class_token",
    "subject.templates": "instance_prompt caption captions prompt_template",
    "subject.caption_dropout": "caption_dropout_rate proportion_empty_prompts",
    "subjects": "concepts concepts_list datasets",
    "photos.crop": "center_crop random_crop",
    "photos.flip": "random_flip flip_aug",
    "photos.cache": "cache_latents cache_latents_to_disk cache_dir",
    "photos.augmentations": "repeats num_repeats",
    "prior.weight": "prior_loss_weight with_prior_preservation prior_preservation",
    "prior.images": "class_data_dir reg_data_dir class_images",
    "validation.prompts": "validation_prompt sample_prompts prompt",
    "validation.every": "validation_epochs validation_steps sample_every sample_every_n_steps",
    "validation.seeds": "num_validation_images",
    "validation.guidance": "guidance_scale cfg cfg_scale",
    "model.name": "pretrained_model_name_or_path base_model checkpoint ckpt",
    "model.vae": "pretrained_vae_model_name_or_path vae_path",
    "tracking.tensorboard tracking.wandb": "report_to log_with",
    "tracking.project": "tracker_project_name wandb_project",
    "output": "output_dir out out_dir save_dir",
}
_SETTINGS_BY_WORD = {word: settings.split() for settings, words in _WORDS.items() for word in words.split()}


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The settings among `known` that an unknown dotted name may mean, the likeliest first; or none."""
    names = list(known)
    asked = name.lower().replace("-", "_")
    leaf = asked.rpartition(".")[2]
    near = difflib.get_close_matches(asked, names, 1, 0.8)
    if near and _leaf(near[0]) == leaf:  # only the way to it is misspelt
        return near
    same = [known_name for known_name in names if _leaf(known_name) == leaf]
    if leaf not in _SETTINGS_BY_WORD and not same:
        close = difflib.get_close_matches(asked, names, 5, 0.6)
        near = [one for one in close if difflib.SequenceMatcher(None, leaf, _leaf(one)).ratio() >= 0.7][:1]
        leaves = {_leaf(known_name): known_name for known_name in names}
        return near or [leaves[match] for match in difflib.get_close_matches(leaf, leaves, 1, 0.7)]
    meant = [
        known_name
        for wanted in _SETTINGS_BY_WORD.get(leaf, ())
        for known_name in names
        if _ends(known_name, wanted)
    ]
    found, above = meant or same, asked.rpartition(".")[0]
    while above and not any(one.startswith(f"{above}.") for one in found):
        above = above.rpartition(".")[0]
    return [one for one in found if one.startswith(f"{above}." if above else "")][:3]


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _ends(name: str, wanted: str) -> bool:
    return name == wanted or name.endswith(f".{wanted}")
