"""arguments.pxi: part of _core.pyx: what a caller gives, checked: timeouts, integers, protections, ranges.

A wrong argument raises before anything is changed, with what was given and what was expected.
"""

PAGE_SIZE = 4096
POLICIES = {"die": PS_DIE, "raise": PS_RAISE, "wait": PS_WAIT}
OUTCOMES = {PS_DIE: "died", PS_RAISE: "raised", PS_WAIT: "waited"}
ENGINES = {"auto": PS_ENGINE_AUTO, "mprotect": PS_ENGINE_MPROTECT, "uffd": PS_ENGINE_UFFD}
THP, LOCK, RESERVED = PS_REGION_THP, PS_REGION_LOCK, PS_REGION_RESERVED
MAX_PARTICIPANTS = PS_SLOTS_MAX
NAME_MAX = PS_NAME_MAX
LARGE = 1 << 16  # bytes from which a copy lets other threads run

cdef enum:
    FEW = 16  # pages that are taken without letting other threads run, where nobody has them


class _Default(enum.Enum):
    DEFAULT = "DEFAULT"

    def __repr__(self):
        return "DEFAULT"


DEFAULT = _Default.DEFAULT
cdef object default_timeout = 5.0


def set_default_timeout(seconds):
    """What ``timeout=DEFAULT`` means from now on in this process: seconds, or None to wait for ever. 5.0 at first."""
    global default_timeout
    deadline_of(seconds)
    default_timeout = seconds


def deadline_of(timeout):
    """A timeout in seconds, None or DEFAULT, as an absolute deadline of the core."""
    if timeout is DEFAULT:
        timeout = default_timeout
    if timeout is None:
        return INT64_MAX
    if not isinstance(timeout, (int, float)) or isinstance(timeout, bool):
        raise TypeError(f"timeout must be seconds or None, not {timeout!r}")
    if not timeout >= 0:  # nor NaN
        raise ValueError(f"timeout must be 0 or more seconds, or None to wait for ever, not {timeout!r}")
    if timeout > 1e9:
        return INT64_MAX
    return ps_sys_now() + int(timeout * 1_000_000_000)


def index_of(value):
    """The integer; None if it is none, or a bool, which is a mistake wherever a number is expected."""
    if type(value) is int:
        return value
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def integer(value, str what):
    number = index_of(value)
    if number is None:
        raise TypeError(f"{what} must be an integer, not {value!r}")
    return number


def protection_bits(prot):
    bits = index_of(prot)
    if bits is None:
        raise TypeError(f"prot must be a Prot or an int of mmap.PROT_* bits, not {prot!r}")
    if bits < 0 or bits > 7:
        raise ValueError(f"prot {prot!r} has unknown bits; expected a combination of READ, WRITE and EXEC, or NONE")
    return bits


cdef check_pages(offset, length, size, uint64_t page):
    """A range of whole pages, or up to the region's end."""
    if offset < 0 or offset % page:
        raise ValueError(f"offset must be a multiple of the page size {page}, not {offset}")
    if length <= 0:
        raise ValueError(f"length must be more than 0 bytes, not {length}")
    end = offset + length
    if end > size and end > (size + page - 1) // page * page:
        raise ValueError(f"the range {offset} to {end} ends behind the region's {size} bytes")
    if end % page and end != size:
        raise ValueError(
            f"a range ends at a multiple of the page size {page} or at the region's size {size}; "
            f"{offset} + {length} = {end} is neither")
