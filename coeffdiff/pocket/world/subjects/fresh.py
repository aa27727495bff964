"""Random subjects, each from a seed."""

from __future__ import annotations

import colorsys
import random
from collections.abc import Mapping
from types import SimpleNamespace

import torch

from coeffdiff.pocket.world.colours import COLOURS
from coeffdiff.pocket.world.scene import RGB, Mark
from coeffdiff.pocket.world.shapes import KINDS, distance, object_bounds
from coeffdiff.pocket.world.subjects.subject import UNNAMED, Subject
from coeffdiff.utils.seeding import stable_seed


def fresh_subject(seed: int) -> Subject:
    """A random individual: unnamed colours, one to three marks, and a proportion beyond its kind's range."""
    rng = random.Random(stable_seed("subject", seed))
    kind = rng.choice(tuple(KINDS))
    ranges = KINDS[kind].ranges
    shape = {name: rng.uniform(low, high) for name, (low, high) in ranges.items()}
    for name in rng.sample([n for n in ranges if n not in ("hour", "minute")], k=min(2, len(ranges))):
        low, high = ranges[name]
        # Half a range beyond: odd, but still of its kind.
        step = (high - low) * rng.uniform(0.35, 0.8)
        shape[name] = high + step if rng.random() < 0.6 or low - step <= 0.3 * low else low - step
    palette = rng.sample(tuple(UNNAMED), k=4)
    hues = [_shifted(rng, UNNAMED[name]) for name in palette]
    top = object_bounds(kind, shape).top
    marks: list[Mark] = []
    count = rng.randint(1, 3)
    for attempt in range(12):
        if len(marks) == count:
            break
        stamp = rng.choice(
            ("disc", "star", "heart", "ring", "bar", "bolt", "band", "zigzag", "spiral", "half")
        )
        yaw = rng.choice((-1, 1)) * rng.uniform(0.0, 40.0)
        colour = hues[1 + attempt % 3]
        if stamp in ("band", "zigzag"):
            level = top * rng.uniform(0.25, 0.75)
            marks.append(Mark(stamp, (0.0, level, 0.0), (1.0, 0.04 if stamp == "band" else 0.08), colour))
        elif stamp == "spiral":
            marks.append(Mark(stamp, (0.0, 0.0, 0.0), (0.45, 0.12), colour))
        elif stamp == "half":
            at = (0.0, top * rng.uniform(0.3, 0.6), 0.0)
            yaw, pitch = rng.choice((-90.0, 90.0)), rng.choice((-90.0, 0.0, 0.0, 40.0))
            marks.append(Mark(stamp, at, (0.3, 0.3), colour, yaw=yaw, pitch=pitch))
        else:
            facing = torch.tensor(yaw).deg2rad()
            towards = (float(torch.sin(facing)), float(torch.cos(facing)))
            point = _surface(kind, shape, top * rng.uniform(0.3, 0.7), rng.uniform(-0.08, 0.08), towards)
            if point:
                size = rng.uniform(0.11, 0.17)
                marks.append(Mark(stamp, point, (size, size), colour, yaw=yaw, turn=rng.uniform(-25, 25)))
    if not marks:
        marks.append(Mark("half", (0.0, 0.5 * top, 0.0), (0.3, 0.3), hues[1], yaw=90))
    plain = rng.random() < 0.6
    return Subject(
        f"fresh_{seed}_{palette[0]}_{kind.replace(' ', '_')}",
        kind,
        shape,
        {"body": hues[0], "accent": hues[3]},
        tuple(marks),
        pattern="plain" if plain else rng.choice(("striped", "dotted", "checkered", "wooden", "shiny")),
        second=hues[2],
        width=rng.random(),
        tilt=rng.random(),
        phase=rng.random(),
    )


def _surface(
    kind: str, shape: Mapping[str, float], height: float, aside: float, towards: tuple[float, float]
) -> tuple[float, float, float] | None:
    """The first surface point seen against `towards` (x, z), at `height` and `aside` of the object's axis."""
    q = SimpleNamespace(**{name: torch.tensor([value]) for name, value in shape.items()})
    x0, z0 = towards[1] * aside, -towards[0] * aside
    t = 2.5
    for _ in range(48):
        x, z = x0 + towards[0] * t, z0 + towards[1] * t
        d = float(distance(kind, (), torch.tensor([x]), torch.tensor([height]), torch.tensor([z]), q))
        if d < 4e-3:
            return x, height, z
        t -= d
        if t < -2.5:
            break
    return None


def _shifted(rng: random.Random, rgb: RGB) -> RGB:
    """The colour a little off, so that two fresh subjects rarely share one; still without a name."""
    for _ in range(20):
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        hue = (hue + rng.uniform(-0.012, 0.012)) % 1.0
        saturation, value = saturation * rng.uniform(0.92, 1.04), value * rng.uniform(0.93, 1.05)
        other = colorsys.hsv_to_rgb(hue, min(saturation, 1.0), min(value, 1.0))
        if not any(name.holds(other, margin=0.02) for name in COLOURS.values()):
            return other
    return rgb
