"""interpreter.pxi: part of _core.pyx: what else in the interpreter has to know of regions: numpy's constructor, signal masks, faulthandler.

Each is wrapped once, for good, when the first region is attached.
"""

# numpy.ndarray(buffer=region) would keep the region itself and no buffer, so that close() could not know of the array.
# Whoever asks ndarray for memory of ours gets the same by a memoryview.

cdef newfunc ndarray_new = NULL


cdef bint keeps_itself(thing):
    return isinstance(thing, (Mapped, Lease, Snapshot))


cdef object held_ndarray_new(type cls, PyObject *arguments, PyObject *keywords):
    """ndarray.__new__(cls, shape, dtype, buffer, ...)"""
    held = <tuple>arguments
    if len(held) > 2 and keeps_itself(held[2]):
        held = (*held[:2], memoryview(held[2]), *held[3:])
    if keywords is NULL or not keeps_itself((<dict>keywords).get("buffer")):
        return ndarray_new(cls, <PyObject *>held, keywords)
    named = {**<dict>keywords, "buffer": memoryview((<dict>keywords)["buffer"])}
    return ndarray_new(cls, <PyObject *>held, <PyObject *>named)


cdef hold_arrays():
    """Where numpy is loaded: take the place of ndarray's constructor, also in the types that have inherited it."""
    global ndarray_new
    wrap_numpy()
    if ndarray_new is not NULL:
        return
    ndarray = getattr(sys.modules.get("numpy"), "ndarray", None)
    if not isinstance(ndarray, type):
        return
    ndarray_new = (<PyTypeObject *>ndarray).tp_new
    types = [ndarray]
    for cls in types:
        if (<PyTypeObject *>cls).tp_new is ndarray_new:
            (<PyTypeObject *>cls).tp_new = <newfunc>held_ndarray_new
        types.extend(type.__subclasses__(cls))


# A thread that blocks SIGSEGV or SIGBUS dies at its first fault, also at one that is mended, as of a page that a snapshot
# has to have first.  Programs block all that they can for the sake of sigwait(2), which is never for these two.

FAULTS = frozenset((signal.SIGSEGV, signal.SIGBUS))
cdef object pthread_sigmask = None


def _pthread_sigmask(how, mask):
    """pthread_sigmask(how, mask): as signal's, which it replaces; SIGSEGV and SIGBUS are never blocked."""
    return pthread_sigmask(how, mask if how == signal.SIG_UNBLOCK else set(mask) - FAULTS)


cdef hold_signals():
    global pthread_sigmask
    if pthread_sigmask is None:
        pthread_sigmask = signal.pthread_sigmask
        signal.pthread_sigmask = _pthread_sigmask


# faulthandler.enable() puts its handlers above ours, and disable() puts back those that it found: ours are gone with its
# own, if we came later.  Participants that are woken for a change notice; those that are changed from outside would not.

def _faulthandler_changed(int descriptor, bint handlers):
    ps_tell_also(descriptor)
    if handlers:
        ps_fault_tracer(descriptor >= 0)


cdef hold_handlers():
    """Be told when faulthandler is enabled or disabled."""
    if _pyshare_faulthandler.listener is None:
        _pyshare_faulthandler.listener = _faulthandler_changed
        ps_tell_also(_pyshare_faulthandler.descriptor)
