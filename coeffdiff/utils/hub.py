"""The Hugging Face Hub: what may be an id, how long an answer may take, and its errors in one sentence each."""

from __future__ import annotations

import contextlib
import errno
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from coeffdiff.errors import CoeffDiffError

T = TypeVar("T")
Trouble = Literal["gated", "absent", "revision", "refused", "unwritable", "unreachable"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The longest wait for a first answer. Looking a name up has no time limit of its own where packets are dropped.
HUB_SECONDS = 10.0
_UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
_REFUSED = (401, 402, 403)


@contextlib.contextmanager
def hub_errors(
    repo: str, kind: type[CoeffDiffError], *, absent: str, unreachable: Callable[[str], str]
) -> Iterator[None]:
    """One sentence for any error of access to a repository inside; errors of this package pass.

    Args: see hub_sentence. Raises: kind.
    """
    try:
        yield
    except CoeffDiffError:
        raise
    except Exception as error:  # the HTTP library's own exceptions have changed their home more than once
        raise kind(hub_sentence(error, repo, absent=absent, unreachable=unreachable)) from error


def hub_sentence(error: Exception, repo: str, *, absent: str, unreachable: Callable[[str], str]) -> str:
    """What an error of access to a repository means, in one sentence.

    Args:
        absent: the sentence for a repository that does not exist, or that the caller may not see.
        unreachable: makes a sentence of the reason why nothing came: offline mode, or what the network said.
    """
    from huggingface_hub import constants, errors

    error, trouble = _underlying(error), trouble_of(error)
    if trouble == "gated":
        return f"{repo} is gated: accept its terms at {constants.ENDPOINT}/{repo} and log in with `hf auth login`."
    if trouble == "absent":
        return absent
    if trouble == "revision":
        return f"{repo} is on the hub, but has no such revision; name a branch, a tag or a commit of it."
    if trouble == "refused":
        return (
            f"The hub refuses access to {repo} ({_said(error)}); log in with `hf auth login`, with a token "
            "that is valid and has the right."
        )
    if trouble == "unwritable":
        return (
            f"{repo} cannot be written to the cache {constants.HF_HUB_CACHE}: {getattr(error, 'strerror', error)}; "
            "HF_HOME moves the cache to another disk."
        )
    offline = isinstance(error, errors.OfflineModeIsEnabled)
    return unreachable("HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached ({_said(error)})")


def _underlying(error: Exception) -> Exception:
    """What kept a file from coming, where the error only says that the cache does not have it either."""
    from huggingface_hub import errors

    cause = error.__cause__
    return (
        cause if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception) else error
    )


def trouble_of(error: Exception) -> Trouble:
    """The kind of an error of access to the hub; "unreachable" for all that is no other."""
    from huggingface_hub import errors

    error = _underlying(error)
    if isinstance(error, errors.GatedRepoError):
        return "gated"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "absent"
    if isinstance(error, errors.RevisionNotFoundError):
        return "revision"
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code in _REFUSED:
        return "refused"
    if isinstance(error, OSError) and error.errno in _UNWRITABLE:
        return "unwritable"
    return "unreachable"


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


def _said(error: Exception) -> str:
    """The reason in an error: of an answer its status and message, without its address and number."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return first_sentence(error)
    message = " ".join((error.server_message or error.response.reason_phrase or "").split())
    return f"{error.response.status_code} {message[:200]}".rstrip(" .")


def first_sentence(error: BaseException) -> str:
    """The first sentence of what an exception says, on one line and without a full stop; its type if it is silent."""
    text = " ".join(str(error).split()) or type(error).__name__
    short = re.split(r"\. |: \n|\n", text)[0].rstrip(".:")
    return short if len(short) <= 300 else short[:297] + "..."
