"""Text encoders that train: alpha and LoRA on them, and captions that run through them in every step, with gradient.

The encoders are no part of what Accelerate prepared, and DistributedDataParallel knows nothing of them. SDXL reads the
first encoder before its last layer, so what is on that layer gets no gradient and stays as it began.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from coeffdiff.config.schema import Settings
from coeffdiff.data.batches import Batch
from coeffdiff.hosts import clip_alpha
from coeffdiff.hosts.guard import verify
from coeffdiff.hosts.lora.clip import add_clip_lora
from coeffdiff.hosts.text_encoders import coefficients_on, encoders_on, settle_saving
from coeffdiff.method.coefficients import Coefficients
from coeffdiff.models.pipelines import text_embeddings
from coeffdiff.sampling.options import Encoded
from coeffdiff.sampling.prompts import encode_prompts
from coeffdiff.training.text import LearnedToken
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.torch_setup import copied


class TrainedEncoders:
    """A pipeline's text encoders, frozen but for alpha and LoRA in float32, and a learned token beside them.

    encoders: by the pipeline's names for them. coefficients: by layer, as in the adapter's file. lora: parameters by
    name, behind that of their encoder.
    """

    def __init__(self, pipe: Any, settings: Settings, learned: LearnedToken | None) -> None:
        """pipe: with tokenizers and text encoders, on the training device, before anything is on these."""
        self._pipe, self._settings, self._learned = pipe, settings, learned
        self.encoders: dict[str, Any] = encoders_on(pipe)
        method, seed = settings.method, settings.training.seed
        self.lora: dict[str, nn.Parameter] = {}
        for network, encoder in self.encoders.items():
            encoder.requires_grad_(False)
            if "lora" in method.on_text_encoders:  # first: PEFT freezes what is there when it comes
                rank, alpha = method.lora.rank, float(method.lora.alpha)
                added = add_clip_lora(
                    encoder, network=network, rank=rank, alpha=alpha, dora=method.lora.dora, seed=seed
                )
                self.lora |= {f"{network}.{name}": parameter for name, parameter in added.items()}
            if "coeff" in method.on_text_encoders:
                form, mixes = method.coeff.form, method.coeff.mixes
                clip_alpha.inject(encoder, network=network, form=form, seed=seed, mixes=mixes)
            settle_saving(encoder)
        self.coefficients: dict[str, Coefficients] = coefficients_on(self.encoders)
        rows = learned.rows.values() if learned else ()
        for parameter in [*self._own, *rows]:
            parameter.requires_grad_(True)
        for parameter in self._own:
            parameter.data = parameter.data.float()

    @property
    def _own(self) -> list[Any]:
        return [*(c.alpha for c in self.coefficients.values()), *self.lora.values()]

    def conditions(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """embeds [N, T, W] and pooled [N, P] of the batch's captions, class captions included, float32, with gradient.

        A caption that was dropped keeps the zeros that it came with, if that is how the model is guided. Every row is
        encoded all the same, so that shapes are always equal.
        Raises: InjectionError if something of ours has gone from the encoders.
        """
        for encoder in self.encoders.values():
            verify(encoder)
        device = batch.embeds.device
        with quiet_libraries():  # what is cut off was said before the run
            embeds, _, pooled, _ = text_embeddings(self._pipe, list(batch.captions), device, guided=False)
        zeros = self._pipe.config.get("force_zeros_for_empty_prompt", False)
        live = copied(torch.tensor([bool(caption) or not zeros for caption in batch.captions]), device)
        return (
            torch.where(live[:, None, None], embeds.float(), batch.embeds),
            torch.where(live[:, None], pooled.float(), batch.pooled),
        )

    def encoded(self, prompts: Sequence[str]) -> dict[str, Encoded]:
        """Prompts with the encoders as they are now, ready for sampling."""
        return encode_prompts(self._pipe, prompts, guidance=self._settings.validation.guidance)

    def share_gradients(self, state: PartialState) -> None:
        """Mean of the gradients over all processes, in one message; what has none has none in any process."""
        if self._learned:
            self._learned.share_gradients(state)
        gradients = [p.grad for p in self._own if p.grad is not None]
        if state.num_processes == 1 or not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= state.num_processes
        parts = flat.split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))
