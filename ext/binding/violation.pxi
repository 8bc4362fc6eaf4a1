"""violation.pxi: part of _core.pyx: the exception of a forbidden access, and Guard.

Not here: when an access is forbidden, and what becomes of it (ext/fault/handler.c); how the thread that made it is told
(ext/binding/exception.c, ext/binding/wrappers.c).
"""

PROTECTIONS = {0: "NONE", 1: "READ", 2: "WRITE", 3: "READ_WRITE", 4: "EXEC"}


cdef explain(error, str doing, const char *name, uint64_t offset, uint64_t page_size, uint32_t required, uint32_t actual,
             ps_author author, file=None, line=None):
    """A ProtectionError's message and attributes; no Python code runs. `offset` is that of the byte."""
    region = name.decode() or None
    since = (f"since a change older than the latest 1,024" if not author.known
             else f"since change {author.generation} by pid {author.pid}" if author.generation
             else f"since it was created by pid {author.pid} (change 0)")
    whole = "the region" if region is None else f"region {region!r}"
    place = f", at {file}:{line}" if file else ""
    OSError.__init__(
        error, f"{doing}: page {offset // page_size} (offset {offset}) of {whole} is {PROTECTIONS.get(actual, actual)} "
        f"{since}; {PROTECTIONS.get(required, required)} is needed{place}")
    error.errno = errno.EACCES
    error.region = region
    error.offset = offset // page_size * page_size
    error.required, error.actual = required, actual
    error.generation = author.generation if author.known else None
    error.author = author.pid if author.known else None
    error.file, error.line = file, line


class Violation(_errors.ProtectionError):
    """What a thread is told of its forbidden access; made without arguments, by the interpreter too."""

    def __init__(self):
        cdef ps_violation_t violation = violation_of_thread()[0]
        code = None if due_of_thread.code is NULL else <object>due_of_thread.code
        line = due_of_thread.line or None
        if not violation.count:
            super().__init__("a forbidden access, of which no more is known")
            return
        ps_forget()
        explain(self, "store" if violation.required & 2 else "load", violation.region, violation.offset,
                violation.page_size, violation.required, violation.actual, violation.author,
                getattr(code, "co_filename", None), line)

    def __reduce__(self):
        return _errors._restore, (_errors.ProtectionError, self.args, dict(self.__dict__))


Violation.__name__ = Violation.__qualname__ = "ProtectionError"
Violation.__module__ = "pyshare"

cdef bint raising = False  # some region of this process has had a policy that raises


cdef expect_violations():
    """From now on forbidden accesses may raise in this process."""
    global raising
    if not raising:
        # No function of this module, where the interpreter looks for nothing.
        function = eval("lambda: None", {})
        if not raising:  # else another thread has come in between; from here on none does
            ps_wrap_builtins()
            ps_expect_violations(Violation, function)
            raising = True
    wrap_numpy()


cdef wrap_numpy():
    if raising and "numpy" in sys.modules:
        ps_wrap_numpy(sys.modules["numpy"])


@cython.final
cdef class Guard:
    """A block at whose end this thread is told of its forbidden accesses, whatever made them; from Region.guard().

    Exact for all code, where an item assignment by ctypes, say, is told of a few instructions later. For regions whose
    policy here is "raise", or "wait" where the wait was ended. May be used again.

    An exception that is on its way out of the block stays what it is, with the ProtectionError as its context.
    """

    def __init__(self):
        raise TypeError("make a guard with region.guard()")

    def __enter__(self):
        due_of_thread.guards += 1
        return self

    def __exit__(self, kind, error, trace):
        if due_of_thread.guards:  # else it was entered in another thread
            due_of_thread.guards -= 1
        cdef PyObject *told = ps_take()
        if told is NULL:
            return
        if error is not None:
            ps_chain(error, told)
            return
        try:
            raise <object>told
        finally:
            Py_DECREF(<object>told)
