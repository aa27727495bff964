"""Free memory and disk of this machine."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import torch

from coeffdiff.preflight.report import Free


def free_resources(device: torch.device, output: Path, cache: Path) -> Free:
    """Memory and disk that a run may take here. output, cache: folders that it writes to, there or not yet."""
    ram = free_ram()
    memory = ram + process_bytes()
    if device.type == "cuda":
        memory = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    return Free(memory, ram, _free_disk(output), _free_disk(cache))


def process_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def free_ram() -> int:
    """What the system can still give to a process: the machine's, or less where a control group allows less."""
    import psutil

    return min([int(psutil.virtual_memory().available), *_group_limits()])


def _group_limits(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[int]:
    """Bytes that the control groups (version 1 or 2) above this process have left: the limits of containers."""
    left = []
    with suppress(OSError):
        for line in membership.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                top, limit, used = root, "memory.max", "memory.current"
            elif "memory" in controllers.split(","):
                top, limit, used = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            else:
                continue
            folder = top / path.lstrip("/")
            for group in (folder, *folder.parents):
                if group == top.parent:
                    break
                with suppress(OSError, ValueError):  # "max": no limit
                    left.append(max(0, int((group / limit).read_text()) - _in_use(group, used)))
    return left


def _in_use(group: Path, used: str) -> int:
    """Bytes that a group uses, without the pages of files that the system would give back."""
    statistics = dict(
        line.split() for line in (group / "memory.stat").read_text().splitlines() if " " in line
    )
    files = statistics.get("total_inactive_file") or statistics.get("inactive_file") or 0
    return int((group / used).read_text()) - int(files)


def _free_disk(path: Path) -> int:
    """Of the disk where a path is or will be; without limit if that is unknown."""
    path = path.expanduser().absolute()
    for existing in (path, *path.parents):
        with suppress(OSError):
            return shutil.disk_usage(existing).free
    return 2**63
