"""Networks that mark a subject, and the masks that are drawn from marks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from small_labellers import save_blip, save_clipseg, save_mask2former, save_segformer

from coeffdiff.data.photos import read_photos
from coeffdiff.errors import ConfigError, ModelError
from coeffdiff.labelling.masking import mask_from, write_masks
from coeffdiff.labelling.places import mask_places
from coeffdiff.labelling.segmenter import find_segmenter, load_segmenter

CPU = torch.device("cpu")
PICTURES = [
    Image.effect_noise((40, 50), 90).convert("RGB"),
    Image.radial_gradient("L").resize((1500, 300)).convert("RGB"),
]
LABELS = {0: "wall", 1: "dog, domestic dog", 2: "hot dog"}


def load(folder, word="dog", threshold=None):
    return load_segmenter(find_segmenter(str(folder)), word, CPU, threshold)


def test_clipseg_marks_what_scores_above_the_threshold(tmp_path):
    """Its scores at the picture's size, by hand; marks of a batch are those of single pictures."""
    folder = save_clipseg(tmp_path)
    segmenter = load(folder, "stuffed animal", 0.5)
    [small, wide] = segmenter.marks(PICTURES)
    assert small.shape == (50, 40) and wide.shape == (205, 1024)  # [h, w], the longer side at most 1024
    inputs = segmenter.processor(images=PICTURES[:1], text=["stuffed animal"], return_tensors="pt")
    with torch.no_grad():
        scores = segmenter.network(**inputs).logits.sigmoid().reshape(1, 1, 32, 32)
    by_hand = torch.nn.functional.interpolate(scores, size=(50, 40), mode="bilinear")[0, 0]
    assert torch.equal(small, by_hand > 0.5) and 0 < small.float().mean() < 1
    assert torch.equal(segmenter.marks(PICTURES[1:])[0], wide)
    assert load(folder, "stuffed animal", 1.0).marks(PICTURES)[0].sum() == 0


def test_a_semantic_model_marks_the_label(tmp_path, capsys):
    """As its own post-processing has it, and not the hot dog."""
    segmenter = load(save_segformer(tmp_path, LABELS))
    assert "dog, domestic dog\n" in capsys.readouterr().err
    [mark] = segmenter.marks(PICTURES[:1])
    inputs = segmenter.pipeline.image_processor(images=PICTURES[:1], return_tensors="pt")
    with torch.no_grad():
        outputs = segmenter.pipeline.model(**inputs)
    processor = segmenter.pipeline.image_processor
    [labels] = processor.post_process_semantic_segmentation(outputs, target_sizes=[(50, 40)])
    assert torch.equal(mark, labels == 1) and {1, 2} <= set(labels.unique().tolist())
    with pytest.raises(ConfigError, match=r"no --threshold; leave it out"):
        load(tmp_path, threshold=0.2)
    with pytest.raises(ConfigError, match=r"contains \"cat\""):
        load(tmp_path, "cat")


def test_a_panoptic_model_marks_all_segments_of_the_label(tmp_path):
    folder = save_mask2former(tmp_path, LABELS, favourite=1)
    [mark] = load(folder).marks(PICTURES[:1])
    assert mark.shape == (50, 40) and mark.any()
    [other] = load(folder, "hot dog").marks(PICTURES[:1])
    assert not other.any()


def test_what_is_no_segmenter_is_one_sentence(tmp_path):
    with pytest.raises(ModelError, match=r"is a blip, and a segmentation model of transformers is needed"):
        find_segmenter(str(save_blip(tmp_path)))


@pytest.mark.parametrize(("grow", "size"), [(0, (20, 10)), (10, (20, 10)), (5, (60, 30))])
def test_a_mark_grows_by_a_part_of_the_longer_side(grow, size):
    """One point of 20 x 10 becomes a square: with 10 % two pixels more to each side, 5 x 5."""
    mark = torch.zeros(10, 20, dtype=torch.bool)
    mark[5, 7] = True
    mask = np.asarray(mask_from(mark, size, grow))
    scale, reach = size[0] // 20, round(20 * grow / 100)
    expected = np.zeros((10, 20), dtype=np.uint8)
    expected[5 - reach : 6 + reach, 7 - reach : 8 + reach] = 255
    assert mask.shape == size[::-1] and mask.dtype == np.uint8
    assert (mask[scale // 2 :: scale, scale // 2 :: scale] == expected).all()


class Bright:
    """Marks what is brighter than half, in pictures no larger than 1024."""

    device = "cpu"

    def marks(self, pictures):
        return [torch.from_numpy(np.asarray(picture.convert("L")) > 127) for picture in pictures]


@pytest.mark.parametrize("name", ["a.jpg", "a.heic", "a.webp"])
def test_a_mask_fits_the_photo_as_training_sees_it(tmp_path, name):
    """Of a picture that its EXIF turns: the mask lies upright, white on the bright square, and training takes it."""
    picture = Image.new("RGB", (80, 40))
    picture.paste("white", (56, 8, 72, 24))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    import pillow_heif

    pillow_heif.register_heif_opener()
    picture.save(tmp_path / name, exif=exif.tobytes())
    Image.new("RGB", (30, 30), (9, 9, 9)).save(tmp_path / "dark.png")
    places = mask_places(read_photos(tmp_path).photos, overwrite=False)
    [written], [unseen] = write_masks(places.new, Bright(), grow=0, batch_size=1)
    assert unseen.path.name == "dark.png" and not (tmp_path / "dark.mask.png").exists()
    assert written.share == pytest.approx(16 * 16 / 3200, rel=0.2)
    photo, dark = read_photos(tmp_path).photos
    mask = np.asarray(photo.open_mask())
    assert dark.mask is None and photo.mask.path == tmp_path / "a.mask.png" and mask.shape == (80, 40)
    agree = (mask > 127) == (np.asarray(photo.open().convert("L")) > 127)
    assert agree.mean() > 0.99 and mask[64, 24] == 255


def test_a_dry_run_draws_nothing(tmp_path):
    Image.new("RGB", (30, 30), "white").save(tmp_path / "a.png")
    places = mask_places(read_photos(tmp_path).photos, overwrite=False)
    [written], _ = write_masks(places.new, Bright(), grow=1, batch_size=1, dry_run=True)
    assert written.share == 1 and [p.name for p in tmp_path.iterdir()] == ["a.png"]
