"""Text files with a prompt a line: comments, encodings, and the options of other tools that may stand in it."""

from __future__ import annotations

import re
from pathlib import Path

from coeffdiff.data.captions import decode_text
from coeffdiff.errors import ConfigError

# sd-scripts' flags, then those of A1111's "prompts from file"
_MEANT = {
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
    """The prompts of a file's bytes, and its encoding; empty lines and those that begin with # are none.

    Raises: ConfigError for what is no text, and for a line with options in it, which would be drawn as words.
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
    """Raises: ConfigError if a prompt holds what other tools read as options, with those of `sample` to use instead."""
    found = list(_FLAG.finditer(prompt))
    if not found:
        return
    instead = []
    for match in found:
        option, value = _MEANT.get(match[1].lower()), (match[2] or "").strip()
        if option and value:
            instead.append(f'{option} "{value}"' if " " in value else f"{option} {value}")
    options = " ".join(match[0].strip() for match in found)
    use = f" and pass {' '.join(instead)} to sample, for prompts that share them" if instead else ""
    raise ConfigError(
        f"{where}: {options} are options of another tool, which would be drawn as words. Take them out{use}."
    )
