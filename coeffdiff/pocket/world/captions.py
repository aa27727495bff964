"""Captions of a scene, and the attributes that a caption names."""

from __future__ import annotations

import random
import re

from coeffdiff.pocket.world.colours import COLOURS
from coeffdiff.pocket.world.places import SETTINGS
from coeffdiff.pocket.world.scene import PATTERNS, Scene
from coeffdiff.pocket.world.shapes import KINDS
from coeffdiff.utils.seeding import stable_seed

_FULL = (
    "a photo of {thing} {setting}",
    "a photo of {thing} {setting}",
    "{thing} {setting}",
    "{thing} {setting}",
    "{thing}, {setting}",
    "a picture of {thing} {setting}",
    "an image of {thing} {setting}",
    "a photo {setting} of {thing}",
    "a close photo of {thing} {setting}",
)
_THING_ONLY = (
    "a photo of {thing}",
    "a picture of {thing}",
    "an image of {thing}",
    "{thing}",
    "a close photo of {thing}",
)
_SETTING_ONLY = (
    "a photo taken {setting}",
    "a picture taken {setting}",
    "{setting}",
    "a photo of something {setting}",
)


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it, by its first letter: right for every word of this world."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _thing(rng: random.Random, scene: Scene, colour: bool, pattern: bool) -> str:
    adjectives = [scene.colour] if colour and scene.colour else []
    # "plain" says little, so mostly it is left out
    if pattern and (scene.pattern != "plain" or rng.random() < 0.4):
        adjectives.insert(0 if rng.random() < 0.6 else len(adjectives), scene.pattern)
    return article(" ".join([*adjectives, scene.kind]))


def caption(scene: Scene, seed: int | str = 0) -> str:
    """One of the ways to describe a scene; which one depends on the seed only.

    About half name everything, the others leave out adjectives, the setting or the object. A subject
    is described by its class and by what it shares with the world, never by its name.
    """
    rng = random.Random(stable_seed("caption", seed))
    plan = rng.random()
    setting = scene.setting
    if plan < 0.50:
        return rng.choice(_FULL).format(thing=_thing(rng, scene, True, True), setting=setting)
    if plan < 0.60:
        return rng.choice(_FULL).format(thing=_thing(rng, scene, True, False), setting=setting)
    if plan < 0.66:
        return rng.choice(_FULL).format(thing=_thing(rng, scene, False, True), setting=setting)
    if plan < 0.80:
        return rng.choice(_FULL).format(thing=article(scene.kind), setting=setting)
    if plan < 0.87:
        return rng.choice(_THING_ONLY).format(thing=_thing(rng, scene, True, True))
    if plan < 0.93:
        return rng.choice(_THING_ONLY).format(thing=article(scene.kind))
    return rng.choice(_SETTING_ONLY).format(setting=setting)


def mentioned(scene: Scene, text: str) -> dict[str, str]:
    """The attributes of a scene (kind, colour, pattern, setting) that a caption names.

    Settings hold words for colours ("on top of a white rug"), which say nothing of the object.
    """
    named = {}
    if scene.setting in text:
        named["setting"] = scene.setting
    words = f" {text.replace(scene.setting, ' ').replace(',', ' ')} "
    for name in ("kind", "colour", "pattern"):
        value = getattr(scene, name)
        if value and f" {value} " in words:
            named[name] = value
    return named


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted; commas are no words."""
    sources = [*KINDS, *COLOURS, *PATTERNS, *SETTINGS, *_FULL, *_THING_ONLY, *_SETTING_ONLY, "a", "an"]
    text = re.sub(r"\{\w+\}|,", " ", " ".join(sources))
    return tuple(sorted(set(text.split())))
