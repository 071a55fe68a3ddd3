"""The catalogue: every number that runs and exporters report or are asked for, with its meaning. No other is taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

# Prometheus wants one namespace for an application; the console and metrics.jsonl do without.
PREFIX = "coldpress_"


@dataclass(frozen=True)
class Metric:
    """One number: its name without prefix, whether it only grows, what it means, and what tells several apart."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, "gauge", text, labels)


def _counter(name: str, text: str) -> Metric:
    return Metric(name, "counter", f"{text}, counted since the process started.")


def _driver_counter(name: str, text: str, *labels: str) -> Metric:
    return Metric(name, "counter", f"{text}, as the driver counts them.", labels)


# Terms of a loss by name: they go while the run goes on.
TERMS = "loss_tap"

# What a process does, as its host sees it: a GPU may still be busy with what was entered before.
PHASES = {
    "start": "at its start, before the first step",
    "data": "waiting for a batch",
    "tune": "choosing a compression",
    "forward": "in forwards",
    "backward": "in backwards",
    "step": "averaging gradients and updating weights",
    "report": "between steps: counting, reporting, agreeing",
    "probe": "in k-NN probes",
    "save": "in saves that training waited for",
    "end": "at its end",
}


def seconds_in(phase: str) -> str:
    """Return the name of the time spent in a phase."""
    return f"phase_{phase}_seconds_total"


_METRICS = (
    # How far the run has come.
    _gauge("step", "Optimizer steps of the run, earlier lives included."),
    _gauge("progress_ratio", "Share of the budget that is spent; every schedule is a function of it."),
    _gauge("budget_spent", "Spent budget, in the unit of the budget."),
    _gauge("budget_total", "Whole budget, in the unit of the budget."),
    _gauge("eta_seconds", "Expected time until the budget is spent."),
    _counter("steps_total", "Optimizer steps"),
    _counter("samples_total", "Samples of all processes together"),
    _counter("tokens_total", "Tokens that entered backbones, of all processes together"),
    _counter("cost_total", "Cost of all processes together; a unit is one forward of the uncompressed sequence"),
    _counter("nominal_cost_total", "Cost as the paper's formula counts it: lengths not rounded, nothing frozen"),
    _counter("flops_total", "Model FLOPs of the steps of all processes together, forward and backward"),
    _counter("uncompressed_cost_total", "Cost of the same samples with nothing compressed and nothing frozen"),
    _counter("skipped_steps_total", "Steps that changed nothing because loss or gradient was not finite"),
    _counter("tuning_cost_total", "Cost of measuring which compression is best, a part of the cost above"),
    _counter("tuning_moves_total", "Changes of the compression that measurements led to"),
    # How fast it goes, over the last log interval.
    _gauge("samples_per_second", "Samples of all processes together per second, over the log interval."),
    _gauge("tokens_per_second", "Backbone tokens of all processes together per second, over the log interval."),
    _gauge("cost_per_second", "Cost units of all processes together per second, over the log interval."),
    _gauge("flops_per_second", "Model FLOPs of all processes together per second, over the log interval."),
    _gauge("mfu_ratio", "Model FLOPs a second over what the devices can do at best; absent where nobody knows that."),
    _gauge("step_seconds", "Mean duration of a step over the log interval."),
    _counter("recompiles_total", "Graphs that this process compiled during training, for shapes that no plan told of"),
    _gauge("data_wait_ratio", "Share of the log interval that this process waited for its next batch."),
    _counter("data_wait_seconds_total", "Time that this process waited for its next batch"),
    *(_counter(seconds_in(phase), f"Time of the main process's thread {what}") for phase, what in PHASES.items()),
    _counter("bad_samples_total", "Samples found broken and replaced by others, by all processes together"),
    _gauge("gpu_memory_bytes", "Memory that tensors of this process occupy on its GPU."),
    _gauge("gpu_memory_peak_bytes", "The most that they have occupied since the process started."),
    _gauge("gpu_memory_reserved_bytes", "Memory that PyTorch keeps for tensors of this process on its GPU."),
    _gauge("gpu_memory_used_bytes", "Memory of that GPU in use by anybody; less what is reserved, DALI, NCCL, CUDA."),
    # What it learns.
    _gauge("loss", "Training loss of the last step, mean over processes."),
    *(_gauge(f"{TERMS}{i}", f"LocalMIM's loss at tap {i}, counted from the input.") for i in range(1, 7)),
    _gauge("grad_norm", "Global gradient norm of the last step, before clipping."),
    _gauge("grad_norm_embedding", "Gradient norm of layer 0, the embedding; with engine.layer_norms only."),
    _gauge("grad_norm_first_block", "Gradient norm of layer 1, the first block; with engine.layer_norms only."),
    _gauge("grad_norm_last_block", "Gradient norm of the last layer that can freeze; with engine.layer_norms only."),
    _gauge("grad_norm_heads", "Gradient norm of all heads together; with engine.layer_norms only."),
    _gauge("grad_norm_largest_layer", "Layer, 0 the embedding, of the largest norm; with engine.layer_norms only."),
    _gauge("feature_std", "Standard deviation of normalized features over one process's samples; 0 is a collapse."),
    _gauge("effective_rank", "Directions that features of one process's samples vary in; near 1 is a collapse."),
    _gauge("teacher_entropy_ratio", "Entropy of the teacher's outputs over the largest possible; 1 is a collapse."),
    _gauge("prototype_entropy_ratio", "Entropy of the teacher's mean output over the largest; 0 is a collapse."),
    _gauge("knn_top1_ratio", "Share of the probe's samples that their nearest neighbors classify right."),
    # What the schedules say.
    _gauge("learning_rate", "Learning rate of the heads."),
    _gauge("weight_decay", "Decoupled weight decay."),
    _gauge("momentum_ratio", "Share that the momentum encoder keeps of itself in a step."),
    _gauge("teacher_temperature", "Softmax temperature of the teacher; 1 for methods without one."),
    _gauge("patch_size_pixels", "Side of a patch of the query's view."),
    _gauge("token_dropout_ratio", "Share of the query's patches that is dropped."),
    _gauge("query_tokens", "Sequence length of the query's forward."),
    _gauge("key_tokens", "Sequence length of the key's forward."),
    _gauge("frozen_layers", "Layers, counted from the input, that no longer learn."),
    _gauge("optimizer_bytes", "Master weights and moments that this process keeps; less as layers freeze."),
    # What survives.
    _gauge(
        "checkpoint_seconds", "Time until the last checkpoint was durable and the next step noticed; training went on."
    ),
    _gauge("checkpoint_stall_seconds", "Time that training waited for the last checkpoint."),
    _gauge("checkpoint_bytes", "Size of the last checkpoint."),
    _gauge("run_directory_free_bytes", "Room on the file system of the run's directory."),
    _gauge("last_checkpoint_timestamp_seconds", "Unix time of the last checkpoint."),
    _gauge("last_step_timestamp_seconds", "Unix time of the last reported step."),
    _gauge("start_timestamp_seconds", "Unix time at which the process opened its endpoint."),
    _gauge("restarts", "How often the scheduler restarted this job."),
    _counter("checkpoints_total", "Checkpoints"),
    _counter("checkpoint_failures_total", "Checkpoints that could not be written"),
)

# What a process is asked for between two reports; where its main thread is, on its own account.
PHASE, PHASE_SECONDS, STEP_SECONDS = "phase", "phase_duration_seconds", "step_duration_seconds"
_LIVE = (
    _gauge(PHASE, "1 for the phase that the process is in.", "phase"),
    _gauge("phase_timestamp_seconds", "Unix time at which the process entered its phase."),
    _counter("phases_total", "Phases that the process entered; all enter the same ones, so who has fewer is behind"),
    _gauge("waiting", "1 while the main thread waits for other processes."),
    Metric(PHASE_SECONDS, "histogram", "Time of a step in each of its phases, as the host sees it.", ("phase",)),
    Metric(STEP_SECONDS, "histogram", "Duration of a step, waiting for data included, probes and saves not."),
)

# What the exporter of a node says of each of its GPUs.
_GPUS = (
    _gauge("node_gpu_up", "1 while the driver answers for the GPU; 0 once it is lost.", "gpu"),
    _gauge("node_gpu_info", "1; which GPU it is.", "gpu", "name", "uuid"),
    _gauge("node_gpu_utilization_ratio", "Share of the driver's last sample in which something ran on the GPU.", "gpu"),
    _gauge("node_gpu_memory_used_bytes", "Memory of the GPU in use, by all processes.", "gpu"),
    _gauge("node_gpu_memory_total_bytes", "Memory of the GPU.", "gpu"),
    _gauge("node_gpu_power_watts", "Power that the GPU draws.", "gpu"),
    _gauge("node_gpu_power_limit_watts", "Power that it may draw.", "gpu"),
    _gauge("node_gpu_temperature_celsius", "Temperature of the GPU's core.", "gpu"),
    _gauge("node_gpu_sm_clock_hertz", "Clock of the multiprocessors.", "gpu"),
    _gauge("node_gpu_sm_clock_max_hertz", "The highest clock that they can have.", "gpu"),
    _gauge("node_gpu_throttled", "1 while the reason holds the clocks down.", "gpu", "reason"),
    _driver_counter("node_gpu_ecc_errors_total", "Memory errors, corrected or not", "gpu", "kind"),
    _driver_counter("node_gpu_pcie_replays_total", "Transfers over PCIe that had to be repeated", "gpu"),
    _gauge("node_gpu_read_timestamp_seconds", "Unix time at which the driver last answered for all GPUs of the node."),
)
# What the exporter of a cluster says.
_SLURM = (
    _gauge("slurm_up", "1 if Slurm answered when it was last asked."),
    _gauge("slurm_read_timestamp_seconds", "Unix time at which Slurm was last asked."),
    _gauge("slurm_read_seconds", "Time that it took to answer, or to fail."),
    _gauge("slurm_jobs", "Jobs that Slurm still knows.", "state", "partition"),
    _gauge("slurm_jobs_pending", "Jobs that wait, by the reason.", "reason"),
    _gauge("slurm_job_restarts", "Restarts of all jobs of coldpress that wait or run."),
    _gauge("slurm_nodes", "Nodes by their state.", "state"),
    _gauge("slurm_nodes_not_responding", "Nodes that do not answer Slurm, whatever their state."),
)


def _catalog(metrics: tuple[Metric, ...]) -> Mapping[str, Metric]:
    return MappingProxyType({metric.name: metric for metric in metrics})


CATALOG, LIVE, GPUS, SLURM = map(_catalog, (_METRICS, _LIVE, _GPUS, _SLURM))
_EVERYTHING = (*_METRICS, *_LIVE, *_GPUS, *_SLURM)
assert len({metric.name for metric in _EVERYTHING}) == len(_EVERYTHING), "a name is listed twice"


def check(metrics: Mapping[str, float]) -> None:
    """Assert that every name is in the catalogue."""
    unknown = sorted(metrics.keys() - CATALOG.keys())
    assert not unknown, f"{', '.join(unknown)}: not in the catalogue, monitoring/metrics.py"
