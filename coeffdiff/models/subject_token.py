"""Whether a word suits as a subject's token: how the tokenizers split it, and whether it already has a meaning."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coeffdiff.method.families import tokenizers_of

# A vocabulary of this size is CLIP's: words of the whole web. Smaller ones hold only what their model was taught.
_CLIP_ENTRIES = 40_000
# CLIP's ids follow the order in which pieces were merged, frequent ones first; its last fifth is rare.
_RARE_FROM = 40_000
_COMMON_BELOW = 15_000  # a piece of a longer word is taken for a word itself only up to here
_MOST_PIECES = 4
PROPOSED = ("ohwx", "zwx")
# Single tokens among CLIP's rarest that people take for empty, and what a picture of them shows. Not complete, nor can
# it be: CLIP has an entry only for what was often written.
KNOWN = {
    "sks": "a rifle",
    "smg": "a submachine gun",
    "jdm": "Japanese cars",
    "fpv": "drones",
    "lsd": "the drug and its colours",
    "dbz": "the Dragon Ball series",
    "ffxv": "a Final Fantasy game",
    "tvxq": "a pop group",
    "lbj": "Lyndon B. Johnson",
    "fdr": "Franklin D. Roosevelt",
    "dprk": "North Korea",
    "wwdc": "Apple's conference",
    "nwsl": "women's football",
    "hgtv": "house interiors on television",
}


def holds(text: str, token: str) -> bool:
    """Whether a text has the token as a word of its own, in any case."""
    return re.search(rf"(?<!\w){re.escape(token)}(?!\w)", text, re.IGNORECASE) is not None


def token_findings(
    pipe_or_tokenizers: Any, token: str, class_word: str | None = None, *, learned: bool = False
) -> list[str]:
    """A sentence for each thing to know about a token before a run; the first says how it is read.

    What it says on meaning comes from the vocabulary and a list of known cases, not from the text encoders: how far
    a word moves the pooled text says nothing about whether it has a meaning. On pocket, put before "mug", "red"
    (0.96, as a cosine to the text without it) lies between the nonsense words "ohwx" (0.97) and "blorp" (0.91).

    Args:
        pipe_or_tokenizers: a pipeline, or its tokenizers; nothing else of the model is needed.
        learned: the token gets embeddings of its own.
    """
    if hasattr(pipe_or_tokenizers, "tokenizer"):
        pipe_or_tokenizers = tokenizers_of(pipe_or_tokenizers)
    tokenizers = [tokenizer for tokenizer in pipe_or_tokenizers if tokenizer is not None]
    readings = [(_pieces(tokenizer, token), len(tokenizer)) for tokenizer in tokenizers]
    lines = []
    if class_word and holds(class_word, token):
        lines.append(
            f"{token} is {'the' if token.lower() == class_word.lower() else 'part of the'} class word: every "
            f'"{class_word}" would become the subject; {_instead(token)}'
        )
    if learned:
        where = "both text encoders" if len(tokenizers) > 1 else "the text encoder"
        lines.insert(0, f"{token} is learned: it gets embeddings of its own, in {where}")
        if any(_meaning(pieces, entries) for pieces, entries in readings):
            lines.append(
                f"{token} means something already; with the adapter loaded it means the subject in every prompt"
            )
        return lines
    one = all(reading == readings[0] for reading in readings)
    texts = [_reading(token, pieces, entries) for pieces, entries in (readings[:1] if one else readings)]
    which = [""] if one else [f" by text encoder {number}" for number in range(1, len(texts) + 1)]
    return [f"{token} is read{by} as {text}" for by, text in zip(which, texts, strict=True)] + lines


def caption_findings(captions: Mapping[str, Sequence[str]], token: str) -> list[str]:
    """One sentence that names the photos of which some caption lacks the token, or none. captions: by file name."""
    lacking = [name for name, texts in captions.items() if not all(holds(text, token) for text in texts)]
    if not lacking:
        return []
    named = ", ".join(lacking[:5]) + (f" and {len(lacking) - 5} more" if len(lacking) > 5 else "")
    verb = "has a caption" if len(lacking) == 1 else "have captions"
    return [f"{named} {verb} without {token}: what they show is not tied to it; write {token} or <V> there"]


def _reading(token: str, pieces: Sequence[tuple[str, int]], entries: int) -> str:
    """The end of the sentence "mug is read as ..."."""
    meaning = _meaning(pieces, entries)
    if len(pieces) == 1:
        rank = f", number {pieces[0][1]:,} of {entries:,} by frequency" if entries >= _CLIP_ENTRIES else ""
        how = "one token" + rank
    else:
        how = f"{len(pieces)} tokens, {' + '.join(piece for piece, _ in pieces)}"
    if meaning:
        return f"{how}, and {meaning}; {_instead(token)}"
    if len(pieces) > _MOST_PIECES:
        return f"{how}, of the 75 that a prompt has room for; a shorter one such as {_proposal(token)} leaves more"
    rest = (
        "not known to mean anything that is seen" if len(pieces) == 1 else "none of them a word that is known"
    )
    return f"{how}, {rest}"


def _meaning(pieces: Sequence[tuple[str, int]], entries: int) -> str:
    """What the token already means, as "it already means a rifle", or nothing."""
    clip = entries >= _CLIP_ENTRIES
    words = [piece for piece, _ in pieces]
    for word in words:
        if clip and word in KNOWN:
            it = "it" if len(words) == 1 else word
            return f"{it} already means {KNOWN[word]} to the model"
    if len(pieces) == 1:
        word, number = pieces[0]
        if not clip:
            return "it already means something: this model's vocabulary is its own" if len(word) > 1 else ""
        known = number < _RARE_FROM or len(word) > 4
        return (
            "it already means something, as nearly every word with a token of its own does" if known else ""
        )
    known_words = [
        word
        for word, number in pieces
        if len(word) > 2 and word.isalpha() and (not clip or number < _COMMON_BELOW)
    ]
    both = " and ".join(known_words)
    return f"{both} mean{'s' * (len(known_words) == 1)} something already" if both else ""


def _instead(token: str) -> str:
    return f"{_proposal(token)} would be better, or --learn-token"


def _proposal(token: str) -> str:
    return " or ".join(name for name in PROPOSED if name != token.lower())


def _pieces(tokenizer: Any, token: str) -> list[tuple[str, int]]:
    """The tokens of a word as readable text with their ids."""
    ids: Iterable[int] = tokenizer(token, add_special_tokens=False).input_ids
    return [(tokenizer.convert_ids_to_tokens(number).removesuffix("</w>"), number) for number in ids]
