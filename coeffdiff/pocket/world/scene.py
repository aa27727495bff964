"""A scene of the pocket world: everything that decides one picture, and nothing else does.

Things are in shapes, what is around them in places, and how a scene becomes a picture in rendering.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RGB = tuple[float, float, float]
PATTERNS = ("plain", "striped", "dotted", "checkered", "wooden", "shiny")
MARK_SHAPES = ("disc", "star", "heart", "ring", "bar", "smile", "bolt", "band", "zigzag", "spiral", "half")
FIELD_OF_VIEW = 36.0  # degrees


@dataclass(frozen=True)
class Camera:
    """azimuth: degrees around the object, 0 faces the backdrop.  elevation: degrees above the horizon.
    distance: world units from the point looked at.  aim: that point's height, as a share of the object's.
    """

    azimuth: float
    elevation: float
    distance: float
    aim: float = 0.5


@dataclass(frozen=True)
class Light:
    """azimuth: degrees from the camera's side of the object.  elevation: degrees above the horizon.
    strength: of the key light, 1 as usual.  warmth: -1 bluish to 1 reddish.  fill: light from the sky, 1 as usual.
    """

    azimuth: float
    elevation: float
    strength: float = 1.0
    warmth: float = 0.0
    fill: float = 1.0


@dataclass(frozen=True)
class Look:
    """How an individual is painted.

    colours: role -> sRGB, all roles of shapes.ROLES.  second: the pattern's other colour.
    width, tilt, phase: size, direction and shift of the pattern, each in 0..1.
    """

    colours: Mapping[str, RGB]
    second: RGB
    width: float = 0.5
    tilt: float = 0.2
    phase: float = 0.3


@dataclass(frozen=True)
class Mark:
    """A figure painted, or carved, on the body and pale parts of an object.

    shape: one of MARK_SHAPES. "band", "zigzag" and "spiral" run around the y axis, "half" colours all
    that lies beyond `at` in the direction it faces; the others are stamped from the direction they face.
    at: its middle in object space.  size: half width and half height (spiral: pitch and thickness).
    yaw, pitch: degrees, the direction it faces; 0, 0 is the front.  turn: degrees in its own plane.
    depth: how deep it is carved, in object units; 0 is painted only.
    """

    shape: str
    at: tuple[float, float, float]
    size: tuple[float, float]
    colour: RGB
    yaw: float = 0.0
    pitch: float = 0.0
    turn: float = 0.0
    depth: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Everything that decides one picture.

    kind, colour, pattern, setting: the words of captions; colour is None where no word fits.
    shape: proportions of the kind (see shapes.KINDS).  yaw: degrees the object is turned.
    size: radius of the object's box in world units.  position: x and z on the ground.
    sunk: share of its height under the ground plane (afloat).  detail: what varies in the place.
    marks, extras, subject: only of subjects.
    """

    kind: str
    colour: str | None
    pattern: str
    setting: str
    shape: Mapping[str, float]
    look: Look
    camera: Camera
    light: Light
    yaw: float
    size: float
    position: tuple[float, float]
    sunk: float
    detail: tuple[float, ...]
    marks: tuple[Mark, ...] = ()
    extras: tuple[str, ...] = ()
    subject: str | None = None
