"""The networks that features of pictures and texts come from: DINO and CLIP, or pocket's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from coeffdiff.errors import ModelError, ShapeError
from coeffdiff.models.finding import encoder_folder
from coeffdiff.pocket import POCKET, POCKET_CLIP, POCKET_DINO, shipped
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.own_memory import own_memory
from coeffdiff.utils.text import first_line

# The encoders of DreamBooth's table
DINO = "facebook/dino-vits16"
CLIP = "openai/clip-vit-base-patch32"
NEUTRAL = (128, 128, 128)  # grey in place of a background that does not count
_VISION_TRANSFORMERS = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")  # class token first


@dataclass(frozen=True)
class Encoder:
    """A vision transformer and its image processor."""

    name: str
    network: Any
    processor: Any

    @torch.no_grad()
    def features(self, pictures: Sequence[Image.Image], batch_size: int = 32) -> Tensor:
        """Unit-length features [N, D] of RGB pictures of any size: the class token of the last layer."""
        return _in_batches(self, pictures, batch_size, lambda output: output.last_hidden_state[:, 0])


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
        return _in_batches(self, pictures, batch_size, lambda output: output.pooler_output)

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit-length projected features [N, D] of texts, cut at the length that the network reads."""
        if not texts:
            return torch.zeros(0, self.network.config.projection_dim)
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        output = self.network.get_text_features(
            input_ids=tokens.input_ids.to(self.network.device),
            attention_mask=tokens.attention_mask.to(self.network.device),
        )
        return F.normalize(output.pooler_output.float(), dim=-1).cpu()


@dataclass(frozen=True)
class Encoders:
    """The encoders that scores are made with; the scores of a missing one are left out."""

    dino: Encoder | None = None
    clip: ClipEncoder | None = None

    def names(self) -> dict[str, str]:
        """Names of the encoders that are there, for reports."""
        present = {"dino": self.dino, "clip": self.clip}
        return {kind: encoder.name for kind, encoder in present.items() if encoder}


def load_dino(name: str = DINO, device: str | torch.device = "cpu") -> Encoder:
    """A vision transformer by hub id or folder (DINO, DINOv2, DINOv3, any ViT), or "pocket-dino".

    Raises: ModelError if there is none, it is of another kind, or it is not available offline.
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

    Raises: ModelError if there is none, it is of another kind, or it is not available offline.
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

    dino, clip: other encoders by name. Raises: ModelError if one is not available.
    """
    own = model_name == POCKET
    return Encoders(
        load_dino(dino or (POCKET_DINO if own else DINO), device),
        load_clip(clip or (POCKET_CLIP if own else CLIP), device),
    )


def _in_batches(
    encoder: Encoder | ClipEncoder, pictures: Sequence[Image.Image], batch_size: int, pick: Any
) -> Tensor:
    """Unit-length features [N, D]. pick: the part of the network's output that is used."""
    network = encoder.network
    encode = network.get_image_features if isinstance(encoder, ClipEncoder) else network
    parts = []
    for begin in range(0, len(pictures), batch_size):
        batch = [picture.convert("RGB") for picture in pictures[begin : begin + batch_size]]
        # In memory of torch's own, as the weights: NumPy's lies elsewhere in every process
        pixels = encoder.processor(batch, return_tensors="pt").pixel_values.clone()
        parts.append(pick(encode(pixel_values=pixels.to(network.device))))
    if not parts:
        raise ShapeError(f"{encoder.name} was given no picture.")
    return F.normalize(torch.cat(parts).float(), dim=-1).cpu()


def _folder(name: str, own: str) -> Path:
    try:
        return shipped(name) if name == own else encoder_folder(name)
    except ModelError as error:
        raise ModelError(f"The encoder {name} cannot be loaded: {error}") from None


def _loaded(kind: Any, folder: Path, **extra: Any) -> Any:
    """The network in float32, in memory of its own.

    Raises: ValueError if the files lack weights, which transformers fills with noise.
    """
    network, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **extra)
    lacking = sorted(report["missing_keys"])
    if lacking:
        raise ValueError(f"its weights lack {lacking[0]} and {len(lacking) - 1} others")
    return own_memory(network)


def _unusable(name: str, error: Exception) -> ModelError:
    return ModelError(f"The encoder {name} cannot be loaded: {first_line(error)}.")
