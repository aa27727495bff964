"""A learned token in ComfyUI: its word in a prompt becomes its vectors, as `embedding:NAME` does there.

ComfyUI's tokenizers hand on numbers and vectors alike, so a copy of them that reads the word is all that is needed;
text encoders and the tokenizers of others stay as they are.
"""

from __future__ import annotations

import copy
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coeffdiff.errors import AdapterError, AdapterMismatch
from coeffdiff.method.adapter_header import PARTS


class LearnedWords:
    """In the place of a transformers tokenizer: learned words are read as vectors, everything else as before.

    A word is found as a whole word in any case ("sks" in "SKS, seen", not in "sksx"), the longest first.
    """

    def __init__(self, tokenizer: Any, rows: Mapping[str, Tensor]) -> None:
        self.tokenizer, self.rows = tokenizer, {normal(word): values for word, values in rows.items()}
        longest_first = sorted(self.rows, key=len, reverse=True)
        self._words = re.compile(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)")

    def __call__(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        """As the tokenizer's own answer, with vectors [D] among the numbers of input_ids."""
        pieces = self._words.split(normal(text)) if isinstance(text, str) else [text]
        if len(pieces) == 1:
            return self.tokenizer(text, *args, **kwargs)
        start, end = self.tokenizer("")["input_ids"]
        ids: list[Any] = [start]
        for piece in pieces:
            if piece in self.rows:
                ids += self.rows[piece]
            else:
                ids += self.tokenizer(piece)["input_ids"][1:-1]
        return {"input_ids": [*ids, end]}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "tokenizer":
            raise AttributeError(name)
        return getattr(self.tokenizer, name)


def normal(text: str) -> str:
    """Text as CLIP's tokenizers take it: composed, in lower case, with single blanks."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFC", text)).lower()


def add_token(clip: Any, word: str, rows: Mapping[str, Tensor], origin: str) -> Any:
    """A clone of ComfyUI's CLIP in which `word` means `rows` ({"clip_l": [N, D], "clip_g": [N, D]}).

    Raises: AdapterError if CLIP is not connected or knows the word already, AdapterMismatch for other encoders.
    """
    if clip is None:
        raise AdapterError(
            f"{origin} has a learned token, {word!r}, which lives in the text encoders: connect the checkpoint's CLIP "
            "to the node, and the node's CLIP to the prompts."
        )
    for part in PARTS:
        _check_encoder(clip, part, rows[part], origin)
    changed = clip.clone()
    changed.tokenizer = copy.copy(clip.tokenizer)
    for part in PARTS:
        reader = copy.copy(getattr(clip.tokenizer, part))
        before = reader.tokenizer
        known = before.rows if isinstance(before, LearnedWords) else {}
        if normal(word) in known:
            raise AdapterError(
                f"{origin} has the learned token {word!r}, which another adapter in this chain has as well; a prompt "
                "could not tell them apart. Load one of the two."
            )
        plain = before.tokenizer if isinstance(before, LearnedWords) else before
        reader.tokenizer = LearnedWords(plain, {**known, word: rows[part].float()})
        setattr(changed.tokenizer, part, reader)
        _check_read(reader.tokenizer, word, len(rows[part]), origin)
    return changed


def _check_encoder(clip: Any, part: str, rows: Tensor, origin: str) -> None:
    encoder = getattr(clip.cond_stage_model, part, None)
    if encoder is None or not hasattr(getattr(clip.tokenizer, part, None), "tokenizer"):
        raise AdapterMismatch(
            f"{origin} has a learned token for SDXL's two text encoders, and the CLIP that is connected has no "
            f"{part}. Connect the CLIP of an SDXL checkpoint."
        )
    width = encoder.transformer.get_input_embeddings().weight.shape[1]
    if rows.shape[1] != width:
        raise AdapterMismatch(
            f"{origin} has a learned token of shape {tuple(rows.shape)} for {part}, but this encoder has embeddings of "
            f"width {width}. Connect the CLIP of an SDXL checkpoint."
        )


def _check_read(tokenizer: LearnedWords, word: str, vectors: int, origin: str) -> None:
    read = tokenizer(word)["input_ids"][1:-1]
    if len(read) != vectors or not all(map(torch.is_tensor, read)):
        raise AdapterError(f"{origin}: this CLIP's tokenizer cannot read the learned token {word!r}.")
