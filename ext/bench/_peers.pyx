# cython: language_level=3, binding=True, embedsignature=True, auto_pickle=False, autotestdict=False
# cython: autotestdict=False
"""_peers: measurement code only, the binding of bench.h.

Lives here: the extern blocks and three classes.  Not here: anything that a program
which shares memory needs; pyshare.bench alone imports this.
Invariant: the GIL is not held while C waits, stores or takes the time.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from cpython.pycapsule cimport PyCapsule_GetContext, PyCapsule_GetPointer
from libc.errno cimport EINTR
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t, uintptr_t

import os

from pyshare import _core

cdef extern from "bench/bench.h" nogil:
    struct ps_calls:
        pass
    struct ps_region:
        pass
    enum:
        PEERS_MAX
    enum peers_cycle_kind "peers_cycle":
        PEERS_MPROTECT
        PEERS_UFFD
        PEERS_FCNTL
        PEERS_MUTEX
        PEERS_THREAD
        PEERS_MAP
        PEERS_MAP_UNMAP
    enum peers_work_kind "peers_work":
        PEERS_REST
        PEERS_LOOK
        PEERS_STORE
    struct peers_board:
        void *address
        int32_t *pids
        int32_t *fds
    peers_board *peers_board_create(void *address, size_t length, void *cells)
    void peers_board_free(peers_board *board)
    int peers_die_with(int32_t parent)
    int peers_protect(peers_board *board, int32_t prot)
    void peers_work(peers_board *board, uint32_t thread)
    int peers_set_work(peers_board *board, peers_work_kind work, uint32_t called)
    int peers_await_work(peers_board *board, peers_work_kind work)
    int peers_signal_listen(peers_board *board)
    int64_t peers_signal_change(peers_board *board, uint32_t count, int32_t prot)
    void peers_floor_serve(peers_board *board, uint32_t threads)
    int64_t peers_floor_change(peers_board *board, int32_t prot)
    int peers_remote_open(peers_board *board)
    int64_t peers_remote_change(peers_board *board, uint32_t count, int32_t prot)
    void peers_cycle_serve(peers_board *board, int32_t fd, size_t length)
    int64_t peers_cycle(peers_board *board, peers_cycle_kind cycle, int32_t times)
    int64_t peers_core_lease(const ps_calls *calls, ps_region *region, uint64_t page, bint window, int32_t times)
    int64_t peers_core_lock(const ps_calls *calls, ps_region *region, uint32_t index, int32_t times)

cdef extern from "bench/bench.h" nogil:
    enum:
        PAUSES_WRITERS
    struct pauses_board:
        size_t length
    pauses_board *pauses_create(size_t length, uint32_t writers, int64_t every)
    void pauses_free(pauses_board *board)
    int pauses_populate(void *data, size_t length, int write)
    void pauses_fill(void *data, size_t length)
    void pauses_write(pauses_board *board, uint32_t index, void *data, const ps_calls *calls, ps_region *region)
    int pauses_begin(pauses_board *board)
    int pauses_end(pauses_board *board)
    void pauses_forget(pauses_board *board)
    int64_t pauses_worst(const pauses_board *board)
    int64_t pauses_probe(pauses_board *board, int64_t *again)
    int64_t pauses_stop_and_copy(pauses_board *board, const void *source, void *to)
    void pauses_serve_forks(pauses_board *board)
    int64_t pauses_fork(pauses_board *board)
    int64_t pauses_await_child(pauses_board *board)

REST, LOOK, STORE = PEERS_REST, PEERS_LOOK, PEERS_STORE
MPROTECT, UFFD, FCNTL, MUTEX = PEERS_MPROTECT, PEERS_UFFD, PEERS_FCNTL, PEERS_MUTEX
THREAD, MAP, MAP_UNMAP = PEERS_THREAD, PEERS_MAP, PEERS_MAP_UNMAP


cdef int64_t checked(int64_t result) except -1:
    if result == -EINTR:
        PyErr_CheckSignals()
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def die_with(int32_t parent) -> None:
    """This process is killed when the thread that forked it, in process `parent`, goes."""
    checked(peers_die_with(parent))


cdef class Board:
    """What the processes of one contender share, and the pages whose protection they change.

    Processes forked after it was made have it too.  `memory` must stay mapped.
    """

    cdef peers_board *board
    cdef uint32_t count

    def __cinit__(self, memory, size_t offset, size_t length, size_t cells) -> None:
        """The pages are `length` bytes from `offset`; working threads store to the page at `cells`."""
        cdef Py_buffer view
        PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE)
        cdef unsigned char *start = <unsigned char *>view.buf
        PyBuffer_Release(&view)
        self.board = peers_board_create(start + offset, length, start + cells)
        if self.board is NULL:
            raise MemoryError
        self.count = 0

    def __dealloc__(self):
        if self.board is not NULL:
            peers_board_free(self.board)

    @property
    def address(self) -> int:
        """Where the pages begin."""
        return <uintptr_t>self.board.address

    def protect(self, int32_t prot) -> None:
        """The pages have the protection in this process."""
        checked(peers_protect(self.board, prot))

    def work(self, uint32_t thread) -> None:
        """Sleeps until it is called, and works while there is work; does not return."""
        with nogil:
            peers_work(self.board, thread)

    def set_work(self, int32_t work, uint32_t called=0) -> None:
        """The working threads are told what to do, and so many of them are called."""
        checked(peers_set_work(self.board, <peers_work_kind>work, called))

    def await_work(self, int32_t work) -> bool:
        """A working thread has just done that, or all rest; where this is False, the machine is too busy to let them."""
        return peers_await_work(self.board, <peers_work_kind>work) == 1

    def signal_listen(self) -> None:
        """This process answers the signal broadcast."""
        checked(peers_signal_listen(self.board))

    cdef set_members(self, int32_t *numbers, members):
        if len(members) > PEERS_MAX:
            raise ValueError(f"{len(members)} processes; at most {PEERS_MAX} can be reached")
        for index, number in enumerate(members):
            numbers[index] = number
        self.count = len(members)

    def signal_members(self, pids) -> None:
        """The signal broadcast goes to these processes."""
        self.set_members(self.board.pids, pids)

    def signal_change(self, int32_t prot) -> int:
        """Every member and this process have the protection; returns ns."""
        cdef int64_t elapsed
        with nogil:
            elapsed = peers_signal_change(self.board, self.count, prot)
        return checked(elapsed)

    def floor_serve(self, uint32_t threads) -> None:
        """Changes the protection in this process when asked, while so many threads work; does not return."""
        with nogil:
            peers_floor_serve(self.board, threads)

    def floor_change(self, int32_t prot) -> int:
        """The serving process has the protection; returns the ns that its mprotect took."""
        cdef int64_t elapsed
        with nogil:
            elapsed = peers_floor_change(self.board, prot)
        return checked(elapsed)

    def remote_open(self) -> int:
        """A userfaultfd on the pages of this process, to be lent to the caller."""
        return checked(peers_remote_open(self.board))

    def remote_members(self, fds) -> None:
        """The remote change goes through these userfaultfds, which others opened."""
        self.set_members(self.board.fds, fds)

    def remote_change(self, int32_t prot) -> int:
        """The members have the protection, and this process is as it was; returns ns."""
        cdef int64_t elapsed
        with nogil:
            elapsed = peers_remote_change(self.board, self.count, prot)
        return checked(elapsed)

    def cycle_serve(self, int32_t fd, size_t length) -> None:
        """Goes through cycles when asked, on a memfd of so many bytes; does not return."""
        with nogil:
            peers_cycle_serve(self.board, fd, length)

    def cycle(self, int32_t cycle, int32_t times) -> int:
        """The serving process went through the cycle so often; returns the ns that it took."""
        cdef int64_t elapsed
        with nogil:
            elapsed = peers_cycle(self.board, <peers_cycle_kind>cycle, times)
        return checked(elapsed)


cdef class Core:
    """The core of a region, called from C."""

    cdef object handle
    cdef ps_region *region
    cdef const ps_calls *calls

    def __cinit__(self, handle) -> None:
        capsule = _core._capsule(handle)
        self.handle = handle
        self.region = <ps_region *>PyCapsule_GetPointer(capsule, "pyshare.region")
        self.calls = <const ps_calls *>PyCapsule_GetContext(capsule)

    def lease(self, uint64_t page, bint window, int32_t times) -> int:
        """One page was leased, stored to and released so often; returns the ns that it took."""
        cdef int64_t elapsed
        with nogil:
            elapsed = peers_core_lease(self.calls, self.region, page, window, times)
        return checked(elapsed)

    def lock(self, uint32_t index, int32_t times) -> int:
        """The lock was taken and released so often; returns the ns that it took."""
        cdef int64_t elapsed
        with nogil:
            elapsed = peers_core_lock(self.calls, self.region, index, times)
        return checked(elapsed)


cdef class Pauses:
    """What processes share that store at a steady pace, into memory of the same length; forked children have it too."""

    cdef pauses_board *board

    def __cinit__(self, size_t length, uint32_t writers, int64_t every) -> None:
        """So many writers rest `every` ns after each of their stores."""
        if not 1 <= writers <= PAUSES_WRITERS:
            raise ValueError(f"{writers} writers; from 1 to {PAUSES_WRITERS} can be measured")
        self.board = pauses_create(length, writers, every)
        if self.board is NULL:
            raise OSError("no board")

    def __dealloc__(self):
        if self.board is not NULL:
            pauses_free(self.board)

    cdef void *start_of(self, memory) except NULL:
        cdef Py_buffer view
        PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE)
        cdef void *start = view.buf
        cdef size_t length = view.len
        PyBuffer_Release(&view)
        if length < self.board.length:
            raise ValueError(f"{length} bytes; {self.board.length} are needed")
        return start

    def fill(self, memory) -> None:
        """No page of it is a hole."""
        cdef void *start = self.start_of(memory)
        with nogil:
            pauses_fill(start, self.board.length)

    def populate(self, memory, bint write) -> None:
        """It is in this process's page tables, to be read or to be written."""
        cdef void *start = self.start_of(memory)
        cdef int result
        with nogil:
            result = pauses_populate(start, self.board.length, write)
        checked(result)

    def write(self, uint32_t index, memory) -> None:
        """The life of a writer; does not return."""
        cdef void *start = self.start_of(memory)
        with nogil:
            pauses_write(self.board, index, start, NULL, NULL)

    def lease(self, uint32_t index, memory, Core core) -> None:
        """The life of a writer that leases each page for its store; does not return."""
        cdef void *start = self.start_of(memory)
        with nogil:
            pauses_write(self.board, index, start, core.calls, core.region)

    def begin(self) -> None:
        """Every writer is at work."""
        cdef int result
        with nogil:
            result = pauses_begin(self.board)
        checked(result)

    def end(self) -> None:
        """No writer is at work."""
        cdef int result
        with nogil:
            result = pauses_end(self.board)
        checked(result)

    def forget(self) -> None:
        """What writers had to wait until now does not count."""
        pauses_forget(self.board)

    def worst(self) -> int:
        """The most ns that a writer had to wait for a store."""
        return pauses_worst(self.board)

    def probe(self) -> tuple[int, int]:
        """ns of a store now, and of the next one to the same page: medians of some."""
        cdef int64_t first, again
        with nogil:
            first = pauses_probe(self.board, &again)
        return checked(first), again

    def stop_and_copy(self, source, to) -> int:
        """All writers have waited while the memory was copied; returns the ns from the first word to the last."""
        cdef void *here = self.start_of(source)
        cdef void *there = self.start_of(to)
        cdef int64_t elapsed
        with nogil:
            elapsed = pauses_stop_and_copy(self.board, here, there)
        return checked(elapsed)

    def serve_forks(self) -> None:
        """The life of a process with private memory, the writers its threads; does not return."""
        with nogil:
            pauses_serve_forks(self.board)

    def fork(self) -> int:
        """That process has forked; returns the ns that it took."""
        cdef int64_t elapsed
        with nogil:
            elapsed = pauses_fork(self.board)
        return checked(elapsed)

    def await_child(self) -> int:
        """The child has read everything and ended; returns the ns since before the fork. The first time: it is ready."""
        cdef int64_t elapsed
        with nogil:
            elapsed = pauses_await_child(self.board)
        return checked(elapsed)
