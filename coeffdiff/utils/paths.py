"""Paths as the user writes them: ~ is the home folder; variables are not expanded but refused."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

# $HOME and ${HOME}; %USERPROFILE%, but not the %C3% of an address
_VARIABLE = re.compile(r"\$\{?[A-Za-z_]\w*\}?|%[A-Za-z_]{3,}%")


def expanded(path: Any) -> Any:
    """The path with its ~ expanded, as text; None and "auto" pass.

    `./~` is the way to a folder that is called so, and becomes absolute, lest it be expanded the next time.
    Raises: ValueError for an unknown ~user, and for what looks like a variable in a path that does not exist.
    """
    if not isinstance(path, str | Path):
        return path
    text = str(path)
    if text.startswith("~"):
        try:
            text = str(Path(text).expanduser())
        except (RuntimeError, KeyError, ValueError):
            if not exists(text):
                user = re.split(r"[/\\]", text[1:])[0]
                whose = (
                    f"there is no user {user!r} whose home it could be" if user else "there is no home folder"
                )
                raise ValueError(
                    f"{whose}; a folder that is called {text.split('/')[0]} is ./{text}"
                ) from None
    elif re.match(r"(\.[/\\])+~", text):
        text = str(Path.cwd() / text)
    variable = _VARIABLE.search(text)
    if variable and not exists(text[: variable.end()] + re.split(r"[/\\]", text[variable.end() :])[0]):
        raise ValueError(
            f"it does not exist, and variables of the environment such as {variable[0]} are not expanded; write the "
            "whole path, or begin it with ~/ for your home folder"
        )
    return text


def path_argument(text: str) -> Path:
    """For argparse's `type`."""
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def exists(path: str | Path) -> bool:
    """Path.exists, which is False for what can be no path at all."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a name that is too long, a zero byte
        return False
