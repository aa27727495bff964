"""Individuals that the world never shows, and their photos."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

from coeffdiff.errors import ConfigError
from coeffdiff.pocket.world import (
    COLOURS,
    caption,
    in_ranges,
    mentioned,
    render,
    sample_scene,
)
from coeffdiff.pocket.world.scene import MARK_SHAPES, Mark
from coeffdiff.pocket.world.subjects import (
    DEV,
    EVAL,
    SUBJECTS,
    TELLABLE,
    TOLD,
    UNNAMED,
    Subject,
    fresh_subject,
    photo_scenes,
    subject_photos,
    write_photos,
)

SIZE = 48  # pixels; enough for statistics


def test_eighteen_subjects_over_many_kinds():
    """6 dev (the sloth and the pot among them), 12 eval, no name twice, at least 14 kinds."""
    assert (len(DEV), len(EVAL), len(SUBJECTS)) == (6, 12, 18)
    assert SUBJECTS["grey_sloth_plushie"] in DEV and SUBJECTS["wooden_pot"] in DEV
    assert SUBJECTS["grey_sloth_plushie"].class_word == "stuffed animal"
    assert len({subject.kind for subject in SUBJECTS.values()}) >= 14


def test_no_sampled_scene_can_be_a_subject():
    """The world draws no marks, no extras, named colours and proportions in range; subjects leave all of it."""
    for i in range(600):
        scene = sample_scene(i)
        assert scene.marks == () and scene.extras == () and scene.subject is None
        assert in_ranges(scene.kind, scene.shape)
        assert COLOURS[scene.colour].holds(scene.look.colours["body"], margin=1e-6)
    for subject in (*SUBJECTS.values(), *map(fresh_subject, range(40))):
        reasons = " ".join(subject.novelty())
        assert "mark" in reasons or "extra" in reasons, subject.name
        assert "proportion" in reasons, subject.name
        assert "colour" in reasons or subject.name == "grey_sloth_plushie", subject.name
    for name, rgb in UNNAMED.items():
        assert not any(box.holds(rgb, margin=0.02) for box in COLOURS.values()), name


def test_tellable_subjects_are_what_the_world_can_draw():
    """Of the dev subjects' kinds, nothing of them is novel; told, their class words are captions' words."""
    assert [subject.kind for subject in TELLABLE] == [subject.kind for subject in DEV]
    for subject, told in zip(TELLABLE, TOLD, strict=True):
        colour, pattern = subject.words
        assert subject.novelty() == () and in_ranges(subject.kind, subject.proportions)
        assert subject.class_word == subject.kind and told.class_word == f"{colour} {pattern} {subject.kind}"
        assert photo_scenes(subject) == photo_scenes(told)
        said = mentioned(sample_scene(1, kind=subject.kind, colour=colour, pattern=pattern), told.class_word)
        assert said == {"kind": subject.kind, "colour": colour, "pattern": pattern}
    mug = next(subject for subject in TELLABLE if subject.kind == "mug")
    with pytest.raises(ConfigError, match="its body is not green"):
        dataclasses.replace(mug, words=("green", "striped"))
    with pytest.raises(ConfigError, match="'red dotted' is no colour and pattern of its own"):
        dataclasses.replace(mug, words=("red", "dotted"))
    with pytest.raises(ConfigError, match="more than words can say: mark: disc"):
        dataclasses.replace(mug, marks=(Mark("disc", (0.0, 0.5, 0.4), (0.1, 0.1), (0.0, 0.0, 0.0)),))


def test_what_is_no_subject_is_refused():
    with pytest.raises(ConfigError, match="neither marks nor extras"):
        Subject("twin", "mug", {}, {"body": (0.5, 0.5, 0.5)})
    with pytest.raises(ConfigError, match="no kind 'spoon'"):
        Subject("spoon", "spoon", {}, {"body": (0.5, 0.5, 0.5)})
    mark = Mark("disc", (0.0, 0.5, 0.4), (0.1, 0.1), (0.0, 0.0, 0.0))
    with pytest.raises(ConfigError, match="no proportion arm"):
        Subject("armed", "mug", {"arm": 1.0}, {"body": (0.5, 0.5, 0.5)}, (mark,))


def test_fresh_subjects_are_deterministic_and_differ():
    assert fresh_subject(4) == fresh_subject(4)
    subjects = [fresh_subject(i) for i in range(30)]
    assert len({s.name for s in subjects}) == 30
    assert len({s.kind for s in subjects}) >= 10
    assert {m.shape for s in subjects for m in s.marks} >= set(MARK_SHAPES) - {"smile"}


def test_marks_are_seen_in_the_photos():
    """Without its marks a subject looks different in its photos, by at least 1 % of the object's brightness."""
    marked = [s for s in SUBJECTS.values() if s.marks]
    with_marks = [scene for s in marked for scene in photo_scenes(s, 2)]
    without = [dataclasses.replace(scene, marks=()) for scene in with_marks]
    images, masks = render([*with_marks, *without], SIZE, supersample=1)
    one, other = images.chunk(2)
    mask = masks[: len(one)]
    change = ((one - other).abs().mean(1, keepdim=True) * mask).sum(dim=(1, 2, 3)) / mask.sum(dim=(1, 2, 3))
    for subject, pair in zip(marked, change.view(-1, 2), strict=True):
        assert pair.max() > 0.01, subject.name


def test_photos_show_one_individual_in_different_places():
    """Five photos: five settings and views, one body; the same seed gives the same photos."""
    images, masks, scenes = subject_photos(SUBJECTS["grey_sloth_plushie"], 5, seed=2, resolution=SIZE)
    assert images.shape == (5, 3, SIZE, SIZE) and masks.shape == (5, 1, SIZE, SIZE)
    assert len({s.setting for s in scenes}) == 5 and len({s.yaw for s in scenes}) == 5
    assert all(s.shape == scenes[0].shape and s.look == scenes[0].look for s in scenes)
    assert masks.mean(dim=(1, 2, 3)).min() > 0.05
    assert photo_scenes(SUBJECTS["grey_sloth_plushie"], 5, seed=2) == scenes
    assert photo_scenes(SUBJECTS["grey_sloth_plushie"], 5, seed=3) != scenes


def test_a_subject_s_caption_never_gives_it_away():
    """Its class, its setting and its pattern, but neither a colour nor its name."""
    scene = SUBJECTS["wooden_pot"].scene(0)
    for i in range(200):
        text = caption(scene, i)
        assert not set(text.split()) & set(COLOURS), text


def test_photos_become_ordinary_jpeg_files(tmp_path):
    """00.jpg, 01.jpg and masks on request; no captions; pixels as rendered, up to JPEG."""
    paths = write_photos(SUBJECTS["wooden_pot"], tmp_path / "pot", 2, resolution=64, masks=True)
    assert [p.name for p in paths] == ["00.jpg", "01.jpg"]
    assert sorted(p.name for p in (tmp_path / "pot").iterdir()) == [
        "00.jpg",
        "00.mask.png",
        "01.jpg",
        "01.mask.png",
    ]
    images, _, _ = subject_photos(SUBJECTS["wooden_pot"], 2, resolution=64)
    with Image.open(paths[0]) as picture:
        assert picture.format == "JPEG" and picture.mode == "RGB" and picture.size == (64, 64)
        data = torch.tensor(list(picture.getdata()), dtype=torch.float32).view(64, 64, 3) / 255
    assert (data.permute(2, 0, 1) - images[0]).abs().mean() < 0.03
    with Image.open(tmp_path / "pot" / "00.mask.png") as mask:
        assert mask.mode == "L" and mask.getextrema() == (0, 255)
