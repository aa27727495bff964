"""Scores of pictures against reference photos and prompts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from coeffdiff.metrics.encoders import NEUTRAL, ClipEncoder, Encoder, Encoders
from coeffdiff.metrics.features import mean_paired_cosine, mean_pairwise_cosine

FIDELITY = {"dino": "dino", "clip": "clip_i"}  # encoder -> its score of subject fidelity


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
    present = _present(encoders)
    features = {kind: encoder.features(pictures) for kind, encoder in present.items()}
    cut = features
    if picture_masks is not None and references.masked:
        pairs = zip(pictures, picture_masks, strict=True)
        plain = [without_background(picture, mask) for picture, mask in pairs]
        cut = {kind: present[kind].features(plain) for kind in references.masked if kind in present}
    scores = fidelity(features, references, cut)
    if encoders.clip is not None:
        scores["clip_t"] = mean_paired_cosine(features["clip"], encoders.clip.text_features(texts))
    return scores


def fidelity(
    features: Mapping[str, Tensor], references: References, cut: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Scores of subject fidelity from features [N, D] by encoder: see score_pictures.

    cut: of the pictures without their background, to be compared with the masked photos; None: the same features.
    """
    cut = features if cut is None else cut
    scores = {}
    for kind, own in features.items():
        scores[FIDELITY[kind]] = mean_pairwise_cosine(own, references.whole[kind])
        if kind in references.masked:
            scores[f"{FIDELITY[kind]}_masked"] = mean_pairwise_cosine(cut[kind], references.masked[kind])
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
