"""Pictures that pocket draws of random captions, for those who measure it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from coeffdiff.pocket import POCKET
from coeffdiff.pocket.world import Scene, caption, sample_scene
from coeffdiff.utils.console import quiet_libraries
from coeffdiff.utils.seeding import generator_for, stable_seed
from pocket_build.workshop import Workshop

TOGETHER = 20


def measured_pipeline(shop: Workshop) -> Any:
    with quiet_libraries():
        pipe = StableDiffusionXLPipeline.from_pretrained(shop.weights / POCKET).to(shop.device)
        pipe.set_progress_bar_config(disable=True)
    return pipe


def captioned_scene(name: str, index: int) -> tuple[Scene, str]:
    """Scene and caption `index` of what is measured under a name."""
    scene = sample_scene(stable_seed(name, index))
    return scene, caption(scene, f"{name} {index}")


def drawn(pipe: Any, name: str, indices: Iterable[int], *, steps: int, guidance: float) -> Tensor:
    """[N, 3, 128, 128], float32, whole numbers in 0..255; each picture from a noise of its own."""
    own = list(indices)
    images = pipe(
        [captioned_scene(name, index)[1] for index in own],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=[generator_for(name, index) for index in own],
        output_type="pt",
    ).images
    return (images * 255.0).round()
