"""The folder that a command writes to: is it a folder, free and writable? Checked before anything slow begins.

Then it is made and held, so that of two commands at once each has a folder of its own.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from coeffdiff.errors import CoeffDiffError, ConfigError
from coeffdiff.utils.distributed import ONE_PROCESS, DistributedContext
from coeffdiff.utils.locks import try_lock

_FILE_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".pdf", ".svg", ".html"),
    *(".safetensors", ".ckpt", ".pt", ".pth", ".bin"),
    *(".json", ".jsonl", ".yaml", ".yml", ".csv", ".txt"),
)
_UNCHANGED = "Nothing was changed."


def check_output(path: Path | None) -> None:
    """Raises: ConfigError for a file, a path below a file, and a new name that ends as a file's does."""
    if path is None:
        return
    try:
        if path.is_dir():
            return
        file = next((place for place in (path, *path.parents) if place.exists() and not place.is_dir()), None)
    except (OSError, ValueError):  # too long a name: reported where the folder is made
        return
    if file == path:
        raise ConfigError(f"--output {path} is a file, and a folder is wanted; name another. {_UNCHANGED}")
    if file:
        raise ConfigError(
            f"--output {path} cannot be a folder, since {file} is a file; name another. {_UNCHANGED}"
        )
    if path.suffix.lower() in _FILE_ENDINGS:
        raise ConfigError(
            f"--output names a folder, and {path} would be one that is called like a {path.suffix} file; name for "
            f"instance {path.with_suffix('')}. {_UNCHANGED}"
        )


def is_free(path: Path) -> bool:
    """Whether nothing is there, or an empty folder."""
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def refuse_occupied(path: Path, error: type[CoeffDiffError] = ConfigError) -> None:
    """Raises: `error` if the path is a file or a folder that holds something."""
    if not is_free(path):
        raise error(f"{path} is not empty; name another --output. {_UNCHANGED}")


def why_unwritable(folder: Path) -> str | None:
    """Why an existing or future folder cannot be written into; None if it can. Leaves nothing behind.

    A temporary file decides: permissions alone say nothing on read-only and network disks.
    """
    try:
        there = folder
        while not _exists(there):
            there = there.parent
        if not there.is_dir():
            return f"{there} is not a folder"
        with tempfile.TemporaryFile(dir=there):
            return None
    except OSError as error:
        return error.strerror or str(error)


def refuse_unwritable(folder: Path, what: str = "The folder") -> None:
    """Raises: ConfigError if `folder` cannot be written into."""
    if reason := why_unwritable(folder):
        raise ConfigError(f"{what} {folder} cannot be written: {reason}. Name another --output.")


@contextmanager
def write_errors(what: str, error: type[CoeffDiffError] = ConfigError) -> Iterator[None]:
    """Raises: `error` in place of an OSError inside. what: a path, or a path with its noun."""
    try:
        yield
    except OSError as reason:
        raise error(f"{what} cannot be written: {reason.strerror or reason}.") from None


@contextmanager
def output_folder(named: Path | None, parent: Path, team: DistributedContext = ONE_PROCESS) -> Iterator[Path]:
    """The folder that the user has named, or else parent/001 or the first number that is free; made, and held inside.

    team: processes that share the folder, all called with equal arguments; the main one chooses.
    Raises: ConfigError if it cannot be made, or another command is at work in it.
    """
    with ExitStack() as held:
        yield team.on_main(lambda: held.enter_context(hold(named) if named else _next_number(parent)))


@contextmanager
def hold(folder: Path) -> Iterator[Path]:
    """A folder, made if need be, that other commands are kept out of inside.

    If the block fails, what was made for it and is still empty is removed.
    Raises: ConfigError if it cannot be made, or another command is at work in it.
    """
    with _alone(folder, _make(folder)):
        yield folder


@contextmanager
def _next_number(parent: Path) -> Iterator[Path]:
    folders = (parent / f"{number:03d}" for number in itertools.count(1))
    folder, made = next((folder, made) for folder in folders if (made := _make(folder)))
    with _alone(folder, made):
        yield folder


def _make(folder: Path) -> list[Path]:
    """Make a folder. Returns: it and the parents that were made with it; nothing if the name is taken.

    Raises: ConfigError if it cannot be made.
    """
    with write_errors(f"The folder {folder}"):
        parents = [place for place in folder.parents if not place.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()  # of two commands that begin at once one is told that it is there
        except FileExistsError:
            return []
    return [folder, *parents]


@contextmanager
def _alone(folder: Path, made: list[Path]) -> Iterator[None]:
    with try_lock(folder) as mine:
        if mine is False:
            raise ConfigError(
                f"Another command is at work in {folder}; wait for its end, or name another --output. {_UNCHANGED}"
            )
        try:
            yield
        except BaseException:
            with suppress(OSError):  # what holds something stays
                for place in made:
                    place.rmdir()
            raise


def _exists(path: Path) -> bool:
    """Raises: OSError for an impossible path, such as a name that is too long, which Path.exists hides."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True
