# cython: language_level=3, binding=True, embedsignature=True, auto_pickle=False, autotestdict=False
# cython: autotestdict=False
"""_peers: measurement code only, the binding of peers.h.

Lives here: the extern block and one class.  Not here: anything that a program
which shares memory needs; pyshare.bench alone imports this.
Invariant: the GIL is not held while C waits, stores or takes the time.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.exc cimport PyErr_CheckSignals
from libc.errno cimport EINTR
from libc.stdint cimport int32_t, int64_t, uint32_t

import os

cdef extern from "peers.h" nogil:
    enum:
        PEERS_MAX
    struct peers_board:
        int32_t *pids
    peers_board *peers_board_create(void *address, size_t length, void *cells)
    void peers_board_free(peers_board *board)
    int peers_die_with(int32_t parent)
    int peers_protect(peers_board *board, int32_t prot)
    void peers_work(peers_board *board, uint32_t thread)
    int peers_set_storing(peers_board *board, uint32_t threads)
    int peers_signal_listen(peers_board *board)
    int64_t peers_signal_change(peers_board *board, uint32_t count, int32_t prot)
    void peers_floor_serve(peers_board *board, uint32_t threads)
    int64_t peers_floor_change(peers_board *board, int32_t prot)


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

    def protect(self, int32_t prot) -> None:
        """The pages have the protection in this process."""
        checked(peers_protect(self.board, prot))

    def work(self, uint32_t thread) -> None:
        """Sleeps, or stores to a cell of its own while told to; does not return."""
        with nogil:
            peers_work(self.board, thread)

    def set_storing(self, uint32_t threads) -> None:
        """So many working threads are told to store; with 0, all are told to stop."""
        checked(peers_set_storing(self.board, threads))

    def signal_listen(self) -> None:
        """This process answers the signal broadcast."""
        checked(peers_signal_listen(self.board))

    def signal_members(self, pids) -> None:
        """The signal broadcast goes to these processes."""
        if len(pids) > PEERS_MAX:
            raise ValueError(f"{len(pids)} processes; at most {PEERS_MAX} can be signalled")
        for index, pid in enumerate(pids):
            self.board.pids[index] = pid
        self.count = len(pids)

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
