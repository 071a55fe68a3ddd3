"""Command: pre-train. Read this file first; `train` is the whole of a run."""

from __future__ import annotations

import logging
from dataclasses import asdict

from monitoring.sinks import MetricSink, build_sinks
from pipeline import distributed
from pipeline.checkpoint import Checkpointer, TrainState
from pipeline.config import TrainConfig
from pipeline.distributed import World
from pipeline.heartbeat import UNWATCHED, Heartbeat, Phase
from pipeline.interplay import warn_of_early_freezing
from pipeline.meter import Meter
from pipeline.parts import Parts, build
from pipeline.peaks import peak_flops
from pipeline.preemption import ProcessFailedError, StopRequest
from pipeline.prewarm import prewarm
from pipeline.run_directory import RunDirectory
from pipeline.schedules import StepPlan
from pipeline.skips import SkippedSteps
from pipeline.status_file import State
from pipeline.training_engine import StepResult
from pipeline.watchdog import Watchdog

log = logging.getLogger(__name__)


def run(config: TrainConfig, overrides: list[str]) -> int:
    """Train until the budget is spent or somebody asks for the node; return the exit code."""
    world = distributed.start()
    # Not before: until the processes have met there is nothing to save, and a signal simply ends them.
    stop = StopRequest()
    with Watchdog(config.watchdog, world, stop) as watchdog:
        return _run(config, overrides, world, stop, watchdog)


def _run(config: TrainConfig, overrides: list[str], world: World, stop: StopRequest, watchdog: Watchdog) -> int:
    directory = distributed.on_main(lambda: _look(config))
    parts = build(config, world)
    if directory is not None:
        directory.clear()
    state = parts.checkpointer.restore(parts.engine) or TrainState()
    if directory is not None:
        directory.open(overrides)
        directory.status(State.running, state.step)
    watchdog.open(config.directory / "heartbeats")
    _announce(config, world, parts, state)
    try:
        return train(config, world, stop, parts, state, directory, watchdog.heartbeat)
    except ValueError as error:
        # What goes wrong from here on is no refusal of what was asked, and may be known to one process only.
        failure = ProcessFailedError(f"process {world.rank} failed at step {state.step}: {error}")
        _say_failed(directory, state, failure)
        raise failure from error
    except Exception as error:
        _say_failed(directory, state, error)
        raise
    finally:
        parts.loader.close()


def train(
    config: TrainConfig,
    world: World,
    stop: StopRequest,
    parts: Parts,
    state: TrainState,
    directory: RunDirectory | None,
    heartbeat: Heartbeat = UNWATCHED,
) -> int:
    """Run the loop: plan, tune, step, advance; log, probe and save when due; leave when spent or asked."""
    sinks = _open_sinks(config, world, state, heartbeat)
    prewarm(parts.method, parts.plans_ahead(state), config.batch_size // world.size, world.device)
    meter = _build_meter(config, world, parts)
    skips = SkippedSteps(config.engine.max_skipped, config.directory, parts.loader.manifest, parts.loader.order)
    finished = parts.progress(state) >= 1

    batches = parts.loader.batches(start=state.samples)
    while not finished:
        heartbeat.begin(state.step)
        batch = next(batches)
        heartbeat.enter(Phase.tune)
        plan = parts.tuner.plan(parts.schedules.at(parts.progress(state)), state)
        meter.tuned(parts.tuner.tune(batch, plan, state))
        result = parts.engine.step(batch, plan, heartbeat)
        cost = parts.method.sample_cost(plan)
        state.advance(config.batch_size, cost)
        meter.count(plan, result, cost, parts.loader.wait_seconds)
        skips.watch(state.step, result, batch)
        progress = parts.progress(state)
        finished = progress >= 1
        heartbeat.finish(state.step)

        if state.step % config.log_every == 0 or finished:
            sinks.write(state.step, _metrics(parts, meter, state, plan, result) | heartbeat.totals())

        # A save is written beside the training: first by all processes, then published by the main one.
        probing, saving, stopping, save_busy, save_failed = distributed.any_rank(
            world.is_main and parts.probe.due(meter.elapsed, meter.seconds_per_sample),
            world.is_main and parts.checkpointer.due(state, progress),
            stop.requested,
            *parts.checkpointer.pending(),
        )
        _report(sinks, state, parts.checkpointer.settle(save_busy, save_failed))
        accuracy = None
        if probing:
            heartbeat.enter(Phase.probe)
            accuracy = _probe(parts, world, state, meter, sinks)
        if saving or stopping or finished or (probing and config.checkpoint.keep_best):
            heartbeat.enter(Phase.save)
            with meter.paused():
                _report(sinks, state, parts.checkpointer.save(parts.engine, state, progress, accuracy))
            _say(directory, State.running, state)
        if stopping:
            break

    _finish_saving(parts.checkpointer, state, sinks, heartbeat)
    _say(directory, State.finished if finished else State.stopped, state)
    log.info("%s at step %d%s", "finished" if finished else "stopped, saved", state.step, stop.after())
    return 0 if finished else stop.exit_code


def _build_meter(config: TrainConfig, world: World, parts: Parts) -> Meter:
    peak = peak_flops(config.monitor.peak_teraflops, config.engine.precision, world.device)
    return Meter(parts.method, parts.budget, config.batch_size, world.size, peak)


def _look(config: TrainConfig) -> RunDirectory:
    """Return the run's directory, untouched; refuse what it, or the machine, has no place for."""
    config.monitor.check_installed()
    return RunDirectory(config)


def _probe(parts: Parts, world: World, state: TrainState, meter: Meter, sinks: MetricSink) -> float:
    """Report and return the k-NN accuracy of the representation. Every process must call this."""
    with meter.paused():
        accuracy = parts.probe.run(parts.method.representation, world, meter.elapsed)
        sinks.write(state.step, {"knn_top1_ratio": accuracy})
    return accuracy


def _finish_saving(checkpointer: Checkpointer, state: TrainState, sinks: MetricSink, heartbeat: Heartbeat) -> None:
    """Wait for the last save of a life, without which it must not end well."""
    heartbeat.enter(Phase.save)
    _report(sinks, state, checkpointer.finish())
    heartbeat.enter(Phase.end)
    sinks.close()
    if checkpointer.failure:
        raise ProcessFailedError(f"step {state.step} could not be saved: {checkpointer.failure}")


def _report(sinks: MetricSink, state: TrainState, metrics: dict[str, float]) -> None:
    if metrics:
        sinks.write(state.step, metrics)


def _metrics(parts: Parts, meter: Meter, state: TrainState, plan: StepPlan, result: StepResult) -> dict[str, float]:
    """Return everything that is worth logging of a step. Every process must call this."""
    loss = float(distributed.mean_over_ranks(result.loss))
    metrics = meter.report(state, plan, parts.engine, loss)
    metrics |= {"bad_samples_total": distributed.sum_over_ranks(parts.loader.bad_samples)}
    return metrics | {name: float(value) for name, value in result.metrics.items()}


def _open_sinks(config: TrainConfig, world: World, state: TrainState, heartbeat: Heartbeat) -> MetricSink:
    return build_sinks(
        config.monitor,
        config.directory,
        run=config.run,
        rank=world.rank,
        local_rank=world.local_rank,
        world_size=world.size,
        resume_step=state.step,
        live=heartbeat.live,
        settings=asdict(config),
    )


def _announce(config: TrainConfig, world: World, parts: Parts, state: TrainState) -> None:
    meeting = distributed.meeting()
    if not world.is_main:
        return
    log.info("%d process(es) on %s %s", world.size, world.device, meeting)
    log.info(
        "run %s: %d samples in %d classes, batch %d, budget %g %s",
        config.directory,
        len(parts.loader.order),
        len(parts.loader.classes),
        config.batch_size,
        config.budget.value,
        config.budget.unit.value,
    )
    warn_of_early_freezing(parts.schedules)
    if config.batch_size > len(parts.loader.order):
        log.warning("batch_size is larger than the set: a sample may occur twice in a batch")
    log.info("resumed at step %d" if state.step else "starting at step %d", state.step)


def _say(directory: RunDirectory | None, status: State, state: TrainState) -> None:
    if directory is not None:
        directory.status(status, state.step)


def _say_failed(directory: RunDirectory | None, state: TrainState, error: Exception) -> None:
    if directory is not None:
        directory.failed(state.step, error)
