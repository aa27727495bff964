"""Files to checked, upright, captioned photos, and how each is shown to the model; encoding is left to latents.py.

    read_photos(folder) -> PhotoSet: photos, what was left out and why
    view_of(photo, ...) -> View: size, crop and flip, decided without pixels
    render(photo.open(), view) -> the picture the VAE encodes
    render_mask(photo.open_mask(), view, size) -> the same part of its mask

Reading writes, renames and deletes nothing. Between calls only paths, sizes and digests stay in memory, no pixels.
"""

from __future__ import annotations

import hashlib
import io
import random
import re
import stat
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image, UnidentifiedImageError

from coeffdiff.config import PLACEHOLDER, Settings, with_values
from coeffdiff.console import say
from coeffdiff.data.captions import CAPTION_SUFFIXES, METADATA, Captions, companion_of
from coeffdiff.data.captions import shown as _shown
from coeffdiff.data.colour import is_grey, profile_fault, to_srgb
from coeffdiff.data.layout import photo_folder, what_it_is_called
from coeffdiff.data.masks import Masks
from coeffdiff.errors import ConfigError, PhotoError, ShapeError
from coeffdiff.seeding import stable_seed

Crop = Literal["none", "center", "random"]

KINDS = "JPEG, PNG, WebP, AVIF, HEIC, TIFF, GIF and BMP"
SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".avif", ".heic", ".heif", ".hif"}
    | {".tif", ".tiff", ".gif", ".bmp"}
)
MASK_SUFFIX = ".mask.png"  # photo.mask.png beside photo.jpg marks its subject and is no photo
FAINTEST_MASK = (
    128  # a mask whose brightest pixel is below this, of 255, marks nothing (labels 0 and 1, for one)
)
SYSTEM_FILE = "a hidden or system file"  # the one reason that an error need not repeat
MAX_PIXELS = 150_000_000  # 450 MB decoded; above Pillow's warning (90 MP), below its refusal (179 MP)
MAX_BYTES = 2**30
MAX_ASPECT = 4

_Convert = Callable[[Image.Image], Image.Image | None]
_WITHOUT_MASKS = "With training.masked_loss=false masks are not looked at"

# Only these decoders see a file's bytes; Pillow knows others, one of which starts Ghostscript. MPO comes with JPEG.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "GIF", "BMP")
_SYSTEM_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
_TO_UPRIGHT = {  # EXIF orientation -> the transposition that undoes it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Mask:
    """Where a photo shows its subject: photo.mask.png beside it, white on black, or the photo's own alpha channel.

    masks.py knows its other names.

    path is the mask's file, or the photo's for an alpha channel; digest is the sha256 (hex) of its bytes.
    """

    path: Path
    digest: str


@dataclass(frozen=True)
class Photo:
    """A photo that was decoded once without complaint; its pixels stay on disk.

    digest is the sha256 (hex) of the file's bytes; width and height are upright, in pixels; caption is the
    text that captions.py found for it, on one line, its placeholders not yet filled.
    """

    path: Path
    digest: str
    width: int
    height: int
    caption: str | None = None
    mask: Mask | None = None

    @property
    def identity(self) -> str:
        """What tells this photo, its caption and its mask from others, wherever they lie."""
        return self.digest + (self.caption or "") + (self.mask.digest if self.mask else "")

    def open(self) -> Image.Image:
        """The picture: RGB, 8 bits, sRGB, upright, transparent parts on white, an animation's first frame.

        Raises: PhotoError if the file vanished or changed since it was checked.
        """
        image = _decode_again(self.path, self.digest, _rgb)
        assert image is not None
        return image

    def open_mask(self) -> Image.Image | None:
        """The mask: 8-bit grey in the size of the upright photo, 255 on the subject; None without one.

        Raises: PhotoError if its file vanished or changed since it was checked.
        """
        if self.mask is None:
            return None
        return _decode_again(
            self.mask.path, self.mask.digest, _alpha if self.mask.path == self.path else _brightness
        )


@dataclass(frozen=True)
class Skipped:
    path: Path
    reason: str


@dataclass(frozen=True)
class PhotoSet:
    """photos are sorted by file name; notes are sentences on what was read otherwise than one would expect."""

    photos: tuple[Photo, ...]
    skipped: tuple[Skipped, ...]
    notes: tuple[str, ...] = ()


NO_PHOTOS = PhotoSet((), ())


@dataclass(frozen=True)
class View:
    """One way a photo is shown to the model: resized, mirrored if flipped, then cropped; decided without pixels.

    size and resized are (width, height), as Pillow counts; crop_top_left and original_size are (top, left) and
    (height, width), as SDXL counts. The crop is measured in the picture that the model sees, so in a flipped
    view left counts from what was the photo's right edge.
    """

    size: tuple[int, int]
    resized: tuple[int, int]
    crop_top_left: tuple[int, int]
    original_size: tuple[int, int]
    flipped: bool

    @property
    def target_size(self) -> tuple[int, int]:
        """(height, width) of the result."""
        return self.size[1], self.size[0]

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's micro-conditioning: original height and width, crop top and left, target height and width."""
        return (*self.original_size, *self.crop_top_left, *self.target_size)


def read_photos(
    folder: Path,
    masks: bool | Literal["auto"] = "auto",
    wanted: str = "three to six of the subject",
    on_file: Callable[[int], None] = lambda done: None,
) -> PhotoSet:
    """Every usable photo of a folder, sorted by name; the rest is left out by name and reason, never touched.

    Each file is decoded in full, so that a truncated one is found now and not in the middle of a run.
    Subfolders are not entered, but for one in kohya's layout (see layout.py); links to photos are followed. on_file
    is told how many files have been read.

    Args:
        masks: auto takes those that are there, True wants one for every photo, False looks at none.
        wanted: what a person is told to put into a folder without any.
    Raises: PhotoError if there is no such folder, it cannot be listed, it holds no usable photo, or a mask is
        missing or unusable: whoever made a mask does not want its photo trained without it.
    """
    given = Path(folder)
    folder = photo_folder(given, _holds_pictures)
    entries = _entries(folder)
    mask_files = Masks(entries, SUFFIXES)
    pictures = [path for path in entries if path.suffix.lower() in SUFFIXES and path not in mask_files]
    names = {path.name for path in pictures}
    stems = names | {path.stem for path in pictures}
    captions = Captions.of(entries, names)
    photos: dict[str, Photo] = {}
    skipped: list[Skipped] = []
    notes = _notes_on_layout(given, folder)
    for number, path in enumerate(entries, 1):
        on_file(number)
        if (mask_files.owner(path) or companion_of(path)) in stems or path.name in METADATA:
            continue
        try:
            data = _read(path, mask_files)
            digest = hashlib.sha256(data).hexdigest()
            if digest in photos:
                raise PhotoError(f"same picture as {_shown(photos[digest].path)}")
            width, height = _decode(data).size
            mask_file = mask_files.of(path)
            alpha = _alpha_of(data) if masks and not mask_file else None
        except PhotoError as reason:
            skipped.append(Skipped(path, str(reason)))
            continue
        if fault := _fault_of_colours(data):
            notes.append(f"{_shown(path)} {fault}; its colours are taken as they are.")
        mask = None
        if alpha is not None:
            _check_mark(_shown(path), "it is transparent all over", alpha)
            mask = Mask(path, digest)
        elif masks and mask_file:
            mask = _read_mask(mask_file, path, (width, height))
        photos[digest] = Photo(path, digest, width, height, captions.caption(path), mask)
    if not photos:
        raise PhotoError(_nothing_usable(folder, skipped, wanted))
    bare = [_shown(photo.path) for photo in photos.values() if photo.mask is None]
    if masks is True and bare:
        raise PhotoError(
            f"training.masked_loss is true, but {len(bare)} of {len(photos)} photos in {folder} have no mask "
            f"({', '.join(bare[:5])}{', ...' if len(bare) > 5 else ''}). Put photo{MASK_SUFFIX} beside each, "
            "or set training.masked_loss=auto."
        )
    return PhotoSet(tuple(photos.values()), tuple(skipped), (*notes, *captions.close()))


def with_offers(settings: Settings) -> Settings:
    """Settings whose token and class word, where they say none, come from a folder's name in kohya's layout.

    Raises: PhotoError if there are several such folders; ConfigError for a name that is no token.
    """
    subject = settings.subject
    if subject.images is None or (subject.token and subject.class_word):
        return settings
    called = what_it_is_called(photo_folder(subject.images, _holds_pictures))
    if called is None:
        return settings
    offered = {}
    if not subject.token:
        offered["subject.token"] = called.token
    if not subject.class_word and called.class_word:
        offered["subject.class_word"] = called.class_word
    if offered:
        said = " and ".join(f"{name} {value}" for name, value in offered.items())
        say(f"offered  {said}, by the name of the folder {called.folder}")
    return with_values(settings, offered) if offered else settings


def fill(template: str, token: str, class_word: str | None) -> str:
    """A template with {token}, {class_word} and <V> (the token) filled in, on one line without double blanks.

    Without a class word its blank goes too, so that "a {token} {class_word}, seen" becomes "a sks, seen".
    Braces around anything but a name are ordinary text.

    Raises: ConfigError, naming it, for a {placeholder} that does not exist.
    """
    text, class_word = template, (class_word or "").strip()
    if not class_word:
        # The blank before it goes if blank, punctuation or the end follows; otherwise the blank after it.
        text = re.sub(r"\s+\{class_word\}(?=$|[\s,.;:!?)\]])|\{class_word\}\s*", "", text)

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name is None or name == "token":
            return token
        if name == "class_word":
            return class_word
        raise ConfigError(
            f"There is no placeholder {match[0]} (in {template!r}); "
            f"{{token}} and {{class_word}} are filled in, and {PLACEHOLDER} stands for the token."
        )

    # One pass: braces inside the token or the class word stay what they are.
    filled = re.sub(rf"\{{([A-Za-z_][\w-]*)\}}|{re.escape(PLACEHOLDER)}", value, text)
    return " ".join(filled.split())


def captions_for(
    photo: Photo, templates: Sequence[str], token: str, class_word: str | None
) -> tuple[str, ...]:
    """The captions to draw from for a photo: its own alone if it has one, else every template, filled.

    Raises: ConfigError for a {placeholder} that does not exist.
    """
    if photo.caption is None:
        return tuple(fill(template, token, class_word) for template in templates)
    try:
        return (fill(photo.caption, token, class_word),)
    except ConfigError as error:
        raise ConfigError(f"The caption of {_shown(photo.path)}: {error}") from None


def class_caption(caption: str, token: str, class_word: str) -> str:
    """A filled caption as it would be without the subject: of its kind only, for prior preservation.

    The token goes where the class word stands in the caption too, and makes way for it elsewhere: of "a photo of
    sks dog" remains "a photo of dog", and "sks on a table" becomes "dog on a table".
    """

    def whole(text: str) -> str:
        return rf"(?<!\w){re.escape(text)}(?!\w)"

    # CLIP reads capitals as small letters. The class word may hold the token, as in "teddy" and "teddy bear"
    pattern = re.compile(rf"(?:{whole(token)}\s+)?({whole(class_word)})|{whole(token)}", re.IGNORECASE)
    alone = "" if any(match[1] for match in pattern.finditer(caption)) else class_word
    text = " ".join(pattern.sub(lambda match: match[1] or alone, caption).split())
    return re.sub(r"\s+([,.;:!?])", r"\1", text)


def bucket(width: int, height: int, resolution: int, step: int) -> tuple[int, int]:
    """The (width, height) at which a photo of this size is trained, when the whole of it is to be kept.

    Both are multiples of step, their product is at most resolution**2, and neither is more than MAX_ASPECT
    times the other. Among those it is the one with the greatest (share of the photo kept)**2 * area: at 1024
    and 64 this finds SDXL's own 1344 x 768 for 16:9, 1216 x 832 for 3:2 and 1152 x 896 for 4:3.

    Raises: ConfigError if the resolution is smaller than one step.
    """
    most = resolution**2 // step**2  # cells of step x step
    if most < 1:
        raise ConfigError(f"A resolution of {resolution} is too small: this model needs {step} or more.")
    best, best_score = (1, 1), -1.0
    for across in range(1, 2 * resolution // step + 1):  # at 4:1 the long side is twice the resolution
        low, high = -(-across // MAX_ASPECT), min(across * MAX_ASPECT, most // across)
        # For a given width the score rises up to the photo's own aspect and falls beyond it.
        below = across * height // width
        for down in (below, below + 1):
            down = min(max(down, low), high)
            if low <= down <= high:
                cells = (across * height, down * width)
                score = (min(cells) / max(cells)) ** 2 * (across * down)
                if score > best_score:
                    best, best_score = (across, down), score
    return best[0] * step, best[1] * step


def view_of(
    photo: Photo,
    *,
    resolution: int,
    step: int,
    crop: Crop,
    flip: bool,
    seed: int,
    augmentation: int,
    size: tuple[int, int] | None = None,
) -> View:
    """How a photo is shown in one of its augmentations; crop and flip depend on seed, digest and augmentation only.

    none keeps the whole photo but for the rows or columns that its bucket has no room for, cut evenly on both
    sides; center and random cut a square of side `resolution` (rounded down to a multiple of step) from the
    photo, whose shorter side is resized to it. With flip every other augmentation is mirrored, the first one
    or the second by chance. size, a bucket's (width, height), takes the place of what the photo would choose.

    Raises: ConfigError if the resolution is smaller than one step.
    """
    shape = (photo.width, photo.height) if crop == "none" else (1, 1)
    size = size or bucket(*shape, resolution, step)
    # The size that covers the bucket: one of the two is the bucket's own, the other at least that.
    resized = (
        max(size[0], round(photo.width * size[1] / photo.height)),
        max(size[1], round(photo.height * size[0] / photo.width)),
    )
    spare = (resized[1] - size[1], resized[0] - size[0])  # rows, columns
    if crop == "random":
        draw = random.Random(stable_seed("crop", seed, photo.digest, augmentation))
        crop_top_left = (draw.randint(0, spare[0]), draw.randint(0, spare[1]))
    else:
        crop_top_left = (spare[0] // 2, spare[1] // 2)
    # Alternating, not a coin each time: a coin leaves one photo in 128 with eight augmentations on one side.
    flipped = flip and (stable_seed("flip", seed, photo.digest) + augmentation) % 2 == 1
    return View(size, resized, crop_top_left, (photo.height, photo.width), flipped)


def render(photo_image: Image.Image, view: View) -> Image.Image:
    """The picture that a view describes, RGB of view.size, from what Photo.open returned.

    Raises: ShapeError if the picture is not of the size that the view was made for.
    """
    # reducing_gap: averages whole pixels first where a photo is several times too large; as good, and faster.
    shown = photo_image.resize(
        view.size, Image.Resampling.LANCZOS, box=_part_shown(photo_image, view), reducing_gap=3.0
    )
    return shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flipped else shown


def render_mask(mask_image: Image.Image, view: View, size: tuple[int, int]) -> Image.Image:
    """What a view shows of the photo's mask, in `size` = (width, height): each pixel the mean of those it covers.

    Raises: ShapeError if the mask is not of the size that the view was made for.
    """
    shown = mask_image.resize(size, Image.Resampling.BOX, box=_part_shown(mask_image, view))
    return shown.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if view.flipped else shown


def _part_shown(image: Image.Image, view: View) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what a view shows, in the picture's own pixels."""
    if (image.height, image.width) != view.original_size:
        raise ShapeError(
            f"The view is of a photo of (height, width) {view.original_size}, "
            f"this one has {(image.height, image.width)}."
        )
    (width, height), (top, left) = view.size, view.crop_top_left
    if view.flipped:
        left = view.resized[0] - width - left  # the same columns, counted before the mirroring
    # Crop and resize at once: the same pixels, but a 6000 x 1 photo's cover of a bucket is never built.
    return (
        left * image.width / view.resized[0],
        top * image.height / view.resized[1],
        (left + width) * image.width / view.resized[0],
        (top + height) * image.height / view.resized[1],
    )


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except FileNotFoundError:
        raise PhotoError(f"There is no folder {folder}; give the one that holds the photos.") from None
    except NotADirectoryError:
        raise PhotoError(f"{folder} is a file; give the folder that holds the photos.") from None
    except OSError as error:
        raise PhotoError(f"The folder {folder} cannot be read ({error.strerror or error}).") from None


def _notes_on_layout(given: Path, folder: Path) -> list[str]:
    """What is said of a folder in kohya's layout."""
    called = what_it_is_called(folder)
    if called is None:
        return []
    found = f"The photos are those of {_shown(folder)} in {given}, kohya's layout" if given != folder else ""
    found = found or f"{_shown(folder)} is named as in kohya's layout"
    return [f"{found}; that each is to be seen {called.repeats} times is ignored, training.steps decides."]


def _read(path: Path, masks: Masks) -> bytes:
    """The bytes of what may be a picture. Raises: PhotoError, a reason without the name, for anything else."""
    suffix = path.suffix.lower()
    if path.name.startswith(".") or path.name.lower() in _SYSTEM_FILES:
        raise PhotoError(SYSTEM_FILE)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise PhotoError("a subfolder, and subfolders are not read")
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait forever
            raise PhotoError("not an ordinary file")
        if path in masks:
            raise PhotoError(masks.why_not(path))
        if suffix in CAPTION_SUFFIXES:
            kind = "text" if suffix == ".txt" else "caption"
            raise PhotoError(f"a {kind} without a photo of that name")
        if suffix not in SUFFIXES:
            raise PhotoError(f"{suffix or 'a name without suffix'} is not among {KINDS}")
        if status.st_size == 0:
            raise PhotoError("empty, 0 bytes")
        if status.st_size > MAX_BYTES:
            raise PhotoError("larger than 1 GiB")
        return path.read_bytes()
    except FileNotFoundError:
        raise PhotoError("a link that leads nowhere" if path.is_symlink() else "vanished") from None
    except OSError as error:
        raise PhotoError(f"cannot be read: {error.strerror or error}") from None


def _read_mask(path: Path, photo: Path, size: tuple[int, int]) -> Mask:
    """A mask file that fits its photo, whose upright (width, height) is size. Raises: PhotoError, a whole sentence."""
    name = _shown(path)
    try:
        data = path.read_bytes()
        mask = _decode(data, _brightness)
    except OSError as error:
        raise PhotoError(f"The mask {name} cannot be read ({error.strerror or error}).") from None
    except PhotoError as reason:
        raise PhotoError(
            f"The mask {name} cannot be used: {reason}. {_WITHOUT_MASKS}, or make it again."
        ) from None
    assert mask is not None
    if mask.size != size:
        raise PhotoError(
            f"The mask {name} has {mask.width} x {mask.height} pixels, its photo {_shown(photo)} has "
            f"{size[0]} x {size[1]} when upright. Save the mask in the photo's size; {_WITHOUT_MASKS.lower()}."
        )
    _check_mark(f"The mask {name}", "white marks the subject", mask)
    return Mask(path, hashlib.sha256(data).hexdigest())


def _check_mark(name: str, why: str, mask: Image.Image) -> None:
    """Raises: PhotoError if there is no subject in a mask."""
    brightest = mask.getextrema()[1]
    if isinstance(brightest, int | float) and brightest < FAINTEST_MASK:
        raise PhotoError(
            f"{name} marks nothing to learn: {why}, and the highest value is {brightest:g} of 255. {_WITHOUT_MASKS}."
        )


def _decode_again(path: Path, digest: str, convert: _Convert) -> Image.Image | None:
    """What was decoded without complaint before. Raises: PhotoError, a whole sentence, if it is another file now."""
    try:
        data = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise PhotoError(f"{path} was checked, but can no longer be read ({reason}).") from None
    if hashlib.sha256(data).hexdigest() != digest:
        raise PhotoError(f"{path} has changed since it was checked; start again with the new file.")
    try:
        return _decode(data, convert)
    except PhotoError as error:  # out of memory, for one
        raise PhotoError(f"{path} was checked, but can no longer be decoded: {error}.") from None


def _alpha_of(data: bytes) -> Image.Image | None:
    """The alpha channel of a picture that has been decoded before, upright; None if it hides nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # JPEGs say without being decoded again that they have none
        if not Image.open(io.BytesIO(data), formats=_FORMATS).has_transparency_data:
            return None
    alpha = _decode(data, _alpha)
    return None if alpha is None or alpha.getextrema()[0] == 255 else alpha


def _fault_of_colours(data: bytes) -> str | None:
    """What is wrong with the colour profile of a picture that has been decoded before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return profile_fault(Image.open(io.BytesIO(data), formats=_FORMATS))


def _decode(data: bytes, convert: _Convert | None = None) -> Any:
    """A file's bytes as an upright picture, RGB or what `convert` makes of it (None stays None).

    Raises: PhotoError, a reason without the name.
    """
    import pillow_heif

    pillow_heif.register_heif_opener()
    try:
        # Ignored: warnings on sizes (checked here), odd EXIF and odd palettes; none of them is for a person.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
            if image.width * image.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            image.load()
            orientation = orientation_of(image)  # after load: TIFF's decoder has turned the picture by then
            made = (convert or _rgb)(image)
        return turned(made, orientation) if made else made
    except Image.DecompressionBombError:
        raise PhotoError(
            f"more than {MAX_PIXELS // 10**6} megapixels, a decompression bomb or a picture to shrink first"
        ) from None
    except UnidentifiedImageError:
        known = re.match(rb"\xff\xd8|\x89PNG|GIF8|BM|II|MM|RIFF|....ftyp", data, re.DOTALL)
        reason = "damaged or cut off, it cannot be opened" if known else f"its content is none of {KINDS}"
        raise PhotoError(reason) from None
    except MemoryError:
        raise PhotoError("too large for this machine's memory") from None
    except Exception as error:  # on damaged files decoders raise anything from SyntaxError to struct.error
        detail = " ".join(str(error).split()) or type(error).__name__
        cut = re.search("truncated|end of file", detail, re.IGNORECASE)
        raise PhotoError("cut off, its end is missing" if cut else f"damaged ({detail})") from None


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """A picture upright, from its EXIF orientation."""
    return image.transpose(_TO_UPRIGHT[orientation]) if orientation in _TO_UPRIGHT else image


def orientation_of(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # a mangled EXIF block is no reason to lose the photo
        return 1


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit sRGB from any mode that Pillow decodes to; transparent parts show white."""
    profile, grey = image.info.get("icc_profile"), is_grey(image.mode)
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    if profile:
        image = to_srgb(image, profile, grey)
    if image.mode == "RGBA":
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _alpha(image: Image.Image) -> Image.Image | None:
    """The alpha channel, or None for a picture without one."""
    if not image.has_transparency_data or image.mode.startswith("I") or image.mode == "F":
        return None
    return image.convert("RGBA").getchannel("A")


def _brightness(image: Image.Image) -> Image.Image:
    """8-bit grey from any mode; transparent parts show black, since in a mask black is what does not count."""
    if image.mode.startswith("I") or image.mode == "F":
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        black = Image.new("RGB", image.size, "black")
        black.paste(image, mask=image.getchannel("A"))
        image = black
    return image.convert("L")


def _eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or more bits as 8; Pillow's own convert would cut off everything above 255.

    32-bit and float pictures do not say what white is: the smallest of the usual values that the brightness
    (its 99th percentile, for overshoot) stays below; if there is none, that brightness itself.
    """
    import numpy as np

    values = np.array(image, dtype=np.float32)  # changed in place from here on: it may hold 600 MB
    np.nan_to_num(values, copy=False)
    white = 65535.0
    if not image.mode.startswith("I;16"):
        bright = float(np.quantile(values.ravel()[:: values.size // 10**6 + 1], 0.99))
        usual = (1.0, 255.0, 65535.0) if image.mode == "F" else (65535.0,)
        white = next((value for value in usual if bright <= value), bright)
    values *= 255 / white
    return Image.fromarray(np.clip(np.round(values, out=values), 0, 255, out=values).astype(np.uint8))


def _nothing_usable(folder: Path, skipped: Iterable[Skipped], wanted: str) -> str:
    named = [s for s in skipped if s.reason != SYSTEM_FILE]
    if not named:
        return f"There are no photos in {folder}; put {wanted} there ({KINDS})."
    sentence = f"{folder} holds no usable photo; left out: "
    sentence += ", ".join(f"{_shown(s.path)} ({s.reason})" for s in named[:5])
    sentence += f" and {len(named) - 5} more." if len(named) > 5 else "."
    below = next((s.path for s in named if _holds_pictures(s.path)), None)
    return f"{sentence} There are pictures in {below}: give that folder." if below else sentence


def _holds_pictures(folder: Path) -> bool:
    try:
        return any(p.suffix.lower() in SUFFIXES and not p.name.startswith(".") for p in folder.iterdir())
    except OSError:  # not a folder, or one that may not be read
        return False
