"""Regions in numbers, for Prometheus: printed once, or served to whoever asks.

Lives here: what is told of a region, by which name; the server.
Not here: how regions are found and looked at (_status.py).  Needs prometheus-client, the extra ``metrics``.

Each series of a region bears the label ``region``: its name, or "(inode N)" where it has none.  Counters begin with the
region, and outlive participants.  Regions that may not be looked at are only counted.

``--listen ADDR`` serves them by HTTP, at /metrics, until the command is ended; each request looks anew.  ADDR is
HOST:PORT, as 127.0.0.1:9184 or [::1]:9184, or :PORT for every address of this machine; whoever can reach it can read
the names of regions and the counts, nothing else.  The address in use is told on stderr: port 0 is one that is free.

``--json`` prints one object: ``metrics``, a list of ``name``, ``type``, ``help`` and ``samples``, each of ``name``,
``labels`` and ``value``.

The exit status is 0; 1 where prometheus-client is missing, or the address cannot be had; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import socket
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from pyshare import _observer, _status
from pyshare._status import Found, Look

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

NAME = "metrics"

Value = Callable[[Look], float]


def seconds_of(times: Iterator[float | None]) -> float:
    """The longest; 0 where there is none."""
    return max((one for one in times if one is not None), default=0.0)


GAUGES: dict[str, tuple[str, Value]] = {
    "region_size_bytes": ("Bytes of data.", lambda seen: seen.size),
    "region_used_bytes": ("Bytes of memory in use, with the control segment and snapshots.", lambda seen: seen.used),
    "leases": ("Leases held.", lambda seen: seen.leases),
    "locks": ("User locks held.", lambda seen: sum(len(one.locks) for one in seen.participants)),
    "late_participants": (
        "Participants whose page tables do not follow the latest change yet.",
        lambda seen: sum(one.late > 0 for one in seen.participants),
    ),
    "waiting_participants": (
        "Participants that wait for another one.",
        lambda seen: seen.waiting,
    ),
    "longest_wait_seconds": (
        "For how long the longest of these waits has lasted.",
        lambda seen: seconds_of(one.waits_seconds for one in seen.participants),
    ),
    "slowest_acknowledgement_seconds": (
        f"How long the slowest of the latest {_status.CHANGES:,} changes took in which anybody was waited for.",
        lambda seen: seen.slowest[1] if seen.slowest else 0.0,
    ),
    "page_tables_bytes": (
        "Bytes of page tables of all participants' processes that can be seen.",
        lambda seen: sum(one.page_tables or 0 for one in seen.participants),
    ),
}
COUNTERS: dict[str, tuple[str, Value]] = {
    "changes": ("Changes of protection since the region began: its generation.", lambda seen: seen.generation),
    "leases_taken": ("Leases taken since the region began.", lambda seen: seen.leases_taken),
}


def collected(found: list[Found]) -> Iterator[Metric]:
    """Everything that is told."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    live = [(one.label, one.look) for one in found if one.look]
    states = GaugeMetricFamily("pyshare_regions", "Regions and names, by state.", labels=["state"])
    for state in _status.STATES:
        states.add_metric([state], sum(one.state == state for one in found))
    yield states
    people = GaugeMetricFamily("pyshare_participants", "Participants, by status.", labels=["region", "status"])
    for label, seen in live:
        for status in _status.STATUSES:
            people.add_metric([label, status], seen.count(status))
    yield people
    for kind, told in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
        for name, (about, value) in told.items():
            family = kind(f"pyshare_{name}", about, labels=["region"])
            for label, seen in live:
                family.add_metric([label], value(seen))
            yield family


class Collector:
    """Looks anew each time."""

    def collect(self) -> Iterator[Metric]:
        """As prometheus-client asks for it."""
        return collected(_status.regions()[0])


def registry() -> CollectorRegistry:
    """One that knows regions alone, nothing of this process."""
    from prometheus_client import CollectorRegistry

    made = CollectorRegistry()
    made.register(Collector())
    return made


def plain() -> dict[str, Any]:
    """For programs, as --json has it."""
    return {
        "metrics": [
            {
                "name": family.name,
                "type": family.type,
                "help": family.documentation,
                "samples": [{"name": one.name, "labels": one.labels, "value": one.value} for one in family.samples],
            }
            for family in registry().collect()
        ]
    }


def serve(host: str, port: int) -> int:
    """Until this process is ended; the exit status, where it cannot."""
    from prometheus_client import start_http_server

    every = "::" if socket.has_dualstack_ipv6() else "0.0.0.0"
    try:
        server, thread = start_http_server(port, host or every, registry())
    except OSError as error:
        print(f"pyshare metrics: cannot listen at {host}:{port}: {error.strerror or error}", file=sys.stderr)
        return 1
    at = f"[{host}]" if ":" in host else host or "*"
    print(f"pyshare metrics: serving http://{at}:{server.server_port}/metrics", file=sys.stderr, flush=True)
    try:
        thread.join()
    finally:
        server.shutdown()
        server.server_close()
    return 0


def address(text: str) -> tuple[str, int]:
    """HOST:PORT."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.%\w]+)\]|([^:\[\]]*)):(\d{1,5})", text)
    if not found or int(found[3]) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}: expected HOST:PORT, [HOST]:PORT or :PORT, as 127.0.0.1:9184")
    return found[1] or found[2] or "", int(found[3])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``metrics``."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--listen", type=address, metavar="ADDR", help="serve them at HOST:PORT until ended")
    form.add_argument("--json", action="store_true", help="print one object, for a program to read")


def run(arguments: argparse.Namespace) -> int:
    """Prints or serves them."""
    if not importlib.util.find_spec("prometheus_client"):
        print("pyshare metrics needs prometheus-client: say pip install 'pyshare[metrics]'", file=sys.stderr)
        return 1
    if arguments.listen:
        return serve(*arguments.listen)
    from prometheus_client import generate_latest

    with _observer.to_who_listens():
        if arguments.json:
            json.dump(plain(), sys.stdout, indent=1)
            print()
        else:
            sys.stdout.write(generate_latest(registry()).decode())
    return 0
