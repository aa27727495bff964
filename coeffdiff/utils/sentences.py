"""Errors that are no defects of this program, each as one sentence for a person."""

from __future__ import annotations

import errno

from coeffdiff.errors import CoeffDiffError

# Errors of the system, not of this program; ENOENT is absent, since a missing file may be a defect
_REFUSALS = frozenset(
    (
        *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
        *(errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EMFILE, errno.ENFILE),
    )
)


def sentence_of(error: Exception) -> str | None:
    """What to tell a person of an error; None for a defect, whose traceback is what helps."""
    if isinstance(error, CoeffDiffError):
        return f"{type(error).__name__}: {error}"
    from coeffdiff.utils.oom import is_out_of_memory, oom_sentence

    if is_out_of_memory(error):
        return f"OutOfMemory: {oom_sentence(error, [])}"
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        named = f": {str(error.filename)[:200]}" if error.filename else ""
        return f"{type(error).__name__}: {error.strerror}{named}. What had been saved is untouched."
    return None
