"""How much memory a device has left for this process."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

GIB = 2**30
_FILES = {  # limit, use, and the name of what can be given back at once, of control groups v2 and v1
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def room_on(device: torch.device, limit_gb: float | None = None) -> int:
    """Free bytes for this process on a device; on the CPU within the limits of its control group.

    `limit_gb` (GiB) caps the answer.
    """
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_room()
    return free if limit_gb is None else min(free, int(limit_gb * GIB))


def host_room(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be had without swapping: of the machine, and of every control group around this process."""
    rooms = [_available(proc)]
    for folder, (limit_name, used_name, cache_name) in _groups(proc, groups):
        try:
            limit = int((folder / limit_name).read_text())
            used = int((folder / used_name).read_text())
            cache = _entries(folder / "memory.stat").get(cache_name, 0)
        except (OSError, ValueError):  # no such group, or no limit ("max")
            continue
        rooms.append(max(limit - used + cache, 0))
    return min(rooms)


def _groups(proc: Path, groups: Path) -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """The control groups of this process for memory, up to the root, with the names of their files."""
    try:
        lines = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    for line in [*lines, "0::/", "0:memory:/"]:  # inside a container the root is its own group
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers not in _FILES:
            continue
        root = groups / controllers
        here = root / path.lstrip("/")
        for folder in (here, *here.parents):
            yield folder, _FILES[controllers]
            if folder == root:
                break


def _available(proc: Path) -> int:
    """Memory that can be had without swapping, of the whole machine."""
    try:
        return _entries(proc / "meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _entries(path: Path) -> dict[str, int]:
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
