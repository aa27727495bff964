"""Pictures of scenes, judged by what can be measured on small ones."""

from __future__ import annotations

import colorsys
import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from coeffdiff.pocket.world import (
    COLOURS,
    KINDS,
    SETTINGS,
    render,
    sample_scene,
    shapes,
)
from coeffdiff.pocket.world.scene import PATTERNS
from coeffdiff.pocket.world.subjects import (
    DEV,
    SUBJECTS,
    fresh_subject,
)

SIZE = 48  # pixels; enough for statistics


def test_the_same_scene_gives_the_same_pixels():
    scenes = [sample_scene(i) for i in range(3)]
    first, second = render(scenes, SIZE), render(scenes, SIZE)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_the_rest_of_the_batch_does_not_change_a_picture():
    """Alone, among others, in another order or in other chunks: the same within 1e-4."""
    scenes = [*(sample_scene(i) for i in range(8)), DEV[0].scene(1, setting="floating on top of water")]
    together, masks = render(scenes, SIZE)
    backwards, _ = render(scenes[::-1], SIZE, chunk=4)
    torch.testing.assert_close(backwards.flip(0), together, atol=1e-4, rtol=0)
    for i in (0, 3, 8):
        image, mask = render([scenes[i]], SIZE)
        torch.testing.assert_close(image[0], together[i], atol=1e-4, rtol=0)
        torch.testing.assert_close(mask[0], masks[i], atol=1e-4, rtol=0)


@pytest.mark.parametrize("supersample", [1, 2])
def test_shapes_and_ranges_of_what_comes_back(supersample):
    images, masks = render([sample_scene(i) for i in range(3)], 32, supersample=supersample)
    assert images.shape == (3, 3, 32, 32) and masks.shape == (3, 1, 32, 32)
    for values in (images, masks):
        assert values.dtype == torch.float32
        assert values.min() >= 0.0 and values.max() <= 1.0 and values.isfinite().all()


def test_a_picture_is_the_same_at_every_resolution():
    """Twice the pixels, averaged back, is the same picture: mean difference under 3 %, masks under 1 %."""
    scenes = [sample_scene(i) for i in range(4)]
    small, small_mask = render(scenes, 64)
    big, big_mask = render(scenes, 128)
    shrink = torch.nn.functional.avg_pool2d
    assert (shrink(big, 2) - small).abs().mean() < 0.03
    assert (shrink(big_mask, 2) - small_mask).abs().mean() < 0.01


def test_every_kind_is_seen_whole_and_of_sane_size():
    """Masks cover 3 % to 60 % of the picture and less than 1 % of them lies at its border."""
    scenes = [sample_scene(10 * i + k, kind=kind) for i, kind in enumerate(KINDS) for k in range(4)]
    _, masks = render(scenes, SIZE, supersample=1)
    area = masks.mean(dim=(1, 2, 3))
    inner = masks[:, :, 1:-1, 1:-1].sum(dim=(1, 2, 3))
    border = 1.0 - inner / masks.sum(dim=(1, 2, 3))
    for scene, share, cut in zip(scenes, area.tolist(), border.tolist(), strict=True):
        assert 0.03 < share < 0.60, (scene.kind, share)
        assert cut < 0.01, (scene.kind, cut)


def test_bounds_hold_every_object():
    """No point inside a field lies outside its box: sampled, the eighteen, and fresh ones."""
    across, up = torch.linspace(-1.6, 1.6, 33), torch.linspace(0.02, 2.2, 25)
    x, y, z = (c.flatten() for c in torch.meshgrid(across, up, across, indexing="ij"))
    cases = [(kind, sample_scene(7, kind=kind).shape, ()) for kind in KINDS]
    cases += [(s.kind, s.proportions, s.extras) for s in (*SUBJECTS.values(), *map(fresh_subject, range(12)))]
    for kind, shape, extras in cases:
        box = shapes.object_bounds(kind, shape, extras)
        q = SimpleNamespace(**{name: torch.tensor(value) for name, value in shape.items()})
        for name in set(shapes.EXTRA_PROPORTIONS) - set(shape):
            setattr(q, name, torch.tensor(0.0))
        inside = shapes.distance(kind, extras, x, y, z, q) < 0.0
        outside_box = (x.abs() > box.x) | (y > box.top) | (z < -box.back) | (z > box.front)
        assert inside.any() and not (inside & outside_box).any(), (kind, extras)


def test_moving_the_object_moves_its_mask_and_nothing_else():
    """0.3 world units to the right at a distance of 3.5 and 36 degrees: 0.3 / (2 * 3.5 * tan 18) = 13 % of the width."""
    scene = sample_scene(2, kind="can", setting="on top of a wooden floor", position=(0.0, 0.0))
    camera = dataclasses.replace(scene.camera, azimuth=0.0, distance=3.5)
    left, right = (
        dataclasses.replace(scene, camera=camera),
        dataclasses.replace(scene, camera=camera, position=(0.3, 0.0)),
    )
    images, masks = render([left, right], 64)
    at = torch.arange(64.0)
    middle = (masks.sum(dim=(1, 2)) * at).sum(-1) / masks.sum(dim=(1, 2, 3))
    assert (middle[1] - middle[0]) / 64 == pytest.approx(0.13, abs=0.02)
    corner = (images[0] - images[1])[:, :8, :8].abs().max()
    assert corner < 1e-4


def test_the_mask_is_where_the_object_is():
    """Repainting the object changes pixels inside the mask only, but for what the lens spreads: next to nothing here."""
    scene = sample_scene(8, kind="teapot", pattern="plain", colour="red", setting="in the kitchen")
    blue = {**scene.look.colours, "body": (0.1, 0.2, 0.9)}
    images, masks = render(
        [scene, dataclasses.replace(scene, look=dataclasses.replace(scene.look, colours=blue))], 64
    )
    changed = (images[0] - images[1]).abs().amax(0)
    assert changed[masks[0, 0] == 0].max() < 1e-3
    assert changed[masks[0, 0] == 1].mean() > 0.2


def _typical(name):
    box = COLOURS[name]
    return colorsys.hsv_to_rgb(
        (sum(box.hue) / 720.0) % 1.0 if name not in ("white", "grey", "black") else 0.0,
        sum(box.saturation) / 2,
        sum(box.value) / 2,
    )


def _shade_free(rgb):
    """Chroma that shading leaves alone (two numbers), and brightness at a small weight."""
    total = rgb.sum().clamp(min=0.25)
    return torch.stack([1.6 * (rgb[0] - rgb[1]) / total, 1.6 * (rgb[1] - rgb[2]) / total, 0.55 * rgb.mean()])


def test_a_plain_object_has_the_colour_it_is_called_by():
    """The lit pixels of plain cans, bowls and chairs are nearest to the word's own colour in 90 % of cases."""
    scenes = [
        sample_scene(31 * i + k, kind=kind, colour=colour, pattern="plain", setting=setting)
        for i, colour in enumerate(COLOURS)
        for k, (kind, setting) in enumerate(
            itertools.product(("can", "bowl", "chair"), ("in the kitchen", "on the beach"))
        )
    ]
    images, masks = render(scenes, SIZE, supersample=1)
    targets = torch.stack([_shade_free(torch.tensor(_typical(name))) for name in COLOURS])
    right = 0
    for scene, image, mask in zip(scenes, images, masks, strict=True):
        pixels = image[:, mask[0] > 0.99]
        bright = pixels[:, pixels.sum(0) >= pixels.sum(0).median()]
        nearest = (targets - _shade_free(bright.median(dim=1).values)).norm(dim=1).argmin()
        right += list(COLOURS)[nearest] == scene.colour
    assert right / len(scenes) >= 0.9


def test_every_pattern_shows_on_every_kind():
    """Against the plain twin, each pattern changes at least 4 % of the object's brightness."""
    scenes = [
        sample_scene(i, kind=kind, colour="blue", pattern=pattern, setting="on top of a white rug")
        for i, kind in enumerate(KINDS)
        for pattern in PATTERNS
    ]
    images, masks = render(scenes, SIZE, supersample=1)
    images = images.view(len(KINDS), len(PATTERNS), 3, SIZE, SIZE)
    solid = masks.view(len(KINDS), len(PATTERNS), 1, SIZE, SIZE)[:, 0]
    plain = PATTERNS.index("plain")
    for k, kind in enumerate(KINDS):
        for p, pattern in enumerate(PATTERNS):
            change = ((images[k, p] - images[k, plain]).abs().mean(0) * solid[k, 0]).sum() / solid[k].sum()
            assert pattern == "plain" or change > 0.02, (kind, pattern, float(change))


def test_settings_tell_themselves_apart_by_their_background():
    """A nearest-mean classifier on 6 x 6 thumbnails of the background knows 14 settings 90 % of the time."""

    def thumbnails(first, each):
        scenes = [
            sample_scene(first + 100 * i + k, setting=setting, kind="candle")
            for i, setting in enumerate(SETTINGS)
            for k in range(each)
        ]
        images, _ = render(scenes, SIZE, supersample=1)
        small = torch.nn.functional.adaptive_avg_pool2d(images, 6)
        rough = torch.nn.functional.adaptive_avg_pool2d((images - images.roll(1, 3)).abs(), 3)
        return torch.cat([small.flatten(1), 4.0 * rough.flatten(1)], dim=1).view(len(SETTINGS), each, -1)

    means = thumbnails(0, 6).mean(1)
    guesses = torch.cdist(thumbnails(50_000, 4).flatten(0, 1), means).argmin(1).view(len(SETTINGS), 4)
    right = (guesses == torch.arange(len(SETTINGS)).view(-1, 1)).float().mean()
    assert right >= 0.9


def test_afloat_it_is_partly_immersed_and_mirrored():
    """Sinking hides part of the object; below the waterline the water takes on the object's red."""
    scene = sample_scene(4, kind="can", colour="red", pattern="plain", setting="floating on top of water")
    assert 0.1 < scene.sunk < 0.3
    images, masks = render([scene, dataclasses.replace(scene, sunk=0.0)], 64)
    assert masks[0].sum() < 0.95 * masks[1].sum()
    rows, cols = masks[0, 0].nonzero(as_tuple=True)
    below, middle = int(rows.max()) + 3, int(cols.float().mean())
    beside = min(62, int(cols.max()) + 8) if middle < 32 else max(1, int(cols.min()) - 8)
    redness = images[0, 0] - images[0, 2]
    assert redness[below, middle] > redness[below, beside] + 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_draws_what_the_cpu_draws():
    """Mean difference under 1/255; single pixels at edges may differ."""
    scenes = [sample_scene(i) for i in range(16)]
    here, there = render(scenes, 64)[0], render(scenes, 64, "cuda")[0].cpu()
    assert (here - there).abs().mean() < 1 / 255
