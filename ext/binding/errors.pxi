"""errors.pxi: part of _core.pyx: the one table from results of the core to exceptions, and the sentences of those who waited in vain.

Not here: the classes (pyshare/_errors.py), the exception of a forbidden access (violation.pxi).
"""


cdef raise_code(int code, str doing, str field=None):
    """The one table from results of the core to exceptions."""
    if code == PS_ECLOSED:
        raise _errors.RegionClosed(
            f"{doing}: the region is closed in this process; attach it again by its name or a descriptor")
    if code == PS_ECORRUPT:
        raise _errors.CorruptRegion(
            f"{doing}: not a pyshare region, or a damaged one: its {field} cannot be right", field=field)
    if code == PS_EFULL:
        raise _errors.ParticipantLimit(
            f"{doing}: every slot of the region is taken; create it with a larger max_participants")
    if code == PS_ENESTED:
        raise _errors.ShareError(
            f"{doing}: this thread holds a lease on some of these pages, and would wait for itself; release it first")
    if code == PS_EFROZEN:
        raise _errors.ShareError(
            f"{doing}: this thread has frozen the region itself, and would wait for itself; thaw it first")
    if code == PS_EMEMLOCK:
        limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
        raise OSError(errno.ENOMEM if limit else errno.EPERM,
            f"{doing}: the region's memory is to be locked, and this process may lock {limit} bytes in all "
            "(RLIMIT_MEMLOCK; ulimit -l); that has to be more than its data and control segment, and than twice its "
            "data for leases by window, readinto and recv_into")
    if code == -errno.EOWNERDEAD:
        raise OSError(errno.EOWNERDEAD,
            f"{doing}: the native thread that follows changes was ended as it began; a seccomp filter that ends threads "
            "does that, and this one has to let it pass")
    if code == PS_EREGIONS:
        raise OSError(errno.EMFILE, f"{doing}: this process has {PS_REGIONS_MAX} regions open, which is the limit")
    raise OSError(-code, f"{doing}: {os.strerror(-code)}")


cdef raise_opening(int code, str doing, int fd, const char *field):
    """The same, of a region that could not be mapped: there may be too little address space."""
    cdef uint64_t needed = 0, most = 0
    if code == -errno.ENOMEM and not ps_room(fd, &needed, &most):
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        takes = f"{doing}: {os.strerror(errno.ENOMEM)}: the region takes {needed} bytes of address space"
        if needed > most:
            raise OSError(errno.ENOMEM, f"{takes}, and one can have {most}: make it smaller, or several of it")
        if limit != resource.RLIM_INFINITY:
            raise OSError(errno.ENOMEM, f"{takes}, up to 11 times its size, and this process may have {limit} in all "
                          "(RLIMIT_AS; ulimit -v): raise the limit, or make the region smaller")
    raise_code(code, doing, None if field is NULL else field.decode())


cdef list pids_of(ps_outcome *outcome):
    cdef uint32_t i
    return sorted({outcome.pids[i] for i in range(outcome.silent)})


cdef raise_undone(ps_outcome *outcome, str doing):
    late = ", ".join(map(str, pids_of(outcome)))
    error = OSError(outcome.error, f"{doing}: pid {outcome.failed_pid} could not apply the change, so it was undone "
                    f"everywhere: {os.strerror(outcome.error)}"
                    + (f"; pid {late} has not acknowledged that in time" if late else ""))
    error.pid = outcome.failed_pid
    raise error


cdef raise_timeout(ps_outcome *outcome, str doing):
    pids = pids_of(outcome)
    who = ", ".join(map(str, pids))
    if outcome.generation:
        message = (f"{doing}: change {outcome.generation} is made, but pid {who} has not acknowledged it in time; "
                   "it applies the change before anything else it acknowledges")
    elif pids:
        message = (f"{doing}: nothing was changed: pid {who} held a lease on these pages or the region's lock, had it "
                   "frozen, or was silent, until the timeout")
    elif doing == "snapshot":
        message = (f"{doing}: it was given up, since a participant could not follow or others waited to store, and begun "
                   "anew, until the timeout")
    else:
        message = (f"{doing}: nothing was changed: pages that a snapshot needs were being saved until the timeout; "
                   "call finish() of the snapshot first")
    raise _errors.PropagationTimeout(message, pids=pids, generation=outcome.generation or None)


_LEASED = "held a lease on some of these pages, or kept leases from them"
_IN_THE_WAY = {  # what those did whom a timeout names
    "lease": _LEASED,
    "readinto": _LEASED,
    "recv_into": _LEASED,
    "lock": "held it",
    "frozen": "held a lease or the region's lock, had it frozen, or was silent",
}


cdef raise_held(ps_outcome *outcome, str doing):
    pids = pids_of(outcome)
    who = "nobody held it, but others were before us"
    if pids:
        who = f"pid {', '.join(map(str, pids))} {_IN_THE_WAY[doing]}"
    raise _errors.PropagationTimeout(f"{doing}: {who}, until the timeout; nothing is held", pids=pids)


cdef warn_dropped(str what):
    warnings.warn(f"{what} was dropped while held; release it, or use it in a with statement", ResourceWarning)
