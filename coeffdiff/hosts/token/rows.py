"""Rows of a learned token: how they begin, and how long they stay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from coeffdiff.errors import ConfigError
from coeffdiff.hosts.token.learned_token import ExtendedEmbedding
from coeffdiff.hosts.token.vocabulary import original
from coeffdiff.method.families import family_of


def initial_rows(pipe: Any, text: str, vectors: int) -> dict[str, Tensor]:
    """Rows [N, D] float32 for each encoder from the embeddings of a text, such as the class word.

    Its tokens are shared out in order: two vectors of "stuffed animal" begin as its two words; where several tokens
    fall to one vector, it is their mean with the mean of their norms, as a bare mean would be too short.
    """
    rows = {}
    for encoder in family_of(pipe).encoders:
        embedding = getattr(pipe, encoder.network).get_input_embeddings()
        matrix = (embedding.base if isinstance(embedding, ExtendedEmbedding) else embedding).weight
        ids = original(getattr(pipe, encoder.tokenizer))(text, add_special_tokens=False).input_ids
        if not ids:
            raise ConfigError(f"{text!r} holds no token that a learned token could begin as.")
        words = matrix.detach()[torch.tensor(ids, device=matrix.device)].float().cpu()
        groups = [
            words[i * len(ids) // vectors : max(i * len(ids) // vectors + 1, (i + 1) * len(ids) // vectors)]
            for i in range(vectors)
        ]
        means = torch.stack([group.mean(0) for group in groups])
        lengths = torch.stack([group.norm(dim=1).mean() for group in groups])
        rows[encoder.key] = means * (lengths / means.norm(dim=1).clamp_min(1e-12))[:, None]
    return rows


@torch.no_grad()
def pull_norms(rows: Iterable[tuple[Tensor, Tensor]], strength: float) -> None:
    """Draw the length of each row [D] back towards what it was at first, on a logarithmic scale.

    rows: pairs of current rows [N, D], changed in place, and their first norms [N]. strength 0: not at all; 1: the
    length never changes. Long rows drown their neighbours in a prompt; diffusers' scripts pull by 0.1 after a step.
    """
    for current, first in rows:
        current.mul_((first / current.norm(dim=1).clamp_min(1e-12)).pow(strength)[:, None])
