"""The stages in which the pocket models are made from nothing but the world; build_pocket.py runs them.

Every stage depends on its own seeds and on the stages before it alone, resumes where it was stopped, and writes
its weights (fp16), its curve and what it took.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pocket_build import deep, unet
from pocket_build.clip import build_clip
from pocket_build.dino import build_dino
from pocket_build.distances import measure_distances
from pocket_build.judges import build_judges
from pocket_build.score import score
from pocket_build.vae import build_decoder, build_vae
from pocket_build.workshop import Workshop

STAGES: dict[str, Callable[[Workshop], Any]] = {
    "vae": build_vae,
    "decoder": build_decoder,
    "judges": build_judges,
    "unet": unet.build_unet,
    "clip": build_clip,
    "dino": build_dino,
    "score": score,
    "distances": measure_distances,
    "shallow": deep.build_shallow,
    "deep": deep.build_deep,
}
"""In the order in which they can be made."""

STORE_UNFINISHED: dict[str, Callable[[Workshop], int]] = {
    "unet": unet.store_unfinished,
    "shallow": lambda shop: deep.store_unfinished(shop, "shallow"),
    "deep": lambda shop: deep.store_unfinished(shop, "deep"),
}
"""Of the stages that take hours."""
