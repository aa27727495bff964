"""Whether a path can be the folder that a command writes to, said before anything is done: a file there, or a file's
name."""

from __future__ import annotations

from pathlib import Path

from coeffdiff.errors import ConfigError

_FILES = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".pdf", ".svg"),
    *(
        ".safetensors",
        ".ckpt",
        ".pt",
        ".pth",
        ".bin",
        ".json",
        ".jsonl",
        ".yaml",
        ".yml",
        ".csv",
        ".html",
        ".txt",
    ),
)


def check_output(path: Path | None) -> None:
    """Raises: ConfigError for a file, a path below a file, and a new name that ends as a file's does."""
    if path is None:
        return
    try:
        if path.is_dir():
            return
        file = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
    except (OSError, ValueError):  # too long a name: whoever makes the folder says it
        return
    if file == path:
        raise ConfigError(f"--output {path} is a file, and a folder is wanted; name another. {_UNCHANGED}")
    if file:
        raise ConfigError(
            f"--output {path} cannot be a folder, since {file} is a file; name another. {_UNCHANGED}"
        )
    if path.suffix.lower() in _FILES:
        raise ConfigError(
            f"--output names a folder, and {path} would be one that is called like a {path.suffix} file; name for "
            f"instance {path.with_suffix('')}. {_UNCHANGED}"
        )


_UNCHANGED = "Nothing was changed."


def next_folder(parent: Path) -> Path:
    number = 1
    while (parent / f"{number:03d}").exists():
        number += 1
    return parent / f"{number:03d}"
