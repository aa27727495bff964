"""CLIP tokenizers for any vocabulary, made here: nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.trainers import BpeTrainer

from coeffdiff.utils.console import quiet_libraries

with quiet_libraries():  # the import itself prints notes on missing packages
    from transformers import CLIPTokenizer

from coeffdiff.pocket.sizes import MAX_TOKENS

BEGIN, END = "<|startoftext|>", "<|endoftext|>"


def tokenizer_pair(words: Sequence[str] = ()) -> tuple[CLIPTokenizer, CLIPTokenizer]:
    """Two CLIP tokenizers over bytes, with merges that make one token of each of `words`: any text encodes.

    The ids are CLIP's first 512 (the 256 bytes, then the same as the last byte of a word), then what was merged,
    then begin and end of text, which is the highest id. The first pads with end of text and the second with "!"
    (id 0), as in SDXL. Without words there are no merges: one token a byte.
    """
    symbols = byte_symbols()
    merges = _merges(words, symbols)
    known = [
        *symbols,
        *(symbol + "</w>" for symbol in symbols),
        *("".join(pair) for pair in merges),
        BEGIN,
        END,
    ]
    vocabulary = {word: number for number, word in enumerate(known)}
    first, second = (
        CLIPTokenizer(vocab=dict(vocabulary), merges=list(merges), pad_token=pad, model_max_length=MAX_TOKENS)
        for pad in (END, "!")
    )
    return first, second


def _merges(words: Sequence[str], symbols: Sequence[str]) -> list[tuple[str, str]]:
    """Byte-pair merges in order, learned until each word is whole."""
    if not words:
        return []
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = WhitespaceSplit()
    trainer = BpeTrainer(
        vocab_size=2 * len(symbols) + sum(map(len, words)),  # more than it can need
        min_frequency=1,
        end_of_word_suffix="</w>",
        initial_alphabet=list(symbols),
        # Ties between pairs go by ids. Letters that end a word would get theirs in an order that changes from call
        # to call (tokenizers 0.23), unless they are known from the start.
        special_tokens=[symbol + "</w>" for symbol in symbols],
        show_progress=False,
    )
    learner.train_from_iterator(sorted(words), trainer)
    return [(first, second) for first, second in json.loads(learner.to_str())["model"]["merges"]]


def byte_symbols() -> list[str]:
    """The visible character that byte-level BPE writes for each byte, in CLIP's order (so "!" comes first).

    Bytes that Latin-1 prints stand for themselves; the other 68 take the code points from 256 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    hidden = 256 - len(visible)
    return [chr(code) for code in visible] + [chr(256 + extra) for extra in range(hidden)]
