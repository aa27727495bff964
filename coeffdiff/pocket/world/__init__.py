"""The pocket world: which things and places it has, what its scenes look like, and their captions.

Everything is deterministic: a scene from its seed, a caption from its scene and seed, a picture from its scene.

    scene.py      what a scene is           sample.py     random scenes
    colours.py    the colours with names    captions.py   what captions name of it
    shapes/       the things                places/       ground, backdrop, light
    rendering/    scenes to pictures        subjects/     individuals that no random scene shows
"""

from __future__ import annotations

from coeffdiff.pocket.world.captions import article, caption, mentioned, vocabulary
from coeffdiff.pocket.world.colours import COLOURS
from coeffdiff.pocket.world.places import SETTINGS
from coeffdiff.pocket.world.rendering import render
from coeffdiff.pocket.world.sample import in_ranges, sample_scene
from coeffdiff.pocket.world.scene import PATTERNS, Camera, Light, Look, Mark, Scene
from coeffdiff.pocket.world.shapes import KINDS

__all__ = [
    "COLOURS", "KINDS", "PATTERNS", "SETTINGS", "Camera", "Light", "Look", "Mark", "Scene", "article", "caption",
    "in_ranges", "mentioned", "render", "sample_scene", "vocabulary",
]  # fmt: skip
