"""What a thread does with images of the whole region: snapshots, files, restores, and what is dirty.

Lives here: those steps, and what of a snapshot is written down.  Not here: which moment it can be of (images.py).
Invariant: a snapshot that is restored, or is asked what is dirty since, has been looked at before, so the history
knows what it holds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import socket
import warnings
import zlib
from multiprocessing.reduction import ForkingPickler
from typing import Any, NamedTuple

import pyshare
from histories import words
from histories.hands import FAILED
from histories.plan import Step
from histories.receiving import Receiving
from histories.words import PAGE

KEPT = 2  # snapshots that a thread has; eight are all that a region has
FILES = 4  # images that it has


class Kept(NamedTuple):
    """One that this thread holds; its name is that of the operation that took it."""

    name: str
    snapshot: pyshare.Snapshot


class Saved(NamedTuple):
    """An image of a snapshot, which may need another one."""

    name: str
    path: str
    base: str | None


class Imaging(Receiving):
    """Snapshots, images, what is dirty."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.kept: list[Kept] = []
        self.files: list[Saved] = []

    def _which(self, step: Step) -> Kept | None:
        return self.kept[step["which"] % len(self.kept)] if self.kept else None

    # -- Snapshots -----------------------------------------------------------------------------------------------------

    def do_snapshot(self, step: Step) -> None:
        timeout, region = step["timeout"], self.on.region
        number, snapshot, ended = self.do(words.SNAPSHOT, (timeout,), lambda: region.snapshot(timeout=timeout))
        if snapshot is FAILED:
            return
        self.log.end(number, words.OK, snapshot.generation, at=ended)
        kept = Kept(self.name_of(number), snapshot)
        del snapshot
        self.kept.append(kept)
        keep = step["keep"]
        for turn in range(step["looks"]):
            if not self.look(kept, step["means"]):
                keep &= turn > 0
                break
            self.spin(step["pause"])
        del kept
        if not keep or len(self.kept) > KEPT:
            self.drop(-1 if not keep else 0, "close")

    def look(self, kept: Kept, means: str) -> bool:
        """Its hot pages are read; False: something went wrong."""
        snapshot = kept.snapshot

        def read() -> tuple[bytes, int]:
            if means == "view":
                with memoryview(snapshot) as data:
                    pages = [bytes(data[page * PAGE : (page + 1) * PAGE]) for page in self.hot]
            else:
                pages = [snapshot.read(page * PAGE, PAGE) for page in self.hot]
            return b"".join(map(self.words_of, pages)), zlib.crc32(b"".join(pages))

        number, result, ended = self.do(words.LOOK, (kept.name, means), read)
        if result is FAILED:
            return False
        self.log.end(number, words.OK, result, at=ended)
        return True

    def do_look(self, step: Step) -> None:
        if kept := self._which(step):
            self.look(kept, step["means"])

    def drop(self, index: int, how: str) -> None:
        """Close it, or let go of the last reference."""
        kept = [self.kept.pop(index)]
        name = kept[0].name

        def end() -> None:
            if how == "close":
                kept[0].snapshot.close()
            kept.clear()

        number, result, ended = self.do(words.DROP, (name, how), end)
        if result is not FAILED:
            self.log.end(number, words.OK, at=ended)

    def do_drop(self, step: Step) -> None:
        if self.kept:
            self.drop(step["which"] % len(self.kept), step["how"])

    def do_save(self, step: Step) -> None:
        kept = self._which(step)
        if kept is None:
            return
        path = os.path.join(self.actor.folder, f"{self.actor.name}={self.slot}-{self.log.number}.image")
        base = self.files[step["since"] % len(self.files)].path if self.files and step["since"] is not None else None
        since = kept.snapshot if base and base == kept.snapshot.saved_as else base
        arguments = (kept.name, path, base)
        number, result, ended = self.do(words.SAVE, arguments, lambda: kept.snapshot.save(path, since=since))
        if result is FAILED:
            return
        self.log.end(number, words.OK, at=ended)
        self.files.append(Saved(kept.name, path, base))
        if len(self.files) > FILES:  # the first that no other needs
            needed = {file.base for file in self.files}
            spare = next(file for file in self.files if file.path not in needed)
            self.files.remove(spare)
            os.unlink(spare.path)

    # -- From one process to another -----------------------------------------------------------------------------------

    def do_pass(self, step: Step) -> None:
        """Whoever adopts it finds a pickle in the box of that thread."""
        kept = self._which(step)
        if kept is None or self.actor.is_child or "descriptors" in self.actor.extras:
            return  # a process that has no descriptors cannot send one, and whoever waits for it would not be told
        boxes = self.actor.boxes
        to = step["to"] % len(boxes)

        def send() -> bool:
            data = bytes(ForkingPickler.dumps(kept.snapshot))
            with contextlib.suppress(BlockingIOError):
                boxes[to].send(pickle.dumps((kept.name, data)), socket.MSG_DONTWAIT)
                return True
            return False

        number, result, ended = self.do(words.PASS, (kept.name, to), send)
        if result is not FAILED:
            self.log.end(number, words.OK, result, at=ended)

    def do_adopt(self, step: Step) -> None:
        if self.actor.is_child:
            return
        try:
            name, data = pickle.loads(self.actor.own_boxes[self.slot].recv(1 << 16, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return

        def adopt() -> pyshare.Snapshot | None:
            try:
                found: pyshare.Snapshot = pickle.loads(data)
            except (FileNotFoundError, ConnectionError, EOFError):
                return None  # its sender has died
            except RuntimeError as error:
                if "ancdata" not in str(error):
                    raise
                raise OSError(errno.EMFILE, "as Python says it where a descriptor does not come") from error
            return found

        number, snapshot, ended = self.do(words.ADOPT, (name,), adopt)
        if snapshot is FAILED:
            return
        self.log.end(number, words.OK if snapshot else words.GONE, at=ended)
        if snapshot is None:
            return
        self.kept.append(Kept(name, snapshot))
        del snapshot
        keep = self.look(self.kept[-1], "read") and step["keep"]
        if not keep or len(self.kept) > KEPT:
            self.drop(-1 if not keep else 0, "close")

    # -- Restores, and what is dirty -----------------------------------------------------------------------------------

    def do_restore(self, step: Step) -> None:
        if step["file"] and self.files:
            name, path, _ = self.files[step["which"] % len(self.files)]
            source: Any = path
        elif kept := self._which(step):
            name, source = kept
        else:
            return
        timeout, region = step["timeout"], self.on.region
        arguments = (name, isinstance(source, str), timeout)
        number, result, ended = self.do(words.RESTORE, arguments, lambda: region.restore(source, timeout=timeout))
        if result is not FAILED:
            self.log.end(number, words.OK, at=ended)

    def do_dirty(self, step: Step) -> None:
        region = self.on.region
        since: Any
        if step["since"] == "snapshot":
            kept = self._which(step)
            if kept is None:
                return
            arguments, since = ("snapshot", kept.name), kept.snapshot
        else:
            since = self.generations[step["which"] % len(self.generations)]
            arguments = ("generation", since)
        number, runs, ended = self.do(words.DIRTY, arguments, lambda: region.dirty(since))
        if runs is FAILED:
            return
        found = {page for offset, length in runs for page in range(offset // PAGE, -(-(offset + length) // PAGE))}
        hot = [index for index, page in enumerate(self.hot) if page in found]
        self.log.end(number, words.OK, (hot, len(found) - len(hot)), at=ended)


warnings.filterwarnings("ignore", category=ResourceWarning)  # held objects are dropped on purpose
