"""Texts while a token is being learned: captions run through the text encoders in every step, with gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from coeffdiff.config.schema import Settings
from coeffdiff.data.batches import Batch
from coeffdiff.errors import AdapterError, ConfigError
from coeffdiff.hosts.token.learned_token import add_token, token_name
from coeffdiff.hosts.token.rows import initial_rows, pull_norms
from coeffdiff.method.adapter_header import row_key
from coeffdiff.models.pipelines import text_embeddings
from coeffdiff.models.subject_token import holds
from coeffdiff.sampling.options import Encoded
from coeffdiff.sampling.prompts import encode_prompts
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.torch_setup import copied


class LearnedToken:
    """A token whose embeddings train: float32 rows in each text encoder, of which nothing else changes.

    rows: {"clip_l": [N, D], "clip_g": [N, D]} or those of the encoders that there are, the parameters; of several
        subjects each one's, by row_key.
    """

    def __init__(self, pipe: Any, settings: Settings) -> None:
        """pipe: with tokenizers and text encoders, on the training device. Raises: ConfigError for an unfit token."""
        self._pipe, self._settings = pipe, settings
        self.words = [str(subject.token) for subject in settings.each_subject]
        self.rows: dict[str, nn.Parameter] = {}
        token = settings.method.token
        for number, (word, subject) in enumerate(zip(self.words, settings.each_subject, strict=True)):
            first = initial_rows(pipe, token.init or subject.class_word or word, token.vectors)
            name = token_name("default", number)
            try:
                own = add_token(pipe, word, first, name, origin="subject.token")
            except AdapterError as error:
                raise ConfigError(str(error)) from None
            self.rows |= {row_key(part, number): rows for part, rows in own.items()}
        self._first = {key: rows.detach().clone() for key, rows in self.rows.items()}
        for rows in self.rows.values():
            rows.requires_grad_(True)

    def conditions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """embeds [B, T, W] and pooled [B, P] of the batch's captions, float32, with gradient for the rows.

        Captions without the token keep the embeddings that they came with. Every sample is encoded all the same, so
        that the shapes are always equal, and so that a batch without the token gives a gradient of zeros, not none.
        """
        device = batch.embeds.device
        with quiet_libraries():  # what is cut off was said before the run
            embeds, _, pooled, _ = text_embeddings(self._pipe, list(batch.captions), device, guided=False)
        named = [any(holds(caption, word) for word in self.words) for caption in batch.captions]
        live = copied(torch.tensor(named), device)
        return (
            torch.where(live[:, None, None], embeds.float(), batch.embeds),
            torch.where(live[:, None], pooled.float(), batch.pooled),
        )

    def encoded(self, prompts: Sequence[str]) -> dict[str, Encoded]:
        """Prompts with the rows as they are now, ready for sampling."""
        return encode_prompts(self._pipe, prompts, guidance=self._settings.validation.guidance)

    def share_gradients(self, state: PartialState) -> None:
        """Mean of the gradients over all processes: the rows are no part of what DDP looks after."""
        if state.num_processes > 1:
            for rows in self.rows.values():
                torch.distributed.all_reduce(rows.grad)
                assert rows.grad is not None
                rows.grad /= state.num_processes

    def stepped(self) -> None:
        """After an optimizer step: lengths back towards the first ones (see pull_norms)."""
        pairs = [(rows.data, self._first[key].norm(dim=1)) for key, rows in self.rows.items()]
        pull_norms(pairs, self._settings.method.token.norm_pull)

    def moved(self) -> Tensor:
        """How far the embeddings are from where they began, as a share of their first length; mean over all, 0-d."""
        shares = [
            (rows.detach() - self._first[key]).norm(dim=1) / self._first[key].norm(dim=1)
            for key, rows in self.rows.items()
        ]
        return torch.cat(shares).mean()
