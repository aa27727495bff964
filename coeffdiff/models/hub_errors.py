"""Errors of the hub and of loading libraries, in one sentence each."""

from __future__ import annotations

import contextlib
import errno
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from coeffdiff.config.fields import SDXL_BASE
from coeffdiff.errors import ModelError
from coeffdiff.utils.oom import is_out_of_memory

T = TypeVar("T")

# The longest wait for a first answer. Looking a name up has no time limit of its own where packets are dropped.
HUB_SECONDS = 10.0
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)


@contextlib.contextmanager
def loading_errors(what: str) -> Iterator[None]:
    """One sentence for any error of a library inside. what: the subject of the sentence. Raises: ModelError."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # there is no list of what three libraries may raise here
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{what} cannot be loaded: {_first_sentence(error)}.") from error


@contextlib.contextmanager
def hub_access_errors(repo: str) -> Iterator[None]:
    """One sentence for any error of access to a repository of the hub inside. Raises: ModelError."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo} and log in with `hf auth login`."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no folder {repo} here and no public model {repo} on the hub; check the spelling, or log in "
            "with `hf auth login` if it is private."
        ) from error
    except Exception as error:  # the HTTP library's own exceptions have changed their home more than once
        if isinstance(error, OSError) and error.errno in _UNWRITABLE:
            raise ModelError(
                f"{repo} cannot be written to the cache {constants.HF_HUB_CACHE}: {error.strerror}; "
                "HF_HOME moves the cache to another disk."
            ) from error
        reason = (
            "HF_HUB_OFFLINE is set"
            if isinstance(error, errors.OfflineModeIsEnabled)
            else f"the hub cannot be reached ({_first_sentence(error)})"
        )
        weights = "*.fp16.safetensors" if repo == SDXL_BASE else "*.safetensors"  # else all precisions: 40 GB
        raise ModelError(
            f"{repo} is no folder here and not complete in the cache ({constants.HF_HUB_CACHE}), and {reason}. "
            f"On a machine with network run `hf download {repo} --include '*.json' --include '*.txt' "
            f"--include '{weights}'` and copy its cache, or pass a folder instead."
        ) from error


def within_seconds(seconds: float, call: Callable[[], T]) -> T:
    """call()'s result. Raises: TimeoutError after so many seconds; the call's thread then ends with the process."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.extend((True, call()))
        except BaseException as error:
            outcome.extend((False, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    succeeded, result = outcome
    if not succeeded:
        raise result
    return result


def _first_sentence(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    short = re.split(r"\. |: \n|\n", text)[0].rstrip(".:")
    return short if len(short) <= 300 else short[:297] + "..."
