"""Random scenes of the pocket world, each from a seed. Subjects, which this world never shows, are in subjects."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from coeffdiff.errors import ConfigError
from coeffdiff.pocket.world.colours import COLOURS, draw_colour, second_colour
from coeffdiff.pocket.world.places import DETAILS, PLACES, SETTINGS
from coeffdiff.pocket.world.scene import FIELD_OF_VIEW, PATTERNS, Camera, Light, Look, Scene
from coeffdiff.pocket.world.shapes import KINDS
from coeffdiff.utils.seeding import stable_seed


def sample_scene(seed: int, **fixed: Any) -> Scene:
    """One random scene of the world.

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

    def rng(name: str) -> random.Random:
        return random.Random(stable_seed("scene", seed, name))

    def given(name: str, draw: Any) -> Any:
        return fixed[name] if name in fixed else draw(rng(name))

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
    r = rng("shape")
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


def in_ranges(kind: str, shape: Mapping[str, float]) -> bool:
    """Whether these are proportions that sample_scene can draw."""
    ranges = KINDS[kind].ranges
    return set(shape) == set(ranges) and all(
        low <= shape[name] <= high for name, (low, high) in ranges.items()
    )


def _draw_look(rng: random.Random, kind: str, colour: str) -> Look:
    warm = rng.uniform(0.90, 0.97)
    accents = KINDS[kind].accents
    accent = accents[rng.randrange(len(accents))] if accents else draw_colour(rng, rng.choice(tuple(COLOURS)))
    dark, metal = rng.uniform(0.05, 0.10), rng.uniform(0.62, 0.74)
    return Look(
        colours={
            "body": draw_colour(rng, colour),
            "accent": accent,
            "pale": (warm, warm * 0.96, warm * 0.88),
            "dark": (dark, dark, dark * 1.1),
            "metal": (metal, metal, metal * 1.03),
            "glow": (1.0, rng.uniform(0.76, 0.90), rng.uniform(0.35, 0.55)),
        },
        second=second_colour(rng, colour),
        width=rng.random(),
        tilt=rng.random(),
        phase=rng.random(),
    )


def _draw_position(rng: random.Random, camera: Camera, size: float) -> tuple[float, float]:
    """Off the middle, but with the whole object in the picture."""
    visible = camera.distance * math.tan(math.radians(FIELD_OF_VIEW / 2))
    slack = max(0.0, 0.96 * visible - size)
    return rng.uniform(-0.75, 0.75) * slack, rng.uniform(-0.6, 0.3) * slack


def _between(rng: random.Random, bounds: tuple[float, float]) -> float:
    return rng.uniform(*bounds)
