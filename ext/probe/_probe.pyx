# cython: language_level=3, binding=True, embedsignature=True, auto_pickle=False, autotestdict=False
"""_probe: diagnosis only, the binding of probe.h.

Lives here: the extern blocks, and functions that raise OSError where C says -errno.
Not here: anything that a program which shares memory needs; pyshare.doctor alone imports this.
"""

from cpython.buffer cimport PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdint cimport uint32_t, uint64_t, uintptr_t

import os

cdef extern from "os/os.h":
    int ps_sys_memfd(const char *name, uint64_t page_size)
    int ps_sys_reopen(int fd)
    int ps_sys_ofd_take(int fd, uint32_t byte)
    int ps_sys_uffd_register(int fd, uintptr_t at, uint64_t length)
    int ps_sys_uffd_protect(int fd, uintptr_t at, uint64_t length, bint on)
    int ps_sys_uffd_protected(int pid, uintptr_t at)
    int ps_sys_socket(uint32_t *name)
    int ps_sys_socket_ask(int socket, uint32_t name)
    int ps_sys_socket_answer(int socket, int fd, uint32_t number)
    int ps_sys_socket_take(int socket, int *pid, int *fd, uint32_t *number)
    int ps_sys_probe_pidfd_open(int pid, unsigned flags)
    int ps_sys_probe_pidfd_getfd(int pidfd, int fd)

cdef extern from "probe/probe.h":
    int probe_private_table(int fd)
    int probe_death_mark()
    int probe_waitv()
    int probe_keep_open()
    int probe_dumpable()
    int probe_userfaultfd(int flags)
    int probe_uffd_features(int uffd, uint64_t wanted, uint64_t *offered)


cdef int checked(int result) except -1:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result


def memfd() -> int:
    """A new memfd, made as a region's is."""
    return checked(ps_sys_memfd(b"pyshare doctor", 4096))


def reopen(int fd) -> int:
    """A description of our own of what a descriptor refers to, by /proc."""
    return checked(ps_sys_reopen(fd))


def ofd_take(int fd) -> None:
    """The description owns a byte of its file; BlockingIOError if another one does."""
    checked(ps_sys_ofd_take(fd, 0))


def private_table(int fd) -> None:
    """A thread had a table of its own, and this one lost nothing."""
    checked(probe_private_table(fd))


def death_mark() -> None:
    """A thread ended, and the kernel marked its word."""
    checked(probe_death_mark())


def waitv() -> None:
    """The kernel can wait for several words."""
    checked(probe_waitv())


def keep_open() -> None:
    """A mapping of a ring of io_uring kept a file open that had no descriptor any more."""
    checked(probe_keep_open())


def dumpable() -> bool:
    """Other processes of this user may look into this one."""
    return checked(probe_dumpable()) == 1


def pidfd_open(int pid, unsigned flags) -> int:
    """A descriptor of a process, or of a thread."""
    return checked(ps_sys_probe_pidfd_open(pid, flags))


def pidfd_getfd(int pidfd, int fd) -> int:
    """A copy of another process's descriptor."""
    return checked(ps_sys_probe_pidfd_getfd(pidfd, fd))


def userfaultfd(int flags) -> int:
    """A new userfaultfd, for faults of user mode only."""
    return checked(probe_userfaultfd(flags))


def uffd_features(int uffd, uint64_t wanted) -> int:
    """The userfaultfd has the features that are wanted; returns all that the kernel has."""
    cdef uint64_t offered = 0
    checked(probe_uffd_features(uffd, wanted, &offered))
    return offered


def uffd_register(int uffd, uintptr_t address, uint64_t length) -> None:
    """The userfaultfd may write-protect this range of this process."""
    checked(ps_sys_uffd_register(uffd, address, length))


def uffd_protect(int uffd, uintptr_t address, uint64_t length, bint on) -> None:
    """The range of the process to which the userfaultfd belongs is write-protected, or no longer."""
    checked(ps_sys_uffd_protect(uffd, address, length, on))


def uffd_protected(int pid, uintptr_t address) -> bool:
    """That process's pagemap says that the page is write-protected."""
    return checked(ps_sys_uffd_protected(pid, address)) == 1


def abstract_socket() -> tuple[int, int]:
    """A descriptor, and its name."""
    cdef uint32_t name = 0
    return checked(ps_sys_socket(&name)), name


def socket_ask(int socket, uint32_t name) -> None:
    """The socket of that name has been asked for a descriptor."""
    checked(ps_sys_socket_ask(socket, name))


def socket_answer(int socket, int fd) -> None:
    """Who asked, if of our user, has been sent the descriptor."""
    checked(ps_sys_socket_answer(socket, fd, 0))


def socket_take(int socket) -> tuple[int, int]:
    """The pid of who answered, 0 for another user, and the descriptor, -1 for none."""
    cdef int pid = 0, fd = -1
    cdef uint32_t number = 0
    checked(ps_sys_socket_take(socket, &pid, &fd, &number))
    return pid, fd


def address(memory) -> int:
    """Where it lies."""
    cdef Py_buffer view
    PyObject_GetBuffer(memory, &view, PyBUF_WRITABLE)
    cdef uintptr_t start = <uintptr_t>view.buf
    PyBuffer_Release(&view)
    return start
