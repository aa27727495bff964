"""Folders and files that other tools wrote: captions, masks, layouts, colour profiles and lists of prompts."""

import json
import struct

import pytest
from PIL import Image, ImageCms
from typer.testing import CliRunner

from coeffdiff.cli.root import app
from coeffdiff.config.loading import load_settings
from coeffdiff.data.photos import offered_values, read_photos
from coeffdiff.errors import ConfigError, PhotoError
from coeffdiff.evaluation.prompts import choose_prompts
from coeffdiff.sampling.prompt_file import prompts_in


def picture(path, colour=(10, 200, 30), mode="RGB", size=(16, 8), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path, **options)
    return path


def captioned(folder):
    return {photo.path.name: photo.caption for photo in read_photos(folder).photos}


# --- colour profiles


def srgb():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def with_gamma(gamma):
    """The sRGB profile with a plain power for its curves; still called sRGB."""
    data = bytearray(srgb())
    count = struct.unpack(">I", data[128:132])[0]
    for entry in range(132, 132 + 12 * count, 12):
        if data[entry : entry + 4] in (b"rTRC", b"gTRC", b"bTRC"):
            place = struct.unpack(">I", data[entry + 4 : entry + 8])[0]
            data[place : place + 16] = struct.pack(">4sIHHi", b"para", 0, 0, 0, round(gamma * 65536))
    return bytes(data)


def test_a_linear_profile_that_is_called_srgb_is_converted(tmp_path):
    """Half of the light is 188 in sRGB: 255 * (1.055 * 0.5 ** (1 / 2.4) - 0.055) = 187.5; black and white stay."""
    for name, value in (("a", 128), ("b", 0), ("c", 255)):
        picture(tmp_path / f"{name}.png", (value,) * 3, icc_profile=with_gamma(1.0))
    shown = [photo.open().getpixel((0, 0))[0] for photo in read_photos(tmp_path).photos]
    assert shown[0] == pytest.approx(188, abs=1) and shown[1:] == [0, 255]


def test_srgb_under_another_name_changes_nothing(tmp_path):
    """Not one level, whatever the profile is called."""
    renamed = srgb().replace("sRGB".encode("utf-16-be"), "mine".encode("utf-16-be"))
    assert renamed != srgb()
    picture(tmp_path / "a.png", (250, 3, 77), icc_profile=renamed)
    assert read_photos(tmp_path).photos[0].open().getpixel((0, 0)) == (250, 3, 77)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_a_grey_photo_obeys_a_profile_of_three_colours(tmp_path, mode):
    """Some scanners write one; transparency, none here, takes no part."""
    colour = 128 if mode == "L" else (128, 255)
    picture(tmp_path / "a.png", colour, mode, icc_profile=with_gamma(1.0))
    assert read_photos(tmp_path).photos[0].open().getpixel((0, 0)) == pytest.approx((188,) * 3, abs=1)


def test_a_profile_of_another_kind_is_said(tmp_path):
    picture(tmp_path / "a.jpg", (0, 0, 0, 0), "CMYK", icc_profile=srgb())
    (note,) = read_photos(tmp_path).notes
    assert note == "a.jpg has a colour profile for RGB, and is CMYK; its colours are taken as they are."


# --- captions


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be", "utf-8"])
def test_captions_of_windows_are_decoded_and_said_once(tmp_path, encoding):
    """An apostrophe is 0x92 in Windows-1252; the other three begin with a byte-order mark."""
    text = "a dog’s café" if encoding == "cp1252" else "\ufeffa dog’s café"
    for number in range(2):
        picture(tmp_path / f"{number}.png", (number, 0, 0))
        (tmp_path / f"{number}.txt").write_bytes(text.encode(encoding))
    found = read_photos(tmp_path)
    assert [photo.caption for photo in found.photos] == ["a dog’s café"] * 2
    name = {"cp1252": "Windows-1252", "utf-8": ""}.get(encoding, "UTF-16")
    assert found.notes == ((f"0.txt, 1.txt are not UTF-8, and read as {name}.",) if name else ())


def test_captions_have_one_order_of_precedence(tmp_path):
    """Each source is used when all before it are gone, and what it overrules is said."""
    picture(tmp_path / "a.png")
    lines = {
        "a.txt": "one",
        "a.png.txt": "two",
        "a.caption": "three",
        "a.png.caption": "four",
        "metadata.jsonl": json.dumps({"file_name": "a.png", "text": "five"}) + "\n",
        "metadata.csv": 'file_name,text\r\na.png,"six, all in all"\r\n',
    }
    for name, text in lines.items():
        (tmp_path / name).write_text(text)
    found = read_photos(tmp_path)
    assert not found.skipped
    others = ", ".join(list(lines)[1:])
    assert found.notes == (f"a.png is captioned by a.txt, and not by {others}.",)
    for name, expected in zip(lines, ("one", "two", "three", "four", "five", "six, all in all"), strict=True):
        assert captioned(tmp_path) == {"a.png": expected}
        (tmp_path / name).unlink()
    assert captioned(tmp_path) == {"a.png": None}


def test_an_empty_or_unreadable_caption_leaves_the_word_to_the_next(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "a.png.txt").write_bytes(b"a\0b")
    (tmp_path / "a.caption").write_text("three")
    found = read_photos(tmp_path)
    assert found.photos[0].caption == "three"
    assert found.notes == ("a.png.txt is not UTF-8 text; a.png is captioned from a.caption.",)


def test_captions_without_a_photo_are_named(tmp_path):
    """Files among what is left out; lines of metadata, and lines that are none, in notes."""
    picture(tmp_path / "a.png")
    (tmp_path / "b.caption").write_text("b")
    (tmp_path / "c.jpg.txt").write_text("c")
    rows = ['{"file_name": "gone.png", "text": "x"}', "{broken", '{"file_name": "./a.png"}', '["a.png"]']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    found = read_photos(tmp_path)
    assert {s.path.name: s.reason for s in found.skipped} == {
        "b.caption": "a caption without a photo of that name",
        "c.jpg.txt": "a text without a photo of that name",
    }
    assert found.notes == (
        "metadata.jsonl: lines 2, 4 gave no file_name, and no caption.",
        "metadata.jsonl: gone.png matches no photo in this folder.",
        "metadata.jsonl has no text for a.png.",
    )


# --- masks


@pytest.mark.parametrize(
    "name", ["a.mask.jpg", "a-masklabel.png", "a_mask.png", "a-mask.webp", "a.png.mask.png"]
)
def test_masks_of_other_tools_are_masks(tmp_path, name):
    """Without masks they are no photos either."""
    picture(tmp_path / "a.png")
    picture(tmp_path / name, 255, "L")
    for masks in ("auto", False):
        (photo,) = read_photos(tmp_path, masks).photos
        assert photo.path.name == "a.png"
        assert (photo.mask.path.name if photo.mask else None) == (name if masks else None)


def test_what_is_only_called_like_a_mask(tmp_path):
    """dog_mask.png with no dog beside it is a photo of one; what OneTrainer writes for control never is."""
    picture(tmp_path / "dog_mask.png")
    picture(tmp_path / "x-masklabel.png", 255, "L")
    picture(tmp_path / "dog_mask-condlabel.png", 255, "L")
    found = read_photos(tmp_path)
    assert [photo.path.name for photo in found.photos] == ["dog_mask.png"]
    assert {s.path.name: s.reason for s in found.skipped} == {
        "x-masklabel.png": "a mask without a photo of that name",
        "dog_mask-condlabel.png": "OneTrainer's picture for control, not a photo",
    }


# --- kohya's layout


@pytest.mark.parametrize("given", ["", "img", "img/10_sks corgi dog"])
def test_kohyas_folder_is_the_folder_and_offers_its_words(tmp_path, given):
    picture(tmp_path / "img/10_sks corgi dog/a.png")
    (tmp_path / "log").mkdir()
    folder = tmp_path / given
    found = read_photos(folder)
    assert len(found.photos) == 1 and "10 times is ignored" in found.notes[0]
    subject = load_settings(None, {"subject.images": str(folder)}).subject
    assert offered_values(subject) == {"subject.token": "sks", "subject.class_word": "corgi dog"}
    subject = load_settings(None, {"subject.images": str(folder), "subject.token": "ohwx"}).subject
    assert offered_values(subject) == {"subject.class_word": "corgi dog"}


def test_several_of_kohyas_folders_are_one_sentence(tmp_path):
    for name in ("10_sks dog", "5_ohwx cat"):
        picture(tmp_path / name / "a.png")
    with pytest.raises(PhotoError, match=r"2 folders in kohya's layout \(10_sks dog, 5_ohwx cat\).*give one"):
        read_photos(tmp_path)


# --- lists of prompts


def test_comments_may_be_indented(tmp_path):
    file = tmp_path / "p.txt"
    data = b"# one\n  # two\n\t#three\n\n  a {token} dog, no. #4 \n"
    assert prompts_in(data, file) == (("a {token} dog, no. #4",), "UTF-8")
    file.write_bytes(data)
    assert choose_prompts(str(file), base_model="x", class_word="dog").subject == ("a {token} dog, no. #4",)


@pytest.mark.parametrize(
    ("line", "options"),
    [
        (
            "a sks dog --n bad hands --w 512 --h 768 --s 20 --l 5 --d 1",
            '--negative-prompt "bad hands" --width 512 --height 768 --steps 20 --guidance 5 --seed 1',
        ),
        ("--prompt a dog --cfg_scale 7", "--guidance 7"),
        ("a dog --ar 16:9", None),
    ],
)
def test_options_of_other_tools_are_pointed_out_and_never_drawn(tmp_path, line, options):
    file = tmp_path / "p.txt"
    file.write_text(f"# list\na {{token}} dog\n{line}\n")
    for run in (
        lambda: prompts_in(file.read_bytes(), file),
        lambda: choose_prompts(str(file), base_model="x", class_word=None),
    ):
        with pytest.raises(ConfigError) as caught:
            run()
        assert "line 3" in str(caught.value) and "would be drawn as words" in str(caught.value)
        assert (f"pass {options} to sample" in str(caught.value)) == bool(options)
    result = CliRunner().invoke(app, ["sample", "--prompts-file", str(file)])
    assert result.exit_code == 2 and "line 3" in result.stderr
    result = CliRunner().invoke(app, ["sample", "--prompt", line])
    assert result.exit_code == 2 and "options of another tool" in result.stderr


def test_dashes_in_a_prompt_are_words(tmp_path):
    line = "a dog -- well-known, half--asleep, 2 -- 3"
    assert prompts_in(line.encode(), tmp_path) == ((line,), "UTF-8")
