"""Where faulthandler writes: the line that explains a death by pyshare goes there too.

faulthandler tells nobody with which descriptor it was enabled, so its two functions are wrapped. pytest gives it a copy
of stderr, and takes descriptor 2 for itself, before a test imports pyshare: so pytest loads this first, as a plugin.
Lives here: that, and nothing of pyshare: a run of pytest that has nothing to do with it imports no more than this file.
"""

from __future__ import annotations

import faulthandler
import functools
import sys
from collections.abc import Callable
from typing import Any

descriptor = -1  # -1: it is not enabled, or was before we came
# pyshare's, once that is in use: called with each new descriptor, and whether handlers of signals have come or gone.
listener: Callable[[int, bool], object] | None = None


def _tell(number: int, handlers: bool) -> None:
    global descriptor
    descriptor = number
    if listener is not None:
        listener(number, handlers)


def _wrap(enable: Any, disable: Any) -> None:
    @functools.wraps(enable)
    def enable_and_tell(file: Any = None, *args: Any, **options: Any) -> None:
        file = sys.stderr if file is None else file
        was_enabled = faulthandler.is_enabled()
        enable(file, *args, **options)
        _tell(file if isinstance(file, int) else file.fileno(), not was_enabled)

    @functools.wraps(disable)
    def disable_and_tell() -> Any:
        was_enabled = disable()
        _tell(-1, was_enabled)
        return was_enabled

    faulthandler.enable, faulthandler.disable = enable_and_tell, disable_and_tell


_wrap(faulthandler.enable, faulthandler.disable)
