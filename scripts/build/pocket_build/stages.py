"""The stages in which the pocket models are made from nothing but the world; build_pocket.py runs them.

Every stage depends on its own seeds and on the stages before it alone, resumes where it was stopped, and writes
its weights (fp16), its curve and what it took.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pocket_build.clip import build_clip
from pocket_build.detail import measure_detail
from pocket_build.dino import build_dino
from pocket_build.distances import measure_distances
from pocket_build.judges import build_judges
from pocket_build.score import score
from pocket_build.sharpening import sharpen_decoder
from pocket_build.unet import build_deep, build_unet, store_unfinished
from pocket_build.vae import build_decoder, build_vae
from pocket_build.workshop import Workshop

STAGES: dict[str, Callable[[Workshop], Any]] = {
    "vae": build_vae,
    "decoder": build_decoder,
    "sharp": sharpen_decoder,
    "judges": build_judges,
    "unet": build_unet,
    "deep": build_deep,
    "clip": build_clip,
    "dino": build_dino,
    "score": score,
    "distances": measure_distances,
    "detail": measure_detail,
}
"""In the order in which they can be made."""

STORE_UNFINISHED: dict[str, Callable[[Workshop], int]] = {"deep": store_unfinished}
"""Of the stage that takes longest; what the others leave is in the work folder."""
