"""Scores of pictures against reference photos and prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from coeffdiff.metrics.encoders import NEUTRAL, ClipEncoder, Encoder, Encoders
from coeffdiff.metrics.features import mean_paired_cosine, mean_pairwise_cosine


@dataclass(frozen=True)
class References:
    """Features of the photos by encoder: whole [M, D], and masked [K, D] of the K with masks, background grey."""

    whole: dict[str, Tensor]
    masked: dict[str, Tensor]


def references_of(
    encoders: Encoders, photos: Sequence[Image.Image], masks: Sequence[Image.Image | None] | None = None
) -> References:
    """Encode the photos once. masks: one per photo or None, white where the subject is."""
    masks = masks or [None] * len(photos)
    cut = [
        without_background(photo, mask) for photo, mask in zip(photos, masks, strict=True) if mask is not None
    ]
    present = _present(encoders)
    return References(
        {kind: encoder.features(photos) for kind, encoder in present.items()},
        {kind: encoder.features(cut) for kind, encoder in present.items()} if cut else {},
    )


def joined(parts: Sequence[References]) -> References:
    """References of photos that were encoded one by one, in order: 200 open ones of 20 megapixels are 12 GB."""
    masked = [part.masked for part in parts if part.masked]
    return References(
        {kind: torch.cat([part.whole[kind] for part in parts]) for kind in parts[0].whole},
        {kind: torch.cat([part[kind] for part in masked]) for kind in masked[0]} if masked else {},
    )


def score_pictures(
    encoders: Encoders,
    references: References,
    pictures: Sequence[Image.Image],
    texts: Sequence[str],
    picture_masks: Sequence[Image.Image] | None = None,
) -> dict[str, float]:
    """Subject fidelity and text alignment of N pictures.

    Args:
        references: of the subject's photos.
        texts: what each picture was asked to show, N in all, without the token: see plain_text.
        picture_masks: white where the subject is, one per picture; rarely known.
    Returns: those that there is an encoder for of
        dino, clip_i: mean cosine of all pairs of a picture and a photo;
        dino_masked, clip_i_masked, if photos have masks: the same with the photos' background made grey, and the
            pictures' background too if picture_masks are given. Otherwise the pictures are compared whole, so that
            a background which resembles the photos' no longer counts, but an own background still costs;
        clip_t: mean cosine of picture and text.
    """
    scores: dict[str, float] = {}
    names = {"dino": "dino", "clip": "clip_i"}
    for kind, encoder in _present(encoders).items():
        features = encoder.features(pictures)
        scores[names[kind]] = mean_pairwise_cosine(features, references.whole[kind])
        if kind in references.masked:
            cut = features
            if picture_masks is not None:
                pairs = zip(pictures, picture_masks, strict=True)
                cut = encoder.features([without_background(picture, mask) for picture, mask in pairs])
            scores[f"{names[kind]}_masked"] = mean_pairwise_cosine(cut, references.masked[kind])
        if isinstance(encoder, ClipEncoder):
            scores["clip_t"] = mean_paired_cosine(features, encoder.text_features(texts))
    return scores


def without_background(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The picture with neutral grey where the mask is black; greys mix. The mask is resized to the picture."""
    grey = Image.new("RGB", picture.size, NEUTRAL)
    weight = mask.convert("L")
    if weight.size != picture.size:
        weight = weight.resize(picture.size, Image.Resampling.BILINEAR)
    return Image.composite(picture.convert("RGB"), grey, weight)


def plain_text(prompt: str, token: str) -> str:
    """The prompt without the token: CLIP knows it as another word or not at all, which would spoil CLIP-T."""
    return " ".join(re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", " ", prompt, flags=re.IGNORECASE).split())


def _present(encoders: Encoders) -> dict[str, Encoder | ClipEncoder]:
    present: dict[str, Encoder | ClipEncoder | None] = {"dino": encoders.dino, "clip": encoders.clip}
    return {kind: encoder for kind, encoder in present.items() if encoder is not None}
