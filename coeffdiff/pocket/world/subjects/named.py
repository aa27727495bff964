"""The eighteen subjects with names, six to try things on and twelve for the final comparison."""

from __future__ import annotations

from coeffdiff.pocket.world.scene import Mark
from coeffdiff.pocket.world.subjects.subject import INK, PALE, UNNAMED, Subject

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
            Mark("disc", (0.15, 0.57, 0.40), (0.042, 0.042), INK),
            Mark("disc", (-0.15, 0.57, 0.40), (0.042, 0.042), INK),
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
            Mark("disc", (0.177, 0.957, 0.52), (0.125, 0.115), INK, yaw=25),
            Mark("bar", (0.0, 1.10, 0.45), (0.40, 0.022), INK, pitch=30, turn=-24),
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
            Mark("disc", (0.20, 0.68, 0.22), (0.165, 0.165), PALE),
            Mark("disc", (-0.20, 0.68, 0.22), (0.165, 0.165), PALE),
            Mark("disc", (0.18, 0.67, 0.22), (0.085, 0.085), INK),
            Mark("ring", (-0.18, 0.67, 0.22), (0.110, 0.110), INK),
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
            Mark("ring", (0.13, 0.66, 0.44), (0.13, 0.13), INK, yaw=15),
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
            Mark("disc", (0.22, 0.64, 0.52), (0.11, 0.13), PALE, yaw=22, pitch=15),
            Mark("disc", (-0.22, 0.64, 0.52), (0.11, 0.13), PALE, yaw=-22, pitch=15),
            Mark("disc", (0.20, 0.62, 0.52), (0.045, 0.065), INK, yaw=22, pitch=15),
            Mark("disc", (-0.20, 0.62, 0.52), (0.045, 0.065), INK, yaw=-22, pitch=15),
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
