"""Six individuals of the world itself, of the dev subjects' kinds: a caption can say all that sets them apart.

The base model could draw them if it were told how. Beside DEV, whose marks and hues no caption can say, they show what
a method does with what a model knows already.
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass, replace

from coeffdiff.errors import ConfigError
from coeffdiff.pocket.world.colours import COLOURS
from coeffdiff.pocket.world.scene import PATTERNS, RGB
from coeffdiff.pocket.world.shapes import KINDS
from coeffdiff.pocket.world.subjects.subject import Subject


@dataclass(frozen=True)
class TellableSubject(Subject):
    """An individual that sample_scene can draw.

    words: its colour and its pattern, as captions name them.  told: whether its class word says them.
    Raises: ConfigError where anything of it is beyond the world or the words.
    """

    words: tuple[str, str] = ("", "")
    told: bool = False

    def _check_likeness(self) -> None:
        colour, pattern = self.words
        if colour not in COLOURS or pattern != self.pattern or self.pattern not in PATTERNS:
            raise ConfigError(
                f"Subject {self.name}: {' '.join(self.words)!r} is no colour and pattern of its own."
            )
        if beyond := self.novelty():
            raise ConfigError(f"Subject {self.name} is more than words can say: {', '.join(beyond)}.")
        if not COLOURS[colour].holds(self.colours["body"]):
            raise ConfigError(f"Subject {self.name}: its body is not {colour}.")

    @property
    def class_word(self) -> str:
        return " ".join((*self.words, self.kind)) if self.told else self.kind


def _tellable(colour: str, pattern: str, kind: str) -> TellableSubject:
    """In the middle of all ranges."""
    accents = KINDS[kind].accents
    colours = {"body": _middle(colour), "accent": accents[0] if accents else _middle("grey")}
    return TellableSubject(
        name=f"{colour}_{pattern}_{kind}".replace(" ", "_"),
        kind=kind,
        shape={},
        colours=colours,
        pattern=pattern,
        second=(0.95, 0.936, 0.902),
        words=(colour, pattern),
    )


def _middle(colour: str) -> RGB:
    box = COLOURS[colour]
    hue, saturation, value = (sum(bounds) / 2.0 for bounds in (box.hue, box.saturation, box.value))
    return colorsys.hsv_to_rgb(hue / 360.0 % 1.0, saturation, value)


TELLABLE: tuple[TellableSubject, ...] = (
    _tellable("purple", "dotted", "stuffed animal"),
    _tellable("green", "checkered", "pot"),
    _tellable("red", "striped", "mug"),
    _tellable("pink", "checkered", "duck"),
    _tellable("orange", "dotted", "clock"),
    _tellable("blue", "striped", "car"),
)
"""Called by their kinds."""

TOLD: tuple[TellableSubject, ...] = tuple(replace(subject, told=True) for subject in TELLABLE)
"""The same, called by all that sets them apart."""
