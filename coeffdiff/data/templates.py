"""Captions from templates, with a token and a class word filled in."""

from __future__ import annotations

import re
from collections.abc import Sequence

from coeffdiff.config.fields import PLACEHOLDER, PLACEHOLDERS
from coeffdiff.data.captions import printable_name
from coeffdiff.data.photos import Photo
from coeffdiff.errors import ConfigError


def fill(template: str, token: str, class_word: str | None, tokens: Sequence[str] = ()) -> str:
    """A template with {token}, {class_word} and <V> (the token) filled in, on one line without double blanks.

    tokens: of all subjects of a run that has several, which <V1>, <V2> stand for.

    Without a class word its blank goes too, so that "a {token} {class_word}, seen" becomes "a sks, seen".
    Braces around anything but a name are ordinary text.

    Raises: ConfigError, naming it, for a {placeholder} or number that does not exist.
    """
    text, class_word = template, (class_word or "").strip()
    if not class_word:
        # The blank before it goes if blank, punctuation or the end follows; otherwise the blank after it.
        text = re.sub(r"\s+\{class_word\}(?=$|[\s,.;:!?)\]])|\{class_word\}\s*", "", text)

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if match[2]:
            return numbered_token(match, tokens, template) if tokens else match[0]
        if name is None or name == "token":
            return token
        if name == "class_word":
            return class_word
        raise ConfigError(
            f"There is no placeholder {match[0]} (in {template!r}); "
            f"{{token}} and {{class_word}} are filled in, and {PLACEHOLDER} stands for the token."
        )

    # One pass: braces inside the token or the class word stay what they are.
    filled = re.sub(rf"\{{([A-Za-z_][\w-]*)\}}|{PLACEHOLDERS}", value, text)
    return " ".join(filled.split())


def numbered_token(match: re.Match[str], tokens: Sequence[str], text: str) -> str:
    """The token that <V2> stands for. match: of a pattern whose last group is the number.

    Raises: ConfigError for a number beyond the tokens.
    """
    number = int(match[match.re.groups])
    if not 1 <= number <= len(tokens):
        known = ", ".join(f"<V{n}> is {token}" for n, token in enumerate(tokens, 1))
        raise ConfigError(f"There is no {match[0]} (in {text[:200]!r}); {known}.")
    return tokens[number - 1]


def captions_for(
    photo: Photo, templates: Sequence[str], token: str, class_word: str | None, tokens: Sequence[str] = ()
) -> tuple[str, ...]:
    """The captions that may go with a photo: its own if it has one, else every template, filled.

    Raises: ConfigError for a {placeholder} that does not exist.
    """
    if photo.caption is None:
        return tuple(fill(template, token, class_word, tokens) for template in templates)
    try:
        return (fill(photo.caption, token, class_word, tokens),)
    except ConfigError as error:
        raise ConfigError(f"The caption of {printable_name(photo.path)}: {error}") from None


def class_caption(caption: str, token: str, class_word: str) -> str:
    """A filled caption with the class word alone in place of the subject, for prior preservation.

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
