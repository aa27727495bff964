"""Captions and tokens before a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from coeffdiff.config.fields import PLACEHOLDER
from coeffdiff.config.schema import Settings
from coeffdiff.data.class_captions import class_captions
from coeffdiff.data.photos import PhotoSet
from coeffdiff.data.templates import fill
from coeffdiff.hosts.learned_token import announce_tokens
from coeffdiff.models.loading import load_pipeline
from coeffdiff.models.subject_token import caption_findings, holds, token_findings
from coeffdiff.preflight.report import MOST_LISTED, Finding, PhotoCheck
from coeffdiff.sampling.prompts import length_warnings


def text_findings(
    settings: Settings, looked: Sequence[PhotoCheck], base: Any, class_pictures: PhotoSet | None = None
) -> list[Finding]:
    """What is odd about token, class word and captions. The one place where such findings are added."""
    subject = settings.subject
    findings = []
    if not subject.token:
        sentence = "there is no --token yet, so captions are shown with <V> in its place"
        findings.append(Finding("note", "token", sentence))
    if not subject.class_word:
        sentence = (
            "without --class-word the model is not told what kind of thing this is. DreamBooth's authors "
            "measured a subject fidelity (DINO) of 0.744 with the right class noun, 0.303 without"
        )
        findings.append(Finding("hint", "class word", sentence))
    outline = load_pipeline(base, dtype=torch.float32, parts=())  # tokenizers and scheduler alone
    if subject.token:
        token = subject.token
        for sentence in token_findings(outline, token, subject.class_word, learned=settings.learns_token):
            findings.append(Finding("note", "token", sentence))
        named = {photo.name: photo.captions for photo in looked}
        for sentence in caption_findings(named, token):
            findings.append(Finding("hint", "captions", sentence))
        if settings.learns_token and not any(
            holds(text, token) for texts in named.values() for text in texts
        ):
            sentence = (
                f"none holds the token {token}, so there is nothing to learn it from; training refuses this"
            )
            findings.append(Finding("problem", "captions", sentence))
    findings += _length_findings(settings, looked, outline, class_pictures)
    return findings


def _length_findings(
    settings: Settings, looked: Sequence[PhotoCheck], outline: Any, class_pictures: PhotoSet | None
) -> list[Finding]:
    """A hint for each text of the run that the model does not read to its end: captions and validation prompts."""
    token = settings.subject.token or PLACEHOLDER
    if settings.learns_token and settings.subject.token:
        announce_tokens(outline, {token: settings.method.token.vectors})
    captions = [photo.captions for photo in looked]
    of_class: dict[str, str] = {}
    of_pictures: list[tuple[str, ...]] = []
    if settings.prior.weight and settings.subject.token:
        of_class, of_pictures = class_captions(settings, captions, class_pictures)
    word = settings.subject.class_word
    prompts = [fill(prompt, token, word) for prompt in settings.validation.prompts]
    texts = [text for some in (*captions, of_class.values(), *of_pictures, prompts) for text in some]
    warned = [line for text in dict.fromkeys(texts) for line in length_warnings(text, outline)]
    findings = [Finding("hint", "captions", line.removesuffix(".")) for line in warned[:MOST_LISTED]]
    if len(warned) > MOST_LISTED:
        findings.append(
            Finding("hint", "captions", f"and {len(warned) - MOST_LISTED} more texts are too long")
        )
    return findings
