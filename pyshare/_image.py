"""Images: files that hold what a region held at one moment.

    bytes 0 to size, whole pages    the memory at its own offsets, sparse: numpy.memmap of the file works
    then JSON                       what it is of, which runs of pages it holds, their CRC-32, which image it builds on
    the last 24 bytes               _FOOT: length and CRC-32 of the JSON, magic

An image with a base holds the pages alone that differ from it; the base is a file in the same directory, named and
known by its id, so a directory of images can be moved.
Lives here: writing one, checking it, reading a chain of them.  Not here: snapshots (the core), restoring (_region.py).
Invariants
 1. A path leads to a whole image or to what it led to before (_draft.py).
 2. Nothing in a file is believed before it was checked; what cannot be right is a CorruptRegion that names it.
 3. However long a chain is, KEPT of its files are open: the newest, whose paths may come to lead elsewhere meanwhile.
    The others are opened when they are read, and must be what they were.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from pyshare._draft import Draft
from pyshare._errors import CorruptRegion

VERSION = 1
CHUNK = 1 << 20  # bytes that are read or written at once; whole pages
KEPT = 16
_MAGIC = b"psimage\n"
_FOOT = struct.Struct("<QII8s")  # length of the JSON, its CRC-32, 0, _MAGIC

Run = tuple[int, int]  # offset and length in bytes, whole pages
Tell = Callable[[int, int], object]  # is told how many bytes are done, of how many


class Readable(Protocol):
    """Memory."""

    @property
    def size(self) -> int: ...
    def read(self, offset: int, length: int, /) -> bytes: ...


class Source(Readable, Protocol):
    """What can be saved: the memory of a region at one moment."""

    @property
    def name(self) -> str | None: ...
    @property
    def page_size(self) -> int: ...
    @property
    def generation(self) -> int: ...
    def runs(self) -> list[Run]:
        """Ascending runs of whole pages; every other page is zero."""


# -- Runs ----------------------------------------------------------------------------------------------------------


def merged(runs: Iterable[Run]) -> list[Run]:
    """The same pages, in the fewest runs."""
    found: list[Run] = []
    for offset, length in sorted(runs):
        if found and offset <= sum(found[-1]):
            start, _ = found[-1]
            found[-1] = (start, max(sum(found[-1]), offset + length) - start)
        else:
            found.append((offset, length))
    return found


def chunks(runs: Iterable[Run]) -> Iterator[Run]:
    """The same, in pieces of at most CHUNK."""
    for offset, length in runs:
        for at in range(offset, offset + length, CHUNK):
            yield at, min(CHUNK, offset + length - at)


def read_pages(source: Readable, offset: int, length: int) -> bytes:
    """Whole pages; behind the end of the source's last bytes they are zero."""
    return source.read(offset, min(length, source.size - offset)).ljust(length, b"\0")


# -- Reading -------------------------------------------------------------------------------------------------------


def _corrupt(path: str, field: str, why: str) -> CorruptRegion:
    return CorruptRegion(f"{path!r} is no whole image of a region: {why}; take another", field=field)


@dataclasses.dataclass(frozen=True)
class Trailer:
    """What an image says of itself."""

    size: int
    page_size: int
    generation: int
    name: str | None
    created: str
    id: str
    base_id: str | None
    base_name: str | None  # of a file in the same directory
    runs: list[Run]
    crc: int

    def text(self) -> bytes:
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)}, separators=(",", ":")).encode()

    @property
    def end(self) -> int:
        """Where the pages end in the file."""
        return -(-self.size // self.page_size) * self.page_size


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_file_name(name: str) -> bool:
    """Of this directory, and none that the kernel would refuse."""
    try:
        return b"/" not in os.fsencode(name) and name not in (".", "..") and "\0" not in name
    except UnicodeEncodeError:
        return False


def _wrong_field(said: dict[str, Any]) -> str | None:
    """The first field that has not the type it must have."""
    texts = ("created", "id")
    options = ("name", "base_id", "base_name")
    wrong = [
        *(field for field in ("size", "page_size", "generation", "crc") if not _is_count(said[field])),
        *(field for field in texts if type(said[field]) is not str),
        *(field for field in options if type(said[field]) not in (str, type(None))),
    ]
    if wrong:
        return wrong[0]
    size, page = said["size"], said["page_size"]
    if not 0 < size <= 1 << 45:
        return "size"
    if page < 4096 or page & (page - 1):
        return "page_size"
    if (said["base_name"] is None) != (said["base_id"] is None) or not _is_file_name(said["base_name"] or "base"):
        return "base_name"
    return None if _are_runs(said["runs"], page, -(-size // page) * page) else "runs"


def _are_runs(runs: object, page: int, end: int) -> bool:
    """Ascending, apart from each other, whole pages of the image."""
    if type(runs) is not list:
        return False
    at = 0
    for run in runs:
        if type(run) is not list or len(run) != 2 or not all(map(_is_count, run)):
            return False
        offset, length = run
        if offset < at or not length or offset % page or length % page or offset + length > end:
            return False
        at = offset + length
    return True


def _parse(path: str, text: bytes) -> Trailer:
    try:
        said = json.loads(text)
        version = said["version"]
        if version != VERSION:
            raise _corrupt(path, "version", f"its format is {version!r}, and {VERSION} is the one that can be read")
        wrong = _wrong_field(said)
        if wrong is None:
            fields = {field.name: said[field.name] for field in dataclasses.fields(Trailer)}
            return Trailer(**{**fields, "runs": [(offset, length) for offset, length in said["runs"]]})
    except (ValueError, KeyError, TypeError, RecursionError):
        wrong = "trailer"
    raise _corrupt(path, wrong, f"its {wrong} cannot be right")


def _identity(fd: int) -> tuple[int, ...]:
    """Of an open file: two with the same are one, and it was not written to meanwhile."""
    about = os.fstat(fd)
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


class _File:
    """One file; its trailer was checked, its pages were not."""

    def __init__(self, path: str, keep: bool) -> None:
        self.path = path
        self._fd = -1
        fd = self._open()
        try:
            self._identity = _identity(fd)
            self.trailer = self._read_trailer(fd)
            if keep:
                self._fd, fd = fd, -1
        finally:
            if fd >= 0:
                os.close(fd)

    def _open(self) -> int:
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a fifo does not keep us

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _read_trailer(self, fd: int) -> Trailer:
        about = os.fstat(fd)
        end = about.st_size - _FOOT.size
        if end < 0 or not stat.S_ISREG(about.st_mode):
            raise _corrupt(self.path, "magic", "it is no file, or too short")
        length, crc, zero, magic = _FOOT.unpack(self._read(fd, end, _FOOT.size))
        if magic != _MAGIC or zero:
            raise _corrupt(self.path, "magic", "it does not end as one")
        if length > end:
            raise _corrupt(self.path, "trailer", "it is too short")
        text = self._read(fd, end - length, length)
        if zlib.crc32(text) != crc:
            raise _corrupt(self.path, "trailer", "the checksum of its trailer is wrong")
        trailer = _parse(self.path, text)
        if trailer.end != end - length:
            raise _corrupt(self.path, "size", f"it has {end - length} bytes of pages where {trailer.end} should be")
        return trailer

    def _read(self, fd: int, offset: int, length: int) -> bytes:
        parts, at = [], offset
        while at < offset + length:
            part = os.pread(fd, offset + length - at, at)
            if not part:
                raise _corrupt(self.path, "size", "it has become shorter")
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def pread(self, offset: int, length: int) -> bytes:
        if self._fd >= 0:
            return self._read(self._fd, offset, length)
        fd = self._open()
        try:
            if _identity(fd) != self._identity and self._read_trailer(fd) != self.trailer:
                raise _corrupt(self.path, "id", "another has come in its place")
            return self._read(fd, offset, length)
        finally:
            os.close(fd)

    def check(self) -> None:
        """Its pages are those that were saved."""
        crc = 0
        for offset, length in chunks(self.trailer.runs):
            crc = zlib.crc32(self.pread(offset, length), crc)
        if crc != self.trailer.crc:
            raise _corrupt(self.path, "data", "the checksum of its pages is wrong")


class Image:
    """What :meth:`Snapshot.save` wrote to a file, together with the images that it builds on; a context manager.

    Of a long chain the 16 newest files are kept open; the others are opened when something of them is read. One that
    was replaced or removed meanwhile is a CorruptRegion or a FileNotFoundError then.

    Raises:
        CorruptRegion: a file is no whole image, or not the one that the image above was saved on.
        FileNotFoundError: a file of the chain is not there.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._files: list[_File] = []
        try:
            self._open_all()
        except BaseException:
            self.close()
            raise
        self._pieces = self._resolve()
        self._starts = [start for start, _, _ in self._pieces]

    @property
    def paths(self) -> list[str]:
        """Its file and those of the images that it builds on, the newest first."""
        return [file.path for file in self._files]

    def _open_all(self) -> None:
        path, wanted = self.path, None
        while True:
            self._files.append(_File(path, len(self._files) < KEPT))
            trailer, newest = self._files[-1].trailer, self._files[0].trailer
            if wanted not in (None, trailer.id) or trailer.id in [one.trailer.id for one in self._files[:-1]]:
                raise _corrupt(path, "id", f"it is not the image that {self._files[-2].path!r} was saved on")
            if (trailer.size, trailer.page_size) != (newest.size, newest.page_size):
                raise _corrupt(path, "size", f"{self.path!r} was saved on it, and has another size")
            if trailer.base_name is None:
                return
            path, wanted = os.path.join(os.path.dirname(self.path), trailer.base_name), trailer.base_id

    def _resolve(self) -> list[tuple[int, int, _File]]:
        """Which image has the latest of each run of pages; ascending."""
        pieces: list[tuple[int, int, _File]] = []
        covered: list[Run] = []
        for file in self._files:
            pieces += [(offset, length, file) for offset, length in uncovered(file.trailer.runs, covered)]
            covered = merged([*covered, *file.trailer.runs])
        return sorted(pieces, key=lambda piece: piece[0])

    def __enter__(self) -> Image:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        while self._files:
            self._files.pop().close()

    def check(self) -> None:
        """Every byte of it, and of those it builds on, is what was saved; else CorruptRegion."""
        for file in self._files:
            file.check()

    @property
    def name(self) -> str | None:
        """Of the region, or None."""
        return self._files[0].trailer.name

    @property
    def id(self) -> str:
        """What makes it different from every other image."""
        return self._files[0].trailer.id

    @property
    def size(self) -> int:
        """Bytes, exactly those of the region."""
        return self._files[0].trailer.size

    @property
    def page_size(self) -> int:
        """Bytes of a page: what two images differ by."""
        return self._files[0].trailer.page_size

    @property
    def generation(self) -> int:
        """The region's latest change of protection at that moment."""
        return self._files[0].trailer.generation

    def runs(self) -> list[Run]:
        """Ascending runs (offset, length) of whole pages; every other page is zero."""
        return merged((offset, length) for offset, length, _ in self._pieces)

    def read(self, offset: int, length: int) -> bytes:
        """A copy of ``length`` bytes from ``offset`` on, which need not be aligned."""
        if offset < 0 or length < 0 or offset + length > self.size:
            raise ValueError(
                f"the range of {length} bytes at offset {offset} is not inside the image's {self.size} bytes"
            )
        found, end = bytearray(length), offset + length
        among = slice(max(bisect.bisect_right(self._starts, offset) - 1, 0), bisect.bisect_left(self._starts, end))
        for start, whole, file in self._pieces[among]:
            first, last = max(start, offset), min(start + whole, end)
            if first < last:
                found[first - offset : last - offset] = file.pread(first, last - first)
        return bytes(found)


def uncovered(runs: Iterable[Run], covered: list[Run]) -> Iterator[Run]:
    """What of the runs no other has; both ascending and apart."""
    at = 0
    for offset, length in runs:
        end = offset + length
        while at < len(covered) and sum(covered[at]) <= offset:
            at += 1
        here = at
        while here < len(covered) and covered[here][0] < end:
            if covered[here][0] > offset:
                yield offset, covered[here][0] - offset
            offset = max(offset, sum(covered[here]))
            here += 1
        if offset < end:
            yield offset, end - offset


# -- Writing -------------------------------------------------------------------------------------------------------


def save(source: Source, path: str | os.PathLike[str], since: object, progress: bool | Tell) -> str:
    """What Snapshot.save does; the path, so that a later one can be saved since this."""
    path = os.path.abspath(os.fsdecode(path))
    with contextlib.ExitStack() as stack:
        base = None if since is None else stack.enter_context(Image(_path_of(since)))
        write(source, path, base, stack.enter_context(telling(progress)))
    return path


def _path_of(source: object) -> str:
    """Of an image: itself, or that of a snapshot that was saved."""
    if isinstance(source, (str, bytes, os.PathLike)):
        return os.fsdecode(source)
    if not hasattr(source, "saved_as"):
        raise TypeError(f"expected the path of an image, or a Snapshot, not {source!r}")
    if source.saved_as is None:
        raise ValueError("this process has not saved that snapshot: save it first, or say the path of its image")
    return str(source.saved_as)


def write(source: Source, path: str | os.PathLike[str], base: Image | None, tell: Tell) -> str:
    """The path leads to an image of the source, whole and on disk; its id.

    With a base it holds the pages that differ from it, and needs it for ever.
    """
    path = os.fspath(path)
    if base is not None:
        _check_base(source, path, base)
    asked = source.runs() if base is None else merged([*source.runs(), *base.runs()])
    total = sum(length for _, length in asked)
    held: list[Run] = []
    crc = done = 0
    with Draft(path) as draft:
        tell(0, total)
        for offset, length in chunks(asked):
            data = read_pages(source, offset, length)
            before = read_pages(base, offset, length) if base else bytes(length)
            for at, size in differing(data, before, source.page_size):
                crc = zlib.crc32(memoryview(data)[at : at + size], crc)
                held.append((offset + at, size))
                for start, count in differing(data[at : at + size], bytes(size), source.page_size):
                    draft.write(offset + at + start, memoryview(data)[at + start : at + start + count])
            done += length
            tell(done, total)
        link = (base.id, os.path.basename(base.path)) if base else None
        trailer = _trailer(source, merged(held), crc, link)
        text = trailer.text()
        draft.write(trailer.end, text + _FOOT.pack(len(text), zlib.crc32(text), 0, _MAGIC))
        draft.publish()
    return trailer.id


def _trailer(source: Source, runs: list[Run], crc: int, link: tuple[str, str] | None) -> Trailer:
    return Trailer(
        size=source.size,
        page_size=source.page_size,
        generation=source.generation,
        name=source.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        id=secrets.token_hex(16),
        base_id=link[0] if link else None,
        base_name=link[1] if link else None,
        runs=runs,
        crc=crc,
    )


def _check_base(source: Source, path: str, base: Image) -> None:
    if (source.size, source.page_size) != (base.size, base.page_size):
        raise ValueError(f"{base.path!r} is of {base.size} bytes, not {source.size}: save without since")
    folders = [os.path.realpath(os.path.dirname(one) or ".") for one in (path, base.path)]
    if folders[0] != folders[1]:
        raise ValueError(f"{base.path!r} must be in the directory of {path!r}, which will need it")
    here = os.path.realpath(path)
    if here in map(os.path.realpath, base.paths):
        raise ValueError(f"{path!r} is one of the images that the new one builds on; give it another name")


def differing(data: bytes, before: bytes, page: int) -> list[Run]:
    """The runs of pages in which the two differ."""
    if data == before:
        return []
    pages = range(0, len(data), page)
    return merged((at, page) for at in pages if data[at : at + page] != before[at : at + page])


@contextlib.contextmanager
def telling(progress: bool | Tell) -> Iterator[Tell]:
    """What to tell: nobody, the function given, or (True) a bar on stderr."""
    if callable(progress):
        yield progress
    elif not progress:
        yield lambda _done, _total: None
    else:
        from rich.console import Console  # not before: it takes longer to import than all of pyshare
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

        columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
            task = bar.add_task("")
            yield lambda done, total: bar.update(task, completed=done, total=total, refresh=True)
