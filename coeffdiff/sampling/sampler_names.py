"""Samplers by the names of A1111, ComfyUI and kohya: a name -> a scheduler class of diffusers and its settings.

Source of the mapping: diffusers' overview of schedulers (huggingface.co/docs/diffusers/api/schedulers/overview). But
for DPM++ SDE, where that table names DPMSolverSinglestep: k-diffusion's sampler of that name is ported as DPMSolverSDE.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
# What a recipe records beside the scheduler's class, where it differs from the class's default
SAID = (*SIGMAS, "algorithm_type", "solver_order", "solver_type", "timestep_spacing")


@dataclass(frozen=True)
class Sampler:
    """label: A1111's name.  scheduler: the class in diffusers without "Scheduler".  others: other names."""

    label: str
    scheduler: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    others: tuple[str, ...] = ()


_TWO_M = {"algorithm_type": "dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
_SDE = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "solver_type": "midpoint"}
SAMPLERS = (
    Sampler("Euler", "EulerDiscrete", others=("k_euler",)),
    Sampler("Euler a", "EulerAncestralDiscrete", others=("euler_a", "euler_ancestral", "k_euler_a")),
    Sampler("Heun", "HeunDiscrete", others=("k_heun",)),
    Sampler("LMS", "LMSDiscrete", others=("k_lms",)),
    Sampler("DPM2", "KDPM2Discrete", others=("dpm_2", "k_dpm_2")),
    Sampler("DPM2 a", "KDPM2AncestralDiscrete", others=("dpm_2_a", "dpm_2_ancestral", "k_dpm_2_a")),
    Sampler("DPM++ 2M", "DPMSolverMultistep", _TWO_M, ("dpmpp_2m", "dpmsolver++")),
    Sampler("DPM++ 2M SDE", "DPMSolverMultistep", _SDE, ("dpmpp_2m_sde",)),
    Sampler(
        "DPM++ 2M SDE Heun", "DPMSolverMultistep", {**_SDE, "solver_type": "heun"}, ("dpmpp_2m_sde_heun",)
    ),
    Sampler("DPM++ 3M SDE", "DPMSolverMultistep", {**_SDE, "solver_order": 3}, ("dpmpp_3m_sde",)),
    Sampler("DPM++ SDE", "DPMSolverSDE", others=("dpmpp_sde",)),
    Sampler("DPM++ 2S", "DPMSolverSinglestep", _TWO_M, ("dpmsingle", "dpmpp_2s")),
    Sampler("DDIM", "DDIM"),
    Sampler("DDPM", "DDPM"),
    Sampler("DEIS", "DEISMultistep"),
    Sampler("PLMS", "PNDM", others=("pndm",)),
    Sampler("UniPC", "UniPCMultistep", others=("uni_pc",)),
    Sampler("UniPC bh2", "UniPCMultistep", {"solver_type": "bh2"}, ("uni_pc_bh2",)),
    Sampler("LCM", "LCM"),
)
# A1111's schedule types and ComfyUI's schedulers, behind the sampler's name
SPACINGS: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "sgm uniform": {"timestep_spacing": "trailing"},
    "simple": {"timestep_spacing": "trailing"},
    "ddim uniform": {"timestep_spacing": "leading"},
    "uniform": {"timestep_spacing": "linspace"},
    "normal": {"timestep_spacing": "linspace"},
}
# What diffusers does not have -> the nearest that it has
MISSING = {
    "DPM adaptive": "DPM++ 2M Karras",
    "DPM fast": "DPM++ 2M Karras",
    "DPM++ 2S a": "DPM++ 2M SDE",
    "DPM++ 2S ancestral": "DPM++ 2M SDE",
    "DPM++ 2M CFG++": "DPM++ 2M",
    "DPM++ 2S ancestral CFG++": "DPM++ 2M SDE",
    "Euler CFG++": "Euler",
    "Euler ancestral CFG++": "Euler a",
    "Euler SMEA Dy": "Euler a",
    "Restart": "Heun",
    "Heun++ 2": "Heun",
    "iPNDM": "PLMS",
    "iPNDM V": "PLMS",
    "Res multistep": "DPM++ 2M",
    "Res multistep ancestral": "DPM++ 2M SDE",
    "Gradient estimation": "Euler",
    "ER SDE": "DPM++ 2M SDE",
    "SEEDS 2": "DPM++ 2M SDE",
    "SEEDS 3": "DPM++ 3M SDE",
    "DDIM CFG++": "DDIM",
}
MISSING_SPACINGS = {
    "automatic": "karras, or none of it",
    "polyexponential": "exponential",
    "kl optimal": "karras",
    "align your steps": "karras",
    "align your steps gits": "karras",
    "align your steps 11": "karras",
    "ays": "karras",
    "linear quadratic": "sgm uniform",
    "turbo": "sgm uniform",
}


@dataclass(frozen=True)
class Found:
    """A sampler with its spacing. settings: complete, so that nothing of an earlier scheduler remains."""

    label: str
    scheduler: str
    settings: Mapping[str, Any]
    spacing: Mapping[str, Any]


def key_of(name: str) -> str:
    """Letters and digits alone, with ComfyUI's pp for ++."""
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))


def find_sampler(name: str) -> Found | str | None:
    """A sampler by any of its names; a sentence on why diffusers lacks it; or None for an unknown name."""
    key = key_of(name).replace("gpu", "")  # where ComfyUI draws the noise
    missing = {key_of(label): label for label in MISSING}
    spacings = {"": "", **{key_of(word): word for word in (*SPACINGS, *MISSING_SPACINGS)}}
    names = {key_of(other): one for one in SAMPLERS for other in (one.label, *one.others)}
    for end in sorted(spacings, key=len):
        start = key.removesuffix(end)
        if not key.endswith(end) or start not in names | missing:
            continue
        word = spacings[end]
        if start in missing:
            return f"diffusers has no sampler {missing[start]}; the nearest is {MISSING[missing[start]]}"
        one = names[start]
        if word in MISSING_SPACINGS:
            return (
                f"diffusers has no schedule of noise levels {word!r}; the nearest is {MISSING_SPACINGS[word]}"
            )
        label = f"{one.label} {word.title() if word != 'sgm uniform' else 'SGM Uniform'}".strip()
        plain = dict.fromkeys(SIGMAS, False)
        return Found(
            label, one.scheduler, {**plain, **one.settings, **SPACINGS.get(word, {})}, SPACINGS.get(word, {})
        )
    return None


def used(scheduler: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's settings that differ from the defaults of its class, for recipes.

    defaults: by parameter. A config also keeps settings of an earlier class, which this one may not have.
    """
    config = scheduler.config
    return {
        name: config[name]
        for name in SAID
        if name in config and name in defaults and config[name] != defaults[name]
    }


def table() -> list[str]:
    """Every name, its class and settings, for a terminal."""
    width = max(len(one.label) for one in SAMPLERS)
    lines = ["Samplers as A1111 names them, also ComfyUI's and kohya's names:", ""]
    for one in SAMPLERS:
        settings = ", ".join(f"{key} {value}" for key, value in one.settings.items())
        others = f"  also {', '.join(one.others)}" if one.others else ""
        lines.append(f"  {one.label:{width}}  {one.scheduler}{f' ({settings})' if settings else ''}{others}")
    lines += ["", "Behind a name, how the noise levels are spaced: DPM++ 2M Karras, euler sgm_uniform, ..."]
    for word, settings_ in SPACINGS.items():
        lines.append(f"  {word:{width}}  {', '.join(f'{key} {value}' for key, value in settings_.items())}")
    lines += ["", "Any other scheduler of diffusers that fits the model goes by the name of its class."]
    missing = ", ".join(f"{name} (nearest: {near})" for name, near in MISSING.items())
    return [*lines, f"Not in diffusers: {missing}."]
