"""dirty.pxi: part of _core.pyx: which pages were written since a moment, and writing pages whatever their protection.

Not here: what that is for (pyshare/_image.py, Region.restore).
"""


def dirty_pages(Handle handle not None, since):
    """Runs (first page, pages) that may have been written since a generation, or were since a snapshot."""
    cdef Holding holding = (<Snapshot>since).held("dirty") if isinstance(since, Snapshot) else None
    cdef uint64_t generation = holding.at.generation if holding is not None else <uint64_t>since
    cdef uint64_t pages = 0, page, first
    cdef const ps_snapshot *snapshot = NULL if holding is None else &holding.at
    cdef int rc
    cdef uint8_t *map
    runs = []
    handle.enter("dirty")
    try:
        pages = (ps_size(handle.region) + PS_PAGE_SIZE - 1) // PS_PAGE_SIZE
        if holding is not None and not ps_snapshot_of(handle.region, snapshot):
            raise ValueError(f"{since!r} is a snapshot of another region")
        page = handle.unit() // PS_PAGE_SIZE
        marks = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>((pages + page - 1) // page * page))  # of whole units
        map = <uint8_t *>PyBytes_AS_STRING(marks)
        with nogil:
            rc = ps_dirty(handle.region, snapshot, generation, map)
        if rc:
            raise_lost(rc, "dirty")
        page = 0
        while page < pages:
            first = page
            while page < pages and map[page] == map[first]:
                page += 1
            if map[first]:
                runs.append((first, page - first))
        return runs
    finally:
        handle.leave()


def put_pages(Handle handle not None, uint64_t offset, data):
    """The pages from `offset` on are those of `data`, whatever their protection; zeros become holes.

    For whoever has the region frozen: nobody else stores, and nobody has a lease.
    """
    cdef Py_buffer source
    cdef int rc
    PyObject_GetBuffer(data, &source, PyBUF_SIMPLE)
    try:
        check_pages(offset, source.len, ps_size(handle.region) if handle.region is not NULL else 0, PS_PAGE_SIZE)
        handle.enter("restore")
        try:
            while True:
                with nogil:
                    rc = ps_put(handle.region, offset, source.buf, <uint64_t>source.len)
                if rc != PS_ESIGNAL:
                    break
                handle.serve_signals("restore")  # nothing of it is there
            if rc:
                raise_code(rc, "restore", handle.corrupt_field())
        finally:
            handle.leave()
    finally:
        PyBuffer_Release(&source)
