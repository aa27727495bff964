"""What a picture is worth, in numbers: functions of pictures and of the networks that look at them.

    encoders_for(model) -> Encoders(dino, clip)
    references_of(encoders, photos, masks) -> References      photos, encoded once
    score_pictures(encoders, references, pictures, texts)     -> {"dino": ..., "clip_i": ..., "clip_t": ...}
    diversity(groups), drift(adapter, base)                   functions of features

Protocol: DreamBooth (arXiv 2208.12242), section 4. Shape letters: N generated pictures, M photos, D features. All
features are of unit length, so that a product is a cosine. Absolute numbers depend on encoder, photos and prompts:
compare arms of one evaluation, never papers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from coeffdiff.backbone import encoder_folder
from coeffdiff.console import quiet_libraries
from coeffdiff.errors import ModelError, ShapeError
from coeffdiff.pocket import POCKET, POCKET_CLIP, POCKET_DINO, shipped

DINO = "facebook/dino-vits16"  # the encoders of DreamBooth's table
CLIP = "openai/clip-vit-base-patch32"
_VISION_TRANSFORMERS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")  # class token first
NEUTRAL = (128, 128, 128)  # what stands for a background that is not looked at


# --- the networks that look ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoder:
    """A vision transformer and how it wants its pictures."""

    name: str
    network: Any
    processor: Any

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """Unit-length features [N, D] of RGB pictures of any size: the class token of the last layer."""
        return _in_batches(self, pictures, batch_size, lambda found: found.last_hidden_state[:, 0])


@dataclass(frozen=True)
class ClipEncoder:
    """A CLIP: pictures and texts in one space."""

    name: str
    network: Any
    processor: Any
    tokenizer: Any

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """Unit-length projected features [N, D] of RGB pictures of any size."""
        return _in_batches(self, pictures, batch_size, lambda found: found.pooler_output)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit-length projected features [N, D] of texts, cut at the length that the network reads."""
        if not texts:
            return torch.zeros(0, self.network.config.projection_dim)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        found = self.network.get_text_features(
            input_ids=tokens.input_ids.to(self.network.device),
            attention_mask=tokens.attention_mask.to(self.network.device),
        )
        return F.normalize(found.pooler_output.float(), dim=-1).cpu()


@dataclass(frozen=True)
class Encoders:
    """What is at hand; a score whose encoder is None is left out."""

    dino: Encoder | None = None
    clip: ClipEncoder | None = None

    def names(self) -> dict[str, str]:
        """Of those that are there, for reports."""
        present = {"dino": self.dino, "clip": self.clip}
        return {kind: encoder.name for kind, encoder in present.items() if encoder}


def _in_batches(
    encoder: Encoder | ClipEncoder, pictures: Sequence[Image.Image], batch_size: int, pick: Any
) -> Tensor:
    network = encoder.network
    look = network.get_image_features if isinstance(encoder, ClipEncoder) else network
    parts = []
    for begin in range(0, len(pictures), batch_size):
        lot = [picture.convert("RGB") for picture in pictures[begin : begin + batch_size]]
        pixels = encoder.processor(lot, return_tensors="pt").pixel_values
        parts.append(pick(look(pixel_values=pixels.to(network.device))))
    if not parts:
        raise ShapeError(f"{encoder.name} was given no picture.")
    return F.normalize(torch.cat(parts).float(), dim=-1).cpu()


def load_dino(name: str = DINO, device: str | torch.device = "cpu") -> Encoder:
    """A vision transformer by hub id or folder (DINO, DINOv2, DINOv3, any ViT), or "pocket-dino".

    Raises: ModelError if there is none, it is of another kind, or it cannot be had offline.
    """
    folder = _folder(name, POCKET_DINO)
    with quiet_libraries():
        from transformers import AutoConfig, AutoImageProcessor, AutoModel

        try:
            kind = AutoConfig.from_pretrained(folder).model_type
            if kind not in _VISION_TRANSFORMERS:
                raise ModelError(f"The encoder {name} is a {kind}, not a vision transformer such as {DINO}.")
            # A ViT's pooler belongs to classifiers; DINO's weights have none.
            extra = {"add_pooling_layer": False} if kind == "vit" else {}
            network = _loaded(AutoModel, folder, **extra)
            processor = AutoImageProcessor.from_pretrained(folder)
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
            raise _unusable(name, error) from error
    return Encoder(name, network.requires_grad_(False).eval().to(device), processor)


def load_clip(name: str = CLIP, device: str | torch.device = "cpu") -> ClipEncoder:
    """A CLIP by hub id or folder, or "pocket-clip".

    Raises: ModelError if there is none, it is of another kind, or it cannot be had offline.
    """
    folder = _folder(name, POCKET_CLIP)
    with quiet_libraries():
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, CLIPModel

        try:
            kind = AutoConfig.from_pretrained(folder).model_type
            if kind != "clip":
                raise ModelError(f"The encoder {name} is a {kind}, not a CLIP such as {CLIP}.")
            network = _loaded(CLIPModel, folder)
            processor = AutoImageProcessor.from_pretrained(folder)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError) as error:
            raise _unusable(name, error) from error
    tokenizer.model_max_length = min(
        tokenizer.model_max_length, network.config.text_config.max_position_embeddings
    )
    return ClipEncoder(name, network.requires_grad_(False).eval().to(device), processor, tokenizer)


def encoders_for(
    model_name: str, dino: str | None = None, clip: str | None = None, device: str | torch.device = "cpu"
) -> Encoders:
    """DINO and CLIP to judge the pictures of a model with: pocket's own for pocket, DreamBooth's for any other.

    dino, clip: other encoders by name. Raises: ModelError if one cannot be had.
    """
    own = model_name == POCKET
    return Encoders(
        load_dino(dino or (POCKET_DINO if own else DINO), device),
        load_clip(clip or (POCKET_CLIP if own else CLIP), device),
    )


def _folder(name: str, own: str) -> Path:
    try:
        return shipped(name) if name == own else encoder_folder(name)
    except ModelError as error:
        raise ModelError(f"The encoder {name} cannot be loaded: {error}") from None


def _loaded(kind: Any, folder: Path, **extra: Any) -> Any:
    """The network in float32. Raises: ValueError if the files lack some of its weights, which transformers fills up."""
    network, found = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **extra)
    lacking = sorted(found["missing_keys"])
    if lacking:
        raise ValueError(f"its weights lack {lacking[0]} and {len(lacking) - 1} others")
    return network


def _unusable(name: str, error: Exception) -> ModelError:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return ModelError(f"The encoder {name} cannot be loaded: {first.rstrip('.')}.")


# --- scores of features ----------------------------------------------------------------------------------------


def mean_pairwise_cosine(features: Tensor, references: Tensor) -> float:
    """Mean of the cosines of all N * M pairs of unit-length features [N, D] and [M, D]: DINO's and CLIP's fidelity.

    Source: DreamBooth, section 4.
    """
    return float((features @ references.T).mean())


def mean_paired_cosine(features: Tensor, partners: Tensor) -> float:
    """Mean of the cosines of row and row, both [N, D]: CLIP-T with the pictures' own texts as partners.

    Raises: ShapeError if they are not as many.
    """
    if features.shape != partners.shape:
        raise ShapeError(f"{list(features.shape)} features cannot be paired with {list(partners.shape)}.")
    return float((features * partners).sum(dim=-1).mean())


def mean_cosine_among(features: Tensor) -> float:
    """Mean of the cosines of the N * (N - 1) / 2 distinct pairs of unit-length features [N, D].

    Of photos it is what DreamBooth's table calls real images: as near as pictures of one subject are to each other.
    Raises: ShapeError for fewer than two.
    """
    count = len(features)
    if count < 2:
        raise ShapeError(f"Pairs need two pictures or more, not {count}.")
    cosines = features @ features.T
    return float((cosines.sum() - cosines.diagonal().sum()) / (count * (count - 1)))


def diversity(groups: Sequence[Tensor]) -> float | None:
    """1 - the mean cosine among the pictures of one prompt, averaged over prompts: 0 if all seeds look the same.

    DreamBooth's diversity is the mean LPIPS of such pairs (section 4.3). LPIPS needs one more network with weights of
    its own, so DINO's cosines take its place: the same pairs, another distance, not comparable in numbers.

    Args:
        groups: per prompt the DINO features [N, D] of its pictures, seed by seed.
    Returns: None if no prompt has two pictures.
    """
    spreads = [1.0 - mean_cosine_among(features) for features in groups if len(features) > 1]
    return sum(spreads) / len(spreads) if spreads else None


def drift(adapted: Tensor, base: Tensor) -> float:
    """1 - the mean cosine of the adapter's and the base model's pictures, [N, D] both, row by row.

    Row i of both is of the same prompt, seed and settings, and the prompts do not hold the token: whatever moves was
    not asked for. 0 if the adapter leaves them alone. Our own score; DINO features.
    Raises: ShapeError if they are not as many.
    """
    return 1.0 - mean_paired_cosine(adapted, base)


# --- scores of pictures ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class References:
    """The photos as the encoders see them: [M, D] by encoder, and [K, D] of the K with masks, background away."""

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
    """Photos that were encoded one by one, in order, as if at once: 200 of 20 megapixels are 12 GB when open."""
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
    Returns: what the encoders at hand allow of
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
    """The prompt without the token: CLIP knows the word otherwise or not at all, and either would spoil CLIP-T."""
    return " ".join(re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", " ", prompt, flags=re.IGNORECASE).split())


def _present(encoders: Encoders) -> dict[str, Encoder | ClipEncoder]:
    present: dict[str, Encoder | ClipEncoder | None] = {"dino": encoders.dino, "clip": encoders.clip}
    return {kind: encoder for kind, encoder in present.items() if encoder is not None}
