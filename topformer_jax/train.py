"""Trains a segmenter or a classifier on all devices of one or several hosts.

  python -m topformer_jax.train --config configs/topformer_b_ade.py --config.data.root=DIR

Writes everything into the work directory, runs/<config name> by default. The same command resumes an interrupted run.
Ctrl-C and SIGTERM save a checkpoint before they end the run. On several hosts, start the same command on each. TPU
pods and SLURM are recognised; elsewhere give --coordinator, --processes and --process-id.
"""

from topformer_jax.runtime import cli, files


def make_parser() -> cli.Parser:
    """The command's flags."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--workdir", type=files.as_path, metavar="DIR", help="default: runs/<config name>")
    parser.add_argument("--profile", metavar="FIRST:LAST", help="trace these steps into WORKDIR/profile")
    cli.add_process_flags(parser)
    return parser


cli.answer_help(__name__, make_parser)

import contextlib
import functools

import jax
from ml_collections import ConfigDict

from topformer_jax import config as config_lib
from topformer_jax.data import sources
from topformer_jax.inspection.sample import look_at_labels
from topformer_jax.runtime import errors, logs, processes, sharding
from topformer_jax.training import run as run_lib
from topformer_jax.training.class_weight import find_class_pixels, set_class_weight
from topformer_jax.training.folded import restore_statistics
from topformer_jax.training.run import Monitor, Run, StepProfiler, parse_steps
from topformer_jax.training.run_folder import RunFolder
from topformer_jax.training.shutdown import GracefulShutdown
from topformer_jax.training.step import init_training


def train(config: ConfigDict, folder: RunFolder, profile_steps: range = range(0)) -> None:
    """Trains for `schedule.epochs` or `schedule.steps`, from the newest checkpoint of the work directory.

    Raises:
        UserError: the data, the devices, the work directory or a checkpoint do not fit the config, or the loss
            becomes NaN.
        SystemExit: 128 + the number of a signal that ended the run, after its state was saved.
    """
    # ---- data
    data_set = sources.find_data_set(config)
    is_first = jax.process_index() == 0
    make_progress = functools.partial(logs.Progress, active=is_first)
    train_source = sources.open_source(config, "train", make_progress)
    validation_source = sources.open_source(config, "validation", make_progress)
    config = config_lib.resolve_schedule(config, len(train_source))
    warnings = look_at_labels(config, data_set, {"train": train_source, "validation": validation_source})
    for line in filter(None, (*warnings, config_lib.explain_warmup(config.schedule))):
        processes.say(f"warning: {line}")

    # ---- state
    mesh = sharding.make_train_mesh(config)
    model, teacher = run_lib.load_initial_model(config), run_lib.load_teacher(config)
    folder.open()
    pixels = find_class_pixels(config, train_source, folder, make_progress)
    weighted = set_class_weight(config, data_set, pixels)
    class_draws = run_lib.find_class_draws(config, data_set, pixels)
    state, train_step = init_training(weighted, mesh, model, teacher)
    records = logs.read_records(folder.path / "metrics.jsonl", processes.say)
    store = run_lib.open_store(config, folder, records)
    start = store.latest or 0
    changes: list[str] = []
    if start:
        data_set, changes = run_lib.check_changes(store, start, config, data_set)
        state = run_lib.restore_state(store, start, state)
    else:
        run_lib.refuse_untrained(config, state.params | state.stats)

    # ---- the run
    if is_first:
        run_lib.record_start(config, folder, start)
    log = logs.RunLog(folder.local, start, config.schedule.steps, records, active=is_first)
    shutdown = GracefulShutdown()
    run = Run(
        config=config,
        folder=folder,
        mesh=mesh,
        model=model,
        data_set=data_set,
        train_source=train_source,
        class_draws=class_draws,
        validation_source=validation_source,
        store=store,
        log=log,
        shutdown=shutdown,
    )
    if is_first:
        run_lib.print_banner(run, state, changes)
    batches = run_lib.open_batches(run, start)
    profiler = StepProfiler(profile_steps, folder)
    monitor = Monitor(run, batches)
    processes.call_before_exit(store.wait_before_exit)
    shutdown.set_early_exit_callback(monitor.has_computed, log.print_line)

    # ---- the loop
    # An implicit transfer would make the host wait at every step.
    with contextlib.ExitStack() as at_exit, jax.transfer_guard("disallow"):
        # Each of these runs, in reverse order, even if another one raises.
        at_exit.callback(shutdown.restore_handlers)
        at_exit.callback(store.close)
        at_exit.callback(log.close)
        at_exit.callback(profiler.close)
        at_exit.callback(batches.close)
        at_exit.push(cli.abort_run_on_error)
        at_exit.enter_context(errors.report_out_of_memory("train", store.describe_newest))
        if not start:
            with jax.transfer_guard("allow"):
                state = restore_statistics(run, state)
        run_lib.evaluate_if_missing(run, state, start)
        for step in range(start + 1, config.schedule.steps + 1):
            with run_lib.save_on_error(run, state, step - 1, monitor):
                batch = monitor.next_batch()
            profiler.before(step)
            state, step_metrics = train_step(state, batch)
            profiler.after(step, step_metrics)
            monitor.add(step_metrics)
            if not shutdown.check() and not run_lib.is_log_step(config, step):
                continue

            monitor.log(step)
            if shutdown.signal or run_lib.is_checkpoint_step(config, step):
                run_lib.save_checkpoint(run, state, step)
            if run_lib.is_evaluation_step(config, step) and not shutdown.signal:
                with run_lib.save_on_error(run, state, step, monitor):
                    run_lib.evaluate_and_log(run, state, step)
            run_lib.exit_if_stopped(run, step)
            monitor.restart_clock()

    # ---- the end
    if is_first:
        run_lib.print_results(run)


def main() -> None:
    """The command."""
    args, config = make_parser().parse()
    assert config is not None  # --config is required
    profile_steps = parse_steps(args.profile)
    processes.start_processes(args.coordinator, args.processes, args.process_id)
    with RunFolder(args.workdir or files.as_path("runs") / config.name, config.upload_every) as folder:
        train(config, folder, profile_steps)


if __name__ == "__main__":
    cli.run(main)
