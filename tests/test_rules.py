"""The rules of the house (ARCHITECTURE.md), as far as a machine can hold us to them.

They are about sources, not behaviour: where what may be called, which names exist, what is written beside them.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import inspect
import os
import re
import subprocess
import sysconfig
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyshare

ROOT = Path(__file__).parent.parent
EXT = ROOT / "ext"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CC = os.environ.get("CC") or "cc"


def sources_of(module: str) -> list[Path]:
    modules = PROJECT["tool"]["setuptools"]["ext-modules"]
    return [ROOT / path for one in modules if one["name"] == module for path in one["sources"] if path.endswith(".c")]


FLOORS = ["operations", "fault", "participant", "hold", "change", "pages", "shared", "process", "segment", "os"]
BINDING = sorted((EXT / "binding").glob("*.c"))  # the C that is Python's
CORE = [path for path in sources_of("pyshare._core") if path not in BINDING]
PROBE = [path for path in sources_of("pyshare._probe") if path not in CORE]
C_FILES = sorted({*EXT.rglob("*.c")} - {*BINDING})


def names(paths: list[Path]) -> list[str]:
    """Folder and file."""
    return [str(path.relative_to(EXT)) for path in paths]


def without_comments(path: Path) -> str:
    """C or Cython, with comments and texts blanked."""
    text = re.sub(r"/\*.*?\*/", " ", path.read_text(), flags=re.S)
    return re.sub(r'"(\\.|[^"\\\n])*"|//.*', '""', text)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Object files by name of the source, compiled without the crash points."""
    directory = tmp_path_factory.mktemp("objects")
    made = {}
    for source in C_FILES:
        (name,) = names([source])
        made[name] = directory / f"{source.parent.name}-{source.stem}.o"
        flags = ["-std=gnu11", "-O2", "-fPIC", "-pthread", "-fvisibility=hidden", "-ftls-model=initial-exec"]
        hardening = ["-U_FORTIFY_SOURCE", "-fno-stack-protector"]  # which some compilers add on their own
        command = [CC, *flags, *hardening, "-I", EXT, "-c", source, "-o", made[name]]
        subprocess.run(command, check=True)
    return made


@functools.cache
def symbols(path: Path) -> list[tuple[str, str, str]]:
    """(name, class, section) of an object file."""
    listed = subprocess.run(["nm", "--format=sysv", path], check=True, capture_output=True, text=True).stdout
    rows = [[cell.strip() for cell in line.split("|")] for line in listed.splitlines() if line.count("|") == 6]
    return [(row[0], row[2], row[6]) for row in rows if row[0] != "Name"]


# -- C -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [[], ["-DPS_POINTS"]], ids=["released", "with points"])
@pytest.mark.parametrize("source", C_FILES, ids=names(C_FILES))
def test_compiles_without_python_and_without_a_warning(source: Path, points: list[str], tmp_path: Path) -> None:
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wstrict-prototypes", "-Wshadow", "-Wvla"]
    command = [CC, "-std=gnu11", "-O2", "-pthread", "-fPIC", *warnings, *points, "-I", EXT, "-c", source]
    subprocess.run([*command, "-o", tmp_path / "object.o"], check=True)


@pytest.mark.parametrize("source", BINDING, ids=names(BINDING))
def test_binding_compiles_without_a_warning(source: Path, tmp_path: Path) -> None:
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wstrict-prototypes", "-Wshadow", "-Wvla"]
    python = ["-isystem", sysconfig.get_path("include")]
    command = [CC, "-std=gnu11", "-O2", "-pthread", "-fPIC", *warnings, *python, "-I", EXT, "-c", source]
    subprocess.run([*command, "-o", tmp_path / "object.o"], check=True)


PURE = {"__errno_location"} | {f"mem{end}" for end in ("cmp", "cpy", "move", "set")} | {"bcmp"}
PURE |= {f"str{end}" for end in ("chr", "rchr", "len", "nlen", "spn", "ncpy", "cmp")}
# What each file may call beside the core itself.  Nowhere malloc or stdio: the agent, a signal handler and a
# forked child before it has joined may not, and nearly everything can run in one of them.
MAY_CALL = {
    "operations/access.c": {"getpid", "madvise"},
    "operations/dirty.c": set(),
    "operations/image.c": {"close", "lseek", "madvise", "mmap", "munmap", "pread"},
    "operations/observe.c": {"madvise", "mmap", "munmap", "pread"},
    "operations/protect.c": set(),
    "operations/snapshot.c": set(),
    "operations/waiter.c": {"getcontext", "madvise", "makecontext", "mmap", "mprotect", "munmap"},
    "fault/handler.c": {"getpid", "sigaction"},
    "fault/message.c": {"fstat", "write"},
    "fault/policy.c": {"pthread_sigmask", "sigaltstack", "sigfillset"},
    "participant/agent.c": {"close", "flock", "getpid"},
    "participant/attach.c": {"munmap"},
    "participant/names.c": {"close", "fstat", "ftruncate", "pread"},
    "hold/closer.c": set(),
    "hold/held.c": set(),
    "hold/lease.c": set(),
    "hold/reclaim.c": set(),
    "change/borrow.c": {"close", "fstat", "mmap"},
    "change/change.c": set(),
    "change/freezer.c": set(),
    "change/remote.c": set(),
    "pages/claim.c": set(),
    "pages/engine.c": {"mprotect"},
    "pages/follow.c": set(),
    "pages/quarantine.c": set(),
    "pages/rights.c": set(),
    "pages/save.c": set(),
    "shared/history.c": set(),
    "shared/lock.c": set(),
    "shared/map.c": set(),
    "shared/slot.c": {"getpid"},
    "shared/states.c": set(),
    "shared/violations.c": {"pread"},
    "process/descriptor.c": {"close", "flock", "fstat", "getpid", "lseek"},
    "process/mapping.c": {"madvise", "mmap", "mprotect", "mremap", "munmap", "pread"},
    "process/process.c": {
        "dlsym",
        "getpid",
        "getppid",
        "madvise",
        "mmap",
        "pthread_atfork",
        "pthread_attr_destroy",
        "pthread_attr_init",
        "pthread_attr_setstacksize",
        "pthread_create",
        "pthread_once",
        "pthread_sigmask",
        "pthread_tryjoin_np",
        "sigfillset",
    },
    "process/signals.c": {
        "getpid",
        "mmap",
        "pthread_sigmask",
        "raise",
        "sigaction",
        "sigaddset",
        "sigaltstack",
        "sigandset",
        "sigemptyset",
        "sigisemptyset",
    },
    "process/sleep.c": {"swapcontext"},
    "segment/create.c": {"close", "fchmod", "fcntl", "ftruncate", "getpid", "madvise", "mmap", "munmap"},
    "segment/format.c": {"fcntl", "fstat", "fstatfs", "lseek", "pread"},
    "os/copy.c": set(),
    "os/file.c": {"close", "fallocate", "fcntl", "getrlimit", "open", "pwrite", "syscall"},
    "os/point.c": set(),
    "os/proc.c": {"close", "getpid", "kill", "open", "poll", "read", "readlink", "stat", "syscall"},
    "os/socket.c": {
        "bind",
        "close",
        "geteuid",
        "getsockname",
        "poll",
        "recvmsg",
        "sendmsg",
        "sendto",
        "setsockopt",
        "socket",
    },
    "os/sys.c": {
        "__sched_cpucount",
        "clock_gettime",
        "getpid",
        "getpriority",
        "getrandom",
        "sched_getaffinity",
        "sched_getscheduler",
        "sched_setscheduler",
        "sched_yield",
        "setpriority",
        "syscall",
        "write",
    },
    "os/uffd.c": {"close", "fcntl", "ioctl", "madvise", "munmap", "open", "pread", "syscall"},
    "probe/probe.c": {"close", "fcntl", "ioctl", "pipe", "poll", "prctl", "pthread_create", "pthread_join"},
}


@pytest.mark.parametrize("source", names([*CORE, *PROBE]))
def test_rooms_call_what_they_may(source: str, objects: dict[str, Path]) -> None:
    undefined = {name for name, kind, _ in symbols(objects[source]) if kind == "U"}
    core = {name for path in names(CORE) for name, kind, _ in symbols(objects[path]) if kind not in "U"}
    assert undefined - core - PURE - {"_GLOBAL_OFFSET_TABLE_"} <= MAY_CALL[source]


@pytest.mark.parametrize("source", names([*CORE, *PROBE]))
def test_state_at_file_scope_is_in_process_c(source: str, objects: dict[str, Path]) -> None:
    writable = re.compile(r"\.t?(data|bss)(?!\.rel\.ro)|\*COM\*")
    state = [name for name, _, section in symbols(objects[source]) if writable.match(section)]
    assert bool(state) == (source == "process/process.c"), state


def test_syscall_is_called_in_os_alone() -> None:
    callers = [path for path in C_FILES if re.search(r"\bsyscall\s*\(", without_comments(path))]
    assert {path.parent.name for path in callers} == {"os"}


# -- The tower ---------------------------------------------------------------------------------------------------------


def floors_below(folder: str) -> set[str]:
    """Its own, too."""
    return set(FLOORS[FLOORS.index(folder) :])


@pytest.mark.parametrize("folder", FLOORS)
def test_a_floor_includes_itself_and_those_below(folder: str) -> None:
    doors = {f"{floor}/{floor}.h" for floor in floors_below(folder)}
    doors |= {"core.h", "types.h", "os/point.h", "segment/layout.h"}
    files = sorted((EXT / folder).iterdir())
    for path in files:
        assert set(re.findall(r'#include "(.*)"', path.read_text())) <= doors, path
    assert {path.name for path in files if path.suffix == ".h"} - {"point.h", "layout.h"} == {f"{folder}.h"}


@pytest.mark.parametrize("source", names(CORE))
def test_a_floor_calls_itself_and_those_below(source: str, objects: dict[str, Path]) -> None:
    below = [name for name in names(CORE) if name.split("/")[0] in floors_below(source.split("/")[0])]
    defined = {name for path in below for name, kind, _ in symbols(objects[path]) if kind != "U"}
    ours = {name for path in names(CORE) for name, kind, _ in symbols(objects[path]) if kind in "TRBD"}
    undefined = {name for name, kind, _ in symbols(objects[source]) if kind == "U"}
    assert undefined & ours <= defined


def test_files_do_not_call_in_a_circle(objects: dict[str, Path]) -> None:
    where = {name: path for path in names(CORE) for name, kind, _ in symbols(objects[path]) if kind not in "U"}
    called = {
        path: {where[name] for name, kind, _ in symbols(objects[path]) if kind == "U" and name in where}
        for path in names(CORE)
    }
    assert list(graphlib.TopologicalSorter(called).static_order())  # CycleError names the circle


def test_core_knows_no_python() -> None:
    for path in [*CORE, *PROBE, *({*EXT.rglob("*.h")} - {EXT / "binding" / "binding.h"})]:
        assert not re.search(r"Python\.h|\bPy[A-Z_]\w+", without_comments(path)), path


FIELD = re.compile(
    r"^[ \t]*(?P<above>/\*.*?\*/)|^[ \t]*(?P<field>[^/\s{}][^/\n{}]*;)[ \t]*(?P<beside>/\*.*?\*/)?", re.S | re.M
)


def fields(body: str) -> Iterator[tuple[str, str]]:
    """(declaration, what is said of it): the comments above it, and the one on its line."""
    above = ""
    for match in FIELD.finditer(body):
        if match["above"]:
            above += match["above"]
        else:
            yield match["field"], above + (match["beside"] or "")
            above = ""


def test_every_shared_field_has_its_contract() -> None:
    structs = re.findall(r"^struct (ps_shm_\w+) \{\n(.*?)^\};", (EXT / "segment" / "layout.h").read_text(), re.S | re.M)
    assert [name for name, _ in structs] == [
        f"ps_shm_{end}"
        for end in ("snapshot", "lock", "violation", "closer", "ticket", "section", "record", "ring", "slot", "header")
    ]
    for name, body in structs:
        declared = list(fields(body))
        assert len(declared) == re.sub(r"/\*.*?\*/", "", body, flags=re.S).count(";"), f"{name}: not all were looked at"
        for field, said in declared:
            assert re.search(r"\bW: ", said), f"{name}: {field} does not say who writes it"
            assert re.search(r"\bR: ", said), f"{name}: {field} does not say who reads it"


# -- Labels ----------------------------------------------------------------------------------------------------------

LABEL = r"\b[A-Z]\d_[a-z]+\b"


def test_labels_agree() -> None:
    """Crash points in C, steps of the model, rows of the state table."""
    code = {label for path in CORE for label in re.findall(rf"PS_POINT\(({LABEL})\)", path.read_text())}
    model = {label for path in (ROOT / "spec").glob("*.pml") for label in re.findall(LABEL, path.read_text())}
    table = set(re.findall(rf"^\| ({LABEL}) \|", (ROOT / "ARCHITECTURE.md").read_text(), re.M))
    assert code == model == table
    assert len(code) == 46


def test_labels_elsewhere_exist() -> None:
    table = set(re.findall(rf"^\| ({LABEL}) \|", (ROOT / "ARCHITECTURE.md").read_text(), re.M))
    for path in ours(".c", ".h", ".py", ".pml", ".md"):
        assert set(re.findall(LABEL, path.read_text())) <= table, path


# -- Every file --------------------------------------------------------------------------------------------------------


def ours(*suffixes: str) -> list[Path]:
    """The files of the project with these suffixes, without what is generated."""
    rooms = ["docs", "ext", "pyshare", "tests", "spec", "examples", ".ci"]
    found = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"]  # it is one in a worktree
    found += [path for room in rooms for path in (ROOT / room).rglob("*")]
    found = [path for path in found if path.is_file() and "__pycache__" not in path.parts]
    return sorted(path for path in found if path.suffix in suffixes)


def test_c_files_begin_with_their_header() -> None:
    for path in ours(".c", ".h", ".pml"):
        header = path.read_text().split("*/", 1)[0]
        assert re.match(rf"/\* {re.escape(path.name)} - \S", header), path
        assert header.count("\n") < 30, path


def test_python_files_begin_with_their_docstring() -> None:
    for path in ours(".py", ".pyi"):
        assert ast.get_docstring(ast.parse(path.read_text())), path
    for path in ours(".pyx"):
        assert re.match(r'(#.*\n)*"""', path.read_text()), path


def test_other_files_say_what_they_are() -> None:
    for path in (ROOT / "Makefile", ROOT / "mkdocs.yml", ROOT / "pyproject.toml", ROOT / "tests" / "stubtest.txt"):
        assert path.read_text().startswith("# "), path
    for path in ours(".md"):
        assert path.read_text().startswith("# "), path


def test_no_path_of_a_machine() -> None:
    for path in [
        *ours(".c", ".h", ".py", ".pyi", ".pyx", ".pml", ".md", ".toml", ".cfg", ".txt", ""),
        ROOT / "MANIFEST.in",
    ]:
        assert not re.search(r"/(home|root|work|Users|tmp)/\w", path.read_text()), path


def test_package_uses_no_ctypes() -> None:
    for path in (ROOT / "pyshare").rglob("*.py*"):
        if path.suffix in (".py", ".pyi"):
            assert "ctypes" not in path.read_text(), path


# -- The interface -----------------------------------------------------------------------------------------------------

SIGNATURES = {
    "create": "(name=None, *, size, mode=384, prot=3, max_participants=1024, engine='auto', replace=False, "
    "on_violation='die', reserve=False, huge=None, numa=None, lock_memory=False)",
    "attach": "(name_or_fd, *, engine='auto', timeout=DEFAULT, readonly=False)",
    "unlink": "(name)",
    "names": "()",
    "set_default_timeout": "(seconds)",
    "Region.close": "(self)",
    "Region.fileno": "(self)",
    "Region.readonly_fd": "(self)",
    "Region.numpy": "(self, dtype, shape=None, offset=0)",
    "Region.mprotect": "(self, offset, length, prot, *, timeout=DEFAULT)",
    "Region.protection": "(self, offset)",
    "Region.protections": "(self)",
    "Region.participants": "(self)",
    "Region.violations": "(self)",
    "Region.on_violation": "(self, policy=None)",
    "Region.guard": "(self)",
    "Region.read": "(self, offset, length)",
    "Region.write": "(self, offset, data)",
    "Region.readinto": "(self, fd, offset, length, *, timeout=DEFAULT)",
    "Region.recv_into": "(self, sock, offset, length, *, flags=0, timeout=DEFAULT)",
    "Region.lease": "(self, offset, length, *, timeout=DEFAULT, window=False)",
    "Region.lock": "(self, index, *, timeout=DEFAULT)",
    "Region.frozen": "(self, *, timeout=DEFAULT)",
    "Region.snapshot": "(self, *, timeout=DEFAULT)",
    "Region.dirty": "(self, since)",
    "Lease.release": "(self)",
    "Frozen.release": "(self)",
    "Lock.release": "(self)",
    "Region.restore": "(self, source, *, timeout=DEFAULT)",
    "Snapshot.read": "(self, offset, length)",
    "Snapshot.save": "(self, path, *, since=None, progress=False)",
    "Snapshot.runs": "(self)",
    "Image.read": "(self, offset, length)",
    "Image.check": "(self)",
    "Snapshot.finish": "(self)",
    "Snapshot.close": "(self)",
}
SIGNATURES |= {
    "Region.mprotect_async": "(self, offset, length, prot, *, timeout=DEFAULT)",
    "Region.lease_async": "(self, offset, length, *, timeout=DEFAULT, window=False)",
    "Region.lock_async": "(self, index, *, timeout=DEFAULT)",
    "Region.changes": "(self, *, since=None)",
}
PROPERTIES = ["name", "readonly", "size", "page_size", "address", "generation", "engine", "closed", "buf"]
ERRORS = {
    "ShareError": (Exception, []),
    "ProtectionError": (
        PermissionError,
        ["region", "offset", "required", "actual", "generation", "author", "file", "line"],
    ),
    "PropagationTimeout": (TimeoutError, ["pids", "generation"]),
    "RegionExists": (FileExistsError, []),
    "RegionNotFound": (FileNotFoundError, []),
    "RegionClosed": (ValueError, []),
    "ParticipantLimit": (Exception, []),
    "CorruptRegion": (Exception, ["field"]),
}


def lookup(dotted: str) -> Any:
    found: Any = pyshare
    for part in dotted.split("."):
        found = getattr(found, part)
    return found


def plain_signature(function: Any) -> str:
    signature = inspect.signature(function)
    bare = [
        parameter.replace(
            annotation=inspect.Parameter.empty,
            default=int(parameter.default) if isinstance(parameter.default, pyshare.Prot) else parameter.default,
        )
        for parameter in signature.parameters.values()
    ]
    return str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty))


@pytest.mark.parametrize("dotted", SIGNATURES)
def test_signature(dotted: str) -> None:
    assert plain_signature(lookup(dotted)) == SIGNATURES[dotted]


@pytest.mark.parametrize("name", PROPERTIES)
def test_property(name: str) -> None:
    assert isinstance(inspect.getattr_static(pyshare.Region, name), property)


@pytest.mark.parametrize("name", ERRORS)
def test_error(name: str) -> None:
    base, attributes = ERRORS[name]
    error = lookup(name)("what")
    assert isinstance(error, pyshare.ShareError)
    assert isinstance(error, base)
    assert all(hasattr(error, attribute) for attribute in attributes)


def test_protections_are_those_of_mmap() -> None:
    import mmap

    assert [pyshare.NONE, pyshare.READ, pyshare.WRITE, pyshare.READ_WRITE, pyshare.EXEC] == [
        0, mmap.PROT_READ, mmap.PROT_WRITE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.PROT_EXEC,
    ]  # fmt: skip


def public() -> Iterator[tuple[str, Any]]:
    for name in pyshare.__all__:
        thing = getattr(pyshare, name)
        if inspect.isclass(thing) or inspect.isfunction(thing):
            yield name, thing
    for cls in (pyshare.Region, pyshare.Observer):
        for name, thing in inspect.getmembers_static(cls):
            if not name.startswith("_") and (inspect.isfunction(thing) or isinstance(thing, property)):
                yield f"{cls.__name__}.{name}", thing


@pytest.mark.parametrize(("name", "thing"), list(public()))
def test_docstring_is_a_sentence(name: str, thing: Any) -> None:
    assert thing.__doc__, name
    first = thing.__doc__.strip().split("\n\n")[0].split("\n")[0]
    assert first[0].isupper() or first[0] in "`(", name
    assert re.search(r"[.:;]", thing.__doc__.strip()), name


def test_names_are_sorted_and_complete() -> None:
    flat = {name for name in vars(pyshare) if not name.startswith("_") and not inspect.ismodule(getattr(pyshare, name))}
    assert flat == set(pyshare.__all__)
