"""Tokenizers that read the word of a learned token as its vectors."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from tokenizers import AddedToken, Regex, normalizers

from coeffdiff.errors import AdapterError
from coeffdiff.hosts.guard import gate, ungate
from coeffdiff.method.adapter_header import PARTS

# Each vector is an added token of one private character, which no text contains and no word pattern matches.
_FIRST_PRIVATE = 0xF0000


def with_tokens(tokenizer: Any, tokens: Iterable[tuple[str, int]]) -> Any:
    """A copy of a CLIP tokenizer that reads each word as so many new tokens, with the ids after its own ones.

    tokens: word and number of vectors, in the order of their ids.
    """
    extended = copy.deepcopy(tokenizer)
    backend = extended.backend_tokenizer
    normalizer = backend.normalizer or normalizers.Sequence([])
    rules, names, at = [], [], _FIRST_PRIVATE
    for token, vectors in tokens:
        own = [chr(at + i) for i in range(vectors)]
        word = re.escape(normalizer.normalize_str(token))
        rules.append((word, "".join(own)))
        names += own
        at += vectors
    # The longest first: "my sks" before "sks".
    rules.sort(key=lambda rule: -len(rule[0]))
    replacing = [normalizers.Replace(Regex(rf"(?<!\w){word}(?!\w)"), own) for word, own in rules]
    # As the last step, where the text is in lower case and has single blanks.
    backend.normalizer = normalizers.Sequence([normalizer, *replacing])
    extended.add_tokens([AddedToken(name, normalized=True) for name in names])
    extended._coeffdiff_original = tokenizer
    return extended


def read_with(tokenizer: Any, tokens: Iterable[tuple[str, int]]) -> None:
    """with_tokens in place, on the same object; without any tokens it reads as it did at first."""
    plain = original(tokenizer)
    if tokens := list(tokens):
        if plain is tokenizer:
            plain = copy.copy(tokenizer)
        tokenizer._tokenizer = with_tokens(plain, tokens)._tokenizer
        tokenizer._coeffdiff_original = plain
        gate(tokenizer, "save_pretrained", refuse_saving)
    elif plain is not tokenizer:
        tokenizer._tokenizer = plain._tokenizer
        del tokenizer._coeffdiff_original
        ungate(tokenizer, "save_pretrained")


def announce_tokens(pipe: Any, tokens: Mapping[str, int]) -> None:
    """Let the tokenizers of a pipeline without text encoders count learned tokens (word -> vectors) correctly."""
    for _, name in PARTS.values():
        if tokens and getattr(pipe, name, None) is not None:
            setattr(pipe, name, with_tokens(getattr(pipe, name), tokens.items()))


def original(tokenizer: Any) -> Any:
    """The tokenizer without learned tokens."""
    return getattr(tokenizer, "_coeffdiff_original", tokenizer)


def refuse_saving(*_: Any, **__: Any) -> None:
    """In place of save_pretrained. Raises: AdapterError."""
    raise AdapterError(
        "save_pretrained would write a text encoder or tokenizer with a learned token in it, which is not read back. "
        "remove() the adapter, save, and keep its folder beside the model."
    )
