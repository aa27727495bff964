"""The pocket world: which things and places it has, how scenes of it are drawn by lot, and what is said of them.

Everything is deterministic: a scene from its seed, a caption from its scene and seed, a picture from its
scene. Subjects, which this world never shows, are in subjects.py.
"""

from __future__ import annotations

import colorsys
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from coeffdiff.errors import ConfigError
from coeffdiff.pocket.places import DETAILS, PLACES
from coeffdiff.pocket.render import (
    FIELD_OF_VIEW,
    PATTERNS,
    RGB,
    Camera,
    Light,
    Look,
    Mark,
    Scene,
    render,
)
from coeffdiff.pocket.shapes import KINDS
from coeffdiff.seeding import stable_seed

__all__ = [
    "COLOURS", "KINDS", "PATTERNS", "SETTINGS", "Camera", "Light", "Look", "Mark", "Scene", "article", "caption",
    "in_ranges", "mentioned", "render", "sample_scene", "vocabulary",
]  # fmt: skip

SETTINGS = tuple(PLACES)
"""The phrases of all settings."""


@dataclass(frozen=True)
class ColourName:
    """The colours that one word means, as a box in HSV: hue in degrees (may pass 0), the others in 0..1."""

    hue: tuple[float, float]
    saturation: tuple[float, float]
    value: tuple[float, float]

    def holds(self, rgb: RGB, margin: float = 0.0) -> bool:
        """Whether an sRGB colour lies in the box, grown by `margin` (of 1, or of 100 degrees)."""
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        low, high = self.hue[0] - 100 * margin, self.hue[1] + 100 * margin
        turned = (hue * 360.0 - low) % 360.0
        return (
            (turned <= high - low or high - low >= 360.0)
            and self.saturation[0] - margin <= saturation <= self.saturation[1] + margin
            and self.value[0] - margin <= value <= self.value[1] + margin
        )


COLOURS: dict[str, ColourName] = {
    "red": ColourName((354.0, 362.0), (0.82, 0.92), (0.74, 0.86)),
    "orange": ColourName((22.0, 29.0), (0.84, 0.94), (0.92, 0.98)),
    "yellow": ColourName((49.0, 55.0), (0.78, 0.90), (0.93, 0.98)),
    "green": ColourName((112.0, 136.0), (0.62, 0.78), (0.48, 0.62)),
    "blue": ColourName((212.0, 226.0), (0.74, 0.86), (0.70, 0.86)),
    "purple": ColourName((268.0, 280.0), (0.58, 0.70), (0.54, 0.66)),
    "pink": ColourName((334.0, 344.0), (0.40, 0.50), (0.95, 0.99)),
    "brown": ColourName((18.0, 26.0), (0.60, 0.72), (0.36, 0.46)),
    "white": ColourName((0.0, 360.0), (0.00, 0.03), (0.95, 0.99)),
    "grey": ColourName((0.0, 360.0), (0.00, 0.05), (0.50, 0.62)),
    "black": ColourName((0.0, 360.0), (0.00, 0.08), (0.09, 0.15)),
}
"""Every named colour. The gaps in hue (lime, teal, indigo, magenta) are left to subjects."""


def _between(lot: random.Random, bounds: tuple[float, float]) -> float:
    return lot.uniform(*bounds)


def _draw_colour(lot: random.Random, name: str) -> RGB:
    box = COLOURS[name]
    hue = _between(lot, box.hue) / 360.0
    return colorsys.hsv_to_rgb(hue % 1.0, _between(lot, box.saturation), _between(lot, box.value))


def _second_colour(lot: random.Random, name: str) -> RGB:
    """The other colour of stripes, dots and checks: light on dark, dark on white, never another name's hue."""
    shade = {"white": 0.30, "black": 0.80, "grey": 0.93}.get(name, 0.95) + lot.uniform(-0.03, 0.03)
    return (shade, shade * 0.985, shade * 0.95)


def _draw_look(lot: random.Random, kind: str, colour: str) -> Look:
    warm = lot.uniform(0.90, 0.97)
    accents = KINDS[kind].accents
    accent = (
        accents[lot.randrange(len(accents))] if accents else _draw_colour(lot, lot.choice(tuple(COLOURS)))
    )
    dark, metal = lot.uniform(0.05, 0.10), lot.uniform(0.62, 0.74)
    return Look(
        colours={
            "body": _draw_colour(lot, colour),
            "accent": accent,
            "pale": (warm, warm * 0.96, warm * 0.88),
            "dark": (dark, dark, dark * 1.1),
            "metal": (metal, metal, metal * 1.03),
            "glow": (1.0, lot.uniform(0.76, 0.90), lot.uniform(0.35, 0.55)),
        },
        second=_second_colour(lot, colour),
        width=lot.random(),
        tilt=lot.random(),
        phase=lot.random(),
    )


def _draw_position(lot: random.Random, camera: Camera, size: float) -> tuple[float, float]:
    """Off the middle, but with the whole object in the picture."""
    visible = camera.distance * math.tan(math.radians(FIELD_OF_VIEW / 2))
    slack = max(0.0, 0.96 * visible - size)
    return lot.uniform(-0.75, 0.75) * slack, lot.uniform(-0.6, 0.3) * slack


def sample_scene(seed: int, **fixed: Any) -> Scene:
    """One scene of the world by lot.

    Every field is drawn from its own seed, so fixing one leaves the others as they were.

    Args:
        seed: same seed, same scene.
        fixed: fields of Scene that are given instead of drawn. `shape` may name some proportions only;
            `view` (degrees, 0 sees the front) may be given instead of `yaw`.
    Raises: ConfigError for a field that does not exist or a name that the world does not know.
    """
    known = {field.name for field in fields(Scene)} | {"view"}
    if unknown := sorted(set(fixed) - known):
        raise ConfigError(f"A scene has no {', '.join(unknown)}; it has {', '.join(sorted(known))}.")

    def lot(name: str) -> random.Random:
        return random.Random(stable_seed("scene", seed, name))

    def given(name: str, draw: Any) -> Any:
        return fixed[name] if name in fixed else draw(lot(name))

    kind = given("kind", lambda r: r.choice(tuple(KINDS)))
    colour = given("colour", lambda r: r.choice(tuple(COLOURS)))
    pattern = given("pattern", lambda r: r.choice(PATTERNS))
    setting = given("setting", lambda r: r.choice(SETTINGS))
    for value, names, what in (
        (kind, KINDS, "kind"),
        (colour, (None, *COLOURS), "colour"),
        (pattern, PATTERNS, "pattern"),
        (setting, PLACES, "setting"),
    ):
        if value not in names:
            raise ConfigError(
                f"The world has no {what} {value!r}; it has {', '.join(str(n) for n in names if n)}."
            )
    place, thing = PLACES[setting], KINDS[kind]
    r = lot("shape")
    shape = {name: _between(r, bounds) for name, bounds in thing.ranges.items()} | dict(
        fixed.get("shape", {})
    )
    size = given("size", lambda r: r.uniform(0.80, 0.96))
    camera = given(
        "camera",
        lambda r: Camera(
            r.uniform(-22, 22), _between(r, place.elevation), r.uniform(2.8, 3.4), r.uniform(0.42, 0.60)
        ),
    )
    light = given(
        "light",
        lambda r: Light(
            r.choice((-1, 1)) * r.uniform(15, 75), r.uniform(34, 62), r.uniform(0.88, 1.10), r.uniform(-1, 1),
            r.uniform(0.88, 1.15),
        ),
    )  # fmt: skip
    if "yaw" in fixed:
        yaw = fixed["yaw"]
    else:
        yaw = camera.azimuth - given("view", lambda r: _between(r, r.choice(thing.views)))
    return Scene(
        kind=kind,
        colour=colour,
        pattern=pattern,
        setting=setting,
        shape=shape,
        look=given("look", lambda r: _draw_look(r, kind, colour or "white")),
        camera=camera,
        light=light,
        yaw=yaw,
        size=size,
        position=given("position", lambda r: _draw_position(r, camera, size)),
        sunk=given("sunk", lambda r: _between(r, place.afloat)),
        detail=given("detail", lambda r: tuple(r.random() for _ in range(DETAILS))),
        marks=tuple(fixed.get("marks", ())),
        extras=tuple(fixed.get("extras", ())),
        subject=fixed.get("subject"),
    )


# --- captions ---------------------------------------------------------------------------------------

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


def _thing(lot: random.Random, scene: Scene, colour: bool, pattern: bool) -> str:
    adjectives = [scene.colour] if colour and scene.colour else []
    # "plain" is what one says when there is nothing to say, so mostly it is left out.
    if pattern and (scene.pattern != "plain" or lot.random() < 0.4):
        adjectives.insert(0 if lot.random() < 0.6 else len(adjectives), scene.pattern)
    return article(" ".join([*adjectives, scene.kind]))


def caption(scene: Scene, seed: int | str = 0) -> str:
    """One of the ways to describe a scene; which one depends on the seed only.

    About half name everything, the others leave out adjectives, the setting or the object. A subject
    is described by its class and by what it shares with the world, never by its name.
    """
    lot = random.Random(stable_seed("caption", seed))
    plan = lot.random()
    setting = scene.setting
    if plan < 0.50:
        return lot.choice(_FULL).format(thing=_thing(lot, scene, True, True), setting=setting)
    if plan < 0.60:
        return lot.choice(_FULL).format(thing=_thing(lot, scene, True, False), setting=setting)
    if plan < 0.66:
        return lot.choice(_FULL).format(thing=_thing(lot, scene, False, True), setting=setting)
    if plan < 0.80:
        return lot.choice(_FULL).format(thing=article(scene.kind), setting=setting)
    if plan < 0.87:
        return lot.choice(_THING_ONLY).format(thing=_thing(lot, scene, True, True))
    if plan < 0.93:
        return lot.choice(_THING_ONLY).format(thing=article(scene.kind))
    return lot.choice(_SETTING_ONLY).format(setting=setting)


def mentioned(scene: Scene, text: str) -> dict[str, str]:
    """What a caption of a scene says of it: the attributes (kind, colour, pattern, setting) that it names.

    Settings hold words for colours ("on top of a white rug"), which say nothing of the object.
    """
    said = {}
    if scene.setting in text:
        said["setting"] = scene.setting
    words = f" {text.replace(scene.setting, ' ').replace(',', ' ')} "
    for name in ("kind", "colour", "pattern"):
        value = getattr(scene, name)
        if value and f" {value} " in words:
            said[name] = value
    return said


def vocabulary() -> tuple[str, ...]:
    """Every word that a caption can hold, sorted; commas are no words."""
    sources = [*KINDS, *COLOURS, *PATTERNS, *SETTINGS, *_FULL, *_THING_ONLY, *_SETTING_ONLY, "a", "an"]
    text = re.sub(r"\{\w+\}|,", " ", " ".join(sources))
    return tuple(sorted(set(text.split())))


def in_ranges(kind: str, shape: Mapping[str, float]) -> bool:
    """Whether these are proportions that sample_scene can draw."""
    ranges = KINDS[kind].ranges
    return set(shape) == set(ranges) and all(
        low <= shape[name] <= high for name, (low, high) in ranges.items()
    )
