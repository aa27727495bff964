"""The UNet made trainable, and the header of what it will learn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

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
from coeffdiff.hosts.lora.layers import add_lora
from coeffdiff.hosts.unet import inject
from coeffdiff.method.adapter_header import (
    AdapterHeader,
    BaseHeader,
    LoraHeader,
    NamedSubject,
    format_for,
)
from coeffdiff.method.coefficients import Coefficients, Mixes
from coeffdiff.method.families import FamilyName
from coeffdiff.method.networks import encoders_in
from coeffdiff.models.quantizing import packages_for
from coeffdiff.training.resolve import PRECISIONS, check_names
from coeffdiff.training.text import LearnedToken
from coeffdiff.training.text_encoders import TrainedEncoders


@dataclass(frozen=True)
class Trainables:
    """What learns, all float32.

    Alphas by layer name, LoRA parameters by name, a token's rows by encoder. text_coefficients, text_lora: on the text
    encoders, their names behind the encoder's.
    """

    coefficients: dict[str, Coefficients]
    lora: dict[str, nn.Parameter]
    token: dict[str, nn.Parameter] = field(default_factory=dict)
    text_coefficients: dict[str, Coefficients] = field(default_factory=dict)
    text_lora: dict[str, nn.Parameter] = field(default_factory=dict)

    @property
    def alphas(self) -> list[Tensor]:
        return [c.alpha for c in self.coefficients.values()]

    @property
    def all_coefficients(self) -> dict[str, Coefficients]:
        """Of all networks."""
        return self.coefficients | self.text_coefficients

    @property
    def groups(self) -> dict[str, list[Tensor]]:
        """What learns at one rate, by the names that MethodSettings.rates has; only groups that there are."""
        found = {
            "coeff": self.alphas,
            "coeff_text": [c.alpha for c in self.text_coefficients.values()],
            "lora": list(self.lora.values()),
            "lora_text": list(self.text_lora.values()),
            "token": list(self.token.values()),
        }
        return {name: parameters for name, parameters in found.items() if parameters}

    def parameters(self) -> list[nn.Parameter]:
        """All that learns, in the order of tensors()."""
        return [*(c.alpha for c in self.all_coefficients.values()), *self._named.values()]

    def tensors(self) -> dict[str, Tensor]:
        """Copies on the CPU under the names that checkpoints use."""
        named = {f"{layer}.alpha": c.alpha for layer, c in self.all_coefficients.items()} | self._named
        return {name: tensor.detach().cpu().clone().contiguous() for name, tensor in named.items()}

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of tensors(). Raises: ResumeError if they are not exactly these."""
        own = self.tensors()
        if own.keys() != tensors.keys() or any(own[k].shape != t.shape for k, t in tensors.items()):
            raise ResumeError(
                "The checkpoint holds other layers than this model has; it belongs to another run."
            )
        fill_alphas(self.all_coefficients, {k: t for k, t in tensors.items() if k not in self._named})
        for name, parameter in self._named.items():
            parameter.copy_(tensors[name])

    @property
    def _named(self) -> dict[str, nn.Parameter]:
        rows = {f"learned_token.{key}": rows for key, rows in self.token.items()}
        return self.lora | self.text_lora | rows

    def mean_abs_alpha(self) -> Tensor | None:
        """Mean |alpha| over all entries of all layers (distance from ordinary attention), 0-d; None without alpha."""
        return _mean_displacement(self.coefficients)

    def mean_abs_text_alpha(self) -> Tensor | None:
        """The same of the text encoders' layers."""
        return _mean_displacement(self.text_coefficients)


def _mean_displacement(layers: dict[str, Coefficients]) -> Tensor | None:
    if not layers:
        return None
    return torch.cat([c.displacement().flatten() for c in layers.values()]).mean()


def make_trainable(
    unet: nn.Module,
    settings: Settings,
    learned: LearnedToken | None = None,
    encoders: TrainedEncoders | None = None,
) -> Trainables:
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
    return Trainables(
        coefficients,
        lora,
        learned.rows if learned else {},
        encoders.coefficients if encoders else {},
        encoders.lora if encoders else {},
    )


def header_for(
    settings: Settings,
    trainables: Trainables,
    model: str,
    step: int,
    networks: dict[str, str] | None = None,
    family: FamilyName = "sdxl",
) -> AdapterHeader:
    """What the adapter will say of itself after `step` steps on `model`.

    settings: with absolute paths, since the adapter is read elsewhere. networks: fingerprints of the model; family: its
    family.
    """
    lora = settings.method.lora
    subject, *others = settings.each_subject
    check_names(model, settings.model)
    mixes: Mixes = settings.method.coeff.mixes if trainables.coefficients else "maps"
    opened = settings.model
    base = BaseHeader(
        vae=opened.vae,
        config=opened.config,
        variant=opened.variant,
        quantize=opened.quantize,
        precision=PRECISIONS[settings.training.precision],
        networks=networks or {},
    )
    return AdapterHeader(
        format_version=format_for(
            mixes,
            opened.vae,
            family,
            text_encoders=bool(settings.method.on_text_encoders),
            learned_tokens=(1 + len(others)) if trainables.token else 0,
        ),
        kind=settings.trained_kind,
        family=family,
        base_model=model,
        token=str(subject.token),
        class_word=subject.class_word,
        templates=tuple(subject.templates),
        form=settings.method.coeff.form,
        mixes=mixes,
        heads={layer: c.heads for layer, c in trainables.all_coefficients.items()},
        lora=LoraHeader(
            rank=lora.rank,
            alpha=float(lora.alpha),
            dora=lora.dora,
            encoders=encoders_in(trainables.text_lora),
        )
        if trainables.lora
        else None,
        vectors=settings.method.token.vectors if trainables.token else 0,
        trained_steps=step,
        resolution=int(settings.training.resolution),
        versions=versions(packages_for(opened.quantize)),
        base=base,
        subjects=tuple(map(_named, (subject, *others))) if others else (),
    )


def _named(subject: SubjectSettings) -> NamedSubject:
    return NamedSubject(
        token=str(subject.token), class_word=subject.class_word, templates=tuple(subject.templates)
    )


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Of everything that decides a result. more: names of further packages."""
    modules = (torch, diffusers, transformers, accelerate, peft)
    found = {"coeffdiff": __version__} | {module.__name__: str(module.__version__) for module in modules}
    return found | {name: version(name) for name in more}
