"""A seed -> a plan: the region, its processes and their threads, what each does step by step, and which trouble comes.

Lives here: everything that is decided at random.  Not here: how a step is done (steps.py); when, nobody decides.
Invariants
 1. The same seed and choices are the same plan, on every machine; a plan is JSON, and can be shortened by hand.
 2. Nothing in a plan can wait for itself.  Locks come before leases, and leases in ascending order of pages; who holds
    a lease changes only pages above it, and takes no lock, snapshot or freeze.  So a call that is patient, and times
    out though nobody was stopped, is a finding.
"""

from __future__ import annotations

import random
from typing import Any

from histories.words import READ, READ_WRITE

Plan = dict[str, Any]
Step = dict[str, Any]

PATIENT = 3.0  # seconds: a timeout of this length comes only where somebody is stopped
PROTECTIONS = [READ] * 8 + [READ_WRITE] * 8 + [0, 0, 2, 4, 5, 6, 7, 7]

STORES = [
    "view",
    "view",
    "numpy",
    "ctypes",
    "write",
    "pack",
    "fill",
    "syscall",
    "flat",
    "real",
    "nditer",
    "copyto",
    "out",
]
LOADS = ["read", "read", "view", "numpy", "ctypes", "bag", "join", "concat", "iterate"]
ENDS = ["release", "release", "with", "handed", "dropped"]
ALL = [
    "change", "store", "load", "transact", "nine", "lock", "freeze", "snapshot", "look", "save", "pass", "adopt",
    "drop", "restore", "dirty", "generation", "readinto", "receive", "send", "fork", "attach", "observe",
    "pour", "stem", "tls", "churn",
]  # fmt: skip
SELDOM = {"fork": 0.1, "attach": 0.15, "observe": 0.2, "nine": 0.3, "save": 0.3, "pass": 0.3,
          "restore": 0.5, "freeze": 0.5, "generation": 0.5, "tls": 0.5, "churn": 0.1}  # fmt: skip
TROUBLES = ["kill", "stop", "term", "int", "point", "ended"]
EXTRAS = ["gc", "trace", "profile", "profiler", "descriptors", "mappings", "blocked", "masked", "closerange"]
BULK = 8192  # pages of a part that is stored to at once
POINTS = [
    "C1_lock", "C3_attempt", "C4_map", "C5_publish", "C6_await", "C7_complete", "A2_apply", "R1_claim", "R2_remote",
    "H1_take", "H2_open", "H3_close", "H4_release", "K1_close", "K2_wait", "F1_own", "F2_keep", "F3_freeze", "F4_thaw",
    "S1_prepare", "S2_protect", "S3_drain", "S4_active", "S5_open", "S6_save", "J1_claim", "J2_lock", "J3_apply",
]  # fmt: skip
ENDINGS = [  # where a thread may be ended alone, as by a seccomp filter: it does not have the interpreter there
    "J1_claim", "J1_claim", "J2_lock", "J3_apply", "J4_live", "A1_wait", "A2_apply", "A4_ack",
    "C1_lock", "C2_save", "C3_attempt", "C4_map", "C5_publish", "C6_await", "C7_complete", "R1_claim", "R2_remote",
    "K1_close", "F1_own", "F2_keep", "F3_freeze", "F4_thaw",
    "S1_prepare", "S2_protect", "S3_drain", "S4_active", "S5_open",
]  # fmt: skip


class _Deviser:
    """Devises the steps of one thread."""

    def __init__(self, rng: random.Random, plan: Plan, weights: dict[str, float]) -> None:
        self._rng, self._plan = rng, plan
        self._names, self._weights = list(weights), list(weights.values())

    def steps(self, count: int) -> list[Step]:
        names = self._rng.choices(self._names, self._weights, k=count)
        return [self._step(name) for name in names]

    def _step(self, name: str) -> Step:
        return {"do": name, **getattr(self, f"_{name}")()}

    def _range(self, low: int = 0, most: int = 4) -> Step:
        """Of hot pages from `low` on."""
        rng, hot = self._rng, len(self._plan["hot"])
        at = rng.randrange(low, hot)
        return {"at": at, "count": min(rng.choice([1, 1, 1, 2, most, hot]), hot - at)}

    def _patience(self) -> Step:
        return {"timeout": PATIENT if self._rng.random() < 0.9 else self._rng.choice([0.0, 0.001, 0.03, 0.2, 0.5])}

    def _page(self) -> Step:
        return {"at": self._rng.randrange(len(self._plan["hot"]))}

    def _pause(self) -> int:
        """Turns of a loop, some 20 ns each."""
        return int(10 ** self._rng.uniform(0, 3.5))

    def _change(self, low: int = 0) -> Step:
        return {**self._range(low), "prot": self._rng.choice(self._plan["protections"]), **self._patience()}

    def _churn(self) -> Step:
        prots = [self._rng.choice(self._plan["protections"]) for _ in range(2)]
        step = {**self._range(), "prots": prots, "turns": int(10 ** self._rng.uniform(0.5, 3.3)), **self._patience()}
        if self._plan["mood"] == "storm":
            step |= {"at": 0, "count": len(self._plan["hot"]), "turns": 1000}
        elif self._plan["mood"] == "gather":
            step |= {"prots": [0, READ_WRITE], "turns": 100}
        return step

    def _store(self) -> Step:
        bold = self._rng.random() < 0.05  # also where it is forbidden
        return {**self._page(), "means": self._rng.choice(STORES), "bold": bold}

    def _load(self) -> Step:
        means = self._rng.choice(LOADS)
        if self._plan["mood"] == "gather":
            return {**self._page(), "means": "bag", "bold": True}
        return {**self._page(), "means": means, "bold": self._rng.random() < 0.05}

    def _transact(self, low: int = 0, depth: int = 0) -> Step:
        rng, step = self._rng, {**self._range(low), **self._patience()}
        step |= {"window": rng.random() < 0.4, "pause": self._pause(), "means": rng.choice(["view", "view", "numpy"])}
        step |= {"end": rng.choice(ENDS), "inner": []}
        above = step["at"] + step["count"]
        if depth < 2 and above < len(self._plan["hot"]) and rng.random() < 0.25:
            inner = rng.choice(["transact", "transact", "change"])
            more = self._transact(above, depth + 1) if inner == "transact" else self._change(above)
            step["inner"] = [{"do": inner, **more}]
        return step

    def _nine(self) -> Step:
        return {"window": self._rng.random() < 0.5, "order": self._rng.sample(range(9), 9), **self._patience()}

    def _lock(self) -> Step:
        inner = [self._step("change" if self._rng.random() < 0.5 else "transact")] if self._rng.random() < 0.2 else []
        step = {"index": self._rng.randrange(3), "pause": self._pause(), "end": self._rng.choice(ENDS), "inner": inner}
        if self._plan["mood"] == "queue":
            step |= {"index": 0, "inner": [], "keep": 0.05}  # seconds: who waits for a while gets in line
        return {**step, **self._patience()}

    def _freeze(self) -> Step:
        return {
            "looks": self._rng.randrange(4),
            "pause": self._pause(),
            "end": self._rng.choice(ENDS),
        } | self._patience()

    def _snapshot(self) -> Step:
        return {"looks": self._rng.choice([1, 2, 2, 3]), "pause": self._pause(), "keep": self._rng.random() < 0.3} | (
            self._patience() | {"means": self._rng.choice(["read", "read", "view"])}
        )

    def _look(self) -> Step:
        return {"which": self._rng.randrange(8), "means": self._rng.choice(["read", "view"])}

    def _save(self) -> Step:
        since = self._rng.randrange(8) if self._rng.random() < 0.6 else None
        return {"which": self._rng.randrange(8), "since": since}

    def _pass(self) -> Step:
        return {"which": self._rng.randrange(8), "to": self._rng.randrange(64)}

    def _adopt(self) -> Step:
        return {"keep": self._rng.random() < 0.3}

    def _drop(self) -> Step:
        return {"which": self._rng.randrange(8), "how": self._rng.choice(["close", "del"])}

    def _restore(self) -> Step:
        return {"which": self._rng.randrange(8), "file": self._rng.random() < 0.3} | self._patience()

    def _dirty(self) -> Step:
        return {"since": self._rng.choice(["generation", "snapshot"]), "which": self._rng.randrange(8)}

    def _generation(self) -> Step:
        return {}

    def _readinto(self) -> Step:
        return self._page() | self._patience()

    def _receive(self) -> Step:
        return self._page() | self._patience()

    def _tls(self) -> Step:
        return self._page() | self._patience()

    def _send(self) -> Step:
        return {"to": self._rng.randrange(64), "count": self._rng.randrange(1, 4)}

    def _few(self) -> list[Step]:
        few = ["change", "store", "store", "load", "transact", "lock", "snapshot", "dirty", "freeze"]
        return [self._step(name) for name in self._rng.choices(few, k=self._rng.randrange(1, 8))]

    def _fork(self) -> Step:
        return {"steps": self._few(), "end": self._rng.choice(["exit", "exit", "kill", "exec", "daemon"])}

    def _attach(self) -> Step:
        engine = self._rng.choice(["auto", "mprotect", "uffd"])
        return {"engine": engine, "by": self._rng.choice(["name", "fd"]), "steps": self._few()}

    def _pour(self) -> Step:
        return {}

    def _stem(self) -> Step:
        return {"pause": self._pause()}  # microseconds

    def _observe(self) -> Step:
        return self._page()

    # -- In an event loop ----------------------------------------------------------------------------------------------

    def task(self, count: int) -> list[Step]:
        steps = []
        for _ in range(count):
            name = self._rng.choice(["transact", "transact", "lock", "change"])
            step = {"do": name, **getattr(self, f"_{name}")()}
            step |= {"inner": [], "end": self._rng.choice(["release", "with", "handed", "dropped"])}
            step["cancel"] = self._rng.choice([None, None, None, self._rng.uniform(0, 0.005)])  # seconds
            steps.append(step)
        return steps


def steps_of(plan: Plan) -> set[str]:
    """Kinds of the steps that its threads take."""
    threads = [thread for actor in plan["actors"] for thread in actor["threads"]]
    return {step["do"] for thread in threads for step in thread.get("steps", [])}


def _hot(rng: random.Random, pages: int) -> list[int]:
    """The pages in which something happens: neighbours, perhaps over a border of 2 MiB, and perhaps the ends."""
    count = rng.randrange(3, 13)
    first = rng.choice([0, max(0, min(512, pages - 1) - count // 2), rng.randrange(max(1, pages - count))])
    hot = set(range(first, min(first + count, pages)))
    if rng.random() < 0.3:
        hot |= {0, pages - 1}
    return sorted(hot)


def _troubles(rng: random.Random, seconds: float, kinds: list[str], actors: int, queue: bool) -> list[dict[str, Any]]:
    troubles, at = [], 0.0
    mean = rng.choice([0.02, 0.1, 0.4]) if not queue else 0.5
    while kinds and (at := at + rng.expovariate(1 / mean)) < seconds:
        trouble: dict[str, Any] = {"at": round(at, 4), "what": rng.choice(kinds), "whom": rng.randrange(actors)}
        if trouble["what"] == "stop":
            about = rng.choice([0.002, 0.02, 0.2, 0.6]) if not queue else 1.2
            trouble["for"] = round(about * rng.uniform(0.5, 1.5), 4)
        troubles.append(trouble)
    return troubles


def _mood(rng: random.Random, chosen: list[str], quiet: bool) -> str | None:
    """What many have to do at once, or it shows nothing.

    storm: all processes but the first make changes, and nothing else.  gather: likewise, and the first has two threads
    that gather pages in one bytearray.  queue: all take one lock and keep it a while, and are stopped.
    """
    possible = {"storm": "churn" in chosen, "gather": {"churn", "load"} <= {*chosen}, "queue": "lock" in chosen}
    mood = rng.choice([*possible, "queue", None, None, None])  # in one of three of those somebody stops in line
    return mood if mood and possible[mood] and not (quiet and mood == "queue") else None


def _actor(rng: random.Random, plan: Plan, weights: dict[str, float], slots: list[int], extras: list[str]) -> Plan:
    gathers = plan["mood"] == "gather" and slots[0] == 0
    if gathers:
        weights = {"load": 1.0}
    elif plan["mood"] in ("storm", "gather") and slots[0]:
        weights = {"churn": 1.0}
    elif plan["mood"] == "queue":
        weights = {"lock": 1.0}
    own = [extra for extra in extras if rng.random() < 0.3]
    if "profiler" in own:
        own = [extra for extra in own if extra != "profile"]  # there is one profile function
    threads: list[Plan] = []
    for slot in slots:
        deviser = _Deviser(rng, plan, weights)
        loops = not ("descriptors" in own or plan["ends"] or plan["mood"])
        if slot != slots[0] and loops and rng.random() < 0.2:
            threads.append({"kind": "loop", "tasks": [deviser.task(40) for _ in range(3)]})
        else:
            threads.append({"kind": "plain", "steps": deviser.steps(120)})
    return {
        "how": rng.choice(
            ["fork", "name", "fd"] if plan["room"] is None else ["fork"]
        ),  # to come again is no sure thing
        "engine": rng.choice(["auto", "uffd", "mprotect"]),
        "policy": rng.choice(["die", "raise", "raise", "wait"] if not gathers else ["wait"]),
        "switch": rng.choice([0.005, 0.0002]),  # seconds between two threads of Python
        "extras": own,
        "point": f"{rng.choice(POINTS)}={rng.choice(['kill', 'kill', 'stop'])}@{rng.randrange(1, 40)}",
        "ended": f"{(ending := rng.choice(ENDINGS))}=exit@{rng.randrange(1, 4 if ending[0] == 'J' else 40)}",
        "free": rng.choice([1, 1, 2, 8]),  # descriptors, where they are few
        "threads": threads,
    }


def _confuses(trouble: dict[str, Any], plan: Plan) -> bool:
    """Python's own faults.

    profile.Profile meets the handler of a signal in a frame that it was not yet told of.  In Python 3.11 a traced
    thread other than the main one cannot begin a frame while a signal is pending, and keeps the interpreter: until the
    main thread sees it, which takes a second where the signal came just before that thread fell asleep.
    """
    extras = plan["actors"][trouble["whom"]]["extras"]
    return trouble["what"] in ("term", "int") and any(extra in extras for extra in ("profiler", "profile", "trace"))


def devise(seed: int, seconds: float, only: list[str] | None = None, calm: bool | None = None) -> Plan:
    """The plan of this seed.

    Each has a few kinds of operations only, more of some than of others: a plan of everything seldom does twice in a
    row what has to meet.  `only`: these kinds; `calm`: no trouble.
    """
    rng = random.Random(f"histories {seed}")
    pages = rng.choice([16, 16, 64, 700, 1600, 4096])
    plan: Plan = {"seed": seed, "seconds": seconds, "pages": pages, "hot": _hot(rng, pages)}
    plan["tail"] = rng.choice([0, 0, 100])  # bytes of one more page, which the region does not have as a whole
    plan["protections"] = rng.choice([PROTECTIONS, [READ, READ_WRITE], [READ]])
    plan["prot"] = rng.choice([READ, READ, READ_WRITE])
    plan["engine"] = rng.choice(["auto", "auto", "mprotect"])
    plan["named"] = rng.random() < 0.5
    chosen = only or [name for name in ALL if rng.random() < 0.5] or ALL
    plan["bulk"] = BULK if rng.random() < 0.15 or "pour" in (only or []) else 0
    if not plan["bulk"]:
        chosen = [name for name in chosen if name not in ("pour", "stem")]
    plan["stripes"] = pages >= 700 and rng.random() < 0.3  # other pages are NONE in turn: a map of many runs
    weights = {name: rng.choice([0.5, 1, 1, 2, 4]) * SELDOM.get(name, 1) for name in chosen}
    quiet = rng.random() < 0.4 if calm is None else calm
    extras = [] if quiet else [extra for extra in EXTRAS if rng.random() < 0.25]
    kinds = [] if quiet else [kind for kind in TROUBLES if rng.random() < 0.4]
    plan["mood"] = _mood(rng, chosen, quiet)
    if plan["mood"] == "queue":
        kinds = ["stop"]
    plan["ends"] = "ended" in kinds
    counts = rng.choice([[1, 1], [2, 1], [2, 2], [3, 2], [1, 1, 1], [2, 2, 1], [1, 1, 1, 1]])
    counts = {"gather": [2, 1], "storm": [1, 1, 1, 1], "queue": [1, 1, 1, 1]}.get(plan["mood"] or "", counts)
    plan["room"] = len(counts) + rng.randrange(2, 4) if rng.random() < 0.15 else None  # participants
    slots = iter(range(sum(counts)))
    plan["actors"] = [_actor(rng, plan, weights, [next(slots) for _ in range(n)], extras) for n in counts]
    plan["points"] = "point" in kinds
    kinds = [kind for kind in kinds if kind not in ("point", "ended")]
    troubles = _troubles(rng, seconds, kinds, len(counts), plan["mood"] == "queue")
    plan["troubles"] = [trouble for trouble in troubles if not _confuses(trouble, plan)]
    return plan
