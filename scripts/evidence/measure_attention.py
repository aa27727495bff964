"""How much of a model's noise prediction comes from attention, level by level.

python scripts/evidence/measure_attention.py --model pocket

A picture of each of four prompts is denoised, and at four of its steps the UNet is asked again: without the attention
of a level (its outputs are zero), without that of a single layer, without the level's transformers (they pass their
inputs on), and with an alpha that is drawn at random for each of its layers. How far does the noise prediction move, of
its own norm? A level that moves it by nothing is one where alpha has nothing to work on, however many layers lie there.
"""

from __future__ import annotations

import argparse
import inspect
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

PROMPTS = (
    "a photo of a red mug in the snow", "a photo of a dog on the beach", "a photo of a green car in the forest",
    "a photo of a stuffed animal on a wooden table",
)  # fmt: skip
STEPS, LOOKED_AT = 25, (3, 9, 15, 21)
DEVIATION = (
    0.3  # of a random alpha's entries; pocket's own come to 0.2 to 0.3 in the mean where they learn alone
)


def main() -> int:
    from coeffdiff.utils.threads import choose_waiting

    choose_waiting()
    import torch

    from coeffdiff.config.schema import ModelSettings
    from coeffdiff.errors import CoeffDiffError
    from coeffdiff.models.finding import find_backbone
    from coeffdiff.models.loading import load_pipeline

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="pocket", help="as in `coeffdiff train`")
    parser.add_argument("--json", action="store_true", help="print the shares as JSON")
    chosen = parser.parse_args()
    try:
        pipe = load_pipeline(find_backbone(ModelSettings(name=chosen.model)), dtype=torch.float32)
        rows = shares(pipe.unet, calls_of(pipe))
    except CoeffDiffError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    if chosen.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(
        "| level | attention layers | without attention | without one layer's: least, median, most | "
        "without transformers | with random alphas |"
    )
    print("|---|---|---|---|---|---|")
    for level, row in rows.items():
        moved = [f"{row[name]:.2%}" for name in ("attention", "transformers", "alphas")]
        moved.insert(1, ", ".join(f"{row[name]:.2%}" for name in ("least", "median", "most")))
        print(f"| {level} | {row['layers']} | {' | '.join(moved)} |")
    return 0


def calls_of(pipe: Any, prompts: Sequence[str] = PROMPTS, steps: int = STEPS) -> list[dict[str, Any]]:
    """The arguments of the UNet's calls at some steps of the prompts' pictures, with guidance 5."""
    import torch

    seen: list[dict[str, Any]] = []
    signature = inspect.signature(pipe.unet.forward)

    def keep(_: Any, arguments: Any, named: Any) -> None:
        seen.append(dict(signature.bind(*arguments, **named | {"return_dict": True}).arguments))

    handle = pipe.unet.register_forward_pre_hook(keep, with_kwargs=True)
    generator = torch.Generator().manual_seed(0)
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        pipe(
            list(prompts),
            num_inference_steps=steps,
            guidance_scale=5.0,
            generator=generator,
            output_type="latent",
        )
    handle.remove()
    return [seen[step] for step in LOOKED_AT if step < len(seen)]


def shares(unet: Any, calls: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each level with attention, and all of them: how far the prediction moves, of its norm."""
    import torch
    from diffusers.models.attention_processor import Attention
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    from coeffdiff.hosts.unet import eject, inject

    def predicted() -> Any:
        with torch.no_grad():
            return torch.cat([unet(**call).sample.flatten() for call in calls])

    def moved() -> float:
        return float((predicted() - plain).norm() / plain.norm())

    plain = predicted()
    modules = dict(unet.named_modules())
    attention = [name for name, module in modules.items() if isinstance(module, Attention)]
    transformers = [name for name, module in modules.items() if isinstance(module, Transformer2DModel)]
    levels = {name.split(".attentions.")[0]: f"{name.split('.attentions.')[0]}." for name in attention}
    levels["all"] = ""
    single = {}
    for name in attention:
        with _instead([modules[name]], _nothing):
            single[name] = moved()
    found: dict[str, dict[str, float]] = {}
    for level, prefix in levels.items():
        own = [name for name in attention if name.startswith(prefix)]
        with _instead([modules[name] for name in own], _nothing):
            without_attention = moved()
        with _instead([modules[name] for name in transformers if name.startswith(prefix)], _its_input):
            without_transformers = moved()
        ones = [single[name] for name in own]
        found[level] = {
            "layers": len(own), "attention": without_attention, "transformers": without_transformers,
            "least": min(ones), "median": statistics.median(ones), "most": max(ones),
        }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    layers = inject(unet)
    for level, prefix in levels.items():
        for name, layer in layers.items():
            deviation = DEVIATION if name.startswith(prefix) else 0.0
            layer.alpha.data = deviation * torch.randn(layer.alpha.shape, generator=generator)
        found[level]["alphas"] = moved()
    eject(unet)
    return found


def _nothing(_: Any, __: Any, output: Any) -> Any:
    return output.new_zeros(output.shape)


def _its_input(_: Any, arguments: Any, output: Any) -> Any:
    return (arguments[0],) if isinstance(output, tuple) else type(output)(sample=arguments[0])


@contextmanager
def _instead(modules: Sequence[Any], what: Callable[[Any, Any, Any], Any]) -> Iterator[None]:
    handles = [module.register_forward_hook(what) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    sys.exit(main())
