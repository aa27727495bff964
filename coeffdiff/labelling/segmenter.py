"""Networks that mark a subject in photos: CLIPSeg, which takes any words, and models with labels of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from coeffdiff.errors import ConfigError
from coeffdiff.labelling.defaults import CONFIDENCE, SEGMENTER, THRESHOLD
from coeffdiff.labelling.labels import matching_labels
from coeffdiff.labelling.networks import (
    Found,
    find_network,
    load_network,
    running_errors,
    shrunk,
    what_is_lacking,
)
from coeffdiff.utils.console import print_info, quiet_libraries

_ANY_WORDS = "clipseg"
# OneFormer fetches a file of labels from the Hub at each start; VidEoMT wants videos
_NOT_USED = ("oneformer", "videomt")


class Segmenter(Protocol):
    @property
    def device(self) -> str:
        """cpu, cuda or mps."""

    def marks(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        """For each RGB picture where it shows the subject: [h, w], bool, of the picture's shape but perhaps smaller."""


@dataclass(frozen=True)
class WordSegmenter:
    """CLIPSeg (Lueddecke and Ecker, CVPR 2022, arXiv 2112.10003)."""

    name: str
    network: Any
    processor: Any
    words: str
    threshold: float

    @property
    def device(self) -> str:
        return str(self.network.device.type)

    @torch.no_grad()
    def marks(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        small = [shrunk(picture) for picture in pictures]
        with quiet_libraries(), running_errors(self.name, "Name another --model."):
            inputs = self.processor(
                images=small,
                text=[self.words] * len(small),
                padding=True,
                truncation=True,
                return_tensors="pt",
            ).to(self.network.device)
            logits = self.network(**inputs).logits
            scores = torch.sigmoid(logits.float()).reshape(len(small), 1, *logits.shape[-2:]).cpu()
        return [
            F.interpolate(score[None], size=(picture.height, picture.width), mode="bilinear")[0, 0]
            > self.threshold
            for score, picture in zip(scores, small, strict=True)
        ]


@dataclass(frozen=True)
class LabelSegmenter:
    """A semantic, instance or panoptic model: every region that has one of the labels."""

    name: str
    pipeline: Any
    labels: frozenset[str]
    options: dict[str, float]

    @property
    def device(self) -> str:
        return str(self.pipeline.model.device.type)

    @torch.no_grad()
    def marks(self, pictures: Sequence[Image.Image]) -> list[Tensor]:
        found = []
        for picture in map(shrunk, pictures):
            with quiet_libraries(), running_errors(self.name, "Name another --model."):
                regions = self.pipeline(picture, **self.options)
            mark = torch.zeros(picture.height, picture.width, dtype=torch.bool)
            for region in regions:
                if region["label"] in self.labels:
                    mark |= _as_tensor(region["mask"])
            found.append(mark)
        return found


def find_segmenter(name: str) -> Found:
    """Raises: ModelError if there is no such model, or it segments no pictures."""
    from transformers.models.auto import modeling_auto as auto

    kinds = {
        *auto.MODEL_FOR_IMAGE_SEGMENTATION_MAPPING_NAMES,
        *auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES,
        *auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES,
        *auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES,
        _ANY_WORDS,
    }.difference(_NOT_USED)
    return find_network(name, kinds, "a segmentation model", SEGMENTER)


def load_segmenter(
    found: Found, class_word: str, device: torch.device, threshold: float | None = None
) -> Segmenter:
    """The network, in float32: borders are drawn where a score crosses a threshold, and these networks are small.

    Args:
        class_word: what to mark.
        threshold: of CLIPSeg's scores, or of the confidence of instance and panoptic models.
    Raises: ModelError if something of it is missing or damaged; ConfigError for a class word that it has no label
        for, or a threshold where it has none.
    """
    from transformers import AutoImageProcessor, AutoProcessor, CLIPSegForImageSegmentation, pipeline

    if found.kind == _ANY_WORDS:
        with quiet_libraries(), what_is_lacking(found.name):
            processor = AutoProcessor.from_pretrained(found.folder, trust_remote_code=False)
        network = load_network(found, CLIPSegForImageSegmentation, device, torch.float32)
        return WordSegmenter(
            found.name, network, processor, class_word, THRESHOLD if threshold is None else threshold
        )
    with quiet_libraries(), what_is_lacking(found.name):
        processor = AutoImageProcessor.from_pretrained(found.folder, trust_remote_code=False)
    options = _options(found, processor, threshold)
    network = load_network(found, _auto_class(found.kind), device, torch.float32)
    labels = matching_labels(network.config.id2label, class_word, found.name)
    chosen = frozenset(labels.values())
    if chosen != {class_word}:
        print_info(f"labels   of {found.name}: {'; '.join(sorted(chosen))}")
    with quiet_libraries(), what_is_lacking(found.name):
        pipe = pipeline("image-segmentation", model=network, image_processor=processor, device=device)
    return LabelSegmenter(found.name, pipe, chosen, options)


def _options(found: Found, processor: Any, threshold: float | None) -> dict[str, float]:
    """What the pipeline is told. Raises: ConfigError for a threshold that would change nothing."""
    separate = hasattr(processor, "post_process_panoptic_segmentation") or hasattr(
        processor, "post_process_instance_segmentation"
    )
    if separate:
        return {"threshold": CONFIDENCE if threshold is None else threshold}
    if threshold is not None:
        raise ConfigError(
            f"{found.name} gives each pixel its most probable label, so there is no --threshold; leave it out."
        )
    return {}


def _auto_class(kind: str) -> Any:
    """The AutoModel class that has a head for segmentation of this kind of model."""
    import transformers
    from transformers.models.auto import modeling_auto as auto

    if kind in auto.MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES:
        return transformers.AutoModelForSemanticSegmentation
    if kind in auto.MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES:
        return transformers.AutoModelForUniversalSegmentation
    if kind in auto.MODEL_FOR_INSTANCE_SEGMENTATION_MAPPING_NAMES:
        return transformers.AutoModelForInstanceSegmentation
    return transformers.AutoModelForImageSegmentation


def _as_tensor(mask: Image.Image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.asarray(mask) > 127)
