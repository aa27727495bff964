"""Findings on captions and the token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from coeffdiff.config.fields import PLACEHOLDER
from coeffdiff.config.schema import SubjectSettings
from coeffdiff.data.class_captions import class_captions
from coeffdiff.data.photos import PhotoSet
from coeffdiff.data.templates import fill
from coeffdiff.hosts.token_vocabulary import announce_tokens
from coeffdiff.models.loading import load_pipeline
from coeffdiff.models.subject_token import caption_findings, holds, token_findings
from coeffdiff.preflight.report import MOST_LISTED, Finding, PhotoCheck
from coeffdiff.sampling.prompts import length_warnings


def text_findings(
    checks: Sequence[PhotoCheck],
    subject: SubjectSettings,
    base: Any,
    *,
    token_vectors: int = 0,
    prior_weight: float = 0.0,
    prompts: Sequence[str] = (),
    class_pictures: PhotoSet | None = None,
) -> list[Finding]:
    """What is odd about token, class word and captions. The one place where such findings are added.

    Args:
        checks: of all photos. base: from find_backbone.
        token_vectors: embeddings of a learned token; 0: the token is not learned.
        prior_weight: with any, the captions of the class are read too.
        prompts: of the validation pictures, with their placeholders.
    """
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
    pipe = load_pipeline(base, dtype=torch.float32, parts=())  # tokenizers and scheduler alone
    if subject.token:
        token = subject.token
        for sentence in token_findings(pipe, token, subject.class_word, learned=token_vectors > 0):
            findings.append(Finding("note", "token", sentence))
        named = {photo.name: photo.captions for photo in checks}
        for sentence in caption_findings(named, token):
            findings.append(Finding("hint", "captions", sentence))
        if token_vectors and not any(holds(text, token) for texts in named.values() for text in texts):
            sentence = (
                f"none holds the token {token}, so there is nothing to learn it from; training refuses this"
            )
            findings.append(Finding("problem", "captions", sentence))
        if token_vectors:
            announce_tokens(pipe, {token: token_vectors})
    captions = [photo.captions for photo in checks]
    of_class, of_pictures = class_captions(
        subject, prior_weight if subject.token else 0.0, captions, class_pictures
    )
    filled = [fill(prompt, subject.token or PLACEHOLDER, subject.class_word) for prompt in prompts]
    texts = [text for some in (*captions, of_class.values(), *of_pictures, filled) for text in some]
    return [*findings, *_length_findings(texts, pipe)]


def _length_findings(texts: Sequence[str], pipe: Any) -> list[Finding]:
    """A hint for each text that the model does not read to its end. pipe: its tokenizers."""
    warned = [line for text in dict.fromkeys(texts) for line in length_warnings(text, pipe)]
    findings = [Finding("hint", "captions", line.removesuffix(".")) for line in warned[:MOST_LISTED]]
    if len(warned) > MOST_LISTED:
        findings.append(
            Finding("hint", "captions", f"and {len(warned) - MOST_LISTED} more texts are too long")
        )
    return findings
