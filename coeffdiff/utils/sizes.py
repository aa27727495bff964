"""Numbers of bytes as text, in binary units."""

from __future__ import annotations

MIB, GIB = 2**20, 2**30
UNDER_ONE_MIB = "under 1 MiB"


def in_gib(size: float) -> str:
    """In GiB whatever the size: "0.62 GiB", "24.0 GiB"."""
    return f"{size / GIB:.1f} GiB" if size >= 10 * GIB else f"{size / GIB:.2f} GiB"


def in_mib_or_gib(size: float, mib_digits: int = 0) -> str:
    """ "1.5 GiB" or "300 MiB"; mib_digits: decimals of MiB."""
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / MIB:.{mib_digits}f} MiB"


def readable_size(size: float) -> str:
    """ "1.5 GiB", "300 MiB" or "under 1 MiB"."""
    return in_mib_or_gib(size) if size >= MIB else UNDER_ONE_MIB
