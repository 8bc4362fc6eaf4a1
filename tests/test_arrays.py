"""Arrays and tensors over a region: numpy, DLPack, and the recipes for pandas, Arrow and torch.

Grouped by promise: an array is the memory, as it was asked for; what is no
array says so; tensor libraries get the same memory, and give it back; the
recipes copy nothing.
"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from conftest import Child

import pyshare
from pyshare import READ, Observer, Region

PAGE = 4096
SIZE = 3 * PAGE + 100
Fork = Callable[..., Child]


@pytest.fixture
def region() -> Iterator[Region]:
    with pyshare.create(size=SIZE) as made:
        yield made


@pytest.fixture
def observer(region: Region) -> Iterator[Observer]:
    with pyshare.attach(region, readonly=True) as made:
        yield made


# -- numpy -------------------------------------------------------------------------------------------------------------

POINT = np.dtype([("x", "f8"), ("tag", "S3")])


@pytest.mark.parametrize(
    ("dtype", "shape", "offset", "expected"),
    [
        ("u1", None, 0, (SIZE,)),
        ("u1", None, SIZE, (0,)),
        (np.float64, None, 0, (SIZE // 8,)),
        (float, None, 3, ((SIZE - 3) // 8,)),
        ("f4", 7, 5, (7,)),
        ("i8", (5, 6, 7), PAGE, (5, 6, 7)),
        ("i8", [np.int64(5), 6], PAGE, (5, 6)),
        ("u1", (), SIZE - 1, ()),
        ("u1", 0, 9, (0,)),
        (POINT, None, 1, ((SIZE - 1) // POINT.itemsize,)),
        ((np.int32, (2, 3)), 4, 0, (4, 2, 3)),
    ],
)
def test_an_array_is_the_memory(region: Region, dtype: Any, shape: Any, offset: int, expected: tuple[int, ...]) -> None:
    array = region.numpy(dtype, shape, offset)
    assert (array.shape, array.dtype) == (expected, np.dtype(dtype).base)
    assert array.ctypes.data == region.address + offset
    assert array.flags.writeable
    assert array.flags.c_contiguous
    if array.size:
        array.view("u1" if array.ndim else array.dtype)[...] = 0xA5 if array.ndim else array.dtype.type(0xA5)
        assert region.read(offset, array.nbytes) == b"\xa5" * array.nbytes


def test_an_array_is_the_same_in_other_processes(region: Region, fork: Fork) -> None:
    array = region.numpy("i8", (4, 4), offset=8)

    def add(child: Child) -> None:
        child.hear()
        array[2, 3] += 1
        child.say(str(region.numpy("i8", 1, 8 + 11 * 8)[0]))

    child = fork(add)
    array[2, 3] = 41
    child.say()
    assert child.hear() == "42"
    assert array[2, 3] == 42


def test_an_array_over_a_page_that_is_read_is_writable_and_a_store_a_violation(region: Region) -> None:
    region.on_violation("raise")
    region.mprotect(0, PAGE, READ)
    array = region.numpy("f8")
    array[PAGE // 8] = 1.5
    with pytest.raises(pyshare.ProtectionError):
        array[0] = 1.5
    assert (array[0], array[PAGE // 8]) == (0, 1.5)


def test_an_observers_array_is_read_only_for_good(region: Region, observer: Observer) -> None:
    array = observer.numpy("u1", (2, 2), 1)
    region.write(1, b"abcd")
    assert array.tobytes() == b"abcd"
    assert not array.flags.writeable
    for changed in (array, array[:], array.reshape(4)):
        with pytest.raises(ValueError, match="cannot set WRITEABLE"):
            changed.flags.writeable = True
    with pytest.raises(ValueError, match="read-only"):
        array[0, 0] = 1


def test_close_refuses_while_an_array_lives(region: Region) -> None:
    array = region.numpy("u1")
    part = array[5:7]
    del array
    with pytest.raises(BufferError, match="release them first"):
        region.close()
    part[0] = 3
    assert region.read(5, 1) == b"\x03"
    del part
    region.close()


def drop(held: list[Any]) -> None:
    held.clear()
    gc.collect()


def test_an_array_keeps_the_memory() -> None:
    held = [pyshare.create("kept", size=PAGE).numpy("u1")]
    gc.collect()
    held[0][5] = 6
    with pyshare.attach("kept") as other:
        assert other.read(5, 1) == b"\x06"
    with pytest.warns(ResourceWarning, match="unclosed"):
        drop(held)
    assert "kept" not in pyshare.names()


@pytest.mark.parametrize("made", ["snapshot", "lease"])
def test_ndarray_itself_keeps_what_it_is_made_of(region: Region, made: str) -> None:
    """It lets go of the buffer that it is given; memory that went then would not be there any more."""
    region.write(0, b"abcd")
    with region.snapshot() if made == "snapshot" else region.lease(0, PAGE) as thing:
        array = np.ndarray((4,), "u1", buffer=thing)
        again = np.ndarray((4,), "u1", thing)
    if made == "snapshot":
        assert array.tobytes() == again.tobytes() == b"abcd"
    else:
        with pytest.raises(BufferError, match="release them first"):
            region.close()
    del array, again


# -- What is no array --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "shape", "offset", "error", "says"),
    [
        ("O", None, 0, ValueError, "no Python objects.*object"),
        ([("a", "i4"), ("b", "O")], None, 0, ValueError, "no Python objects"),
        ("S0", None, 0, ValueError, "must have a size"),
        ("V0", 1, 0, ValueError, "must have a size"),
        ("u1", SIZE + 1, 0, ValueError, rf"{SIZE + 1} bytes.*{SIZE}"),
        ("f8", (SIZE // 8, 2), 0, ValueError, "the region has"),
        ("f8", 1, SIZE - 7, ValueError, "has 8 bytes.*has 7"),
        ("f8", (1 << 62, 1 << 62), 0, ValueError, "the region has"),
        ("u1", -1, 0, ValueError, "0 or more, not -1"),
        ("u1", (2, -3), 0, ValueError, r"0 or more, not \(2, -3\)"),
        ("u1", 1, -1, ValueError, "offset must be in 0 to"),
        ("u1", None, SIZE + 1, ValueError, f"offset must be in 0 to {SIZE}, not {SIZE + 1}"),
        ("u1", 1.5, 0, TypeError, "shape must be an integer, not 1.5"),
        ("u1", (1, "2"), 0, TypeError, "shape must be an integer, not '2'"),
        ("u1", 1, 1.5, TypeError, "offset must be an integer"),
        ("u1", True, 0, TypeError, "shape must be an integer"),
        ("nonsense", 1, 0, TypeError, "nonsense"),
    ],
)
def test_what_is_no_array_says_so(
    region: Region, dtype: Any, shape: Any, offset: Any, error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        region.numpy(dtype, shape, offset)
    region.close()


WITHOUT = """
import sys
sys.modules["numpy"] = None
import pyshare
with pyshare.create(size=10) as region:
    try:
        region.numpy("u1")
    except ImportError as error:
        print(error)
"""


def test_without_numpy_it_says_so(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    ran = run_python(WITHOUT)
    assert (ran.stdout, ran.stderr) == ("arrays need numpy, which is not installed: pip install numpy\n", "")


# -- DLPack ------------------------------------------------------------------------------------------------------------


class Tensor(ctypes.Structure):
    """As dlpack.h has it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", ctypes.c_int32 * 2),
        ("dimensions", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )

    def facts(self) -> tuple[object, ...]:
        kind = (self.code, self.bits, self.lanes)
        return self.data, tuple(self.device), self.dimensions, kind, self.shape[0], self.strides[0], self.byte_offset


Deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)  # runs without the GIL


class Plain(ctypes.Structure):
    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter))


class Versioned(ctypes.Structure):
    _fields_ = (
        ("version", ctypes.c_uint32 * 2),
        ("context", ctypes.c_void_p),
        ("deleter", Deleter),
        ("flags", ctypes.c_uint64),
        ("tensor", Tensor),
    )


def taken(capsule: object) -> Any:
    """The tensor of a capsule, as who takes it has it."""
    api = ctypes.pythonapi
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_char_p]
    name, kind = (b"dltensor_versioned", Versioned) if "versioned" in repr(capsule) else (b"dltensor", Plain)
    tensor = kind.from_address(api.PyCapsule_GetPointer(capsule, name))  # type: ignore[attr-defined]
    keep.append(b"used_" + name)
    api.PyCapsule_SetName(capsule, keep[-1])
    return tensor


keep: list[bytes] = []  # names of capsules, which point at them


def test_a_tensor_is_what_dlpack_says(region: Region, observer: Observer) -> None:
    assert region.__dlpack_device__() == (1, 0)
    plain = taken(region.__dlpack__())
    versioned, read_only = (taken(one.__dlpack__(max_version=(1, 3))) for one in (region, observer))
    for made, source in ((plain, region), (versioned, region), (read_only, observer)):
        assert made.tensor.facts() == (source.address, (1, 0), 1, (1, 8, 1), SIZE, 1, 0)
    assert [tuple(made.version) for made in (versioned, read_only)] == [(1, 0)] * 2
    assert [made.flags for made in (versioned, read_only)] == [0, 1]
    for made in (plain, versioned, read_only):
        made.deleter(ctypes.addressof(made))


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_a_tensor_is_given_back_by_whatever_thread(region: Region, max_version: tuple[int, int] | None) -> None:
    """With the capsule gone, by a thread that has not the GIL."""
    made = taken(region.__dlpack__(max_version=max_version))
    gc.collect()
    with pytest.raises(BufferError, match="release them first"):
        region.close()
    thread = threading.Thread(target=made.deleter, args=(ctypes.addressof(made),))
    thread.start()
    thread.join()
    region.close()


@pytest.mark.parametrize("max_version", [None, (0, 8), (1, 0), (2, 0)])
def test_a_capsule_that_nobody_takes_gives_the_memory_back(region: Region, max_version: tuple[int, int] | None) -> None:
    capsule = region.__dlpack__(max_version=max_version)
    assert ("versioned" in repr(capsule)) == (max_version is not None and max_version >= (1, 0))
    with pytest.raises(BufferError):
        region.close()
    del capsule
    region.close()


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"stream": 1}, ValueError, "stream must be None, not 1"),
        ({"dl_device": (2, 0)}, BufferError, r"device \(1, 0\).*\(2, 0\)"),
    ],
)
def test_what_cannot_be_had_by_dlpack_is_refused(
    region: Region, asked: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        region.__dlpack__(**asked)
    region.close()


def test_read_only_memory_is_not_lent_to_who_would_not_know(observer: Observer) -> None:
    for asked in ({}, {"max_version": (0, 8)}):
        with pytest.raises(BufferError, match=r"read-only, which only DLPack 1\.0"):
            observer.__dlpack__(**asked)
    observer.close()


@pytest.mark.parametrize("max_version", [None, (1, 0)])
def test_a_copy_is_the_takers_own(region: Region, observer: Observer, max_version: tuple[int, int] | None) -> None:
    region.write(0, b"abc")
    for source in (region, observer):
        made = taken(source.__dlpack__(copy=True, max_version=max_version))
        assert made.tensor.data != source.address
        assert ctypes.string_at(made.tensor.data, 4) == b"abc\0"
        if max_version:
            assert made.flags == 2
        made.deleter(ctypes.addressof(made))
    region.mprotect(0, PAGE, pyshare.NONE)
    with pytest.raises(pyshare.ProtectionError):
        region.__dlpack__(copy=True)


def test_numpy_takes_a_tensor(region: Region) -> None:
    array = np.from_dlpack(region)
    region.write(SIZE - 1, b"\x09")
    assert (array.shape, array.dtype, array[SIZE - 1]) == ((SIZE,), np.uint8, 9)
    with pytest.raises(BufferError):
        region.close()
    del array
    region.close()


@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) < "2.1.0", reason="DLPack 1.0 came with numpy 2.1")
def test_numpy_knows_which_tensors_are_read_only(region: Region, observer: Observer) -> None:
    arrays = [np.from_dlpack(source) for source in (region, observer)]
    arrays[0][7] = 7
    assert [(array[7], array.flags.writeable) for array in arrays] == [(7, True), (7, False)]
    del arrays


AT_EXIT = """
import ctypes, os, sys
import numpy as np
import pyshare
sys.path.insert(0, os.path.dirname(sys.argv[1]))
region = pyshare.create(size=4096)
kept = [np.from_dlpack(region), region.__dlpack__(), region.numpy("u1")]
sys.stdout.kept = kept
"""


def test_the_interpreter_ends_with_tensors_alive(run_python: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    ran = run_python(AT_EXIT, __file__, PYTHONWARNINGS="ignore")
    assert (ran.returncode, ran.stderr) == (0, "")


# -- Recipes: what others make of the same memory, without a copy ------------------------------------------------------


def test_pandas_over_columns(region: Region) -> None:
    """A column a dtype field, each in pages of its own where they are protected apart."""
    pandas = pytest.importorskip("pandas")
    columns = {name: region.numpy("f8", 100, offset) for name, offset in (("price", 0), ("size", PAGE))}
    frame = pandas.DataFrame(columns, copy=False)
    columns["price"][3] = 2.5
    assert frame["price"][3] == 2.5
    assert all(np.shares_memory(frame[name].to_numpy(), array) for name, array in columns.items())
    with pytest.raises(BufferError):
        region.close()
    del frame, columns
    gc.collect()


def test_pandas_over_one_array(region: Region, observer: Observer) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(observer.numpy("f8", (100, 3)), columns=["x", "y", "z"], copy=False)
    region.numpy("f8", (100, 3))[42, 1] = 1.25
    assert frame.loc[42, "y"] == 1.25


def test_arrow_arrays(region: Region, observer: Observer) -> None:
    arrow = pytest.importorskip("pyarrow")
    region.numpy("i8", 3)[:] = [1, 2, 3]
    buffers = [arrow.py_buffer(source) for source in (region, observer)]
    assert [buffer.is_mutable for buffer in buffers] == [True, False]
    assert [buffer.address for buffer in buffers] == [region.address, observer.address]
    arrays = [arrow.Array.from_buffers(arrow.int64(), 3, [None, buffer]) for buffer in buffers]
    region.numpy("i8")[1] = 20
    assert [array.to_pylist() for array in arrays] == [[1, 20, 3]] * 2
    with pytest.raises(BufferError):
        region.close()
    del arrays, buffers


def test_an_arrow_table_is_written_once_and_read_in_place(region: Region, observer: Observer) -> None:
    """By its stream format: who observes reads columns that lie in the region."""
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table({"id": [1, 2, 3], "name": ["a", "b", "c"]})
    sink = arrow.FixedSizeBufferWriter(arrow.py_buffer(region))
    with arrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    del sink, writer
    read = arrow.ipc.open_stream(arrow.py_buffer(observer)).read_all()
    assert read.equals(table)
    first = read["id"].chunk(0).buffers()[1]
    assert observer.address <= first.address < observer.address + SIZE
    del read, first


def test_torch_shares_the_memory(region: Region) -> None:
    torch = pytest.importorskip("torch")
    tensors = [
        torch.from_dlpack(region).view(torch.float32)[:6].reshape(2, 3),
        torch.frombuffer(region, dtype=torch.float32, count=6).reshape(2, 3),
    ]
    tensors[0][1, 2] = 4.5
    assert [float(tensor[1, 2]) for tensor in tensors] == [4.5, 4.5]
    assert [tensor.data_ptr() for tensor in tensors] == [region.address] * 2
    assert region.numpy("f4", 6)[5] == 4.5
    with pytest.raises(BufferError):
        region.close()
    del tensors
    gc.collect()


def test_torch_copies_what_it_may_not_write(observer: Observer) -> None:
    """It knows no read-only tensors: a store to one would be a SIGSEGV."""
    torch = pytest.importorskip("torch")
    tensor = torch.from_dlpack(observer.__dlpack__(copy=True))
    tensor[0] = 1
    assert observer.read(0, 4) == bytes(4)
