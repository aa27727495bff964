"""Text files with a prompt a line: comments, encodings, and options of other tools in a line."""

from __future__ import annotations

import re
from pathlib import Path

from coeffdiff.data.captions import decode_text
from coeffdiff.errors import ConfigError

# sd-scripts' flags, then those of A1111's "prompts from file"
_OUR_OPTIONS = {
    "n": "--negative-prompt",
    "w": "--width",
    "h": "--height",
    "s": "--steps",
    "l": "--guidance",
    "d": "--seed",
    "ss": "--scheduler",
    "negative_prompt": "--negative-prompt",
    "width": "--width",
    "height": "--height",
    "steps": "--steps",
    "cfg_scale": "--guidance",
    "seed": "--seed",
    "sampler_name": "--scheduler",
}
_FLAG = re.compile(r"(?<!\S)--([A-Za-z][\w-]*)(?:[ \t=]+(?!--[A-Za-z])(\S.*?))?(?=\s+--[A-Za-z]|\s*$)")


def prompts_in(data: bytes, file: Path) -> tuple[tuple[str, ...], str]:
    """The prompts of a file's bytes, and its encoding. Empty lines and those that begin with # are skipped.

    Raises: ConfigError for bytes that are no text, and for a line with options, which would be drawn as words.
    """
    try:
        text, encoding = decode_text(data)
    except ValueError as reason:
        raise ConfigError(f"The prompts file {file} cannot be read: it {reason}.") from None
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        prompt = line.strip()
        if prompt and not prompt.startswith("#"):
            refuse_options(prompt, f"{file}, line {number}")
            prompts.append(prompt)
    return tuple(prompts), encoding


def refuse_options(prompt: str, where: str) -> None:
    """Raises: ConfigError if a prompt holds options of other tools; it names those of `sample` to use instead."""
    found = list(_FLAG.finditer(prompt))
    if not found:
        return
    instead = []
    for match in found:
        option, value = _OUR_OPTIONS.get(match[1].lower()), (match[2] or "").strip()
        if option and value:
            instead.append(f'{option} "{value}"' if " " in value else f"{option} {value}")
    options = " ".join(match[0].strip() for match in found)
    use = f" and pass {' '.join(instead)} to sample, for prompts that share them" if instead else ""
    raise ConfigError(
        f"{where}: {options} are options of another tool, which would be drawn as words. Take them out{use}."
    )
