"""Pipelines of diffusers out of their parts, and what the families' pipelines want to be told differently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from coeffdiff.method.families import Family, family_of
from coeffdiff.utils.console import quiet_libraries

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Texts = tuple["Tensor", "Tensor | None", "Tensor", "Tensor | None"]


def make_pipeline(family: Family, parts: Mapping[str, Any], *, task: str = "", **options: Any) -> Any:
    """A pipeline of these parts; text encoders, tokenizers and networks that are left out are None.

    Args:
        task: of diffusers' names for pipelines of this family: "", Img2Img, ControlNetInpaint, ...
        options: in place of the family's own, for its constructor.
    """
    with quiet_libraries():
        import diffusers

        kind = getattr(diffusers, f"{family.pipelines}{task}Pipeline")
        absent = dict.fromkeys((*family.text_networks, *family.tokenizers, "vae", "unet"))
        return kind(**{**absent, **parts, **family.options, **options})


def text_embeddings(
    pipe: Any,
    prompts: str | list[str],
    device: torch.device,
    *,
    guided: bool,
    negative_prompt: str | None = None,
    negative: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Texts:
    """Embeddings of prompts and of the negative prompt: text [B, T, W], its negative, pooled [B, P], its negative.

    P is 0 in families that take no pooled text. The negatives are None unless `guided`.

    Args:
        negative: of an earlier call, text and pooled, in place of negative_prompt.
    """
    text_before, pooled_before = negative
    if family_of(pipe).pools:
        texts: Texts = pipe.encode_prompt(
            prompts,
            device=device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=guided,
            negative_prompt=negative_prompt,
            negative_prompt_embeds=text_before,
            negative_pooled_prompt_embeds=pooled_before,
        )
        return texts
    text, negative_text = pipe.encode_prompt(
        prompts,
        device,
        1,
        guided,
        negative_prompt=negative_prompt,
        negative_prompt_embeds=text_before,
    )
    pooled = text.new_zeros(len(text), 0)
    return text, negative_text, pooled, None if negative_text is None else pooled


def conditions(pooled: Tensor, time_ids: Tensor) -> dict[str, Any]:
    """What a UNet is given beside noise, timestep and text; nothing where there is no pooled text (P = 0).

    pooled: [N, P]; time_ids: [N, 6].
    """
    if not pooled.shape[-1]:
        return {}
    return {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": time_ids}}
