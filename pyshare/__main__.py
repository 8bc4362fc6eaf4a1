"""The command line: ``python -m pyshare`` and the console script ``pyshare``.

Lives here: the parser and the list of commands.  A command is a module with
``NAME``, ``add_arguments(parser)`` and ``run(arguments) -> exit status``; its
docstring begins with the line that the help shows.
Not here: anything that a command does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import pyshare
from pyshare import _names, _unlink, bench, doctor, ls, metrics, show, top, trace
from pyshare import map as map_

COMMANDS = (ls, show, top, _unlink, map_, trace, metrics, doctor, bench)


def parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; ``arguments.run`` is the command's function."""
    whole = argparse.ArgumentParser(
        prog="pyshare",
        description="Shared memory whose protection changes in every process at once.",
    )
    whole.add_argument("--version", action="version", version=f"pyshare {pyshare.__version__}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True)
    for module in COMMANDS:
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(module.NAME, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run, command=module.NAME)
    return whole


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit status: 1 where names cannot be listed, 2 for a wrong command line, 130 after
    Ctrl-C."""
    arguments = parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
    except KeyboardInterrupt:
        status = 130
    except OSError as error:
        if error.filename != _names.DIRECTORY:
            raise
        print(f"pyshare {arguments.command}: {_names.DIRECTORY} cannot be read: {error.strerror}", file=sys.stderr)
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
