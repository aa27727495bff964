"""Scores of validation pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from coeffdiff.config.schema import Settings
from coeffdiff.data.photos import PhotoSet
from coeffdiff.data.templates import fill
from coeffdiff.metrics.encoders import Encoders, load_clip, load_dino
from coeffdiff.metrics.pictures import References, joined, plain_text, references_of, score_pictures
from coeffdiff.utils.console import print_info, progress


@dataclass(frozen=True)
class Judge:
    """Encoders, the photos as they see them, and what each validation picture was asked to show, in order."""

    encoders: Encoders
    references: References
    texts: Sequence[str]

    def scores(self, files: Sequence[Path]) -> dict[str, float]:
        """What score_pictures finds with these encoders and photos, and score: what the best adapter is chosen by."""
        pictures = []
        for file in files:
            with Image.open(file) as picture:
                pictures.append(picture.convert("RGB"))
        found = score_pictures(self.encoders, self.references, pictures, self.texts)
        return {name: round(value, 6) for name, value in (found | {"score": selection_score(found)}).items()}


def judge_for(settings: Settings, photos: PhotoSet) -> Judge | None:
    """The encoders that the settings name, after a look at the photos; None if there is nothing to score.

    They stay on the CPU: a handful of pictures takes a second there, and the GPU's memory is the training's.
    Raises: ModelError if an encoder cannot be had.
    """
    validation, subject = settings.validation, settings.subject
    if not (validation.prompts and (validation.dino or validation.clip)):
        return None
    encoders = Encoders(
        load_dino(validation.dino) if validation.dino else None,
        load_clip(validation.clip) if validation.clip else None,
    )
    print_info(f"scores   by {' and '.join(encoders.names().values())} at each validation")
    seen = []
    with progress("looking at the photos", len(photos.photos)) as bar:
        for number, photo in enumerate(photos.photos, 1):
            seen.append(references_of(encoders, [photo.open()], [photo.open_mask()]))
            bar(number)
    token = str(subject.token)
    prompts = dict.fromkeys(fill(prompt, token, subject.class_word) for prompt in validation.prompts)
    texts = [plain_text(prompt, token) for prompt in prompts for _ in validation.seeds]
    return Judge(encoders, joined(seen), texts)


def selection_score(scores: Mapping[str, float]) -> float:
    """One number to choose an adapter by: the geometric mean of subject fidelity and text alignment.

    Subject fidelity is DINO's, which tells individuals of a kind apart better than CLIP-I (DreamBooth, section
    4), or CLIP-I where there is no DINO; where photos have masks, it is fidelity to those without their
    background, so that an adapter is not chosen for having learned that too. Training on raises it and, once
    photos are copied, lowers CLIP-T, so either alone would choose the first or the last step. Their cosines
    live on scales of their own (real photos have a DINO of some 0.8, good prompts a CLIP-T of some 0.3), and a
    sum would hear the larger one only; in a product a loss of one per cent in one is paid for by a gain of one
    per cent in the other, and dividing each by its value at the first validation, or any other, would change no
    order. Where a cosine is negative, as on the first steps, the lower one is the score, so that rising still
    counts. With one encoder that has no partner the score is what there is.
    """
    fidelities = ("dino_masked", "dino", "clip_i_masked", "clip_i")
    subject = next((scores[name] for name in fidelities if name in scores), None)
    parts = [part for part in (subject, scores.get("clip_t")) if part is not None]
    if not parts:
        return 0.0
    if any(math.isnan(part) for part in parts):
        return -1.0  # pictures that are none are the worst
    return min(parts) if min(parts) < 0 else math.prod(parts) ** (1 / len(parts))
