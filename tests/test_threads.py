"""The native threads of a process: what they need, and what one that is ended alone leaves behind."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


def test_libraries_may_have_many_thread_local_variables(run_python: RunPython, tmp_path: Path) -> None:
    """They lie on each thread's stack (glibc), which has to have room for them."""
    source, library = tmp_path / "large.c", tmp_path / "large.so"
    source.write_text("__thread char large[300000] = {1}; char *where(void) { return large; }")
    command = [os.environ.get("CC") or "cc", "-shared", "-fPIC", "-ftls-model=initial-exec", "-o", library, source]
    subprocess.run(command, check=True)
    ran = run_python(
        """
import asyncio, os, pyshare
async def wait(region):
    async with region.lock_async(0):
        pass
with pyshare.create(size=1 << 20) as region:
    lock = region.lock(0)
    region.mprotect(0, 4096, pyshare.READ)
    pid = os.fork()
    if pid == 0:
        region.mprotect(4096, 4096, pyshare.READ)
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    lock.release()
    asyncio.run(wait(region))
""",
        LD_PRELOAD=str(library),
    )
    assert (ran.returncode, ran.stderr) == (0, "")
