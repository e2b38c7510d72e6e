"""What every command does before its own work."""

import os
import platform
import subprocess
import sys

import pytest

# Page faults of a block of 256 MiB that is filled and freed, the first time and the third.
FAULTS = """
import ctypes, resource
from topformer_jax import cli
cli.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**28)))
    libc.memset(block, 1, ctypes.c_size_t(2**28))
    libc.free(block)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone is told to keep memory")
@pytest.mark.parametrize(("environment", "kept"), [({}, True), ({"MALLOC_ARENA_MAX": "2"}, False)])
def test_freed_memory_is_kept_unless_the_environment_says_how(
    environment: dict[str, str], kept: bool
) -> None:
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], env=plain | environment, capture_output=True, text=True, check=True
    )
    first, _, third = map(int, done.stdout.split())
    assert first > 100  # of pages of 4 KiB, or of 2 MiB
    assert (third < first / 10) == kept
