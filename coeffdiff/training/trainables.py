"""The UNet made trainable, and the header of what it will learn."""

from __future__ import annotations

from dataclasses import dataclass, field

import accelerate
import diffusers
import peft
import torch
import transformers
from torch import Tensor, nn

from coeffdiff import __version__
from coeffdiff.config.schema import Settings, SubjectSettings
from coeffdiff.errors import ResumeError
from coeffdiff.hosts.diffusers import fill_alphas
from coeffdiff.hosts.lora import add_lora
from coeffdiff.hosts.unet import inject
from coeffdiff.method.adapter_header import (
    AdapterHeader,
    BaseHeader,
    LoraHeader,
    NamedSubject,
    format_for,
)
from coeffdiff.method.coefficients import Coefficients, Mixes
from coeffdiff.training.resolve import PRECISIONS, check_model_name
from coeffdiff.training.text import LearnedToken


@dataclass(frozen=True)
class Trainables:
    """What learns: alphas by layer name, LoRA parameters by name, a token's rows by encoder; all float32."""

    coefficients: dict[str, Coefficients]
    lora: dict[str, nn.Parameter]
    token: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def alphas(self) -> list[Tensor]:
        return [c.alpha for c in self.coefficients.values()]

    def tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU under the names that checkpoints use."""
        named = {f"{layer}.alpha": c.alpha for layer, c in self.coefficients.items()} | self._named
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in named.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of tensors(). Raises: ResumeError if they are not exactly these."""
        own = self.tensors()
        if own.keys() != tensors.keys() or any(own[k].shape != t.shape for k, t in tensors.items()):
            raise ResumeError(
                "The checkpoint holds other layers than this model has; it belongs to another run."
            )
        fill_alphas(self.coefficients, {k: t for k, t in tensors.items() if k not in self._named})
        for name, parameter in self._named.items():
            parameter.copy_(tensors[name])

    @property
    def _named(self) -> dict[str, nn.Parameter]:
        return self.lora | {f"learned_token.{key}": rows for key, rows in self.token.items()}

    def mean_abs_alpha(self) -> Tensor | None:
        """Mean |alpha| over all entries of all layers (distance from ordinary attention), 0-d; None without alpha."""
        if not self.coefficients:
            return None
        return torch.cat([c.displacement().flatten() for c in self.coefficients.values()]).mean()


def make_trainable(unet: nn.Module, settings: Settings, learned: LearnedToken | None = None) -> Trainables:
    """LoRA first: PEFT freezes everything that is there when it comes. What learns is float32."""
    method, seed = settings.method, settings.training.seed
    unet.requires_grad_(False)
    lora: dict[str, nn.Parameter] = {}
    coefficients: dict[str, Coefficients] = {}
    if "lora" in method.kind:
        lora = add_lora(
            unet,
            rank=method.lora.rank,
            alpha=float(method.lora.alpha),
            targets=method.lora.targets,
            dora=method.lora.dora,
            seed=seed,
        )
    if "coeff" in method.kind:
        coefficients = inject(
            unet,
            targets=method.coeff.targets,
            blocks=method.coeff.blocks,
            form=method.coeff.form,
            seed=seed,
            backend=method.coeff.backend,
            mixes=method.coeff.mixes,
        )
    for parameter in [*lora.values(), *(c.alpha for c in coefficients.values())]:
        parameter.requires_grad_(True)
        parameter.data = parameter.data.float()
    return Trainables(coefficients, lora, learned.rows if learned else {})


def header_for(
    settings: Settings,
    trainables: Trainables,
    model: str,
    step: int,
    networks: dict[str, str] | None = None,
) -> AdapterHeader:
    """What the adapter will say of itself after `step` steps on `model`.

    settings: with absolute paths, since the adapter is read elsewhere. networks: fingerprints of the model.
    """
    lora = settings.method.lora
    subject, *others = settings.each_subject
    check_model_name(model)
    mixes: Mixes = settings.method.coeff.mixes if trainables.coefficients else "maps"
    opened = settings.model
    base = BaseHeader(
        vae=opened.vae,
        config=opened.config,
        variant=opened.variant,
        precision=PRECISIONS[settings.training.precision],
        networks=networks or {},
    )
    return AdapterHeader(
        format_version=format_for(mixes, opened.vae, (1 + len(others)) if trainables.token else 0),
        kind=settings.trained_kind,
        base_model=model,
        token=str(subject.token),
        class_word=subject.class_word,
        templates=tuple(subject.templates),
        form=settings.method.coeff.form,
        mixes=mixes,
        heads={layer: c.heads for layer, c in trainables.coefficients.items()},
        lora=LoraHeader(rank=lora.rank, alpha=float(lora.alpha), dora=lora.dora) if trainables.lora else None,
        vectors=settings.method.token.vectors if trainables.token else 0,
        trained_steps=step,
        resolution=int(settings.training.resolution),
        versions=versions(),
        base=base,
        subjects=tuple(map(_named, (subject, *others))) if others else (),
    )


def _named(subject: SubjectSettings) -> NamedSubject:
    return NamedSubject(
        token=str(subject.token), class_word=subject.class_word, templates=tuple(subject.templates)
    )


def versions() -> dict[str, str]:
    """Of everything that decides a result."""
    modules = (torch, diffusers, transformers, accelerate, peft)
    return {"coeffdiff": __version__} | {module.__name__: str(module.__version__) for module in modules}
