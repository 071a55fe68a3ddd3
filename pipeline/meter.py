"""Counting what a process does, and turning it into the metrics of the catalogue."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.checkpoint import TrainState
from pipeline.flops import StepFlops
from pipeline.methods.base import Method
from pipeline.schedules import Budget, StepPlan
from pipeline.training_engine import StepResult, TrainingEngine
from pipeline.tuning import Tuned


class Meter:
    """Totals since the process started, and rates since the last report."""

    def __init__(
        self, method: Method, budget: Budget, global_batch: int, processes: int = 1, peak: float | None = None
    ) -> None:
        """Count for all processes together; `peak`: the FLOPS that each of their devices could reach, if known."""
        self._method, self._budget, self._global_batch = method, budget, global_batch
        self._processes, self._peak = processes, peak
        self._flops = StepFlops(method, global_batch // processes)
        self.totals = dict.fromkeys(
            (
                "steps_total",
                "samples_total",
                "tokens_total",
                "cost_total",
                "nominal_cost_total",
                "flops_total",
                "uncompressed_cost_total",
                "data_wait_seconds_total",
                "skipped_steps_total",
                "recompiles_total",
                "tuning_cost_total",
                "tuning_moves_total",
            ),
            0.0,
        )
        self._start = self._reported_at = time.monotonic()
        self._paused = 0.0
        self._reported = dict(self.totals)
        self._start_progress: float | None = None
        self._uncompressed = 0.0

    @property
    def elapsed(self) -> float:
        """Return the seconds since the process began to train, probes and saves included."""
        return time.monotonic() - self._start

    @property
    def seconds_per_sample(self) -> float:
        """Return the mean over the process's life."""
        return self.elapsed / max(1.0, self.totals["samples_total"])

    def count(self, plan: StepPlan, result: StepResult, sample_cost: float, data_wait: float) -> None:
        """Count one step; `data_wait` is the loader's cumulative waiting time in seconds."""
        if self._start_progress is None:
            self._start_progress = plan.progress
            self._uncompressed = self._method.uncompressed_sample_cost(plan)
        self.totals["steps_total"] += 1
        self.totals["samples_total"] += self._global_batch
        self.totals["tokens_total"] += self._global_batch * self._method.tokens(plan)
        self.totals["cost_total"] += self._global_batch * sample_cost
        self.totals["nominal_cost_total"] += self._global_batch * self._method.nominal_sample_cost(plan)
        self.totals["flops_total"] += self._processes * self._flops(plan)
        self.totals["uncompressed_cost_total"] += self._global_batch * self._uncompressed
        self.totals["data_wait_seconds_total"] = data_wait
        self.totals["skipped_steps_total"] += not result.applied
        self.totals["recompiles_total"] = self._method.encoder.run_block.recompiles

    def tuned(self, tuned: Tuned) -> None:
        """Count what choosing a compression has cost, and whether there is another one now."""
        self.totals["cost_total"] += tuned.cost
        self.totals["tuning_cost_total"] += tuned.cost
        self.totals["tuning_moves_total"] += tuned.moved

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave what is not training (a probe, a save) out of the next report's rates."""
        begin = time.monotonic()
        yield
        self._paused += time.monotonic() - begin

    def report(self, state: TrainState, plan: StepPlan, engine: TrainingEngine, loss: float) -> dict[str, float]:
        """Return every metric of the training itself; `loss` is the mean over processes."""
        progress = self._budget.progress(steps=state.step, samples=state.samples, cost=state.cost)
        return {
            **self.totals,
            **self._rates(),
            **self._plan_metrics(plan),
            **_layer_metrics(engine.layer_norms()),
            "step": state.step,
            "progress_ratio": progress,
            "budget_spent": self._budget.spent(steps=state.step, samples=state.samples, cost=state.cost),
            "budget_total": self._budget.value,
            "eta_seconds": self._eta(progress),
            "loss": loss,
            "grad_norm": engine.grad_norm(),
            "optimizer_bytes": engine.optimizer_bytes(),
            "last_step_timestamp_seconds": time.time(),
            "restarts": float(os.environ.get("SLURM_RESTART_COUNT", 0)),
            **_gpu_memory(),
        }

    def _rates(self) -> dict[str, float]:
        now = time.monotonic()
        seconds = max(1e-9, now - self._reported_at - self._paused)
        since = {name: total - self._reported[name] for name, total in self.totals.items()}
        self._reported, self._reported_at, self._paused = dict(self.totals), now, 0.0
        return {
            "samples_per_second": since["samples_total"] / seconds,
            "tokens_per_second": since["tokens_total"] / seconds,
            "cost_per_second": since["cost_total"] / seconds,
            **self._utilization(since["flops_total"] / seconds),
            "step_seconds": seconds / max(1.0, since["steps_total"]),
            "data_wait_ratio": since["data_wait_seconds_total"] / seconds,
        }

    def _utilization(self, flops_per_second: float) -> dict[str, float]:
        share = {"mfu_ratio": flops_per_second / (self._processes * self._peak)} if self._peak else {}
        return {"flops_per_second": flops_per_second, **share}

    def _plan_metrics(self, plan: StepPlan) -> dict[str, float]:
        vit = self._method.encoder.config
        size = (vit.image_size, vit.patch_size)
        patches = plan.query.num_patches(*size)
        query, key = self._method.lengths(plan)
        return {
            "learning_rate": plan.learning_rate,
            "weight_decay": plan.weight_decay,
            "momentum_ratio": plan.momentum,
            "teacher_temperature": plan.teacher_temperature,
            "patch_size_pixels": plan.query.patch_size(vit.patch_size),
            "token_dropout_ratio": 1 - plan.query.keep(patches) / patches,
            "query_tokens": query,
            "key_tokens": key,
            "frozen_layers": plan.frozen_layers,
        }

    def _eta(self, progress: float) -> float:
        done = progress - (self._start_progress or 0.0)
        return self.elapsed * (1 - progress) / done if done > 0 else float("nan")


def _gpu_memory() -> dict[str, float]:
    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "gpu_memory_bytes": torch.cuda.memory_allocated(),
        "gpu_memory_peak_bytes": torch.cuda.max_memory_allocated(),
        "gpu_memory_reserved_bytes": torch.cuda.memory_reserved(),
        "gpu_memory_used_bytes": total - free,
    }


def _layer_metrics(norms: list[float]) -> dict[str, float]:
    """Return what is reported of the gradient norms of all layers and, last, the heads; nothing of none."""
    if not norms:
        return {}
    *layers, heads = norms
    # A nan counts as larger than anything.
    largest = max(range(len(layers)), key=lambda i: math.inf if math.isnan(layers[i]) else layers[i])
    return {
        "grad_norm_embedding": layers[0],
        "grad_norm_first_block": layers[1],
        "grad_norm_last_block": layers[-1],
        "grad_norm_heads": heads,
        "grad_norm_largest_layer": largest,
    }
