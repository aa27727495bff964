"""Individuals that the pocket world never shows, and photos of them: what customization is tried on.

A subject is of a class that the base model knows, with what no caption can say: hues between the named
colours, marks on one side, proportions beyond the world's, parts of other things. sample_scene never draws
marks or extras, and a Subject without either is refused, so no sampled scene can be one; Subject.novelty()
lists everything in which it lies outside.
"""

from __future__ import annotations

import colorsys
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from coeffdiff.errors import ConfigError
from coeffdiff.pocket.render import RGB, Look, Mark, Scene, render
from coeffdiff.pocket.shapes import EXTRA_PROPORTIONS, EXTRAS, KINDS, distance, object_bounds
from coeffdiff.pocket.world import COLOURS, SETTINGS, sample_scene
from coeffdiff.seeding import stable_seed

UNNAMED: dict[str, RGB] = {
    "lime": (0.66, 0.84, 0.20),
    "teal": (0.10, 0.58, 0.60),
    "indigo": (0.27, 0.22, 0.68),
    "magenta": (0.80, 0.18, 0.66),
    "mint": (0.52, 0.88, 0.74),
    "sand": (0.86, 0.76, 0.56),
    "slate": (0.40, 0.50, 0.60),
    "mauve": (0.68, 0.50, 0.66),
    "olive": (0.47, 0.48, 0.18),
    "honey": (0.72, 0.48, 0.24),
}
"""Colours that no caption names."""

PHOTO_SETTINGS = tuple(s for s in SETTINGS if s not in ("floating on top of water", "at night"))
"""Where subjects are photographed: wherever all of them can be seen well."""

_PALE: RGB = (0.93, 0.88, 0.79)
_INK: RGB = (0.08, 0.07, 0.08)
_NEUTRAL: dict[str, RGB] = {
    "accent": (0.80, 0.66, 0.30),
    "pale": _PALE,
    "dark": _INK,
    "metal": (0.68, 0.69, 0.72),
    "glow": (1.0, 0.84, 0.45),
}


@dataclass(frozen=True)
class Subject:
    """One individual.

    name: for files and tables; never in a caption.  kind: its class, see class_word.
    shape: proportions that differ from the middle of the kind's ranges.
    colours: role -> sRGB of what differs from neutral colours; must hold "body".
    pattern, second, width, tilt, phase: its pattern, see render.Look.
    marks, extras: at least one of either.
    Raises: ConfigError where the world has no such kind, proportion or extra, or nothing sets it apart.
    """

    name: str
    kind: str
    shape: Mapping[str, float]
    colours: Mapping[str, RGB]
    marks: tuple[Mark, ...] = ()
    extras: tuple[str, ...] = ()
    pattern: str = "plain"
    second: RGB = _PALE
    width: float = 0.5
    tilt: float = 0.2
    phase: float = 0.3

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(
                f"Subject {self.name}: no kind {self.kind!r}; the world has {', '.join(KINDS)}."
            )
        if unknown := set(self.shape) - set(KINDS[self.kind].ranges) - set(EXTRA_PROPORTIONS):
            raise ConfigError(
                f"Subject {self.name}: a {self.kind} has no proportion {', '.join(sorted(unknown))}."
            )
        if unknown := set(self.extras) - set(EXTRAS):
            has = ", ".join(EXTRAS)
            raise ConfigError(f"Subject {self.name}: no extra {', '.join(sorted(unknown))}; there are {has}.")
        if not self.marks and not self.extras:
            raise ConfigError(
                f"Subject {self.name} has neither marks nor extras, so the world may show its like."
            )

    @property
    def class_word(self) -> str:
        """The word that the base model knows it by."""
        return self.kind

    @property
    def look(self) -> Look:
        return Look({**_NEUTRAL, **self.colours}, self.second, self.width, self.tilt, self.phase)

    @property
    def proportions(self) -> dict[str, float]:
        """All proportions, the same in every picture."""
        middle = {name: 0.5 * (low + high) for name, (low, high) in KINDS[self.kind].ranges.items()}
        return middle | dict(self.shape)

    def scene(self, seed: int, **fixed: Any) -> Scene:
        """This individual in a scene drawn by lot; `fixed` as in sample_scene."""
        return sample_scene(
            seed,
            kind=self.kind,
            colour=None,
            pattern=self.pattern,
            shape=self.proportions,
            look=self.look,
            marks=self.marks,
            extras=self.extras,
            subject=self.name,
            **fixed,
        )

    def novelty(self) -> tuple[str, ...]:
        """In what it lies outside everything that sample_scene draws, in words."""
        found = [f"mark: {mark.shape}" for mark in self.marks]
        found += [f"extra: {extra}" for extra in self.extras]
        for name, (low, high) in KINDS[self.kind].ranges.items():
            value = self.proportions[name]
            if not low <= value <= high:
                found.append(f"proportion: {name} {value:.2f} is outside {low:.2f}..{high:.2f}")
        if not any(name.holds(self.colours["body"]) for name in COLOURS.values()):
            found.append("colour: the body's has no name")
        return tuple(found)


# --- the eighteen -----------------------------------------------------------------------------------

_C = UNNAMED

DEV: tuple[Subject, ...] = (
    Subject(
        "grey_sloth_plushie",
        "stuffed animal",
        {
            "arm": 0.80,
            "arm_out": 0.34,
            "arm_forward": 0.46,
            "arm_thick": 0.115,
            "ear": 0.035,
            "head": 0.41,
            "snout": 0.105,
            "belly": 0.36,
            "leg": 0.30,
        },
        {"body": (0.50, 0.48, 0.47), "pale": (0.90, 0.83, 0.72)},
        (
            Mark("disc", (0.0, 1.03, 0.40), (0.31, 0.275), (0.91, 0.85, 0.75)),
            Mark("disc", (0.175, 1.045, 0.40), (0.150, 0.078), (0.20, 0.16, 0.15), yaw=10, turn=-32),
            Mark("disc", (-0.175, 1.045, 0.40), (0.150, 0.078), (0.20, 0.16, 0.15), yaw=-10, turn=32),
            Mark("smile", (0.0, 0.93, 0.46), (0.145, 0.085), (0.16, 0.11, 0.10)),
        ),
        ("claws",),
    ),
    Subject(
        "wooden_pot",
        "pot",
        {"ear": 0.20, "rim": 0.075, "mouth": 0.36, "r": 0.52},
        {"body": _C["honey"]},
        (
            Mark("zigzag", (0.0, 0.55, 0.0), (1.0, 0.075), (0.22, 0.11, 0.05), depth=0.022),
            Mark("band", (0.0, 0.66, 0.0), (1.0, 0.014), (0.22, 0.11, 0.05), depth=0.02),
            Mark("band", (0.0, 0.44, 0.0), (1.0, 0.014), (0.22, 0.11, 0.05), depth=0.02),
            Mark("star", (0.0, 0.25, 0.46), (0.14, 0.14), (0.20, 0.10, 0.04), pitch=-22, depth=0.02),
        ),
        pattern="wooden",
        width=0.75,
    ),
    Subject(
        "robot_mug",
        "mug",
        {"handle": 0.02, "r": 0.42, "h": 0.86, "flare": 0.0, "extra_x": 0.42, "extra_y": 0.46},
        {"body": _C["teal"], "accent": (0.36, 0.20, 0.10)},
        (
            Mark("disc", (0.15, 0.58, 0.40), (0.085, 0.085), (0.97, 0.95, 0.86)),
            Mark("disc", (-0.15, 0.58, 0.40), (0.085, 0.085), (0.97, 0.95, 0.86)),
            Mark("disc", (0.15, 0.57, 0.40), (0.042, 0.042), _INK),
            Mark("disc", (-0.15, 0.57, 0.40), (0.042, 0.042), _INK),
            Mark("smile", (0.0, 0.40, 0.42), (0.15, 0.10), (0.97, 0.80, 0.25)),
        ),
        ("robot arms",),
    ),
    Subject(
        "pirate_duck",
        "duck",
        {"head": 0.34, "tail": 0.34, "beak": 0.20},
        {"body": _C["mint"], "accent": _C["magenta"]},
        (
            Mark("half", (0.0, 0.24, 0.0), (0.3, 0.3), _C["indigo"], pitch=-90),
            Mark("disc", (0.177, 0.957, 0.52), (0.125, 0.115), _INK, yaw=25),
            Mark("bar", (0.0, 1.10, 0.45), (0.40, 0.022), _INK, pitch=30, turn=-24),
        ),
    ),
    Subject(
        "harlequin_clock",
        "clock",
        {"bell": 0.23, "deep": 0.27, "hour": 5.2, "minute": 1.05, "extra_x": 0.44, "extra_y": 0.62},
        {"body": _C["lime"], "accent": _C["magenta"]},
        (Mark("half", (0.0, 0.0, 0.0), (0.3, 0.3), _C["indigo"], yaw=90),),
        ("wings",),
    ),
    Subject(
        "comet_car",
        "car",
        {"wheel": 0.23, "cabin": 0.36, "extra_x": 0.0, "extra_y": 0.80, "extra_z": -0.04},
        {"body": _C["lime"], "accent": _C["indigo"]},
        (
            Mark("bar", (0.20, 0.60, 0.0), (0.055, 1.2), _C["magenta"], pitch=90),
            Mark("star", (0.38, 0.34, 0.0), (0.15, 0.15), _C["magenta"], yaw=90),
        ),
        ("fin",),
    ),
)
"""For the demo, tests, sweeps and the search for recipes."""

EVAL: tuple[Subject, ...] = (
    Subject(
        "heart_teapot",
        "teapot",
        {"handle": 0.33, "spout": 0.40, "tall": 0.48},
        {"body": _C["mauve"], "accent": _C["lime"]},
        (
            Mark("heart", (0.0, 0.46, 0.50), (0.17, 0.17), _C["teal"]),
            Mark("band", (0.0, 0.72, 0.0), (1.0, 0.035), _C["teal"]),
        ),
    ),
    Subject(
        "patched_dog",
        "dog",
        {"ear": 0.29, "leg": 0.27, "snout": 0.16},
        {"body": _C["sand"], "accent": _C["magenta"]},
        (
            Mark("disc", (0.10, 0.95, 0.67), (0.13, 0.12), _C["indigo"], yaw=35),
            Mark("half", (0.0, 0.50, -0.12), (0.3, 0.3), _C["slate"], yaw=180),
            Mark("disc", (-0.20, 0.50, 0.06), (0.12, 0.10), _C["slate"], yaw=-90),
        ),
    ),
    Subject(
        "winged_boot",
        "boot",
        {"foot": 0.56, "cuff": 0.085, "shaft": 0.60, "extra_x": 0.22, "extra_y": 0.50},
        {"body": _C["indigo"], "pale": _C["mint"]},
        (
            Mark("half", (0.0, 0.2, 0.32), (0.3, 0.3), _C["lime"]),
            Mark("bolt", (0.16, 0.24, 0.05), (0.10, 0.13), _C["lime"], yaw=90),
            Mark("disc", (-0.16, 0.22, 0.05), (0.09, 0.09), _C["magenta"], yaw=-90),
        ),
        ("wings",),
    ),
    Subject(
        "owl_backpack",
        "backpack",
        {"pocket": 0.15, "wide": 0.50, "h": 1.0, "extra_x": 0.26, "extra_y": 0.93, "extra_z": 0.02},
        {"body": _C["teal"], "accent": _C["honey"], "metal": _C["honey"]},
        (
            Mark("disc", (0.20, 0.68, 0.22), (0.165, 0.165), _PALE),
            Mark("disc", (-0.20, 0.68, 0.22), (0.165, 0.165), _PALE),
            Mark("disc", (0.18, 0.67, 0.22), (0.085, 0.085), _INK),
            Mark("ring", (-0.18, 0.67, 0.22), (0.110, 0.110), _INK),
        ),
        ("bunny ears",),
    ),
    Subject(
        "gentleman_can",
        "can",
        {"r": 0.46, "h": 1.0, "extra_x": 0.0, "extra_y": 0.99, "extra_z": 0.0},
        {"body": _C["magenta"], "accent": _C["lime"]},
        (
            Mark("spiral", (0.0, 0.0, 0.0), (0.42, 0.11), _C["mint"]),
            Mark("ring", (0.13, 0.66, 0.44), (0.13, 0.13), _INK, yaw=15),
        ),
        ("hat",),
    ),
    Subject(
        "antler_robot",
        "robot",
        {"antenna": 0.02, "head_w": 0.34, "arm": 0.50, "extra_x": 0.20, "extra_y": 1.14, "extra_z": 0.0},
        {"body": _C["mauve"], "accent": _C["honey"], "glow": (0.55, 1.0, 0.80)},
        (
            Mark("half", (0.0, 0.0, 0.0), (0.3, 0.3), _C["teal"], yaw=-90),
            Mark("heart", (0.19, 0.74, 0.20), (0.07, 0.07), _C["lime"]),
        ),
        ("antlers",),
    ),
    Subject(
        "teal_fox_plushie",
        "stuffed animal",
        {"ear": 0.22, "head": 0.46, "arm": 0.28, "belly": 0.28, "extra_x": 0.26},
        {"body": _C["teal"], "pale": _C["sand"], "accent": _C["sand"]},
        (
            Mark("disc", (0.165, 1.13, 0.46), (0.155, 0.135), _C["magenta"], yaw=15),
            Mark("bar", (0.0, 1.36, 0.32), (0.035, 0.14), _C["lime"], pitch=40),
        ),
        ("tail",),
    ),
    Subject(
        "galaxy_vase",
        "vase",
        {"neck": 0.25, "belly": 0.44, "lip": 0.02, "belly_at": 0.58},
        {"body": _C["indigo"]},
        (
            Mark("half", (0.0, 0.62, 0.0), (0.3, 0.3), _C["magenta"], yaw=90, pitch=50),
            Mark("zigzag", (0.0, 0.30, 0.0), (1.0, 0.075), _C["mint"]),
            Mark("star", (-0.08, 0.78, 0.42), (0.14, 0.14), _C["lime"], yaw=-10),
        ),
    ),
    Subject(
        "walking_bowl",
        "bowl",
        {"h": 0.64, "r": 0.56, "foot": 0.40, "extra_x": 0.22, "extra_z": 0.62},
        {"body": _C["lime"], "accent": _C["indigo"]},
        (
            Mark("zigzag", (0.0, 0.50, 0.0), (1.0, 0.07), _C["indigo"]),
            Mark("ring", (0.20, 0.30, 0.42), (0.10, 0.10), _C["magenta"], yaw=25),
            Mark("disc", (-0.20, 0.30, 0.42), (0.10, 0.10), _C["magenta"], yaw=-25),
        ),
        ("bird legs",),
    ),
    Subject(
        "barber_candle",
        "candle",
        {"r": 0.32, "h": 0.78, "drip": 0.50, "flame": 0.46, "dish": 0.50, "extra_x": 0.30},
        {"body": _C["mint"], "accent": _C["magenta"], "metal": (0.76, 0.60, 0.34)},
        (Mark("spiral", (0.0, 0.0, 0.0), (0.52, 0.15), _C["magenta"]),),
        ("tail",),
    ),
    Subject(
        "dragon_mushroom",
        "mushroom",
        {
            "stem": 0.44,
            "wide": 0.64,
            "dome": 0.52,
            "foot": 0.30,
            "extra_x": 0.0,
            "extra_y": 0.90,
            "extra_z": 0.0,
        },
        {"body": _C["slate"], "accent": _C["lime"], "pale": _C["sand"]},
        (
            Mark("disc", (0.22, 0.64, 0.52), (0.11, 0.13), _PALE, yaw=22, pitch=15),
            Mark("disc", (-0.22, 0.64, 0.52), (0.11, 0.13), _PALE, yaw=-22, pitch=15),
            Mark("disc", (0.20, 0.62, 0.52), (0.045, 0.065), _INK, yaw=22, pitch=15),
            Mark("disc", (-0.20, 0.62, 0.52), (0.045, 0.065), _INK, yaw=-22, pitch=15),
            Mark("disc", (0.46, 0.70, 0.20), (0.10, 0.10), _C["magenta"], yaw=65, pitch=20),
        ),
        ("fin",),
    ),
    Subject(
        "crooked_lamp",
        "lamp",
        {
            "stem": 0.28,
            "wide": 0.56,
            "narrow": 0.12,
            "shade_h": 0.62,
            "extra_x": 0.08,
            "extra_y": 0.98,
            "extra_z": 0.0,
        },
        {"body": _C["olive"], "accent": _C["magenta"]},
        (
            Mark("heart", (0.0, 0.66, 0.40), (0.15, 0.15), _C["magenta"], pitch=30),
            Mark("band", (0.0, 0.48, 0.0), (1.0, 0.035), _C["mint"]),
        ),
        ("antlers",),
    ),
)
"""For the final comparison, and nothing else may train on them."""

SUBJECTS: dict[str, Subject] = {subject.name: subject for subject in (*DEV, *EVAL)}


# --- fresh ones -------------------------------------------------------------------------------------


def _surface(
    kind: str, shape: Mapping[str, float], height: float, aside: float, towards: tuple[float, float]
) -> tuple[float, float, float] | None:
    """What one meets looking at the object against `towards` (x, z), `height` up and `aside` of its axis."""
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


def fresh_subject(seed: int) -> Subject:
    """A new individual by lot: unnamed colours, one to three marks, and a proportion beyond its kind's range."""
    lot = random.Random(stable_seed("subject", seed))
    kind = lot.choice(tuple(KINDS))
    ranges = KINDS[kind].ranges
    shape = {name: lot.uniform(low, high) for name, (low, high) in ranges.items()}
    for name in lot.sample([n for n in ranges if n not in ("hour", "minute")], k=min(2, len(ranges))):
        low, high = ranges[name]
        # Half a range beyond: odd, but still of its kind.
        step = (high - low) * lot.uniform(0.35, 0.8)
        shape[name] = high + step if lot.random() < 0.6 or low - step <= 0.3 * low else low - step
    palette = lot.sample(tuple(UNNAMED), k=4)
    hues = [_shifted(lot, UNNAMED[name]) for name in palette]
    top = object_bounds(kind, shape).top
    marks: list[Mark] = []
    count = lot.randint(1, 3)
    for attempt in range(12):
        if len(marks) == count:
            break
        stamp = lot.choice(
            ("disc", "star", "heart", "ring", "bar", "bolt", "band", "zigzag", "spiral", "half")
        )
        yaw = lot.choice((-1, 1)) * lot.uniform(0.0, 40.0)
        colour = hues[1 + attempt % 3]
        if stamp in ("band", "zigzag"):
            level = top * lot.uniform(0.25, 0.75)
            marks.append(Mark(stamp, (0.0, level, 0.0), (1.0, 0.04 if stamp == "band" else 0.08), colour))
        elif stamp == "spiral":
            marks.append(Mark(stamp, (0.0, 0.0, 0.0), (0.45, 0.12), colour))
        elif stamp == "half":
            at = (0.0, top * lot.uniform(0.3, 0.6), 0.0)
            yaw, pitch = lot.choice((-90.0, 90.0)), lot.choice((-90.0, 0.0, 0.0, 40.0))
            marks.append(Mark(stamp, at, (0.3, 0.3), colour, yaw=yaw, pitch=pitch))
        else:
            facing = torch.tensor(yaw).deg2rad()
            towards = (float(torch.sin(facing)), float(torch.cos(facing)))
            point = _surface(kind, shape, top * lot.uniform(0.3, 0.7), lot.uniform(-0.08, 0.08), towards)
            if point:
                size = lot.uniform(0.11, 0.17)
                marks.append(Mark(stamp, point, (size, size), colour, yaw=yaw, turn=lot.uniform(-25, 25)))
    if not marks:
        marks.append(Mark("half", (0.0, 0.5 * top, 0.0), (0.3, 0.3), hues[1], yaw=90))
    plain = lot.random() < 0.6
    return Subject(
        f"fresh_{seed}_{palette[0]}_{kind.replace(' ', '_')}",
        kind,
        shape,
        {"body": hues[0], "accent": hues[3]},
        tuple(marks),
        pattern="plain" if plain else lot.choice(("striped", "dotted", "checkered", "wooden", "shiny")),
        second=hues[2],
        width=lot.random(),
        tilt=lot.random(),
        phase=lot.random(),
    )


def _shifted(lot: random.Random, rgb: RGB) -> RGB:
    """The colour a little off, so that two fresh subjects rarely share one; still without a name."""
    for _ in range(20):
        hue, saturation, value = colorsys.rgb_to_hsv(*rgb)
        hue = (hue + lot.uniform(-0.012, 0.012)) % 1.0
        saturation, value = saturation * lot.uniform(0.92, 1.04), value * lot.uniform(0.93, 1.05)
        other = colorsys.hsv_to_rgb(hue, min(saturation, 1.0), min(value, 1.0))
        if not any(name.holds(other, margin=0.02) for name in COLOURS.values()):
            return other
    return rgb


# --- photos -----------------------------------------------------------------------------------------


def photo_scenes(subject: Subject, count: int = 5, seed: int = 0) -> list[Scene]:
    """`count` scenes of a subject: settings differ as long as there are any, views, light and camera vary."""
    order = list(PHOTO_SETTINGS)
    random.Random(stable_seed("photos", subject.name, seed)).shuffle(order)
    # Who photographs a thing shows its face: of all views of the kind, the frontal ones if there are any.
    views = [
        (max(low, -65.0), min(high, 65.0)) for low, high in KINDS[subject.kind].views if low < 0.0 < high
    ]
    scenes = []
    for i in range(count):
        own = stable_seed("photo", subject.name, seed, i)
        lot = random.Random(own)
        view = {"view": lot.uniform(*lot.choice(views))} if views else {}
        scenes.append(subject.scene(own, setting=order[i % len(order)], **view))
    return scenes


def subject_photos(
    subject: Subject, count: int = 5, seed: int = 0, resolution: int = 128, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor, list[Scene]]:
    """Photos of a subject: images [count, 3, R, R] in 0..1, masks [count, 1, R, R], and their scenes."""
    scenes = photo_scenes(subject, count, seed)
    images, masks = render(scenes, resolution, device)
    return images, masks, scenes


def write_photos(
    subject: Subject,
    folder: str | Path,
    count: int = 5,
    seed: int = 0,
    resolution: int = 256,
    *,
    masks: bool = False,
) -> list[Path]:
    """Photos of a subject as files 00.jpg, 01.jpg, ... (quality 95), as a person's folder would hold them.

    Args:
        folder: made if missing; files of the same names are overwritten.
        masks: also write 00.mask.png, ...: white where the subject is.
    Returns: the paths of the photos.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    images, shares, _ = subject_photos(subject, count, seed, resolution)
    paths = []
    for i in range(count):
        path = folder / f"{i:02d}.jpg"
        picture_of(images[i]).save(path, quality=95)
        if masks:
            picture_of(shares[i]).save(folder / f"{i:02d}.mask.png")
        paths.append(path)
    return paths


def picture_of(values: Tensor) -> Image.Image:
    """[C, R, R] in 0..1 -> 8 bits; one channel becomes grey."""
    bytes_ = (values.clamp(0.0, 1.0) * 255.0 + 0.5).to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(bytes_.squeeze(-1) if bytes_.shape[-1] == 1 else bytes_)
