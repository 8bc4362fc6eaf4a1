"""multiprocessing.shared_memory, on regions: the same program with another import.

    from pyshare.compat import SharedMemory, ShareableList, SharedMemoryManager

Lives here: the three classes, each a subclass of the standard library's, and
the names that blocks have as regions.  Not here: the process that keeps a block
without holders (_holder.py), and anything about memory: see ``SharedMemory.region``.
docs/compat.md lists what is different, and why; tests/test_stdlib.py holds both
to CPython's own tests.
Invariant: no resource tracker hears of a block.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import struct
from collections.abc import Iterable
from multiprocessing import managers, shared_memory
from typing import Any, TypeAlias, TypeVar

from pyshare import _holder, _names
from pyshare._core import NAME_MAX
from pyshare._errors import RegionExists, RegionNotFound, ShareError
from pyshare._region import Region, attach, create

__all__ = ["ShareableList", "SharedMemory", "SharedMemoryManager"]

_USE_POSIX, _SHM_NAME_PREFIX = True, "/psm_"  # as the standard library's tests expect of its module

_Item = TypeVar("_Item", int, float, bool, str, bytes, None)
_ESCAPE = "--"  # no name passes unchanged that begins so


def _region_name(block: str) -> str:
    """The name of the region that is the block of this name: the same, wherever a region may be called so.

    Else every byte but letters, digits, '.' and '_' is written as '-' and two digits, behind an escape, so that
    different blocks are different regions. As in shm_open(3) leading slashes do not count, and no others may be.
    """
    bare = block.lstrip("/")
    if "\0" in bare:
        raise ValueError("embedded null character")
    if not bare or "/" in bare:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL), block)
    with contextlib.suppress(ValueError):
        if not bare.startswith(_ESCAPE):
            return _names.check(bare)
    escaped = re.sub(rb"[^A-Za-z0-9._]", lambda found: b"-" + found[0].hex().encode(), os.fsencode(bare)).decode()
    if len(_ESCAPE + escaped) > NAME_MAX:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), block)
    return _ESCAPE + escaped


class SharedMemory(shared_memory.SharedMemory):
    """A block of memory that whoever knows its name can attach to, as multiprocessing.shared_memory.SharedMemory.

    Unlike there, nothing outlives its last holder, however that ended: the block is a region (``region``), and goes
    with the last process that has it, unless ``persist`` keeps it. Arrays and memoryviews of it stay valid after
    ``close``. ``size`` is what was asked for.

    Args:
        name: the block's name, with or without '/' in front; None, to create one, makes one up.
        create: make it; else attach to it.
        size: bytes, to create.
        track: accepted and without effect, since there is no resource tracker.
        persist: a process of its own holds the block until somebody unlinks it.

    Raises:
        FileExistsError: create, and there is a live one of this name.
        FileNotFoundError: there is none, or its last holder is gone.
        ValueError: a size or a name that cannot be.
        OSError: what the kernel refuses; with ``persist``, also if that process does not start.
    """

    _region: Region | None = None
    _buf: Any = None  # a memoryview; None after close
    _mode = 0o600
    _name: str
    _entry: int | None = None  # once closed: what the name then led to, if that was this block (_entry_of)

    def __init__(
        self, name: str | None = None, create: bool = False, size: int = 0, *, track: bool = True, persist: bool = False
    ) -> None:
        if not size >= 0:
            raise ValueError(f"'size' must be a positive integer, not {size!r}")
        self._track = track
        if create:
            if size == 0:
                raise ValueError("'size' must be a positive number different from zero")
            region = self._create(name, size)
        elif name is None:
            raise ValueError("'name' can only be None if create=True")
        else:
            self._name = "/" + name  # as the standard library has it
            region = attach(_region_name(self._name))
        self._region, self._size, self._buf = region, region.size, memoryview(region)
        if persist:
            self._keep(region, create)

    def _create(self, name: str | None, size: int) -> Region:
        while True:
            # What is made up has its slash already.
            self._name = shared_memory._make_filename() if name is None else "/" + name  # type: ignore[attr-defined]
            try:
                return create(_region_name(self._name), size=size, mode=self._mode)
            except RegionExists:
                if name is not None:
                    raise

    def _keep(self, region: Region, created: bool) -> None:
        try:
            _holder.keep(region)
        except BaseException:
            if created:  # even if there is a keeper, which came when we were interrupted: it ends then
                with contextlib.suppress(FileNotFoundError):
                    self.unlink()
            self.close()
            raise

    @property
    def region(self) -> Region | None:
        """The region that the block is, for leases, locks, protection, snapshots; None after ``close``."""
        return self._region

    def close(self) -> None:
        """This object has no access any more. What was made from ``buf`` keeps the memory until it goes itself."""
        region, self._region = self._region, None
        buf, self._buf = self._buf, None
        if region is None:
            return
        self._entry = _entry_of(region)
        with contextlib.suppress(BufferError):
            buf.release()
        region._let_go()

    def unlink(self) -> None:
        """Nobody finds the block by its name any more; whoever has it keeps it. Another block of this name stays.

        Raises:
            FileNotFoundError: it has no name any more. Not if that went with its last holder after our ``close``.
            PermissionError: it belongs to another user.
        """
        name = _region_name(self._name)
        if self._region is not None:
            entry = _entry_of(self._region)
        else:
            entry, self._entry = self._entry, None
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._name)
        with contextlib.suppress(RegionNotFound), _names.live(name) as fd:
            if os.fstat(fd).st_ino == entry:
                _names.remove(fd, name)

    def __del__(self) -> None:
        if self._region is not None and self._region._is_forsaken():
            self.close()


def _entry_of(region: Region) -> int | None:
    """The inode number of its name's entry, by which it is told from another region of this name."""
    with contextlib.suppress(ShareError, OSError), _names.of_region(region.name, region.fileno()) as fd:
        return os.fstat(fd).st_ino if fd >= 0 else None
    return None  # a forked child that could not join, or the names' directory is out of reach


_TYPES: dict[type, int] = {int: 0, float: 1, bool: 2, type(None): 3, str: 4, bytes: 5}
_FORMATS = ("q", "d", "xxxxxxx?", "xxxxxx?x", "%ds", "%ds")  # of struct, by type; the last two of the item's room
_NONE, _STR, _BYTES = 3, 4, 5
_COUNT = struct.Struct("q")
_ENTRY = struct.Struct("qqqq")  # of an item: where it is; its room, in bytes, for good; its length; its type
_STEP = 8  # rooms are multiples


def _packed(value: object) -> tuple[int, int, bytes]:
    """(room, type, bytes) of an item; KeyError: it is none of those that can be stored.

    The room is the standard library's, so that what fitted there fits here, but enough where letters are several bytes.
    """
    if isinstance(value, (str, bytes)):
        kind, data = (_STR, value.encode()) if isinstance(value, str) else (_BYTES, value)
        return _STEP * max(len(value) // _STEP + 1, -(-len(data) // _STEP)), kind, data
    kind = _TYPES[type(value)]
    return _STEP, kind, struct.pack(_FORMATS[kind], value)


def _unpacked(kind: int, data: bytes) -> Any:
    if kind == _STR:
        return data.decode()
    if kind == _BYTES:
        return data
    return None if kind == _NONE else struct.unpack(_FORMATS[kind], data)[0]


class ShareableList(shared_memory.ShareableList[_Item]):
    """A list of fixed length in a block (``shm``), as multiprocessing.shared_memory.ShareableList.

    Unlike there, a str or bytes comes back as it was stored, whole and with its trailing NULs. As there, nothing
    keeps two processes from one item at a time: ``shm.region.lock`` does.

    Args:
        sequence: items, each an int of 64 bits, float, bool, str, bytes or None.
        name: of the block: of a new one with ``sequence`` (None makes one up), else of the list to attach to.

    Raises:
        KeyError: an item of another type.
        ...: as SharedMemory.
    """

    # The block: how many items, an entry for each, their bytes.
    shm: SharedMemory

    def __init__(self, sequence: Iterable[_Item] | None = None, *, name: str | None = None) -> None:
        if sequence is None and name is not None:
            self.shm = SharedMemory(name)
            return
        items = [_packed(value) for value in (() if sequence is None else sequence)]
        at = _COUNT.size + _ENTRY.size * len(items)
        self.shm = SharedMemory(name, create=True, size=at + sum(room for room, _, _ in items))
        _COUNT.pack_into(self.shm._buf, 0, len(items))
        for index, (room, kind, data) in enumerate(items):
            self._store(index, at, room, kind, data)
            at += room

    def _store(self, index: int, at: int, room: int, kind: int, data: bytes) -> None:
        self.shm._buf[at : at + len(data)] = data
        _ENTRY.pack_into(self.shm._buf, _COUNT.size + _ENTRY.size * index, at, room, len(data), kind)

    def _find(self, position: int, what: str = "index") -> tuple[int, tuple[int, int, int, int]]:
        """(index, entry) of an item; IndexError."""
        index = position + len(self) if position < 0 else position
        if not 0 <= index < len(self):
            raise IndexError(f"{what} out of range")
        return index, _ENTRY.unpack_from(self.shm._buf, _COUNT.size + _ENTRY.size * index)

    def __getitem__(self, position: int) -> _Item:
        """The item, as it was stored; IndexError."""
        _, (at, _, length, kind) = self._find(position)
        item: _Item = _unpacked(kind, bytes(self.shm._buf[at : at + length]))
        return item

    def __setitem__(self, position: int, value: _Item) -> None:
        """Another item in its place; ValueError: it needs more bytes than there were at first, in steps of 8."""
        index, (at, room, _, _) = self._find(position, "assignment index")
        _, kind, data = _packed(value)
        if len(data) > room:
            raise ValueError(f"bytes/str item exceeds available storage: {len(data)} bytes, room for {room}")
        self._store(index, at, room, kind, data)

    def _get_packing_format(self, position: int) -> str:
        _, (_, room, _, kind) = self._find(position)
        return _FORMATS[kind] % room if kind in (_STR, _BYTES) else _FORMATS[kind]

    @property
    def format(self) -> str:
        """The struct format of all items, with the room that each str and bytes has."""
        return "".join(map(self._get_packing_format, range(len(self))))


class _Blocks:
    """What a manager's server has of the blocks made through it: it is a holder of each, until it unlinks it."""

    def __init__(self) -> None:
        self._held: dict[str, SharedMemory] = {}

    @property
    def segment_names(self) -> list[str]:
        return list(self._held)

    def register_segment(self, name: str) -> None:
        self._held[name] = SharedMemory(name)

    def destroy_segment(self, name: str) -> None:
        block = self._held.pop(name)
        block.close()
        block.unlink()

    def unlink(self) -> None:
        for name in self.segment_names:
            with contextlib.suppress(FileNotFoundError):  # its maker has unlinked it already
                self.destroy_segment(name)


class _Server(managers.SharedMemoryServer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shared_memory_context = _Blocks()


_Block: TypeAlias = SharedMemory  # in a manager these words are methods
_List: TypeAlias = ShareableList[_Item]


class SharedMemoryManager(managers.SharedMemoryManager):
    """A server that holds the blocks made through it until it is shut down, as the standard library's.

    Unlike there, they also go when it is killed.
    """

    _Server = _Server

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        managers.BaseManager.__init__(self, *args, **kwargs)  # past a parent that starts a resource tracker

    def SharedMemory(self, size: int) -> _Block:  # noqa: N802
        """A new block of ``size`` bytes, which the server holds; ValueError before ``start``."""
        block = SharedMemory(create=True, size=size)
        self._hand_over(block)
        return block

    def ShareableList(self, sequence: Iterable[_Item] | None) -> _List[_Item]:  # noqa: N802
        """A new list of these items, which the server holds; ValueError before ``start``."""
        made = ShareableList(sequence)
        self._hand_over(made.shm)
        return made

    def _hand_over(self, block: _Block) -> None:
        this: Any = self  # what the standard library's annotations leave out
        try:
            with this._Client(this._address, authkey=this._authkey) as connection:
                managers.dispatch(connection, None, "track_segment", (block.name,))  # type: ignore[attr-defined]
        except BaseException:
            block.unlink()
            block.close()
            raise
