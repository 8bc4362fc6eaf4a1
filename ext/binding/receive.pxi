"""receive.pxi: part of _core.pyx: bytes from descriptors, without a wait that no signal ends.


"""


cdef bint await_readable(int fd, int64_t deadline) except -1:
    """Or closed at the other end; False after the deadline.  A signal just before poll() is served within a second."""
    cdef pollfd watched
    cdef int rc, error
    cdef int64_t left
    while True:
        left = max(0, deadline - ps_sys_now()) // 1_000_000
        watched.fd, watched.events = fd, POLLIN
        with nogil:
            rc = poll(&watched, 1, <int>min(left, 1000))
            error = libc_errno
        if rc > 0 or (rc == 0 and not left):
            return rc
        if rc < 0 and error != errno.EINTR:
            raise OSError(error, os.strerror(error))
        PyErr_CheckSignals()


cdef Py_ssize_t receive(int fd, char *to, size_t length, int flags) except? -1:
    """Bytes, or -errno: -EAGAIN where nothing is there any more, without a wait; of a file that cannot say so with one."""
    cdef Py_ssize_t got
    cdef iovec into
    into.iov_base, into.iov_len = to, length
    with nogil:
        if flags >= 0:
            got = recv(fd, to, length, flags | MSG_DONTWAIT)
        else:
            got = preadv2(fd, &into, 1, -1, RWF_NOWAIT)
            if got < 0 and (libc_errno == EOPNOTSUPP or (libc_errno == EAGAIN and is_file(fd))):
                got = read(fd, to, length)
        if got < 0:
            got = -libc_errno
    return got
