"""names.pxi: part of _core.pyx: entries of names, as the core reads and writes them.

Not here: the directory of entries (pyshare/_names.py).
"""


def name_format(int name_fd, int region_fd):
    cdef int rc = ps_name_format(name_fd, region_fd)
    if rc:
        raise_code(rc, "create")


def name_find(int name_fd):
    """A descriptor of the region that an entry leads to; -EACCES or -ENOENT if no holder can be reached, or none found."""
    cdef int fd = -1
    cdef int rc = ps_name_find(name_fd, &fd)
    if rc == -errno.EACCES or rc == -errno.ENOENT:
        return rc
    if rc:
        raise_code(rc, "attach", "name's entry")
    return fd


def name_leads_to(int name_fd, int region_fd):
    return ps_name_leads_to(name_fd, region_fd) == 1


def name_of(int region_fd):
    """The name a region was created with, or None; CorruptRegion, OSError."""
    cdef char name[PS_NAME_MAX + 8]
    cdef const char *field = NULL
    cdef int rc = ps_name_of(region_fd, name, &field)
    if rc:
        raise_code(rc, "attach", None if field is NULL else field.decode())
    return name.decode() or None
