"""What the reference makes of our docstrings, which are written to be read in a terminal; an extension of griffe.

Lives here: rules for texts alone. Invariant: a docstring says the same before and after.
"""

from __future__ import annotations

import re
from typing import Any

import griffe

import pyshare


def tidy(text: str) -> str:
    """As the reference wants it: Markdown, and one error a line where it says what is raised."""
    text = re.sub(r"\A\w+\(self\b.*\)\n", "", text)  # the signature that Cython puts first
    text = re.sub(r":(?:func|meth|mod|class):`(?:~?pyshare\.)?([\w.]+)`", r"`\1`", text)
    return re.sub(r"^( +)((?:[A-Z]\w+, )*[A-Z]\w+)\.$", _errors, text, flags=re.M)


def _errors(match: re.Match[str]) -> str:
    """Errors that are listed without a word get their own first line."""
    names = match[2].split(", ")
    if not all(hasattr(pyshare, name) for name in names):
        return match[0]
    said = {name: str(getattr(pyshare, name).__doc__).partition("\n")[0] for name in names}
    return "\n".join(f"{match[1]}{name}: {words}" for name, words in said.items())


class Tidy(griffe.Extension):
    """Hands each docstring to :func:`tidy` before it is parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = tidy(obj.docstring.value)
