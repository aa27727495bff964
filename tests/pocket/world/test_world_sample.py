"""Random scenes of the pocket world: how wide it is, and what a seed decides."""

from __future__ import annotations

import pytest

from coeffdiff.errors import ConfigError
from coeffdiff.pocket.world import (
    COLOURS,
    KINDS,
    SETTINGS,
    render,
    sample_scene,
)
from coeffdiff.pocket.world.scene import PATTERNS


def test_the_world_is_as_wide_as_promised():
    """16 kinds with the twelve asked for by name, 10 colours, 6 patterns, 12 settings in DreamBooth's words."""
    asked = [
        "stuffed animal",
        "mug",
        "teapot",
        "vase",
        "bowl",
        "candle",
        "clock",
        "can",
        "boot",
        "robot",
        "duck",
        "car",
    ]
    assert len(KINDS) >= 16 and set(asked) <= set(KINDS)
    assert len(COLOURS) >= 10
    assert set(PATTERNS) >= {"plain", "striped", "dotted", "checkered", "wooden", "shiny"}
    words = (
        "in the snow,on the beach,in the jungle,on a cobblestone street,on top of pink fabric,"
        "on top of a wooden floor,with a mountain in the background,with a city in the background,"
        "floating on top of water,on top of green grass with sunflowers around it,on top of a white rug,at night"
    )
    assert len(SETTINGS) >= 12 and set(words.split(",")) <= set(SETTINGS)


def test_a_scene_depends_on_its_seed_only():
    """Same seed, same scene; another seed, another one."""
    assert sample_scene(3) == sample_scene(3)
    assert sample_scene(3) != sample_scene(4)


def test_fixing_one_field_leaves_the_others():
    """Only the setting and what follows from it (camera height, how deep it floats) change."""
    free = sample_scene(5)
    fixed = sample_scene(5, setting="at night" if free.setting != "at night" else "in the snow")
    assert fixed.setting != free.setting
    for name in ("kind", "colour", "pattern", "shape", "look", "light", "size", "detail"):
        assert getattr(fixed, name) == getattr(free, name), name


def test_mistakes_in_fixed_fields_are_named():
    with pytest.raises(ConfigError, match="no colour"):
        sample_scene(0, colour="turquoise")
    with pytest.raises(ConfigError, match="A scene has no colr"):
        sample_scene(0, colr="red")
    with pytest.raises(ConfigError, match="at least one"):
        render([])
    with pytest.raises(ConfigError, match="even number"):
        render([sample_scene(0)], resolution=33)


def test_all_words_are_drawn_about_equally_often():
    """1,980 draws: each of 18 kinds near 110, each of 11 colours near 180."""
    scenes = [sample_scene(i) for i in range(1980)]
    for name, values in (("kind", KINDS), ("colour", COLOURS), ("pattern", PATTERNS), ("setting", SETTINGS)):
        mean = len(scenes) / len(values)
        counts = [sum(getattr(s, name) == value for s in scenes) for value in values]
        assert min(counts) > 0.6 * mean and max(counts) < 1.5 * mean, name
