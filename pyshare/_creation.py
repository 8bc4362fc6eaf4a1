"""Memory, as create() makes it: there from the beginning, of huge pages, on a NUMA node, locked.

Lives here: the checks of these arguments, how much memory may still be asked
for, and the refusals in words.  Not here: making it (ext/segment/create.c), what each
mapping of it is (ext/process/mapping.c).
Invariant: memory that cannot be had is refused before it is taken, as far as
the kernel lets one know: its own answer is not ENOMEM but a process that it
kills.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from pyshare import _core

HUGE = {"2M": 2 << 20, "1G": 1 << 30}
PREFERRED, INTERLEAVE = 1, 3  # modes of set_mempolicy(2)
PROC, NODES, POOLS = Path("/proc"), Path("/sys/devices/system/node"), Path("/sys/kernel/mm/hugepages")


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """What a region's memory is to be, checked."""

    page_size: int
    flags: int
    reserve: bool
    numa: tuple[int, list[int]] | None

    @property
    def huge(self) -> bool:
        return self.page_size > _core.PAGE_SIZE


def check(reserve: bool, huge: str | None, numa: int | str | None, lock_memory: bool) -> Memory:
    """Arguments of create(); ValueError, TypeError."""
    for name, value in (("reserve", reserve), ("lock_memory", lock_memory)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {value!r}")
    if huge is not None and (not isinstance(huge, str) or huge not in {"thp", *HUGE}):
        raise ValueError(f"huge must be None, 'thp', '2M' or '1G', not {huge!r}")
    flags = _core.THP * (huge == "thp") | _core.LOCK * lock_memory | _core.RESERVED * reserve
    return Memory(HUGE.get(huge or "", _core.PAGE_SIZE), flags, reserve, _check_numa(numa))


def _numbers(listed: str) -> list[int]:
    """Of a list as the kernel writes it: 0-2,5."""
    spans = re.findall(r"(\d+)(?:-(\d+))?", listed)
    return [number for low, high in spans for number in range(int(low), int(high or low) + 1)]


def _check_numa(numa: int | str | None) -> tuple[int, list[int]] | None:
    """(mode, nodes) of a policy, or None where there is nothing to choose."""
    if numa is None:
        return None
    wanted = numa if isinstance(numa, str) else _core.integer(numa, "numa: a node")
    try:
        nodes = _numbers((NODES / "has_memory").read_text())
    except FileNotFoundError:  # a kernel without NUMA
        nodes = [0]
    if wanted not in {"interleave", *nodes}:
        raise ValueError(f"numa must be 'interleave' or a node that has memory, of {nodes}, not {numa!r}")
    if len(nodes) == 1:
        warnings.warn(f"numa={numa!r} is ignored: this machine has one node only", stacklevel=4)
        return None
    return (INTERLEAVE, nodes) if wanted == "interleave" else (PREFERRED, [int(wanted)])


def create(size: int, prot: int, slots: int, mode: int, policy: int, name: str, memory: Memory) -> int:
    """A new region's descriptor; nobody participates yet."""
    footprint = _core.footprint(size, slots, memory.page_size, memory.flags)
    try:
        fd = _core.create(size, prot, slots, mode, policy, name, memory.page_size, memory.flags)
    except OSError as error:
        raise (_explained(error, footprint, memory) if memory.huge else error) from None
    try:
        if memory.numa is not None:
            _core.prefer(fd, memory.numa)
        if memory.reserve or memory.huge:
            _allocate(fd, footprint, memory)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _allocate(fd: int, footprint: int, memory: Memory) -> None:
    """Every page of it, in pieces, between which signals are served, and whatever others took meanwhile is seen."""
    at = 0
    while at < footprint:
        if not memory.huge:
            _check_available(footprint - at, swap=not memory.flags & _core.LOCK)
        try:
            at = _core.allocate(fd, memory.numa, at)
        except OSError as error:
            raise _explained(error, footprint, memory) from None


def _explained(error: OSError, footprint: int, memory: Memory) -> OSError:
    """The kernel's refusal, with what was wanted and what there is."""
    number, what = error.errno or 0, os.strerror(error.errno or 0)
    if not memory.huge:
        return OSError(number, f"create: {footprint} bytes, with the control segment, cannot be reserved: {what}")
    pages, kib = footprint // memory.page_size, memory.page_size >> 10
    pool = POOLS / f"hugepages-{kib}kB"
    if not pool.is_dir():
        return OSError(errno.ENODEV, f"create: this machine has no huge pages of {kib} KiB (there is no {pool})")
    if number not in (errno.ENOMEM, errno.ENOSPC):
        return OSError(number, f"create: {pages} huge pages of {kib} KiB: {what}")
    free, promised = (int((pool / name).read_text()) for name in ("free_hugepages", "resv_hugepages"))
    return OSError(
        errno.ENOMEM,
        f"create: {pages} huge pages of {kib} KiB are needed, with the control segment, and {free - promised} are "
        f"free: more are made by writing to {'/proc/sys/vm' if kib == 2048 else pool}/nr_hugepages (a limit of the "
        "cgroup's hugetlb controller may be lower)",
    )


# -- How much there is ---------------------------------------------------------------------------------------------


def _check_available(length: int, *, swap: bool) -> None:
    """OSError where to take so many bytes would have the kernel kill somebody for want of memory."""
    # What it takes beside the pages: their index (0.2 %), and some in advance on each CPU.
    needed = length + length // 256 + (1 << 20)
    available, where = min(_limits(swap))
    if needed > available:
        raise OSError(
            errno.ENOMEM,
            f"create: {length} bytes, with the control segment, cannot be reserved: {needed} are needed with what the "
            f"kernel needs for them, and {where} leaves {max(0, available)}",
        )


def _fields(path: Path) -> dict[str, int]:
    """A file of lines 'name: value' or 'name value'."""
    rows = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _number(path: Path) -> int | None:
    """None where there is no such file, or no such limit."""
    with contextlib.suppress(OSError, ValueError):
        return int(path.read_text())
    return None


def _limits(swap: bool) -> Iterator[tuple[int, str]]:
    """(bytes that may still be taken, by which limit)."""
    machine = {name: kib << 10 for name, kib in _fields(PROC / "meminfo").items()}
    swappable = machine["SwapFree"] if swap else 0
    yield machine["MemAvailable"] + swappable, "this machine (MemAvailable and SwapFree in /proc/meminfo)"
    for group in _groups():
        with contextlib.suppress(OSError):  # it has no limits, or hides them
            stat = _fields(group / "memory.stat")
            rooms = _version_1 if "total_cache" in stat else _version_2
            for room in rooms(group, stat, swappable):
                yield room, f"the limit of memory cgroup {group}"


def _groups() -> Iterator[Path]:
    """The directories of this process's memory cgroup and of those above it, of both versions, that can be seen."""
    mounts = [line.split() for line in (PROC / "self/mountinfo").read_text().splitlines()]
    for line in (PROC / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        for mount in mounts:
            root, point, (kind, _, options) = mount[3], Path(mount[4]), mount[mount.index("-") + 1 :][:3]
            if (kind == "cgroup2" and not controllers) or (
                kind == "cgroup" and "memory" in controllers.split(",") and "memory" in options.split(",")
            ):
                inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
                yield from (point / part for part in (inside, *inside.parents))


# Of one cgroup.  Clean page cache counts as free: the kernel drops it before it kills.


def _version_1(group: Path, stat: dict[str, int], swappable: int) -> Iterator[int]:
    cache = stat["total_inactive_file"] + stat["total_active_file"] - stat["total_dirty"] - stat["total_writeback"]
    for kind, more in (("memory", swappable), ("memory.memsw", 0)):
        limit, used = (_number(group / f"{kind}.{what}_in_bytes") for what in ("limit", "usage"))
        if limit is not None and used is not None:
            yield limit - used + cache + more


def _version_2(group: Path, stat: dict[str, int], swappable: int) -> Iterator[int]:
    cache = stat["inactive_file"] + stat["active_file"] - stat["file_dirty"] - stat["file_writeback"]
    limit, used, swap_limit, swapped = (
        _number(group / f"memory.{what}") for what in ("max", "current", "swap.max", "swap.current")
    )
    if swap_limit is not None:
        swappable = min(swappable, swap_limit - (swapped or 0))
    if limit is not None and used is not None:
        yield limit - used + cache + swappable
