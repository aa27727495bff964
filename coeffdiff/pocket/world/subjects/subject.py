"""One individual: a thing of a known kind with traits that no caption names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coeffdiff.errors import ConfigError
from coeffdiff.pocket.world.colours import COLOURS
from coeffdiff.pocket.world.sample import sample_scene
from coeffdiff.pocket.world.scene import RGB, Look, Mark, Scene
from coeffdiff.pocket.world.shapes import EXTRA_PROPORTIONS, EXTRAS, KINDS

# Colours that no caption names
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
PALE: RGB = (0.93, 0.88, 0.79)
INK: RGB = (0.08, 0.07, 0.08)
_NEUTRAL: dict[str, RGB] = {
    "accent": (0.80, 0.66, 0.30),
    "pale": PALE,
    "dark": INK,
    "metal": (0.68, 0.69, 0.72),
    "glow": (1.0, 0.84, 0.45),
}


@dataclass(frozen=True)
class Subject:
    """One individual.

    name: for files and tables; never in a caption.  kind: its class, see class_word.
    shape: proportions that differ from the middle of the kind's ranges.
    colours: role -> sRGB of what differs from neutral colours; must hold "body".
    pattern, second, width, tilt, phase: its pattern, see scene.Look.
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
    second: RGB = PALE
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
        self._check_likeness()

    def _check_likeness(self) -> None:
        """Raises: ConfigError where the world may show its like."""
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
        """This individual in a random scene; `fixed` as in sample_scene."""
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
        """In words, what sets it apart from everything that sample_scene draws."""
        traits = [f"mark: {mark.shape}" for mark in self.marks]
        traits += [f"extra: {extra}" for extra in self.extras]
        for name, (low, high) in KINDS[self.kind].ranges.items():
            value = self.proportions[name]
            if not low <= value <= high:
                traits.append(f"proportion: {name} {value:.2f} is outside {low:.2f}..{high:.2f}")
        if not any(name.holds(self.colours["body"]) for name in COLOURS.values()):
            traits.append("colour: the body's has no name")
        return tuple(traits)
