"""compile: how long a command takes to its first step, with and without compiled programs on disk."""

import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from topformer_jax import sharding, step
from topformer_jax.benchmark import measure, samples
from topformer_jax.benchmark.measure import Options
from topformer_jax.benchmark.report import Report
from topformer_jax.errors import UserError

PACKAGE = pathlib.Path(__file__).parents[1]
IMPORTS = 3  # runs of each
DISPATCHES = 7


def startup(config: ConfigDict, options: Options) -> Report:
    """The first step with an empty and with a filled cache, and the import of each command."""
    rows = []
    cold, warm = [], []
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory(prefix="topformer_jax.") as cache:
            cold.append(_first_step(config, cache))
            warm.append(_first_step(config, cache))
    for name, found in (("empty cache", cold), ("filled cache", warm)):
        for phase in found[0]:
            rows.append(_row(f"train-step, {name}", phase, [phases[phase] for phases in found]))
    for module in ["jax", *(f"topformer_jax.{command}" for command in commands())]:
        code = (
            f"import time; start = time.perf_counter(); import {module}; print(time.perf_counter() - start)"
        )
        rows.append(_row("import", module, [float(_python(code, {})) for _ in range(IMPORTS)]))
    return Report(f"compile: {measure.described(config)}", measure.machine().facts(), rows)


def commands() -> list[str]:
    """The modules that are commands."""
    files = [file for file in PACKAGE.glob("*.py") if "\nif __name__ ==" in file.read_text()]
    return sorted([*(file.stem for file in files), "benchmark.__main__"])


def phases(settings: dict[str, Any]) -> dict[str, float]:
    """Seconds that a fresh process takes to make the state, for the first step, and for the second.

    "dispatch" is how long Python is busy with a later step before it is free again: the device is idle at its start.
    """
    config = ConfigDict(settings)
    mesh = sharding.make_mesh(config, jax.local_devices()[:1])
    clock = [time.perf_counter()]
    state, train = step.create(config, mesh)
    batch = jax.device_put(samples.batch(config), sharding.batch_sharding(mesh))
    jax.block_until_ready(state.params)
    clock.append(time.perf_counter())
    for _ in range(2):
        state, metrics = train(state, batch)
        jax.block_until_ready(metrics)
        clock.append(time.perf_counter())
    dispatches = []
    for _ in range(DISPATCHES):
        start = time.perf_counter()
        state, metrics = train(state, batch)
        dispatches.append(time.perf_counter() - start)
        jax.block_until_ready(metrics)
    names = ("state", "first step", "second step")
    found = {name: end - start for name, (start, end) in zip(names, itertools.pairwise(clock), strict=True)}
    return found | {"dispatch": statistics.median(dispatches)}


def _first_step(config: ConfigDict, cache: str) -> dict[str, float]:
    """The import of the training command and `phases` in a process with this cache, and the whole process."""
    code = f"""
import json, time
start = time.perf_counter()
import topformer_jax.train
imported = time.perf_counter() - start
from topformer_jax import cli
from topformer_jax.benchmark import startup
cli.keep_freed_memory()  # as the command does
print(json.dumps({{"import": imported, **startup.phases({config.to_dict()})}}))
"""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    start = time.perf_counter()
    found = json.loads(_python(code, environment).splitlines()[-1])
    return found | {"whole process": time.perf_counter() - start}


def _python(code: str, environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(
            f"a measured process failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}"
        )
    return done.stdout


def _row(case: str, name: str, seconds: list[float]) -> dict[str, Any]:
    print(f"{case}, {name}: {statistics.median(seconds):.2f} s", file=sys.stderr, flush=True)
    return {"case": case, "program": name, "seconds": measure.spread(seconds)}
