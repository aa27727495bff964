"""Scores of validation pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from coeffdiff.config.schema import Settings
from coeffdiff.data.photos import PhotoSet
from coeffdiff.data.subjects import prompts_of, tokens_of
from coeffdiff.errors import ConfigError
from coeffdiff.metrics.encoders import Encoders, load_clip, load_dino
from coeffdiff.metrics.pictures import References, joined, plain_text, references_of, score_pictures
from coeffdiff.models.subject_token import holds
from coeffdiff.utils.console import print_info, progress


@dataclass(frozen=True)
class Sitter:
    """A subject as the encoders see its photos, and the validation pictures that were asked to show it.

    texts: what each picture was asked to show, without the token, by its place among all pictures.
    """

    token: str
    references: References
    texts: Mapping[int, str]


@dataclass(frozen=True)
class Judge:
    """Encoders and the subjects that they know."""

    encoders: Encoders
    sitters: Sequence[Sitter]

    def scores(self, files: Sequence[Path]) -> dict[str, float]:
        """What score_pictures finds with these encoders and photos, and score: what the best adapter is chosen by.

        Of several subjects the means, and their own scores under names such as ohwx/dino.
        """
        pictures = []
        for file in files:
            with Image.open(file) as picture:
                pictures.append(picture.convert("RGB"))
        found = {sitter.token: self._of(sitter, pictures) for sitter in self.sitters}
        if len(found) == 1:
            return next(iter(found.values()))
        # Masks are a subject's own, so a mean is only of what all have
        shared = [name for name in next(iter(found.values())) if all(name in own for own in found.values())]
        means = {name: round(statistics.fmean(own[name] for own in found.values()), 6) for name in shared}
        return means | {f"{token}/{name}": own[name] for token, own in found.items() for name in own}

    def _of(self, sitter: Sitter, pictures: Sequence[Image.Image]) -> dict[str, float]:
        shown = [pictures[place] for place in sitter.texts]
        found = score_pictures(self.encoders, sitter.references, shown, list(sitter.texts.values()))
        return {name: round(value, 6) for name, value in (found | {"score": selection_score(found)}).items()}


def judge_for(settings: Settings, photos: PhotoSet) -> Judge | None:
    """The encoders that the settings name, after a look at the photos; None if there is nothing to score.

    They stay on the CPU: a handful of pictures takes a second there, and the GPU's memory is the training's.
    Raises: ModelError if an encoder cannot be had.
    """
    validation, subjects = settings.validation, settings.each_subject
    if not (validation.prompts and (validation.dino or validation.clip)):
        return None
    encoders = Encoders(
        load_dino(validation.dino) if validation.dino else None,
        load_clip(validation.clip) if validation.clip else None,
    )
    print_info(f"scores   by {' and '.join(encoders.names().values())} at each validation")
    texts = [texts_of(settings, token) for token in tokens_of(subjects)]
    seen: list[list[References]] = [[] for _ in subjects]
    with progress("looking at the photos", len(photos.photos)) as bar:
        for number, photo in enumerate(photos.photos, 1):
            seen[photo.subject].append(references_of(encoders, [photo.open()], [photo.open_mask()]))
            bar(number)
    parts = zip(tokens_of(subjects), map(joined, seen), texts, strict=True)
    return Judge(encoders, [Sitter(*part) for part in parts])


def texts_of(settings: Settings, token: str) -> dict[int, str]:
    """What the validation pictures of one subject were asked to show, by their places among all pictures.

    Of several subjects only those that name it and no other: in a picture of two, none has photos to be compared with.
    Raises: ConfigError if there are none.
    """
    tokens = tokens_of(settings.each_subject)
    prompts = prompts_of(settings.each_subject, settings.validation.prompts)
    asked = [prompt for prompt in prompts for _ in settings.validation.seeds]
    named = [[one for one in tokens if holds(prompt, one)] for prompt in asked]
    texts = {
        place: plain_text(prompt, token)
        for place, prompt in enumerate(asked)
        if len(tokens) == 1 or named[place] == [token]
    }
    if not texts:
        raise ConfigError(
            f"No validation prompt names {token} alone, so there is nothing to score it by: write {{token}} into one "
            "of validation.prompts, or set validation.dino and validation.clip to null."
        )
    return texts


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
