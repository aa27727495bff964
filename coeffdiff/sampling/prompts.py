"""Prompts: fill in the token, check the length, encode."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coeffdiff.config.fields import PLACEHOLDERS
from coeffdiff.data.templates import numbered_token
from coeffdiff.errors import ConfigError
from coeffdiff.hosts.diffusers import loaded_adapters
from coeffdiff.method.adapter_header import AdapterHeader
from coeffdiff.method.families import family_of, tokenizers_of
from coeffdiff.models.pipelines import text_embeddings
from coeffdiff.models.subject_token import holds
from coeffdiff.sampling.options import Encoded, Options
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.text import has_surrogates


def fill_prompt(prompt: str, tokens: Sequence[str]) -> str:
    """The prompt with the adapters' one token in place of <V>, or their first in place of <V1>, and so on.

    Raises: ConfigError for no token, for a bare <V> among several, and for a number beyond them.
    """
    if has_surrogates(prompt):
        raise ConfigError(f"The prompt {ascii(prompt)[:80]} is not valid text; it must be UTF-8.")
    tokens = list(dict.fromkeys(tokens))  # check_apart refuses two adapters of one token

    def word(match: re.Match[str]) -> str:
        if match[1] and tokens:
            return numbered_token(match, tokens, prompt)
        if len(tokens) == 1:
            return tokens[0]
        why = "has no meaning without an adapter; write the word itself instead."
        if tokens:
            numbers = " or ".join(f"<V{number}>" for number in range(1, len(tokens) + 1))
            why = f"may mean {' or '.join(tokens)}; write {numbers}, or the word itself instead."
        raise ConfigError(f"{match[0]} in the prompt {shortened(prompt)} {why}")

    return re.sub(PLACEHOLDERS, word, prompt)


def warnings_for(
    prompts: Iterable[str],
    adapters: Sequence[tuple[Path, AdapterHeader]],
    pipe: Any,
    options: Options | None = None,
) -> list[str]:
    """A line for each problem with the prompts that the user may have overlooked; none of them is an error.

    adapters: folders and headers.
    """
    lines = []
    for prompt in dict.fromkeys(prompts):
        for path, header in adapters:
            if not any(holds(prompt, token) for token in header.tokens):
                lines.append(
                    f"The prompt {shortened(prompt)} lacks {' or '.join(header.tokens)}, the token of {path}; "
                    f'write for instance "a photo of {header.calls[0]}".'
                )
        lines += length_warnings(prompt, pipe)
    if options and options.negative_prompt:
        if options.guidance <= 1:
            lines.append(
                f"The negative prompt has no effect without guidance, and {options.guidance:g} is none."
            )
        else:
            lines += length_warnings(options.negative_prompt, pipe)
    return lines


def length_warnings(text: str, pipe: Any) -> list[str]:
    """One line with the length and the part that is cut off, if the model does not read all of the text."""
    cuts = [cut for tokenizer in tokenizers_of(pipe) for cut in [_cut(text, tokenizer)] if cut]
    if not cuts:
        return []
    tokens, limit, start = min(cuts, key=lambda cut: cut[2])
    return [
        f"{shortened(text)} has {tokens} tokens, begin and end included, and the model reads {limit}; "
        f"it will not see {shortened(text[start:], 200)}."
    ]


def _cut(text: str, tokenizer: Any) -> tuple[int, int, int] | None:
    """Tokens with begin and end, the limit, and where in the text the first word begins that is cut off."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    room = tokenizer.model_max_length - 2
    if len(found.input_ids) <= room:
        return None
    start = found.offset_mapping[room][0]
    word = re.search(r"\S{0,30}$", text[:start])  # a longer run is a script without spaces
    return len(found.input_ids) + 2, tokenizer.model_max_length, word.start() if word else start


def shortened(text: str, width: int = 60) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(line) > width:
        line = textwrap.shorten(line, width, placeholder="...")
        line = line if len(line) > 3 else text[: width - 3] + "..."
    return f'"{line}"'


def encode_prompts(
    pipe: Any, prompts: Iterable[str], *, negative_prompt: str = "", guidance: float = Options.guidance
) -> dict[str, Encoded]:
    """Each distinct prompt's embeddings, so that the text encoders can be freed before `generate`.

    One prompt at a time, so that no embedding depends on the others.
    """
    prompts = list(dict.fromkeys(prompts))
    family = family_of(pipe)
    if prompts and any(getattr(pipe, part) is None for part in (*family.tokenizers, *family.text_networks)):
        raise ConfigError(
            "This pipeline has no text encoders, so it needs prompts that encode_prompts has encoded before."
        )
    for adapter in loaded_adapters(pipe) if pipe.unet is not None else ():
        adapter.verify_text(pipe)
    result: dict[str, Encoded] = {}
    negative: tuple[Tensor | None, Tensor | None] = (None, None)
    for prompt in prompts:
        with torch.no_grad(), quiet_libraries():  # length_warnings reports what is cut off
            embeddings = text_embeddings(
                pipe,
                prompt,
                pipe._execution_device,
                guided=guidance > 1,
                negative_prompt=(negative_prompt or None) if negative[0] is None else None,
                negative=negative,
            )
        text, negative_text, pooled, negative_pooled = embeddings
        negative = (negative_text, negative_pooled)
        parts = [None if t is None else t[0].cpu() for t in (text, pooled, *negative)]
        assert parts[0] is not None and parts[1] is not None
        result[prompt] = Encoded(parts[0], parts[1], parts[2], parts[3], negative_prompt)
    return result


def text_arguments(
    embeddings: Sequence[Encoded], guided: bool, device: torch.device, dtype: torch.dtype
) -> dict[str, Tensor]:
    """A batch's embeddings under the names that the family's pipelines take them by."""
    columns = {
        "prompt_embeds": [e.text for e in embeddings],
        "pooled_prompt_embeds": [e.pooled for e in embeddings],
    }
    if guided:
        columns |= {
            "negative_prompt_embeds": [e.negative_text for e in embeddings if e.negative_text is not None],
            "negative_pooled_prompt_embeds": [
                e.negative_pooled for e in embeddings if e.negative_pooled is not None
            ],
        }
    stacked = {name: torch.stack(column) for name, column in columns.items()}
    return {name: one.to(device, dtype) for name, one in stacked.items() if one.shape[-1]}
