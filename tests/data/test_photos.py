"""Photos: what is read, how it comes out, what is left out and why, and what each view tells SDXL."""

import contextlib
import errno
import functools
import io
import os
import random
import re
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from coeffdiff.data.photos import Photo, PhotoSet, read_photos
from coeffdiff.data.templates import captions_for, class_caption, fill
from coeffdiff.data.views import View, bucket, render, render_mask, view_of
from coeffdiff.errors import ConfigError, PhotoError, ShapeError

pillow_heif.register_heif_opener()

COLOURS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255), "K": (0, 0, 0)}


def quadrants(width=60, height=40):
    """Red and green above blue and white."""
    picture = Image.new("RGB", (width, height))
    for letter, left, top in (("R", 0, 0), ("G", 1, 0), ("B", 0, 1), ("W", 1, 1)):
        box = (left * width // 2, top * height // 2, (left + 1) * width // 2, (top + 1) * height // 2)
        picture.paste(COLOURS[letter], box)
    return picture


def corners(picture):
    """The nearest colour letters of the four quadrants: "RG/BW" for quadrants()."""
    assert picture.mode == "RGB"
    names = []
    for top in (1, 3):
        for left in (1, 3):
            pixel = picture.getpixel((picture.width * left // 4, picture.height * top // 4))
            names.append(
                min(COLOURS, key=lambda c: sum(abs(a - b) for a, b in zip(pixel, COLOURS[c], strict=True)))
            )
    return "{}{}/{}{}".format(*names)


def oriented(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def png(width, height, bits, colour_type, rows=b""):
    """A PNG by hand, for depths that Pillow does not write; rows include their filter bytes."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def only(folder, notes=()):
    """The one photo of a folder in which nothing is left out, and of which only these notes are made."""
    found = read_photos(folder)
    assert found.skipped == ()
    assert found.notes == notes
    (photo,) = found.photos
    return photo


def reasons(found: PhotoSet):
    return {entry.path.name: entry.reason for entry in found.skipped}


def a_photo(width, height, digest="ab" * 32, caption=None):
    return Photo(Path("a.jpg"), digest, width, height, caption)


# --- formats and modes


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.jpg", {"quality": 95}),
        ("a.JPEG", {"quality": 95, "progressive": True}),
        ("a.png", {}),
        ("a.webp", {"quality": 95}),
        ("a.avif", {"quality": 95}),
        ("a.heic", {"quality": 95}),
        ("a.tif", {}),
        ("a.tiff", {"compression": "tiff_lzw"}),
        ("a.gif", {}),
        ("a.bmp", {}),
        ("in fact a PNG.jpg", {"format": "PNG"}),
    ],
)
def test_every_format_is_read(tmp_path, name, options):
    """Whatever the container, four coloured quadrants come back in place, and the size is right."""
    quadrants().save(tmp_path / name, **options)
    photo = only(tmp_path)
    assert (photo.path, photo.width, photo.height) == (tmp_path / name, 60, 40)
    picture = photo.open()
    assert picture.size == (60, 40)
    assert corners(picture) == "RG/BW"


@pytest.mark.parametrize(
    ("orientation", "expected"),
    enumerate(["RG/BW", "GR/WB", "WB/GR", "BW/RG", "RB/GW", "BR/WG", "WG/BR", "GW/RB"], start=1),
)
def test_exif_orientation_is_undone(tmp_path, orientation, expected):
    """EXIF: 6 means row 0 is the right side and column 0 the top, so red moves to the top right; and so on."""
    quadrants().save(tmp_path / "a.jpg", exif=oriented(orientation), quality=95)
    photo = only(tmp_path)
    assert (photo.width, photo.height) == ((60, 40) if orientation < 5 else (40, 60))
    assert photo.open().size == (photo.width, photo.height)
    assert corners(photo.open()) == expected


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.png", {"exif": oriented(6)}),
        ("a.webp", {"exif": oriented(6)}),
        ("a.avif", {"exif": oriented(6)}),
        ("a.heic", {"exif": oriented(6).tobytes()}),
        ("a.tif", {"tiffinfo": {0x0112: 6}}),
        ("a.tiff", {"tiffinfo": {0x0112: 6}, "compression": "tiff_lzw"}),
    ],
)
def test_every_format_is_turned_exactly_once(tmp_path, name, options):
    """The TIFF and HEIC decoders turn the picture themselves, the others leave that to us."""
    quadrants().save(tmp_path / name, **options)
    photo = only(tmp_path)
    assert (photo.width, photo.height) == (40, 60)
    assert corners(photo.open()) == "BR/WG"


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp"])
def test_a_mangled_exif_block_does_not_cost_the_photo(tmp_path, name):
    """Its orientation is unknown, so the picture stays as it is stored."""
    quadrants().save(tmp_path / name, exif=b"Exif\0\0XXnot a TIFF header", quality=95)
    assert corners(only(tmp_path).open()) == "RG/BW"


def grey16(*values):
    return Image.fromarray(np.array([values], dtype=np.uint16))


def palette(*colours, **info):
    """One pixel per colour."""
    picture = Image.new("P", (len(colours), 1))
    picture.putpalette([channel for colour in colours for channel in colour])
    picture.putdata(range(len(colours)))
    picture.info.update(info)
    return picture


def row(mode, *pixels):
    picture = Image.new(mode, (len(pixels), 1))
    for x, pixel in enumerate(pixels):
        picture.putpixel((x, 0), pixel)
    return picture


@pytest.mark.parametrize(
    ("name", "picture", "expected"),
    [
        ("grey.png", row("L", 0, 200), [(0,) * 3, (200,) * 3]),
        ("one-bit.png", row("1", 0, 255), [(0,) * 3, (255,) * 3]),
        ("palette.png", palette((1, 2, 3), (9, 8, 7)), [(1, 2, 3), (9, 8, 7)]),
        ("palette-one-clear.png", palette((1, 2, 3), (9, 8, 7), transparency=0), [(255,) * 3, (9, 8, 7)]),
        (
            "palette-alpha.png",
            palette((0, 0, 0), (9, 8, 7), transparency=b"\x80\xff"),
            [(127,) * 3, (9, 8, 7)],
        ),
        ("clear.gif", palette((1, 2, 3), (9, 8, 7), transparency=1), [(1, 2, 3), (255,) * 3]),
        ("rgba.png", row("RGBA", (255, 0, 0, 255), (9, 9, 9, 0)), [(255, 0, 0), (255,) * 3]),
        ("half.png", row("RGBA", (0, 0, 0, 128), (0, 0, 0, 255)), [(127,) * 3, (0,) * 3]),
        ("grey-alpha.png", row("LA", (0, 128), (50, 255)), [(127,) * 3, (50,) * 3]),
        ("grey16.png", grey16(0, 257 * 100, 65535), [(0,) * 3, (100,) * 3, (255,) * 3]),
        ("dark-grey16.png", grey16(0, 257), [(0,) * 3, (1,) * 3]),
        ("grey16.tif", grey16(0, 257 * 100, 65535), [(0,) * 3, (100,) * 3, (255,) * 3]),
        ("big-endian.tif", Image.fromarray(np.array([[0, 25700]], ">u2")), [(0,) * 3, (100,) * 3]),
        (
            "int32.tif",
            Image.fromarray(np.array([[0, 25700, 65535]], "i4")),
            [(0,) * 3, (100,) * 3, (255,) * 3],
        ),
        ("huge.tif", Image.fromarray(np.array([[0, 2**31 - 1]], "i4")), [(0,) * 3, (255,) * 3]),
        ("float1.tif", Image.fromarray(np.array([[0, 0.2, 1]], "f4")), [(0,) * 3, (51,) * 3, (255,) * 3]),
        ("float255.tif", Image.fromarray(np.array([[0, 51, np.nan]], "f4")), [(0,) * 3, (51,) * 3, (0,) * 3]),
        ("cmyk.tif", row("CMYK", (0, 255, 255, 0), (0, 0, 0, 255)), [(255, 0, 0), (0, 0, 0)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_mode_becomes_8_bit_rgb(tmp_path, name, picture, expected):
    """Depth is scaled, never cut off; what is transparent shows white, half of it half."""
    picture.save(tmp_path / name)
    opened = only(tmp_path).open()
    assert opened.mode == "RGB"
    assert [opened.getpixel((x, 0)) for x in range(opened.width)] == expected


def test_16_bit_colour_is_scaled(tmp_path):
    """Of 9C40, 0000, FFFF the high bytes: 156, 0, 255; and of 0000, 0101, 0202: 0, 1, 2."""
    row16 = struct.pack(">6H", 0x9C40, 0, 0xFFFF, 0, 0x0101, 0x0202)
    (tmp_path / "a.png").write_bytes(png(2, 1, 16, 2, b"\0" + row16))
    opened = only(tmp_path).open()
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(156, 0, 255), (0, 1, 2)]


def test_an_adobe_cmyk_jpeg_is_not_inverted(tmp_path):
    """Print programs store CMYK JPEGs inverted; red stays red."""
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    red, green, blue = only(tmp_path).open().getpixel((8, 8))
    assert red > 240 and green < 15 and blue < 15


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png"])
def test_an_animation_gives_its_first_frame(tmp_path, name):
    """Red first, then blue: red."""
    frames = [Image.new("RGB", (16, 16), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100)
    assert corners(only(tmp_path).open()) == "RR/RR"


def test_colours_are_converted_to_srgb(tmp_path):
    """A profile like sRGB's but with red's and blue's places exchanged: what is stored as red is blue."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = srgb.replace(b"rXYZ", b"tmp!").replace(b"bXYZ", b"rXYZ").replace(b"tmp!", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    picture = row("RGB", (255, 0, 0), (0, 255, 0))
    picture.save(tmp_path / "a.png", icc_profile=swapped)
    opened = only(tmp_path).open()
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [(0, 0, 255), (0, 255, 0)]


@pytest.mark.parametrize("profile", ["sRGB", "not a profile"])
def test_srgb_and_broken_profiles_change_nothing(tmp_path, profile):
    """The numbers stay what they are."""
    data = b"nonsense" * 20
    if profile == "sRGB":
        data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    row("RGB", (250, 3, 77)).save(tmp_path / "a.png", icc_profile=data)
    found = read_photos(tmp_path)
    assert found.photos[0].open().getpixel((0, 0)) == (250, 3, 77)
    told = "a.png has a damaged colour profile; its colours are taken as they are."
    assert found.notes == (() if profile == "sRGB" else (told,))


# --- what is left out


def test_junk_is_left_out_by_name_and_reason(tmp_path):
    """One good photo among everything a folder can hold: the good one is read, the rest named, nothing touched."""
    quadrants().save(tmp_path / "good.png")
    good = (tmp_path / "good.png").read_bytes()
    for name in (".DS_Store", "._good.png", "Thumbs.db", "desktop.ini"):
        (tmp_path / name).write_bytes(b"\0\1\2")
    (tmp_path / "cut.png").write_bytes(good[:-40])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "film.mov").write_bytes(b"film")
    (tmp_path / "nosuffix").write_bytes(good)
    (tmp_path / "words.jpg").write_text("not a picture")
    quadrants().save(
        tmp_path / "foreign.jpg", format="PPM"
    )  # Pillow could, but only the named formats are tried
    (tmp_path / "notes.txt").write_text("shopping list")
    (tmp_path / "other.mask.png").write_bytes(good)
    (tmp_path / "later.png").write_bytes(good)
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.iterdir()}

    found = read_photos(tmp_path)

    assert [photo.path.name for photo in found.photos] == ["good.png"]
    kinds = "JPEG, PNG, WebP, AVIF, HEIC, TIFF, GIF and BMP"
    assert reasons(found) == {
        ".DS_Store": "a hidden or system file",
        "._good.png": "a hidden or system file",
        "Thumbs.db": "a hidden or system file",
        "desktop.ini": "a hidden or system file",
        "cut.png": "cut off, its end is missing",
        "empty.jpg": "empty, 0 bytes",
        "film.mov": f".mov is not among {kinds}",
        "nosuffix": f"a name without suffix is not among {kinds}",
        "words.jpg": f"its content is none of {kinds}",
        "foreign.jpg": f"its content is none of {kinds}",
        "notes.txt": "a text without a photo of that name",
        "other.mask.png": "a mask without a photo of that name",
        "later.png": "same picture as good.png",
        "folder.jpg": "a subfolder, and subfolders are not read",
        "loop": "a subfolder, and subfolders are not read",
        "self.jpg": f"cannot be read: {os.strerror(errno.ELOOP)}",
        "gone.jpg": "a link that leads nowhere",
        "pipe.jpg": "not an ordinary file",
    }
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["b.jpg", "b.png", "b.webp", "b.avif", "b.heic", "b.tif", "b.tiff", "b.gif"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_truncation_is_found_while_reading(tmp_path, name, share):
    """Half a file is no photo, in any format; it is reported and the others are read."""
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name, **({"compression": "tiff_lzw"} if name == "b.tiff" else {}))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
    quadrants().save(tmp_path / "a.png")
    found = read_photos(tmp_path)
    assert [photo.path.name for photo in found.photos] == ["a.png"]
    assert found.skipped[0].path.name == name
    assert found.skipped[0].reason.startswith(("cut off, its end is missing", "damaged"))


@pytest.mark.parametrize(("width", "height"), [(13_000, 12_000), (60_000, 60_000)])
def test_decompression_bombs_are_not_decoded(tmp_path, width, height):
    """156 megapixels pass Pillow with a warning, 3600 raise; both are left out before any pixel is decoded."""
    quadrants().save(tmp_path / "a.png")
    (tmp_path / "bomb.png").write_bytes(png(width, height, 8, 2))
    reason = "more than 150 megapixels, a decompression bomb or a picture to shrink first"
    assert reasons(read_photos(tmp_path)) == {"bomb.png": reason}


def test_a_large_photo_is_read_without_pillows_warning(tmp_path, monkeypatch):
    """Above Pillow's warning and below our limit a photo is welcome."""
    quadrants(60, 40).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    with pytest.warns(Image.DecompressionBombWarning), Image.open(tmp_path / "a.png"):
        pass
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert corners(only(tmp_path).open()) == "RG/BW"


def test_photos_are_sorted_by_name_and_links_followed(tmp_path):
    """Order does not depend on the file system; a linked photo counts under the link's name."""
    album, elsewhere = tmp_path / "album", tmp_path / "elsewhere"
    album.mkdir()
    elsewhere.mkdir()
    for shade, path in enumerate((album / "c.png", elsewhere / "x.png", album / "a.png")):
        Image.new("L", (8, 8), shade).save(path)
    (album / "b.png").symlink_to(elsewhere / "x.png")
    found = read_photos(album)
    assert [photo.path.name for photo in found.photos] == ["a.png", "b.png", "c.png"]
    assert [photo.open().getpixel((0, 0))[0] for photo in found.photos] == [2, 1, 0]


def test_unprintable_names_are_escaped_in_sentences(tmp_path):
    """A name with a line break, or bytes that are no text, does not break the report."""
    (tmp_path / "a\n.jpg").touch()
    (tmp_path / os.fsdecode(b"b\xff.jpg")).touch()
    with pytest.raises(PhotoError, match=r"left out: a\\n\.jpg \(empty.*b\\udcff\.jpg \(empty") as caught:
        read_photos(tmp_path)
    assert str(caught.value).isprintable()


# --- errors


def test_a_missing_folder_is_said(tmp_path):
    """No such folder."""
    with pytest.raises(
        PhotoError, match=r"There is no folder .*photos; give the one that holds the photos\."
    ):
        read_photos(tmp_path / "photos")


def test_a_file_is_not_a_folder(tmp_path):
    """A photo where its folder was wanted."""
    quadrants().save(tmp_path / "a.png")
    with pytest.raises(PhotoError, match=r"a\.png is a file; give the folder that holds the photos\."):
        read_photos(tmp_path / "a.png")


def test_an_unreadable_folder_is_said(tmp_path, monkeypatch):
    """Root may read anything, so the refusal is played."""

    def refuse(_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(PhotoError, match=r"The folder .* cannot be read \(Permission denied\)\."):
        read_photos(tmp_path)


def test_an_unreadable_photo_is_left_out(tmp_path, monkeypatch):
    """The others are still read."""
    Image.new("L", (8, 8), 1).save(tmp_path / "a.png")
    Image.new("L", (8, 8), 2).save(tmp_path / "b.png")
    read_bytes = Path.read_bytes

    def refuse_b(path):
        if path.name == "b.png":
            raise PermissionError(13, "Permission denied")
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse_b)
    assert reasons(read_photos(tmp_path)) == {"b.png": "cannot be read: Permission denied"}


def test_a_folder_without_photos_says_what_to_put_there(tmp_path):
    """Empty but for system files is empty."""
    (tmp_path / ".DS_Store").touch()
    with pytest.raises(PhotoError, match=r"There are no photos in .*; put three to six .* \(JPEG, PNG,"):
        read_photos(tmp_path)


def test_nothing_usable_names_what_was_left_out(tmp_path):
    """Five are named with their reasons, the rest counted."""
    for index in range(7):
        (tmp_path / f"{index}.jpg").touch()
    expected = r"holds no usable photo; left out: 0\.jpg \(empty, 0 bytes\), .*4\.jpg \(.*\) and 2 more\."
    with pytest.raises(PhotoError, match=expected):
        read_photos(tmp_path)


def test_pictures_in_subfolders_only_are_pointed_at(tmp_path):
    """The sentence ends with the folder to give instead."""
    (tmp_path / "cat").mkdir()
    quadrants().save(tmp_path / "cat" / "a.png")
    with pytest.raises(
        PhotoError, match=r"cat \(a subfolder.*There are pictures in .*/cat: give that folder\."
    ):
        read_photos(tmp_path)


def test_a_photo_that_changed_or_vanished_is_noticed(tmp_path):
    """The digest of the checked file is compared whenever it is opened."""
    quadrants().save(tmp_path / "a.png")
    photo = only(tmp_path)
    quadrants(8, 8).save(tmp_path / "a.png")
    with pytest.raises(PhotoError, match=r"a\.png has changed since it was checked"):
        photo.open()
    (tmp_path / "a.png").unlink()
    with pytest.raises(PhotoError, match=r"a\.png was checked, but can no longer be read \(No such file"):
        photo.open()


# --- captions


def test_a_caption_lies_beside_its_photo(tmp_path):
    """On one line, without the mark that Windows puts in front; neither it nor the mask is junk."""
    Image.new("L", (8, 8), 1).save(tmp_path / "a.jpg")
    Image.new("L", (8, 8), 2).save(tmp_path / "b.png")
    Image.new("L", (8, 8), 3).save(tmp_path / "c.png")
    Image.new("L", (8, 8), 255).save(tmp_path / "a.mask.png")
    (tmp_path / "a.txt").write_text("\ufeff <V>,\r\nin a  café \n", encoding="utf-8")
    (tmp_path / "b.txt").write_text(" \n")
    found = read_photos(tmp_path)
    assert [photo.caption for photo in found.photos] == ["<V>, in a café", None, None]
    assert (found.skipped, found.notes) == ((), ())


# --- masks


def half_mask(width=60, height=40):
    """White on the left half."""
    mask = Image.new("L", (width, height))
    mask.paste(255, (0, 0, width // 2, height))
    return mask


def test_a_mask_lies_beside_its_photo_or_is_its_alpha_channel(tmp_path):
    """Of four photos one has a file, one an alpha channel, one an alpha channel that hides nothing, one nothing."""
    quadrants().save(tmp_path / "file.jpg")
    half_mask().save(tmp_path / "file.MASK.PNG")
    cut_out = quadrants()
    cut_out.putalpha(half_mask())
    cut_out.save(tmp_path / "alpha.png")
    opaque = quadrants(30, 30)
    opaque.putalpha(255)
    opaque.save(tmp_path / "opaque.png")
    quadrants(20, 30).save(tmp_path / "plain.webp")
    found = read_photos(tmp_path)
    assert (found.skipped, found.notes) == ((), ())
    photos = {photo.path.stem: photo for photo in found.photos}
    assert list(photos) == ["alpha", "file", "opaque", "plain"]
    assert [photo.mask is not None for photo in photos.values()] == [True, True, False, False]
    for name in ("alpha", "file"):
        mask = photos[name].open_mask()
        assert (mask.mode, mask.size) == ("L", (60, 40))
        assert (mask.getpixel((29, 20)), mask.getpixel((30, 20))) == (255, 0)
    assert photos["plain"].open_mask() is None
    assert all(photo.mask is None for photo in read_photos(tmp_path, masks=False).photos)
    identities = {photo.identity for photo in (*found.photos, *read_photos(tmp_path, masks=False).photos)}
    assert len(identities) == 6  # a photo with its mask is another than without


def test_a_mask_file_wins_over_an_alpha_channel(tmp_path):
    """The file marks the left half, the alpha channel everything but a corner."""
    photo, alpha = quadrants(), Image.new("L", (60, 40), 255)
    alpha.paste(0, (0, 0, 10, 10))
    photo.putalpha(alpha)
    photo.save(tmp_path / "a.png")
    half_mask().save(tmp_path / "a.mask.png")
    mask = only(tmp_path).open_mask()
    assert (mask.getpixel((5, 5)), mask.getpixel((50, 30))) == (255, 0)


@pytest.mark.parametrize(
    ("mode", "white", "black"),
    [
        ("1", 1, 0),
        ("RGB", (255, 255, 255), (0, 0, 0)),
        ("I;16", 65535, 0),
        ("LA", (255, 255), (255, 0)),
        ("RGBA", (255, 255, 255, 255), (255, 255, 255, 0)),
    ],
)
def test_masks_come_in_every_mode(tmp_path, mode, white, black):
    """White is the subject; what is transparent in a mask is not."""
    quadrants().save(tmp_path / "a.jpg")
    mask = Image.new(mode, (60, 40), black)
    mask.paste(white, (0, 0, 30, 40))
    mask.save(tmp_path / "a.mask.png")
    mask = only(tmp_path).open_mask()
    assert (mask.getpixel((0, 0)), mask.getpixel((59, 39))) == (255, 0)


def test_a_mask_is_of_the_upright_photo(tmp_path):
    """A photo of 60 x 40 that a camera stored turned by 90 degrees is 40 x 60, and so is its mask."""
    quadrants().save(tmp_path / "a.jpg", exif=oriented(6))
    half_mask(40, 60).save(tmp_path / "a.mask.png")
    photo = only(tmp_path)
    assert photo.open_mask().size == photo.open().size == (40, 60)


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (
            half_mask(40, 60),
            r"mask a\.mask\.png has 40 x 60 pixels, its photo a\.png has 60 x 40 when upright\. Save",
        ),
        (
            Image.new("L", (60, 40), 1),
            r"a\.mask\.png marks nothing to learn: white marks .* highest value is 1 of 255",
        ),
        (b"no picture", r"The mask a\.mask\.png cannot be used: its content is none of"),
    ],
    ids=["another size", "empty", "no picture"],
)
def test_a_mask_that_cannot_be_meant_is_refused(tmp_path, mask, sentence):
    """Rather than train its photo as if it had none; and how to do that is said."""
    quadrants().save(tmp_path / "a.png")
    if isinstance(mask, bytes):
        (tmp_path / "a.mask.png").write_bytes(mask)
    else:
        mask.save(tmp_path / "a.mask.png")
    with pytest.raises(PhotoError, match=sentence) as error:
        read_photos(tmp_path)
    assert "training.masked_loss=false" in str(error.value)
    assert read_photos(tmp_path, masks=False).photos[0].mask is None


def test_a_photo_that_is_transparent_all_over_is_refused(tmp_path):
    photo = quadrants()
    photo.putalpha(0)
    photo.save(tmp_path / "a.png")
    with pytest.raises(PhotoError, match=r"a\.png marks nothing to learn: it is transparent all over"):
        read_photos(tmp_path)


def test_masks_that_every_photo_must_have(tmp_path):
    """masks=True names the photos that lack one."""
    quadrants().save(tmp_path / "a.png")
    quadrants(20, 20).save(tmp_path / "b.png")
    half_mask().save(tmp_path / "a.mask.png")
    with pytest.raises(
        PhotoError, match=r"masked_loss is true, but 1 of 2 photos in .* have no mask \(b\.png\)"
    ):
        read_photos(tmp_path, masks=True)
    half_mask(20, 20).save(tmp_path / "b.mask.png")
    assert len(read_photos(tmp_path, masks=True).photos) == 2


def test_a_mask_that_changes_after_it_was_read_is_noticed(tmp_path):
    quadrants().save(tmp_path / "a.png")
    half_mask().save(tmp_path / "a.mask.png")
    photo = only(tmp_path)
    Image.new("L", (60, 40), 255).save(tmp_path / "a.mask.png")
    with pytest.raises(PhotoError, match=r"a\.mask\.png has changed since it was checked"):
        photo.open_mask()


@pytest.mark.parametrize("crop", ["none", "center", "random"])
@pytest.mark.parametrize("augmentation", [0, 1])  # with flip one of the two is mirrored
def test_a_mask_follows_its_photos_crop_flip_and_size(crop, augmentation):
    """A photo that is its own mask: an eighth of its view is the view's mask, to the rounding of resampling."""
    picture = Image.new("L", (300, 170))
    picture.paste(255, (20, 90, 200, 170))
    picture.paste(255, (250, 10, 290, 60))
    photo = a_photo(300, 170)
    view = view_of(photo, resolution=128, step=32, crop=crop, flip=True, seed=3, augmentation=augmentation)
    size = (view.size[0] // 8, view.size[1] // 8)
    shown = np.asarray(render(picture, view).resize(size, Image.Resampling.BOX), dtype=float)
    mask = np.asarray(render_mask(picture, view, size), dtype=float)
    assert np.abs(shown - mask).max() < 16
    assert np.abs(shown - mask[:, ::-1]).max() > 150
    with pytest.raises(ShapeError):
        render_mask(picture.rotate(90, expand=True), view, size)


def test_views_of_a_given_size():
    """Whatever a photo's own bucket, it is shown in the size that is asked for, cut evenly."""
    view = view_of(
        a_photo(400, 100),
        resolution=64,
        step=32,
        crop="none",
        flip=False,
        seed=0,
        augmentation=0,
        size=(64, 64),
    )
    assert (view.size, view.resized, view.crop_top_left) == ((64, 64), (256, 64), (0, 96))


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of sks dog", "a photo of dog"),
        ("sks on a table", "dog on a table"),
        ("Sks, a DOG in the snow", ", a DOG in the snow"),
        ("a dog beside sks, asleep", "a dog beside, asleep"),
        ("sksy and tasks", "sksy and tasks"),
        ("a sks dog and a sks dog", "a dog and a dog"),
    ],
)
def test_a_class_caption_knows_no_subject(caption, expected):
    """The token goes; where the class word is not said, it takes the token's place."""
    assert class_caption(caption, "sks", "dog") == expected


@pytest.mark.parametrize(
    ("caption", "token", "word", "expected"),
    [
        ("a teddy teddy bear, a teddy", "teddy", "teddy bear", "a teddy bear, a"),
        ("a photo of dog dog", "dog", "dog", "a photo of dog"),
        ("a <new> c++ toy", "<new>", "c++ toy", "a c++ toy"),
        (r"a \1 dog", r"\1", r"\g<0> dog", r"a \g<0> dog dog"),
    ],
)
def test_a_class_caption_of_odd_words(caption, token, word, expected):
    """A class word that holds the token, equals it, or looks like a pattern."""
    assert class_caption(caption, token, word) == expected


# --- captions that cannot be read


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("a cup".encode("utf-16-le"), "is not UTF-8 text"),
        (b"\xff\xfea", "begins like UTF-16 text, but is none"),
        ("Фото".encode("cp1251"), "is neither UTF-8 nor Windows-1252 text"),
        ("ein grüner Tisch, größer".encode()[:-5] + b".", "is damaged UTF-8 text"),
    ],
)
def test_a_caption_in_no_known_encoding_is_noted(tmp_path, data, reason):
    """The photo stays, with the templates for a caption; nothing is guessed."""
    quadrants().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(data)
    found = read_photos(tmp_path)
    assert found.photos[0].caption is None
    assert found.notes == (f"a.txt {reason}; a.png is captioned from the templates.",)


@pytest.mark.parametrize(
    ("template", "class_word", "expected"),
    [
        ("a photo of {token} {class_word}", "stuffed animal", "a photo of sks stuffed animal"),
        ("a photo of {token} {class_word}", None, "a photo of sks"),
        ("a photo of {token} {class_word}", " ", "a photo of sks"),
        ("a {token} {class_word}, in snow.", None, "a sks, in snow."),
        ("the {class_word} {token} here", None, "the sks here"),
        ("{class_word} {token} ({class_word})", None, "sks ()"),
        ('"{class_word} {token}"!', None, '"sks"!'),
        ("<V> {class_word} and <V>", "cat", "sks cat and sks"),
        ("two  blanks {token}\n below", "cat", "two blanks sks below"),
        ("{} {0} {a b} {{token}} } {", "cat", "{} {0} {a b} {sks} } {"),
        ("no placeholder", "cat", "no placeholder"),
    ],
)
def test_templates_are_filled(template, class_word, expected):
    """<V> is the token; without a class word its blank goes too; other braces are text."""
    assert fill(template, "sks", class_word) == expected


def test_braces_in_the_token_are_not_filled_again():
    """The token is text, whatever it looks like."""
    assert fill("{token} {class_word}", "{class_word}", "cat") == "{class_word} cat"


@pytest.mark.parametrize("name", ["tokn", "Token", "class-word"])
def test_an_unknown_placeholder_is_named(name):
    """A misspelt placeholder would be trained as text otherwise."""
    with pytest.raises(
        ConfigError, match=rf"no placeholder \{{{name}\}} \(in .a \{{{name}\}}.\); \{{token\}}"
    ):
        fill(f"a {{{name}}}", "sks", None)


def test_a_photos_own_caption_wins():
    """One caption of its own, else every template."""
    templates = ("a {token}", "the {token} {class_word}")
    assert captions_for(a_photo(8, 8), templates, "sks", "cat") == ("a sks", "the sks cat")
    assert captions_for(a_photo(8, 8, caption="<V> asleep"), templates, "sks", "cat") == ("sks asleep",)
    with pytest.raises(ConfigError, match=r"The caption of a\.jpg: There is no placeholder \{cat\}"):
        captions_for(a_photo(8, 8, caption="{cat}"), templates, "sks", "cat")


# --- buckets and views


@pytest.mark.parametrize(
    ("photo", "expected"),
    [
        ((4000, 4000), (1024, 1024)),
        ((4000, 3000), (1152, 896)),
        ((3000, 4000), (896, 1152)),
        ((6000, 4000), (1216, 832)),
        ((1920, 1080), (1344, 768)),
        ((2000, 1000), (1408, 704)),  # exactly 2:1, 94.5 % of the area
        ((9000, 1000), (2048, 512)),  # no further than 4:1, here the whole area
        ((1, 1), (1024, 1024)),
    ],
)
def test_buckets_at_1024_are_sdxls_own(photo, expected):
    """The usual aspects land on sizes that SDXL was trained with."""
    assert bucket(*photo, 1024, 64) == expected


def test_a_resolution_of_one_step_has_one_bucket():
    """Whatever the photo; and below one step there is none."""
    assert {bucket(w, h, 64, 64) for w, h in ((1, 1), (9, 1), (1, 9))} == {(64, 64)}
    with pytest.raises(ConfigError, match=r"resolution of 56 is too small: this model needs 64 or more"):
        bucket(10, 10, 56, 64)


SIDE = st.integers(1, 6000)


@given(
    width=SIDE,
    height=SIDE,
    resolution=st.integers(8, 90).map(lambda n: n * 8),
    step=st.sampled_from([8, 32, 64]),
)
@settings(max_examples=200, deadline=None)
def test_buckets_are_legal_and_the_best_there_is(width, height, resolution, step):
    """Multiples of step, no more than the area, within 4:1, and best among all that are so."""

    def score(w, h):
        return (min(w * height, h * width) / max(w * height, h * width)) ** 2 * w * h

    w, h = bucket(width, height, resolution, step)
    assert w % step == h % step == 0
    assert w * h <= resolution**2
    assert max(w, h) <= 4 * min(w, h)
    if step == 64:  # few enough to try them all
        sides = range(step, 2 * resolution + 1, step)
        rivals = [
            (a, b) for a in sides for b in sides if a * b <= resolution**2 and max(a, b) <= 4 * min(a, b)
        ]
        assert score(w, h) >= max(score(*rival) for rival in rivals) * (1 - 1e-12)


def test_a_view_of_the_whole_photo_by_hand():
    """300 x 200 into 1216 x 832: 1248 x 832 covers it, 32 columns too many, 16 on each side."""
    view = view_of(
        a_photo(300, 200), resolution=1024, step=64, crop="none", flip=False, seed=0, augmentation=0
    )
    assert view == View((1216, 832), (1248, 832), (0, 16), (200, 300), False)
    assert view.target_size == (832, 1216)
    assert view.time_ids == (200, 300, 0, 16, 832, 1216)


def test_a_centre_crop_by_hand():
    """100 x 300 at 64: the short side becomes 64, the long one 192, of which the middle third stays."""
    view = view_of(
        a_photo(100, 300), resolution=64, step=32, crop="center", flip=False, seed=0, augmentation=0
    )
    assert view == View((64, 64), (64, 192), (64, 0), (300, 100), False)
    assert view.time_ids == (300, 100, 64, 0, 64, 64)


@given(
    width=SIDE,
    height=SIDE,
    resolution=st.sampled_from([64, 256, 520, 1024]),
    step=st.sampled_from([8, 32, 64]),
    crop=st.sampled_from(["none", "center", "random"]),
    flip=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    augmentation=st.integers(0, 63),
)
@settings(max_examples=300, deadline=None)
def test_views_hold_together(width, height, resolution, step, crop, flip, seed, augmentation):
    """The crop lies inside the resized photo, which keeps the photo's aspect and is no larger than needed."""
    options = {"resolution": resolution, "step": step, "crop": crop, "flip": flip, "seed": seed}
    photo = a_photo(width, height)
    view = view_of(photo, **options, augmentation=augmentation)
    assert view == view_of(photo, **options, augmentation=augmentation)
    square = resolution // step * step
    assert view.size == (bucket(width, height, resolution, step) if crop == "none" else (square, square))
    assert view.original_size == (height, width)
    assert view.target_size == view.size[::-1]
    assert view.time_ids == (height, width, *view.crop_top_left, view.size[1], view.size[0])
    for axis in (0, 1):
        start = view.crop_top_left[1 - axis]
        assert 0 <= start <= view.resized[axis] - view.size[axis]
        if crop != "random":
            assert start == (view.resized[axis] - view.size[axis]) // 2
    # One side is the bucket's, the other follows from the photo's aspect, rounded.
    assert view.size[0] == view.resized[0] or view.size[1] == view.resized[1]
    assert 2 * abs(view.resized[0] * height - view.resized[1] * width) <= max(width, height)
    assert flip or not view.flipped


@given(width=st.integers(1500, 6000), height=st.integers(1, 700), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_random_crops_differ_between_augmentations_photos_and_seeds(width, height, seed):
    """More than a hundred places for the crop: eight draws do not all agree."""
    options = {"resolution": 128, "step": 32, "crop": "random", "flip": False}
    photo, other = a_photo(width, height), a_photo(width, height, digest="cd" * 32)
    views = [view_of(photo, **options, seed=seed, augmentation=i) for i in range(8)]
    assert len(set(views)) > 1
    assert views != [view_of(other, **options, seed=seed, augmentation=i) for i in range(8)]
    assert views != [view_of(photo, **options, seed=seed + 1, augmentation=i) for i in range(8)]


def test_every_other_augmentation_is_mirrored():
    """Half of the views, whichever comes first, and the crop does not depend on it."""
    firsts = set()
    for digest in "abcdefgh":
        options = {"resolution": 64, "step": 32, "crop": "random", "seed": 0}
        photo = a_photo(300, 100, digest)
        views = [view_of(photo, **options, flip=True, augmentation=i) for i in range(6)]
        plain = [view_of(photo, **options, flip=False, augmentation=i) for i in range(6)]
        assert sum(view.flipped for view in views) == 3
        assert all(views[i].flipped != views[i + 1].flipped for i in range(5))
        assert [view.crop_top_left for view in views] == [view.crop_top_left for view in plain]
        firsts.add(views[0].flipped)
    assert firsts == {True, False}


# --- rendering


def stripes(*letters, side=10):
    picture = Image.new("RGB", (side * len(letters), side))
    for index, letter in enumerate(letters):
        picture.paste(COLOURS[letter], (index * side, 0, (index + 1) * side, side))
    return picture


@pytest.mark.parametrize(
    ("flipped", "left", "seen"),
    [(False, 0, "R"), (False, 20, "B"), (True, 0, "B"), (True, 10, "G"), (True, 20, "R")],
)
def test_a_crop_is_measured_in_what_the_model_sees(flipped, left, seen):
    """Red, green, blue from left to right; mirrored, the leftmost is blue."""
    view = View((10, 10), (30, 10), (0, left), (10, 30), flipped)
    assert render(stripes("R", "G", "B"), view).getcolors() == [(100, COLOURS[seen])]


def test_flipping_mirrors_the_picture():
    """The quadrants change sides."""
    picture = quadrants(64, 64)
    assert corners(render(picture, View((32, 32), (32, 32), (0, 0), (64, 64), True))) == "GR/WB"


@pytest.mark.parametrize(
    ("width", "height", "crop"), [(900, 700, "none"), (700, 900, "random"), (90, 70, "center")]
)
@pytest.mark.parametrize("flip", [False, True])
def test_rendering_is_resize_then_mirror_then_crop(width, height, crop, flip):
    """Done in one go for memory's sake, but within a rounding of the three steps one after the other."""
    grid = np.add.outer(np.sin(np.arange(height) / 9), np.cos(np.arange(width) / 7))[..., None] * [30, 50, 60]
    picture = Image.fromarray((grid + 128).astype(np.uint8))
    options = {"resolution": 256, "step": 64, "crop": crop, "flip": flip, "seed": 1}
    views = [view_of(a_photo(width, height), **options, augmentation=i) for i in (0, 1)]
    view = views[0] if views[0].flipped == flip else views[1]
    assert view.flipped == flip
    steps = picture.resize(view.resized, Image.Resampling.LANCZOS)
    steps = steps.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else steps
    top, left = view.crop_top_left
    steps = steps.crop((left, top, left + view.size[0], top + view.size[1]))
    shown = render(picture, view)
    assert shown.size == view.size
    assert np.abs(np.asarray(shown, int) - np.asarray(steps, int)).max() <= 2


@pytest.mark.parametrize(("width", "height"), [(1, 6000), (6000, 1), (1, 1)])
@pytest.mark.parametrize("crop", ["none", "random"])
def test_the_thinnest_photo_can_be_shown(width, height, crop):
    """A 6000 x 1 photo covers a square of 512 at 3,072,000 x 512; that picture is never built."""
    options = {"resolution": 512, "step": 64, "flip": True, "seed": 3, "augmentation": 1}
    view = view_of(a_photo(width, height), crop=crop, **options)
    shown = render(Image.new("RGB", (width, height), "red"), view)
    assert shown.size == view.size
    assert shown.getcolors() == [(view.size[0] * view.size[1], COLOURS["R"])]


def test_a_view_of_another_photo_is_refused():
    """Its micro-conditioning would lie."""
    view = View((32, 32), (32, 32), (0, 0), (64, 60), False)
    with pytest.raises(ShapeError, match=r"\(64, 60\), this one has \(60, 64\)"):
        render(Image.new("RGB", (64, 60)), view)


def test_importing_the_module_loads_nothing_heavy():
    """torch, numpy and the HEIC decoder wait until they are needed."""
    heavy = "{'torch', 'numpy', 'pillow_heif'}"
    code = f"import sys, coeffdiff.data.photos; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# --- anything that may lie in a folder

MODES = (
    *(
        "1",
        "L",
        "LA",
        "La",
        "P",
        "PA",
        "RGB",
        "RGBA",
        "RGBa",
        "RGBX",
        "CMYK",
        "YCbCr",
        "LAB",
        "HSV",
        "I",
        "F",
    ),
    *("I;16", "I;16B", "I;16L", "I;16N"),
)
SUFFIX = {
    "JPEG": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "AVIF": "avif",
    "HEIF": "heic",
    "TIFF": "tif",
    "GIF": "gif",
}
SUFFIX |= {"BMP": "bmp"}


@functools.cache
def writable():
    """Every (format, mode) that Pillow writes here; more than 70."""
    found = []
    for kind in SUFFIX:
        for mode in MODES:
            with contextlib.suppress(Exception), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                Image.new(mode, (5, 3)).save(io.BytesIO(), format=kind)
                found.append((kind, mode))
    return found


def noise(mode, size, seed):
    """A picture of any mode with something in it."""
    drawn = random.Random(seed).randbytes(size[0] * size[1] * 3)
    picture = Image.frombytes("RGB", size, drawn)
    try:
        return picture.convert(mode)
    except ValueError:  # modes that nothing converts to
        return Image.new(mode, size)


SIZES = st.tuples(st.integers(1, 60), st.integers(1, 60)) | st.sampled_from(
    [(1, 1), (1, 2500), (2500, 1), (2, 999)]
)


@given(data=st.data(), size=SIZES, orientation=st.integers(0, 9) | st.just(65535), seed=st.integers(0, 2**32))
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_pillow_writes_is_a_photo(data, size, orientation, seed, tmp_path):
    """Any mode, size and orientation in any format: read, upright, RGB, and shown in each way of cropping."""
    kind, mode = data.draw(st.sampled_from(writable()))
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    picture = noise(mode, size, seed)
    turns = kind in ("JPEG", "PNG", "WEBP", "TIFF")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        picture.save(
            folder / f"a.{SUFFIX[kind]}", format=kind, **({"exif": oriented(orientation)} if turns else {})
        )
    # Pillow writes a Lab picture's profile beside the RGB pixels that it makes of it.
    lab = f"a.{SUFFIX[kind]} has a colour profile for Lab, and is RGB; its colours are taken as they are."
    photo = only(folder, notes=(lab,) if (kind, mode) == ("AVIF", "LAB") else ())
    swapped = turns and 5 <= orientation <= 8
    assert (photo.width, photo.height) == (size[::-1] if swapped else size)
    opened = photo.open()
    assert (opened.mode, opened.size) == ("RGB", (photo.width, photo.height))
    if kind == "PNG" and mode == "RGB":
        picture.getexif()[0x0112] = orientation
        upright = ImageOps.exif_transpose(picture)
        assert opened.tobytes() == upright.tobytes()
    for crop in ("none", "center", "random"):
        view = view_of(photo, resolution=64, step=32, crop=crop, flip=True, seed=seed, augmentation=seed % 3)
        shown = render(opened, view)
        assert (shown.mode, shown.size) == ("RGB", view.size)


WORDS = st.text(max_size=80)  # any Unicode but surrogates, which no UTF-8 file can hold
BRACES = st.lists(
    st.sampled_from(
        [
            "{token}",
            "{class_word}",
            "<V>",
            "{",
            "}",
            "{{",
            "}}",
            "{ token }",
            "{0}",
            "{}",
            "{token",
            "sks",
            "x",
        ]
    )
    | st.text(max_size=8),
    max_size=8,
).map("".join)


@given(text=WORDS | BRACES, mark=st.booleans(), ending=st.sampled_from(["", "\n", "\r\n", "\u2028"]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_caption_says_is_one_line_or_one_sentence(text, mark, ending, tmp_path):
    """Empty, with a byte order mark, control characters or braces: a caption, none, or the one error that names it."""
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    (folder / "a.txt").write_bytes((b"\xef\xbb\xbf" if mark else b"") + (text + ending).encode())
    found = read_photos(folder)
    (photo,) = found.photos
    told = " ".join((text.removeprefix("\ufeff") if not mark else text).split()) or None
    if "\0" in text:
        assert photo.caption is None and "is not UTF-8 text" in found.notes[0]
        return
    assert photo.caption == told and not found.notes
    unknown = set(re.findall(r"\{([A-Za-z_][\w-]*)\}", told or "")) - {"token", "class_word"}
    if unknown:
        with pytest.raises(ConfigError, match=r"^The caption of a\.png: There is no placeholder"):
            captions_for(photo, ["unused"], "sks", "mug")
        return
    (caption,) = captions_for(photo, ["a {token}"], "sks", "mug")
    assert caption == " ".join(caption.split())
    expected = (
        (told or "a sks").replace("{token}", "sks").replace("<V>", "sks").replace("{class_word}", "mug")
    )
    assert caption == " ".join(expected.split())


def test_the_token_in_other_words_is_left_alone():
    """Only placeholders are filled: a word that contains the token, or its letters in braces of others, stays."""
    assert fill("sksual {token}s sks{token} <v> <V>s", "sks", "mug") == "sksual skss skssks <v> skss"
    assert fill("{ token } {{token}} {0}", "sks", "mug") == "{ token } {sks} {0}"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_caption_that_is_a_pipe_does_not_wait_for_ever(tmp_path):
    """Nor is a book read for one: both are noted, and the templates caption the photo."""
    for name in ("a", "b"):
        Image.new("RGB", (8, 8), (name == "a" and "red") or "blue").save(tmp_path / f"{name}.png")
    os.mkfifo(tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("word " * 5000)
    found = read_photos(tmp_path)
    assert [photo.caption for photo in found.photos] == [None, None]
    assert found.notes == (
        "a.txt is not an ordinary file; a.png is captioned from the templates.",
        "b.txt is larger than 20 kB; b.png is captioned from the templates.",
    )
