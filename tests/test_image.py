"""Images: what was saved is what is read, or nothing is; and a chain of them.

The format is tested with memory of our own as the source, snapshots and restoring with regions.
"""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import signal
import struct
import sys
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from conftest import Child, until
from kernel import LOCK, WAITING, is_asleep, word

import pyshare
from pyshare import _image
from pyshare._draft import Draft
from pyshare._image import Image

PAGE = 4096
Fork = Callable[..., Child]
FOOT = struct.Struct("<QII8s")


class Memory:
    """A source that is bytes."""

    name = "memory"
    page_size = PAGE
    generation = 7

    def __init__(self, size: int, pages: dict[int, bytes]) -> None:
        self.data = bytearray(size)
        for page, data in pages.items():
            self.data[page * PAGE : page * PAGE + len(data)] = data
        self.size = size

    def runs(self) -> list[tuple[int, int]]:
        pages = range(0, self.size, PAGE)
        return _image.merged((at, PAGE) for at in pages if any(self.data[at : at + PAGE]))

    def read(self, offset: int, length: int) -> bytes:
        assert 0 <= offset <= offset + length <= self.size
        return bytes(self.data[offset : offset + length])


def save(source: Any, path: Path, since: Path | None = None) -> str:
    if since is None:
        return _image.write(source, path, None, lambda *_: None)
    with Image(since) as base:
        return _image.write(source, path, base, lambda *_: None)


def load(path: Path) -> bytes:
    """All of it, checked."""
    with Image(path) as image:
        image.check()
        return image.read(0, image.size)


def held(path: Path) -> list[tuple[int, int]]:
    """The runs of pages that the file itself has, in pages."""
    with Image(path) as image:
        return [(offset // PAGE, length // PAGE) for offset, length in image._files[0].trailer.runs]


def filled(*pages: int, with_: int = 1, size: int = 16 * PAGE) -> Memory:
    return Memory(size, {page: bytes([with_ + page]) * min(PAGE, size - page * PAGE) for page in pages})


# -- What was saved is what is read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, PAGE - 1, PAGE, 5 * PAGE + 17, 3 * _image.CHUNK + 5])
@pytest.mark.parametrize("part", [0.0, 0.3, 1.0])
def test_round_trip(tmp_path: Path, size: int, part: float) -> None:
    chance = random.Random(size)
    pages = [page for page in range(-(-size // PAGE)) if chance.random() < part]
    source = Memory(size, {page: chance.randbytes(min(PAGE, size - page * PAGE)) for page in pages})
    identity = save(source, tmp_path / "image")
    assert load(tmp_path / "image") == source.data
    with Image(tmp_path / "image") as image:
        assert (image.id, image.name, image.size, image.generation) == (identity, "memory", size, 7)
        assert image.runs() == source.runs()
        for _ in range(50):
            offset = chance.randrange(size)
            length = chance.randint(0, size - offset)
            assert image.read(offset, length) == source.data[offset : offset + length]


def test_an_image_is_the_memory_at_its_own_offsets_and_sparse(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    source = Memory(64 << 20, {5000: b"five thousand", 0: b"first"})
    save(source, tmp_path / "image")
    array = numpy.memmap(tmp_path / "image", dtype="u1", mode="r")
    assert array[5000 * PAGE : 5000 * PAGE + 13].tobytes() == b"five thousand"
    assert array[:5].tobytes() == b"first"
    assert os.stat(tmp_path / "image").st_blocks * 512 < 1 << 20
    assert held(tmp_path / "image") == [(0, 1), (5000, 1)]


def test_only_the_owner_may_read_it(tmp_path: Path) -> None:
    save(filled(1), tmp_path / "image")
    assert os.stat(tmp_path / "image").st_mode & 0o777 == 0o600


# -- Chains ----------------------------------------------------------------------------------------------------------


def test_an_image_with_a_base_holds_what_differs(tmp_path: Path) -> None:
    """Also pages that have become zero, and pages that were and are again what they were."""
    source = filled(1, 2, 3, 9)
    states = [bytes(source.data)]
    save(source, tmp_path / "0")
    for number, (page, byte) in enumerate([(2, 77), (3, 0), (12, 5), (2, 3)], 1):
        source.data[page * PAGE : (page + 1) * PAGE] = bytes([byte]) * PAGE
        save(source, tmp_path / f"{number}", tmp_path / f"{number - 1}")
        states.append(bytes(source.data))
        assert held(tmp_path / f"{number}") == [(page, 1)]
    save(source, tmp_path / "5", tmp_path / "4")
    assert held(tmp_path / "5") == []
    states.append(states[-1])
    assert [load(tmp_path / f"{number}") for number in range(6)] == states


def test_a_directory_of_images_can_be_moved(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    save(filled(1), tmp_path / "here" / "a")
    save(filled(1, 2), tmp_path / "here" / "b", tmp_path / "here" / "a")
    os.rename(tmp_path / "here", tmp_path / "there")
    assert load(tmp_path / "there" / "b") == filled(1, 2).data


def test_a_random_chain(tmp_path: Path) -> None:
    chance = random.Random(8)
    source = Memory(700 * PAGE + 100, {})
    since, states = None, []
    for number in range(8):
        for _ in range(chance.randrange(60)):
            at = chance.randrange(source.size)
            source.data[at : at + 1] = bytes([chance.randrange(3)])
        save(source, tmp_path / str(number), since)
        since = tmp_path / str(number)
        states.append(bytes(source.data))
    for number, state in enumerate(states):
        assert load(tmp_path / str(number)) == state
        with Image(tmp_path / str(number)) as image:
            for _ in range(100):
                at = chance.randrange(source.size)
                assert image.read(at, 1) == state[at : at + 1]


CHAIN = 40  # more than descriptors that are kept, and than the limit below


def chain(folder: Path) -> list[Path]:
    """Images that each build on the one before, of one page more."""
    paths = [folder / str(number) for number in range(CHAIN)]
    for number, path in enumerate(paths):
        save(filled(*range(number + 1), size=CHAIN * PAGE), path, since=paths[number - 1] if number else None)
    return paths


def test_a_chain_is_as_long_as_it_gets(tmp_path: Path, fork: Fork) -> None:
    def body(_: Child) -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + _image.KEPT + 8, hard))
        newest = chain(tmp_path)[-1]
        with Image(newest) as image:
            image.check()
            assert len(image.paths) == CHAIN
            assert image.read(0, image.size) == filled(*range(CHAIN), size=CHAIN * PAGE).data

    assert fork(body).wait() == 0


def test_a_chain_reads_what_it_was_when_it_was_opened(tmp_path: Path) -> None:
    paths = chain(tmp_path)
    wanted = filled(*range(CHAIN), size=CHAIN * PAGE).data
    with Image(paths[-1]) as image:
        os.utime(paths[0])  # which is not open
        save(filled(9, size=CHAIN * PAGE), paths[-1])  # and which is
        assert image.read(0, image.size) == wanted
        save(filled(9, size=CHAIN * PAGE), paths[1])
        assert image.read(0, PAGE) == wanted[:PAGE]
        with pytest.raises(pyshare.CorruptRegion, match="another has come in its place") as told:
            image.read(PAGE, PAGE)
        assert told.value.field == "id"
        paths[2].unlink()
        with pytest.raises(FileNotFoundError):
            image.read(2 * PAGE, PAGE)


@pytest.mark.parametrize("what", ["size", "directory", "itself", "under it"])
def test_a_base_that_cannot_be_one_is_refused(tmp_path: Path, what: str) -> None:
    (tmp_path / "other").mkdir()
    save(filled(1), tmp_path / "a")
    save(filled(1, 2), tmp_path / "b", tmp_path / "a")
    path, since, size = {
        "size": ("c", "a", 17),
        "directory": ("other/c", "a", 16),
        "itself": ("b", "b", 16),
        "under it": ("a", "b", 16),
    }[what]
    with pytest.raises(ValueError, match=r"without since|must be in the directory|another name"):
        save(filled(3, size=size * PAGE), tmp_path / path, tmp_path / since)
    assert (load(tmp_path / "a"), load(tmp_path / "b")) == (filled(1).data, filled(1, 2).data)


# -- What is not whole is recognised ---------------------------------------------------------------------------------


def damage(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_END if at < 0 else os.SEEK_SET)
        file.write(data)


def forge(path: Path, **fields: Any) -> None:
    """The trailer says something else, under a right checksum."""
    data = path.read_bytes()
    length = FOOT.unpack(data[-FOOT.size :])[0]
    text = json.loads(data[-FOOT.size - length : -FOOT.size])
    forged = json.dumps(text | fields).encode()
    foot = FOOT.pack(len(forged), zlib.crc32(forged), 0, b"psimage\n")
    path.write_bytes(data[: -FOOT.size - length] + forged + foot)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"version": 2}, "version"),
        ({"version": None}, "version"),
        ({"size": 0}, "size"),
        ({"size": -1}, "size"),
        ({"size": 1 << 60}, "size"),
        ({"size": 17 * PAGE}, "size"),
        ({"size": "big"}, "size"),
        ({"size": True}, "size"),
        ({"page_size": 1000}, "page_size"),
        ({"page_size": 0}, "page_size"),
        ({"runs": {}}, "runs"),
        ({"runs": [[0]]}, "runs"),
        ({"runs": [[0, 0]]}, "runs"),
        ({"runs": [[1, PAGE]]}, "runs"),
        ({"runs": [[PAGE, PAGE], [0, PAGE]]}, "runs"),
        ({"runs": [[0, PAGE], [0, PAGE]]}, "runs"),
        ({"runs": [[0, 17 * PAGE]]}, "runs"),
        ({"runs": [[-PAGE, PAGE]]}, "runs"),
        ({"crc": 1}, "data"),
        ({"crc": "1"}, "crc"),
        ({"id": 5}, "id"),
        ({"name": 5}, "name"),
        ({"base_name": "base"}, "base_name"),
        ({"base_name": "../base", "base_id": "x"}, "base_name"),
        ({"base_name": "..", "base_id": "x"}, "base_name"),
        ({"base_name": "a\0b", "base_id": "x"}, "base_name"),
        ({"base_name": "\ud800", "base_id": "x"}, "base_name"),
        ({"base_name": "image", "base_id": "x"}, "id"),
    ],
    ids=str,
)
def test_a_forged_trailer(tmp_path: Path, fields: dict[str, Any], field: str) -> None:
    save(filled(1, 2), tmp_path / "image")
    forge(tmp_path / "image", **fields)
    with pytest.raises(pyshare.CorruptRegion) as caught:
        load(tmp_path / "image")
    assert caught.value.field == field


@pytest.mark.parametrize("text", [b"[" * 100_000, b"\xff", b"[]", b"{}", b"1" * 10_000, b""])
def test_a_trailer_that_is_something_else(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "image").write_bytes(bytes(PAGE) + text + FOOT.pack(len(text), zlib.crc32(text), 0, b"psimage\n"))
    with pytest.raises(pyshare.CorruptRegion):
        load(tmp_path / "image")


def test_every_byte_counts(tmp_path: Path) -> None:
    """Whatever byte of an image is another: it is recognised, or (in a page that it does not hold) not looked at."""
    save(filled(1, 3), tmp_path / "image")
    whole = (tmp_path / "image").read_bytes()
    for at in [*range(0, 16 * PAGE, 509), *range(16 * PAGE, len(whole))]:
        damage(tmp_path / "image", at, bytes([whole[at] ^ 0x10]))
        if at // PAGE in (1, 3) or at >= 16 * PAGE:
            with pytest.raises(pyshare.CorruptRegion):
                load(tmp_path / "image")
        else:
            assert load(tmp_path / "image") == filled(1, 3).data
        damage(tmp_path / "image", at, whole[at : at + 1])


def test_every_length_but_its_own(tmp_path: Path) -> None:
    save(filled(1, size=2 * PAGE), tmp_path / "image")
    whole = (tmp_path / "image").read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        (tmp_path / "image").write_bytes(whole[:length])
        with pytest.raises(pyshare.CorruptRegion):
            load(tmp_path / "image")


def test_a_base_that_is_another_image_is_recognised(tmp_path: Path) -> None:
    save(filled(1), tmp_path / "a")
    save(filled(1, 2), tmp_path / "b", tmp_path / "a")
    save(filled(1), tmp_path / "a")
    with pytest.raises(pyshare.CorruptRegion, match="is not the image") as caught:
        load(tmp_path / "b")
    assert caught.value.field == "id"
    os.unlink(tmp_path / "a")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "b")


def test_what_is_no_file_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/null")):
        with pytest.raises(pyshare.CorruptRegion):
            load(path)


# -- Whole or nothing ------------------------------------------------------------------------------------------------


class Failing(Memory):
    """Something happens when its second chunk is read."""

    def __init__(self, then: Callable[[], object]) -> None:
        super().__init__(3 * _image.CHUNK, dict.fromkeys(range(3 * _image.CHUNK // PAGE), b"new"))
        self.then = then

    def read(self, offset: int, length: int) -> bytes:
        if offset == _image.CHUNK:
            self.then()
        return super().read(offset, length)


def give_up() -> None:
    raise OSError(errno.EIO, "no more")


@pytest.mark.parametrize("unnamed", [True, False], ids=["O_TMPFILE", "a file system without"])
def test_what_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool) -> None:
    save(filled(1), tmp_path / "image")
    if not unnamed:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)  # which is what such a file system makes of it
    with pytest.raises(OSError, match="no more"):
        save(Failing(give_up), tmp_path / "image")
    assert load(tmp_path / "image") == filled(1).data
    assert os.listdir(tmp_path) == ["image"]
    save(filled(2), tmp_path / "image")
    assert load(tmp_path / "image") == filled(2).data
    assert os.listdir(tmp_path) == ["image"]


@pytest.mark.parametrize("unnamed", [True, False], ids=["O_TMPFILE", "a file system without"])
def test_ctrl_c_while_the_file_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unnamed: bool) -> None:
    if not unnamed:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    lines: list[int] = []

    def tracer(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is Draft.publish.__code__ and event == "line" and frame.f_lineno not in lines:
            lines.append(frame.f_lineno)
            raise KeyboardInterrupt
        return tracer

    def save_traced() -> bool:
        sys.settrace(tracer)
        try:
            save(filled(2), tmp_path / "image")
        except KeyboardInterrupt:
            return False
        finally:
            sys.settrace(None)
        return True

    save(filled(1), tmp_path / "image")
    while not save_traced():  # at each line in turn
        assert load(tmp_path / "image") in (filled(1).data, filled(2).data)
        assert os.listdir(tmp_path) == ["image"]
    assert len(lines) >= 5


def test_whoever_is_killed_leaves_what_was_there(tmp_path: Path, fork: Fork) -> None:
    save(filled(1), tmp_path / "image")

    def body(child: Child) -> None:
        save(Failing(lambda: (child.say(), child.hear())), tmp_path / "image")

    child = fork(body)
    assert child.hear() == "ok"
    child.kill(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert load(tmp_path / "image") == filled(1).data
    assert os.listdir(tmp_path) == ["image"]


def test_what_the_killed_left_goes_with_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork: Fork) -> None:
    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def body(_: Child) -> None:
        monkeypatch.setattr(os, "rename", die)
        save(filled(1), tmp_path / "image")

    assert fork(body).wait() == -signal.SIGKILL
    (left,) = os.listdir(tmp_path)
    assert left.startswith(".pyshare.new.")
    save(filled(1), tmp_path / "other")
    assert os.listdir(tmp_path) == ["other"]


def test_who_is_alive_keeps_what_has_no_name_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fork: Fork) -> None:
    def body(child: Child) -> None:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
        save(Failing(lambda: (child.say(), child.hear())), tmp_path / "image")

    child = fork(body)
    assert child.hear() == "ok"
    save(filled(1), tmp_path / "other")
    assert len(os.listdir(tmp_path)) == 2
    child.say()
    assert child.wait() == 0
    assert sorted(os.listdir(tmp_path)) == ["image", "other"]


@pytest.mark.parametrize("unnamed", [True, False], ids=["O_TMPFILE", "a file system without"])
@pytest.mark.parametrize("length", [242, 255])
def test_a_name_may_be_as_long_as_the_file_system_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, unnamed: bool
) -> None:
    if not unnamed:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    path = tmp_path / ("n" * length)
    for number in (1, 2):  # new, and in the place of another
        save(filled(number), path)
        assert load(path) == filled(number).data
    assert os.listdir(tmp_path) == [path.name]


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, fork: Fork) -> None:
    save(filled(1), tmp_path / "image")

    def body(child: Child) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2 * _image.CHUNK, 2 * _image.CHUNK))
        with pytest.raises(OSError, match="too large"):
            save(Failing(lambda: None), tmp_path / "image")
        child.say()

    child = fork(body)
    assert child.hear() == "ok"
    assert child.wait() == 0
    assert load(tmp_path / "image") == filled(1).data
    assert os.listdir(tmp_path) == ["image"]


# -- Progress --------------------------------------------------------------------------------------------------------


def test_progress_is_told(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = Failing(lambda: None)
    told: list[tuple[int, int]] = []
    with _image.telling(lambda done, total: told.append((done, total))) as tell:
        _image.write(source, tmp_path / "image", None, tell)
    assert told == [(done * _image.CHUNK, source.size) for done in range(4)]
    for progress, says in ((True, True), (False, False)):
        with _image.telling(progress) as tell:
            _image.write(source, tmp_path / "image", None, tell)
        out, err = capfd.readouterr()
        assert out == ""
        assert bool(err) == says


# -- Snapshots -------------------------------------------------------------------------------------------------------

ENGINES = ["mprotect", "uffd"]
PROTS = [pyshare.READ, pyshare.READ_WRITE]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    try:
        pyshare.create(size=PAGE, engine=request.param).close()
    except OSError:
        pytest.skip("this machine has no userfaultfd")
    return str(request.param)


def store(region: pyshare.Region, page: int, data: bytes) -> None:
    with region.lease(page * PAGE, PAGE) as lease:
        lease.view[: len(data)] = data


@pytest.mark.parametrize("prot", PROTS, ids=str)
def test_a_snapshot_is_saved_as_it_was(engine: str, prot: pyshare.Prot, tmp_path: Path) -> None:
    """Whatever is written meanwhile, and before pages of it are read; size is no whole number of pages."""
    size = 100 * PAGE + 1234
    with pyshare.create("test-image", size=size, prot=prot, engine=engine) as region:
        for page in range(0, 60, 2):
            store(region, page, b"before")
        before = region.read(0, size)
        with region.snapshot() as snapshot:
            told = []

            def write(done: int, total: int) -> None:
                told.append((done, total))
                store(region, len(told), b"later")
                store(region, 90 + len(told), b"later")

            for page in range(3):
                store(region, 10 + page, b"later")
            snapshot.save(tmp_path / "image", progress=write)
            assert load(tmp_path / "image") == before
            assert snapshot.saved_as == str(tmp_path / "image")
            assert told[0][0] == 0
            assert told[-1][0] == told[-1][1] > 0
            assert [sum(run) for run in held(tmp_path / "image")][-1] == 59
            with pyshare.Image(tmp_path / "image") as image:
                assert (image.name, image.size, image.generation) == ("test-image", size, snapshot.generation)


def test_a_snapshot_is_saved_since_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pyshare.create(size=1000 * PAGE, prot=pyshare.READ) as region:
        store(region, 5, b"one")
        store(region, 700, b"one")
        with region.snapshot() as first, pytest.raises(ValueError, match="has not saved that snapshot"):
            region.snapshot().save("second", since=first)
        first = region.snapshot()
        first.save("first")
        first.close()
        store(region, 700, b"two")
        with region.snapshot() as second:
            second.save("second", since=first)
            second.save("the same", since="first")
            with pytest.raises(TypeError, match="expected the path of an image"):
                second.save("third", since=7)  # type: ignore[arg-type]
            store(region, 5, b"three")
            assert held(tmp_path / "second") == held(tmp_path / "the same") == [(700, 1)]
            assert load(tmp_path / "second") == second.read(0, second.size)
    assert sorted(os.listdir(tmp_path)) == ["first", "second", "the same"]


def test_who_saves_is_killed_and_the_next_saves(tmp_path: Path, joined: Callable[..., Child]) -> None:
    with pyshare.create(size=3 * _image.CHUNK, prot=pyshare.READ) as region:
        store(region, 1, b"here")
        store(region, 500, b"and there")

        def body(child: Child) -> None:
            child.say()
            region.snapshot().save(
                tmp_path / "image", progress=lambda done, _: done and (child.say("half"), child.hear())
            )

        child = joined(body)
        assert child.hear() == "half"
        child.kill()
        assert child.wait() == -signal.SIGKILL
        assert os.listdir(tmp_path) == []
        store(region, 1, b"next")
        with region.snapshot() as snapshot:
            snapshot.save(tmp_path / "image")
        assert load(tmp_path / "image") == region.read(0, region.size)


# -- Restoring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prot", PROTS, ids=str)
@pytest.mark.parametrize("how", ["snapshot", "path", "image", "chain"])
def test_what_is_restored_is_what_was(
    engine: str, prot: pyshare.Prot, how: str, tmp_path: Path, joined: Callable[..., Child]
) -> None:
    """For every participant, whatever the protections, which stay."""
    size = 600 * PAGE + 99
    with pyshare.create(size=size, prot=prot, engine=engine) as region:
        region.mprotect(40 * PAGE, PAGE, pyshare.NONE)
        for page in (0, 3, 50, 599, 600):
            store(region, page, b"before")
        before = region.read(0, 40 * PAGE), region.read(41 * PAGE, size - 41 * PAGE)
        protections = region.protections()
        snapshot = region.snapshot()
        snapshot.save(tmp_path / "0")
        for page in (3, 4, 50, 300, 600):
            store(region, page, b"later")
        if how == "chain":
            with region.snapshot() as other:
                other.save(tmp_path / "1", since=tmp_path / "0")
            snapshot.save(tmp_path / "2", since=tmp_path / "1")

        def look(child: Child) -> None:
            child.say()
            child.hear()
            assert (region.read(0, 40 * PAGE), region.read(41 * PAGE, size - 41 * PAGE)) == before
            child.say("same")

        other_process = joined(look)
        sources: dict[str, Any] = {"snapshot": snapshot, "path": str(tmp_path / "0"), "chain": tmp_path / "2"}
        with pyshare.Image(tmp_path / "0") as image:
            region.restore(image if how == "image" else sources[how])
        assert region.protections() == protections
        other_process.say("look")
        assert other_process.hear() == "same"
        assert other_process.wait() == 0
        snapshot.close()
        for page in (3, 4, 50):
            store(region, page, b"again")


def test_a_snapshot_that_is_alive_keeps_what_it_has(engine: str, tmp_path: Path) -> None:
    with pyshare.create(size=64 * PAGE, prot=pyshare.READ_WRITE, engine=engine) as region:
        region.buf[:5] = b"first"
        with region.snapshot() as first:
            first.save(tmp_path / "image")
            region.buf[:6] = region.buf[PAGE : PAGE + 6] = b"second"
            with region.snapshot() as second:
                region.restore(tmp_path / "image")
                assert (region.read(0, 6), region.read(PAGE, 6)) == (b"first\0", bytes(6))
                assert (second.read(0, 6), second.read(PAGE, 6)) == (b"second", b"second")
                region.restore(second)
                assert (first.read(0, 6), first.read(PAGE, 6)) == (b"first\0", bytes(6))
                assert (region.read(0, 6), region.read(PAGE, 6)) == (b"second", b"second")


def test_a_damaged_image_changes_nothing(tmp_path: Path) -> None:
    with pyshare.create(size=64 * PAGE) as region:
        region.buf[:5] = b"first"
        with region.snapshot() as snapshot:
            snapshot.save(tmp_path / "image")
        region.buf[:6] = b"second"
        damage(tmp_path / "image", 3, b"!")
        with pytest.raises(pyshare.CorruptRegion) as caught:
            region.restore(tmp_path / "image")
        assert caught.value.field == "data"
        with pytest.raises(ValueError, match="must be the same"), pyshare.create(size=63 * PAGE) as other:
            other.restore(tmp_path / "image")
        with pytest.raises(FileNotFoundError):
            region.restore(tmp_path / "none")
        assert region.read(0, 6) == b"second"


def test_holes_stay_and_come_back(tmp_path: Path) -> None:
    with pyshare.create(size=1 << 32) as region:
        region.buf[:4] = b"here"
        with region.snapshot() as snapshot:
            snapshot.save(tmp_path / "image")
        region.buf[1 << 20 : 9 << 20] = bytes([1]) * (8 << 20)
        region.restore(tmp_path / "image")
        assert region._data() == [(0, PAGE)]


def test_whom_restoring_waits_for(tmp_path: Path, joined: Callable[..., Child]) -> None:
    with pyshare.create(size=64 * PAGE, prot=pyshare.READ) as region:
        with region.snapshot() as snapshot:
            snapshot.save(tmp_path / "image")

        def hold(child: Child) -> None:
            with region.lease(0, PAGE) as lease:
                lease.view[:5] = b"other"
                child.say()
                child.hear()
            child.say("released")

        child = joined(hold)
        with pytest.raises(pyshare.PropagationTimeout) as caught:
            region.restore(tmp_path / "image", timeout=0.1)
        assert caught.value.pids == [child.pid]
        assert region.read(0, 5) == b"other"
        child.say()
        assert child.hear() == "released"
        with region.lease(PAGE, PAGE), pytest.raises(pyshare.ShareError, match="would wait for itself"):
            region.restore(tmp_path / "image")
        region.restore(tmp_path / "image")
        assert region.read(0, 5) == bytes(5)


class Slow(Image):
    """Somebody is asked before anything is read after the check."""

    def ask(self, child: Child) -> Slow:
        self.child = child
        return self

    def read(self, offset: int, length: int) -> bytes:
        self.child.say("reads")
        self.child.hear()
        return super().read(offset, length)


def test_who_restores_is_killed(tmp_path: Path, joined: Callable[..., Child]) -> None:
    """The others are not, nor kept from anything; and whoever restores again, restores."""
    with pyshare.create(size=3 * _image.CHUNK, prot=pyshare.READ) as region:
        for page in range(0, 768, 10):
            store(region, page, b"before")
        before = region.read(0, region.size)
        with region.snapshot() as snapshot:
            snapshot.save(tmp_path / "image")
        for page in range(0, 768, 10):
            store(region, page, b"later")

        def body(child: Child) -> None:
            child.say()
            region.restore(Slow(tmp_path / "image").ask(child))

        child = joined(body)
        for _ in range(2):
            assert child.hear() == "reads"
            child.say()
        child.kill()
        assert child.wait() == -signal.SIGKILL
        store(region, 760, b"again")
        assert {region.read(page * PAGE, 5) for page in range(0, 760, 10)} == {b"befor", b"later"}
        region.restore(tmp_path / "image")
        assert region.read(0, region.size) == before


def test_nothing_is_frozen_after_a_restore_whose_end_ctrl_c_has_met(
    tmp_path: Path, fork: Fork, joined: Callable[..., Child]
) -> None:
    with pyshare.create(size=8 * PAGE) as region:
        with region.snapshot() as snapshot:
            snapshot.save(tmp_path / "image")
        store(region, 1, b"later")

        def body(child: Child) -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            warnings.simplefilter("ignore", ResourceWarning)  # that the freeze was dropped
            child.say()
            with pytest.raises(KeyboardInterrupt) as caught:
                region.restore(Slow(tmp_path / "image").ask(child))
            region.mprotect(0, PAGE, pyshare.READ)
            assert caught.tb

        child = joined(body)
        assert child.hear() == "reads"
        snapshotter = fork(lambda _: region.snapshot().close(), point="S1_prepare=stop")
        snapshotter.wait_stopped()  # with the region's lock
        child.say()
        until(lambda: word(region, LOCK) & WAITING)
        child.kill(signal.SIGINT)
        until(lambda: not is_asleep(child.pid, child.pid))
        snapshotter.resume()
        assert (child.wait(), snapshotter.wait()) == (0, 0)
        assert region.protection(0) == pyshare.READ
