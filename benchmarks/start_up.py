"""How long does training take to its first step?

  python -m benchmarks.start_up --repeats 1 --config configs/topformer_t_ade.py --config.batch_size=4

With an empty and with a filled cache of compiled programs, in fresh processes. "dispatch" is how long Python is busy
with a later step before it is free again.
"""

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

from benchmarks import samples, timing
from topformer_jax.runtime import cli, sharding
from topformer_jax.runtime.errors import UserError
from topformer_jax.training import step

ROOT = pathlib.Path(__file__).parents[1]
DISPATCHES = 7
FIRST_STEP = """
import json, time
start = time.perf_counter()
import topformer_jax.train
imported = time.perf_counter() - start
from benchmarks import start_up
from topformer_jax.runtime import cli
cli.run(lambda: print(json.dumps({{"import": imported, **start_up.time_phases({settings})}})))
"""


def time_phases(settings: dict[str, Any]) -> dict[str, float]:
    """Seconds that a fresh process takes to make the state, for its first step, and to dispatch a later one."""
    config = ConfigDict(settings)
    start = time.perf_counter()
    mesh = sharding.make_train_mesh(config, jax.local_devices()[:1])
    state, train_step = step.init_training(config, mesh)
    batch = jax.device_put(samples.batch(config), sharding.batch_sharding(mesh))
    jax.block_until_ready(state.params)
    phases = {"state": time.perf_counter() - start}
    seconds, dispatches = [], []
    for _ in range(1 + DISPATCHES):
        start = time.perf_counter()
        state, metrics = train_step(state, batch)
        dispatches.append(time.perf_counter() - start)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return phases | {"first step": seconds[0], "dispatch": statistics.median(dispatches[1:])}


def run_python(code: str, environment: dict[str, str]) -> Any:
    """What a fresh process prints last, as JSON.

    Raises:
        UserError: it fails.
    """
    command = [sys.executable, "-c", code]
    environment = os.environ | environment
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"a measured process failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """The command."""
    args, config = timing.parse(timing.make_parser(__doc__))
    code = FIRST_STEP.format(settings=config.to_dict())
    runs: dict[str, list[dict[str, float]]] = {"empty cache": [], "filled cache": []}
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory(prefix="topformer_jax.") as cache:
            environment = {
                "JAX_COMPILATION_CACHE_DIR": cache,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
            }
            for found in runs.values():
                start = time.perf_counter()
                found.append(run_python(code, environment))
                found[-1]["whole process"] = time.perf_counter() - start
    rows = [
        timing.make_row(name, phase, [run[phase] for run in found])
        for name, found in runs.items()
        for phase in found[0]
    ]
    timing.report(f"start_up: {timing.describe(config)}", rows, args)


if __name__ == "__main__":
    cli.run(main)
