"""Findings on captions and the token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from coeffdiff.config.schema import SubjectSettings
from coeffdiff.data.class_captions import class_captions
from coeffdiff.data.photos import PhotoSet
from coeffdiff.data.subjects import prompts_of
from coeffdiff.hosts.token.vocabulary import announce_tokens
from coeffdiff.models.loading import load_pipeline
from coeffdiff.models.subject_token import caption_findings, holds, token_findings
from coeffdiff.preflight.report import MOST_LISTED, Finding, PhotoCheck
from coeffdiff.sampling.prompts import length_warnings


def text_findings(
    checks: Sequence[PhotoCheck],
    subjects: Sequence[SubjectSettings],
    base: Any,
    *,
    token_vectors: int = 0,
    prior_weight: float = 0.0,
    prompts: Sequence[str] = (),
    class_pictures: PhotoSet | None = None,
) -> list[Finding]:
    """What is odd about tokens, class words and captions. The one place where such findings are added.

    Args:
        checks: of all photos. base: from find_backbone.
        token_vectors: embeddings of a learned token; 0: the token is not learned.
        prior_weight: with any, the captions of the class are read too.
        prompts: of the validation pictures, with their placeholders.
    """
    findings: list[Finding] = []
    pipe = load_pipeline(base, dtype=torch.float32, parts=())  # tokenizers and scheduler alone
    for number, subject in enumerate(subjects):
        named = {photo.name: photo.captions for photo in checks if photo.of_subject == number}
        name = f"{subject.token or f'subject {number + 1}'}: " if len(subjects) > 1 else ""
        findings += _findings_on_subject(subject, named, pipe, token_vectors, name)
    tokens = [subject.token for subject in subjects if subject.token]
    if token_vectors and tokens:
        announce_tokens(pipe, dict.fromkeys(tokens, token_vectors))
    captions = [photo.captions for photo in checks]
    of_class, of_pictures = class_captions(
        subjects, prior_weight if len(tokens) == len(subjects) else 0.0, captions, class_pictures
    )
    filled = prompts_of(subjects, prompts)
    texts = [text for some in (*captions, of_class.values(), *of_pictures, filled) for text in some]
    return [*findings, *_length_findings(texts, pipe)]


def _findings_on_subject(
    subject: SubjectSettings, captions: Mapping[str, Sequence[str]], pipe: Any, token_vectors: int, name: str
) -> list[Finding]:
    """captions: of its photos, by their names. name: begins sentences, where there are several subjects."""
    findings = []
    if not subject.token:
        sentence = "there is no --token yet, so captions are shown with <V> in its place"
        findings.append(Finding("note", "token", name + sentence))
    if not subject.class_word:
        sentence = (
            f"without {'a class word' if name else '--class-word'} the model is not told what kind of thing this is. "
            "DreamBooth's authors measured a subject fidelity (DINO) of 0.744 with the right class noun, 0.303 without"
        )
        findings.append(Finding("hint", "class word", name + sentence))
    if not subject.token:
        return findings
    token = subject.token
    for sentence in token_findings(pipe, token, subject.class_word, learned=token_vectors > 0):
        findings.append(Finding("note", "token", sentence))
    for sentence in caption_findings(captions, token):
        findings.append(Finding("hint", "captions", sentence))
    if token_vectors and not any(holds(text, token) for texts in captions.values() for text in texts):
        sentence = (
            f"none holds the token {token}, so there is nothing to learn it from; training refuses this"
        )
        findings.append(Finding("problem", "captions", sentence))
    return findings


def _length_findings(texts: Sequence[str], pipe: Any) -> list[Finding]:
    """A hint for each text that the model does not read to its end. pipe: its tokenizers."""
    warned = [line for text in dict.fromkeys(texts) for line in length_warnings(text, pipe)]
    findings = [Finding("hint", "captions", line.removesuffix(".")) for line in warned[:MOST_LISTED]]
    if len(warned) > MOST_LISTED:
        findings.append(
            Finding("hint", "captions", f"and {len(warned) - MOST_LISTED} more texts are too long")
        )
    return findings
