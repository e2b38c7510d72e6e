"""What every command does before its own work."""

import os
import platform
import subprocess
import sys

import pytest

from topformer_jax.config.settings import SETTINGS
from topformer_jax.runtime import cli
from topformer_jax.runtime.errors import UserError

# Page faults of a block of 256 MiB that is filled and freed, the first time and the third, by a thread as XLA's are.
FAULTS = """
import ctypes, resource, sys, threading
from topformer_jax.runtime import cli
cli._ACCELERATORS = sys.argv[1:]
cli.keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def fill():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(2**28)))
        libc.memset(block, 1, ctypes.c_size_t(2**28))
        libc.free(block)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=fill)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
@pytest.mark.parametrize(
    ("environment", "accelerator", "kept"),
    [
        ({}, "/dev/no_gpu", True),
        ({"MALLOC_ARENA_MAX": "2"}, "/dev/no_gpu", False),
        ({}, "/dev/null", False),
        ({"JAX_PLATFORMS": "cpu"}, "/dev/null", True),
    ],
)
def test_freed_memory_is_kept_where_a_cpu_computes_unless_the_environment_says_how(
    environment: dict[str, str], accelerator: str, kept: bool
) -> None:
    names = ("MALLOC_", "GLIBC_", "JAX_PLATFORMS")
    plain = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    command = [sys.executable, "-c", FAULTS, accelerator]
    done = subprocess.run(command, env=plain | environment, capture_output=True, text=True, check=True)
    first, _, third = map(int, done.stdout.split())
    assert first > 100  # of pages of 4 KiB, or of 2 MiB
    assert (third < first / 10) == kept


def test_help_config_lists_all_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.Parser("a command").parse(["--help-config"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for key, setting in SETTINGS.items():
        assert f"  {key}=" in out
        assert f"{setting.meaning} [{setting.expected}]" in out


def test_overrides() -> None:
    parser = cli.Parser("a command")
    parser.add_argument("images", nargs="*")
    args, config = parser.parse(
        ["--config", "topformer_t_ade", "a.jpg", "--config.batch_size", "32", "--config.seed=-0", "b.jpg"]
    )
    assert config is not None
    assert (args.images, config.batch_size, config.name) == (["a.jpg", "b.jpg"], 32, "topformer_t_ade")
    with pytest.raises(UserError, match=r"--config\.seed has no value"):
        parser.parse(["--config", "topformer_t_ade", "--config.seed", "--other"])
    with pytest.raises(UserError, match=r"--config\.seed needs --config FILE"):
        cli.Parser("a command", config_required=False).parse(["--config.seed=1"])


@pytest.mark.parametrize(
    "command", ["train", "evaluate", "predict", "convert", "browse", "check", "export", "prepare", "demo"]
)
def test_help_imports_neither_jax_nor_what_uses_it(command: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = ['topformer_jax.{command}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('topformer_jax.{command}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0\n"
        "assert not {'jax', 'flax', 'grain', 'torch', 'numpy', 'cv2'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"python -m topformer_jax.{command} " in done.stdout
