"""Prompts for judging an adapter: our lists in DreamBooth's manner, pocket's, or those of a file.

They are of three kinds: the subject in new places and styles (`subject`), unrelated things (`unrelated`), and the class
without the token, made from the first kind (see protocol.asked_for). DreamBooth's data set has lists of its own, which
`read_listing` reads. The sentences here are ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coeffdiff.config.fields import PLACEHOLDER
from coeffdiff.data.captions import decode_text
from coeffdiff.errors import ConfigError
from coeffdiff.metrics.pictures import plain_text
from coeffdiff.pocket import POCKET
from coeffdiff.pocket.world import KINDS, SETTINGS, article
from coeffdiff.sampling.prompt_file import prompts_in
from coeffdiff.utils.console import print_info

LISTING = "prompts_and_classes.txt"

OBJECT_PROMPTS: tuple[str, ...] = (
    "a {token} {class_word} on a mossy forest floor",
    "a {token} {class_word} in deep snow",
    "a {token} {class_word} on a sandy beach at low tide",
    "a {token} {class_word} on a kitchen counter beside a bowl of lemons",
    "a {token} {class_word} on a park bench in autumn",
    "a {token} {class_word} on a stack of old books",
    "a {token} {class_word} on a marble staircase",
    "a {token} {class_word} in a field of lavender",
    "a {token} {class_word} on the deck of a sailing boat",
    "a {token} {class_word} on a picnic blanket in a meadow",
    "a {token} {class_word} on wet asphalt under neon signs",
    "a {token} {class_word} on an empty railway platform",
    "a {token} {class_word} on a green velvet armchair",
    "a {token} {class_word} drifting on a calm lake",
    "a {token} {class_word} inside a glass display case",
    "a {token} {class_word} with a lighthouse in the background",
    "a {token} {class_word} with a desert canyon in the background",
    "a {token} {class_word} with skyscrapers at dusk in the background",
    "a {token} {class_word} with a waterfall in the background",
    "a {token} {class_word} with the Taj Mahal in the background",
    "a golden {token} {class_word}",
    "a green {token} {class_word}",
    "a {token} {class_word} made of glass",
    "a {token} {class_word} covered in frost",
    "an oil painting of a {token} {class_word}",
)
LIVING_PROMPTS: tuple[str, ...] = (
    "a {token} {class_word} on a mossy forest floor",
    "a {token} {class_word} in deep snow",
    "a {token} {class_word} on a sandy beach at low tide",
    "a {token} {class_word} on a park bench in autumn",
    "a {token} {class_word} in a field of lavender",
    "a {token} {class_word} on the deck of a sailing boat",
    "a {token} {class_word} on a picnic blanket in a meadow",
    "a {token} {class_word} on an empty railway platform",
    "a {token} {class_word} on a green velvet armchair",
    "a {token} {class_word} with a lighthouse in the background",
    "a {token} {class_word} with a desert canyon in the background",
    "a {token} {class_word} with the Taj Mahal in the background",
    "a {token} {class_word} wearing a yellow raincoat",
    "a {token} {class_word} wearing a striped sailor shirt",
    "a {token} {class_word} wearing round glasses",
    "a {token} {class_word} wearing a straw hat",
    "a {token} {class_word} wearing a knitted green scarf",
    "a {token} {class_word} dressed as an astronaut",
    "a {token} {class_word} dressed as a baker",
    "a {token} {class_word} sleeping on a pile of cushions",
    "a {token} {class_word} jumping over a puddle",
    "a {token} {class_word} swimming in a lake",
    "a white {token} {class_word}",
    "a muddy {token} {class_word}",
    "an oil painting of a {token} {class_word}",
)
UNRELATED_PROMPTS: tuple[str, ...] = (
    "a red bicycle leaning against a brick wall",
    "a plate of spaghetti on a wooden table",
    "a mountain lake at sunrise",
    "two children flying a kite",
    "an old street with a tram",
    "a bunch of tulips by a window",
)
# Without "at night", which validation uses and may choose the adapter by; see config.fields.VALIDATION_PROMPTS.
POCKET_SETTINGS = tuple(setting for setting in SETTINGS if setting != "at night")
POCKET_PROMPTS = tuple(f"a photo of a {{token}} {{class_word}} {setting}" for setting in POCKET_SETTINGS)

_LIVING_WORDS = """
baby bear bird boy budgie bunny butterfly calf cat chick chicken child cow deer dog donkey duckling elephant
    fish fox frog girl goat goldfish goose guinea-pig hamster hedgehog horse hen kid kitten lamb lion lizard man
    monkey mouse owl panda parrot penguin person pig pigeon pony puppy rabbit rat sheep snake squirrel tiger toad
    tortoise turtle wolf woman
"""
_LIVING = frozenset(_LIVING_WORDS.split())


@dataclass(frozen=True)
class Prompts:
    """subject: templates with {token} and {class_word}; unrelated: sentences without; name: which list, for reports."""

    name: str
    subject: tuple[str, ...]
    unrelated: tuple[str, ...]


@dataclass(frozen=True)
class Listing:
    """The content of a prompts_and_classes.txt: subject -> class word, templates for objects and living subjects."""

    file: Path
    classes: dict[str, str] = field(default_factory=dict)
    objects: tuple[str, ...] = ()
    living: tuple[str, ...] = ()


def choose_prompts(
    wanted: str,
    *,
    base_model: str,
    class_word: str | None,
    listing: Listing | None = None,
    limit: int | None = None,
) -> Prompts:
    """The prompts for a subject.

    Args:
        wanted: object, living or pocket for one of our lists; dreambooth for the data set's own; a text file with a
            template a line; or auto: pocket's for pocket, else the data set's own if the photos lie in one, else
            ours, for objects or living subjects as the class word says.
        limit: at most so many of the subject's, spread over the list.
    Raises: ConfigError for an unknown list, a file that cannot be read, and a template without the token.
    """
    living = is_living(class_word)
    if wanted == "auto":
        wanted = "pocket" if base_model == POCKET else "dreambooth" if listing else "own"
    kind = "living" if living else "object"
    unrelated = UNRELATED_PROMPTS
    if wanted in ("own", "object", "living"):
        kind = kind if wanted == "own" else wanted
        name, subject = kind, LIVING_PROMPTS if kind == "living" else OBJECT_PROMPTS
    elif wanted == "pocket":
        name, subject = "pocket", POCKET_PROMPTS
        others = [other for other in KINDS if other != class_word]
        unrelated = tuple(
            f"a photo of {article(thing)} {setting}"
            for thing, setting in zip(others[::3], POCKET_SETTINGS[1::2], strict=False)
        )
    elif wanted == "dreambooth":
        if listing is None:
            raise ConfigError(
                f"There is no {LISTING} beside the photos; choose --prompts object or --prompts living."
            )
        name, subject = f"dreambooth, {kind}", listing.living if living else listing.objects
    else:
        name, subject = Path(wanted).name, _from_file(Path(wanted))
    return Prompts(name, spread(subject, limit), unrelated)


def is_living(class_word: str | None) -> bool:
    """Whether a class is a living thing, by its last word: a "corgi dog" is, a "dog toy" is not."""
    words = (class_word or "").lower().split()
    return bool(words) and words[-1] in _LIVING


def spread(items: Sequence[str], limit: int | None) -> tuple[str, ...]:
    """At most `limit` of the items, evenly spread and in their order."""
    if limit is None or limit >= len(items):
        return tuple(items)
    return tuple(items[i * len(items) // limit] for i in range(limit))


def without_token(prompt: str, token: str) -> str:
    """The prompt for any of the class: without the token, and with the article that then fits."""
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", plain_text(prompt, token))


def read_listing(folder: Path) -> Listing | None:
    """The prompts_and_classes.txt of a data set in DreamBooth's layout: in the folder, or beside it.

    Raises: ConfigError if there is one that holds neither prompts nor classes.
    """
    for file in (folder / LISTING, folder.parent / LISTING):
        if file.is_file():
            return parse_listing(file)
    return None


def parse_listing(file: Path) -> Listing:
    """Lines `subject,class` and, below a heading with "Object" or "Live", lines `'... {0} {1} ...'.format(...)`."""
    classes: dict[str, str] = {}
    prompts: dict[str, list[str]] = {"objects": [], "living": []}
    section = "objects"
    for line in _text(file).splitlines():
        quoted = re.match(r"""\s*(['"])(?P<text>.*)\1\s*\.format\(""", line)
        named = re.fullmatch(r"\s*([\w .-]+?)\s*,\s*([\w .-]+?)\s*", line)
        if quoted:
            filled = quoted["text"].replace("{0}", "{token}").replace("{1}", "{class_word}")
            prompts[section].append(" ".join(filled.replace("\\'", "'").split()))
        elif named and named[1] != "subject_name":
            classes[named[1]] = named[2]
        elif "prompt" in line.lower():
            section = "living" if "live" in line.lower() else section
    listing = Listing(file, classes, tuple(prompts["objects"]), tuple(prompts["living"]))
    if not classes or not listing.objects or not listing.living:
        missing = (
            "classes" if not classes else "object prompts" if not listing.objects else "live subject prompts"
        )
        raise ConfigError(f"{file} is not laid out as DreamBooth's: there are no {missing} in it.")
    return listing


def _from_file(file: Path) -> tuple[str, ...]:
    if file.name == LISTING:
        raise ConfigError(f"Use --prompts dreambooth with --images, the data set's folder, to read {file}.")
    templates, encoding = prompts_in(_bytes(file), file)
    if encoding != "UTF-8":
        print_info(f"note     {file} is not UTF-8, and read as {encoding}")
    for template in templates:
        if "{token}" not in template and PLACEHOLDER not in template:
            raise ConfigError(
                f"{file}: {template!r} lacks {{token}} (or {PLACEHOLDER}), so no subject is asked for."
            )
    if not templates:
        raise ConfigError(f"{file} holds no prompts.")
    return templates


def _text(file: Path) -> str:
    try:
        return decode_text(_bytes(file))[0]
    except ValueError as reason:
        raise ConfigError(f"{file} cannot be read: it {reason}.") from None


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"There is no list of prompts {str(file)!r}: auto, object, living, pocket, dreambooth, or a text file."
        ) from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from None
