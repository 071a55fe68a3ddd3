"""What the Grafana dashboards show: every panel with its queries, and what to do about what it shows."""

from __future__ import annotations

from monitoring.node_panels import GPUS, QUEUE
from monitoring.panel import RATE, RUN, Dashboard, Panel, Row, of_run, quantile, rate_of_run, share_of_phases

# Exporters have targets, too, and no run.
RANKS_UP = 'up{job="coldpress", run=~"$run"}'

# On both pages.
SAMPLES = Panel(
    "Samples per second",
    ((rate_of_run("samples_total"), "{{run}}"),),
    "All processes together. It falls where a schedule relaxes; ThroughputDropped compares a stage with itself.",
)
COST = Panel(
    "Cost per second",
    ((rate_of_run("cost_total"), "{{run}}"),),
    "Units of the budget, a unit being one uncompressed forward. Level over all stages means that what compression "
    "and freezing promise is realized.",
)
DATA_WAIT = Panel(
    "Waiting for data",
    ((f"rate(coldpress_data_wait_seconds_total{RUN}{RATE})", "{{run}} rank {{rank}}"),),
    "Share of wall-clock time, rank by rank. Above 0.2: more cores per task, or data.staging on a local disk.",
    "percentunit",
)
PROGRESS_RATIO = Panel(
    "Progress",
    ((of_run("progress_ratio"), "{{run}}"),),
    "Share of the budget that is spent; every schedule follows it. A step back is work that a lost node cost.",
    "percentunit",
)
STANDING = Panel(
    "Since the last step",
    ((f"time() - coldpress_last_step_timestamp_seconds{RUN}", "{{run}} rank {{rank}}"),),
    "Grows while a run stands still; its watchdog ends it by itself. A rank that is not there has no line.",
    "s",
)
KNN = Panel(
    "k-NN accuracy",
    ((of_run("knn_top1_ratio"), "{{run}}"),),
    "Held-out samples that their nearest neighbors classify right: the number that counts.",
    "percentunit",
)
SKIPPED = Panel(
    "Skipped steps",
    ((of_run("skipped_steps_total"), "{{run}}"),),
    "Steps that changed nothing, since loss or gradient was not finite. A few are no harm; engine.max_skipped in "
    "a row end the run.",
    "none",
)
AGE = Panel(
    "Age of the last checkpoint",
    ((f"time() - {of_run('last_checkpoint_timestamp_seconds')}", "{{run}}"),),
    "What a lost node would cost. Too old: lower checkpoint.every_minutes.",
    "s",
)
ROOM = Panel(
    "Room on the disk",
    (
        (of_run("run_directory_free_bytes"), "{{run}} free"),
        (of_run("checkpoint_bytes"), "{{run}} a checkpoint"),
    ),
    "Make room before it is less than two checkpoints.",
    "bytes",
)
RESTARTS = Panel(
    "Restarts",
    ((of_run("restarts"), "{{run}}"),),
    "How often Slurm restarted the job. With progress that is preemption; without, read the log of each life.",
    "none",
)
MFU = Panel(
    "Model FLOPs utilization",
    ((of_run("mfu_ratio"), "{{run}}"),),
    "What forward and backward multiply, over what the GPUs can do at best. Short sequences and small batches leave "
    "GPUs idle: raise batch_size, say model.compile=true. Empty for GPUs that nobody knows: monitor.peak_teraflops.",
    "percentunit",
)
THROUGHPUT = Row(
    "Throughput",
    (
        SAMPLES,
        Panel(
            "Tokens per second",
            ((rate_of_run("tokens_total"), "{{run}}"),),
            "All processes together. Compression lowers the tokens of a sample, not this number: if it falls, too, "
            "short sequences leave the device idle. Raise batch_size.",
        ),
        COST,
        MFU,
        Panel(
            "FLOPs per second",
            ((rate_of_run("flops_total"), "{{run}}"),),
            "Model FLOPs of all processes together; falls with compression where the device is left idle.",
            "flops",
        ),
        Panel(
            "Duration of a step",
            ((quantile(0.5), "{{run}} median"), (quantile(0.95), "{{run}} 95 %")),
            "Of all ranks, waiting for data included. Where they are far apart, look at data and the network.",
            "s",
        ),
        Panel(
            "Where a step's time goes",
            ((share_of_phases(), "{{run}} {{phase}}"),),
            "Share of wall-clock time as the host sees it, mean over ranks; the rest is reports, probes and "
            "saves. On a GPU the host runs ahead, and waits in step.",
            "percentunit",
            stacked=True,
        ),
        DATA_WAIT,
    ),
)
PROGRESS = Row(
    "Progress",
    (
        PROGRESS_RATIO,
        Panel("Time left", ((of_run("eta_seconds"), "{{run}}"),), "Expected time until the budget is spent.", "s"),
        STANDING,
    ),
)
LEARNING = Row(
    "Learning",
    (
        Panel(
            "Loss", ((of_run("loss"), "{{run}}"),), "Training loss, mean over processes. It jumps where views change."
        ),
        KNN,
        Panel(
            "Gradient norm",
            ((of_run("grad_norm"), "{{run}}"),),
            "Global, before clipping. Spikes with skipped steps: lower rate.base or optim.clip.",
        ),
        Panel(
            "Feature spread",
            ((of_run("feature_std", "min"), "{{run}}"),),
            "1 for features in all directions, 0 is a collapse.",
        ),
        Panel(
            "Effective rank",
            ((of_run("effective_rank", "min"), "{{run}}"),),
            "Directions in which features vary; near 1 is a collapse.",
        ),
        Panel(
            "Teacher's entropy",
            (
                (of_run("teacher_entropy_ratio"), "{{run}} of an output"),
                (of_run("prototype_entropy_ratio"), "{{run}} of the mean"),
            ),
            "DINO only. An output's at 1, or the mean's at 0, is a collapse.",
            "percentunit",
        ),
        Panel(
            "Loss by tap",
            (('max by (run, __name__) ({__name__=~"coldpress_loss_tap.", run=~"$run"})', "{{run}} {{__name__}}"),),
            "LocalMIM only. A term ends where its layer is frozen.",
        ),
        SKIPPED,
    ),
)
SCHEDULES = Row(
    "Schedules",
    (
        Panel(
            "Tokens of a sample",
            ((of_run("query_tokens"), "{{run}} query"), (of_run("key_tokens"), "{{run}} key")),
            "Sequence lengths of the query's and the key's forward.",
        ),
        Panel(
            "Compression",
            ((of_run("token_dropout_ratio"), "{{run}} dropout"),),
            "Share of the query's patches that is dropped; patch sizes show in the tokens.",
            "percentunit",
        ),
        Panel(
            "Frozen layers",
            ((of_run("frozen_layers"), "{{run}}"),),
            "Layers, counted from the input, that no longer learn.",
        ),
        Panel("Learning rate", ((of_run("learning_rate"), "{{run}}"),), "Learning rate of the heads.", "sci"),
        Panel(
            "Momentum",
            ((of_run("momentum_ratio"), "{{run}}"),),
            "Share that the momentum encoder keeps of itself in a step.",
        ),
        Panel(
            "Changes of an adaptive compression",
            ((of_run("tuning_moves_total"), "{{run}}"),),
            "Moves that measurements led to; compression=adaptive only.",
            "none",
        ),
    ),
)
RANKS = Row(
    "Ranks",
    (
        Panel(
            "Phase",
            ((f"max by (run, rank, phase) (coldpress_phase{RUN})", "{{run}} rank {{rank}} {{phase}}"),),
            "Where each rank is at each scrape. In a hang, they wait for the one in another phase than the rest.",
            kind="state-timeline",
        ),
        Panel(
            "Behind the first",
            (("rank:coldpress_phases_behind" + RUN, "{{run}} rank {{rank}}"),),
            "Phases that a rank has entered less than the first one. Level and above 0: the others wait for it.",
            "none",
        ),
        Panel(
            "Waiting for others",
            ((f"avg_over_time(coldpress_waiting{RUN}[10m])", "{{run}} rank {{rank}}"),),
            "Share of scrapes at which a rank was held up by the others. Who hardly ever waits while others do is "
            "slow: look at its node.",
            "percentunit",
        ),
        Panel(
            "Memory of the optimizer",
            ((f"coldpress_optimizer_bytes{RUN}", "{{run}} rank {{rank}}"),),
            "Master weights and moments; it falls as layers freeze.",
            "bytes",
        ),
        Panel(
            "Memory of the GPU",
            (
                (f"coldpress_gpu_memory_bytes{RUN}", "{{run}} rank {{rank}}"),
                (f"coldpress_gpu_memory_peak_bytes{RUN}", "{{run}} rank {{rank}} peak"),
                (f"coldpress_gpu_memory_reserved_bytes{RUN}", "{{run}} rank {{rank}} reserved"),
                (f"coldpress_gpu_memory_used_bytes{RUN}", "{{run}} rank {{rank}} in use"),
            ),
            "What tensors occupy, the most that they have, what PyTorch keeps for them, and what is in use at all: the "
            "rest is DALI's, NCCL's and CUDA's. Empty without a GPU.",
            "bytes",
        ),
        Panel(
            "Broken samples",
            ((of_run("bad_samples_total"), "{{run}}"),),
            "Samples that broke after sharding and were replaced, on all ranks together; 0 is right. coldpress verify "
            "names the shards.",
            "none",
        ),
    ),
)
CHECKPOINTS = Row(
    "Checkpoints",
    (
        AGE,
        Panel(
            "Duration of a checkpoint",
            (
                (of_run("checkpoint_seconds"), "{{run}} until durable"),
                (of_run("checkpoint_stall_seconds"), "{{run}} training waits"),
            ),
            "Until it is durable training goes on; it waits for the copy only, or for a save before that is not done.",
            "s",
        ),
        Panel(
            "Failed saves",
            ((of_run("checkpoint_failures_total"), "{{run}}"),),
            "The log says why. Training goes on, and the checkpoint before stays the newest.",
            "none",
        ),
        ROOM,
        RESTARTS,
    ),
)
OVERVIEW = Row(
    "Runs",
    (
        PROGRESS_RATIO,
        SAMPLES,
        COST,
        KNN,
        MFU,
        Panel(
            "Processes",
            ((f"sum by (run) ({RANKS_UP})", "{{run}} up"), (f"count by (run) ({RANKS_UP})", "{{run}} all")),
            "Fewer up than there are: a process that did not end well, or a node that nobody reaches.",
            "none",
        ),
        Panel(
            "Alerts",
            (('sum by (run, alertname) (ALERTS{alertstate="firing", run=~"$run"})', "{{run}} {{alertname}}"),),
            "What fires now; each alert says what to do.",
            "none",
        ),
    ),
)
CLUSTER = Row(
    "Where time is lost",
    (
        DATA_WAIT,
        STANDING,
        AGE,
        RESTARTS,
        ROOM,
        SKIPPED,
    ),
)
DASHBOARDS = (
    Dashboard(
        "coldpress-training",
        "coldpress: one run",
        (THROUGHPUT, PROGRESS, LEARNING, SCHEDULES, RANKS, CHECKPOINTS),
    ),
    Dashboard("coldpress-cluster", "coldpress: all runs", (OVERVIEW, CLUSTER, GPUS, QUEUE), many=True),
)
