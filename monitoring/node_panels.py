"""What the exporters of nodes and queue show; empty where none runs."""

from __future__ import annotations

from monitoring.panel import RATE, Panel, Row

GPU = "{{node}} {{gpu}}"
GPUS = Row(
    "GPUs of all nodes (coldpress gpu-exporter)",
    (
        Panel(
            "Utilization",
            (("coldpress_node_gpu_utilization_ratio", GPU),),
            "Share of time in which something ran, however little of the GPU that took; model FLOPs utilization says "
            "how much. Low on one node only: look at that node.",
            "percentunit",
        ),
        Panel(
            "Memory in use",
            (("coldpress_node_gpu_memory_used_bytes / coldpress_node_gpu_memory_total_bytes", GPU),),
            "Of all processes on the GPU. Somebody who should not be there shows before a run starts.",
            "percentunit",
        ),
        Panel(
            "Power",
            (("coldpress_node_gpu_power_watts", GPU),),
            "Far below that of the other GPUs of a run: it waits, or is held down.",
            "watt",
        ),
        Panel(
            "Temperature",
            (("coldpress_node_gpu_temperature_celsius", GPU),),
            "Clocks fall a few degrees below the limit of the GPU. Look at the cooling of a node that stands out.",
            "celsius",
        ),
        Panel(
            "Clock",
            (("coldpress_node_gpu_sm_clock_hertz / coldpress_node_gpu_sm_clock_max_hertz", GPU),),
            "Share of the highest. Low under load: see what holds it down.",
            "percentunit",
        ),
        Panel(
            "Held down by",
            (('coldpress_node_gpu_throttled{reason!="gpu_idle"} == 1', f"{GPU} {{{{reason}}}}"),),
            "Why clocks are lower than they could be. sw_power_cap is usual under load; heat and brakes are not.",
            "none",
        ),
        Panel(
            "Memory errors",
            (
                (f"sum by (node, gpu, kind) (rate(coldpress_node_gpu_ecc_errors_total{RATE}))", f"{GPU} {{{{kind}}}}"),
                (f"rate(coldpress_node_gpu_pcie_replays_total{RATE})", f"{GPU} PCIe replays"),
            ),
            "A second. Uncorrected ones end what runs on the GPU: drain the node.",
            "none",
        ),
        Panel(
            "GPUs that answer",
            (("sum by (node) (coldpress_node_gpu_up)", "{{node}}"),),
            "Fewer than the node has: one has fallen off the bus. Drain the node.",
            "none",
        ),
    ),
)
QUEUE = Row(
    "Slurm (coldpress slurm-exporter)",
    (
        Panel(
            "Jobs",
            (("sum by (state, partition) (coldpress_slurm_jobs)", "{{partition}} {{state}}"),),
            "Jobs that Slurm still knows, ended ones for a while.",
            "none",
        ),
        Panel(
            "Why jobs wait",
            (("sum by (reason) (coldpress_slurm_jobs_pending)", "{{reason}}"),),
            "Resources and Priority: their turn comes. Held, launch failed or a bad constraint: it does not by itself.",
            "none",
        ),
        Panel(
            "Nodes",
            (
                ("sum by (state) (coldpress_slurm_nodes)", "{{state}}"),
                ("sum (coldpress_slurm_nodes_not_responding)", "not responding"),
            ),
            "sinfo --list-reasons says why one is down or drained.",
            "none",
        ),
        Panel(
            "Restarts of waiting and running jobs",
            (("sum (coldpress_slurm_job_restarts)", "restarts"),),
            "Of jobs called coldpress. Rising fast: preemption, or a node that runs keep dying on.",
            "none",
        ),
        Panel(
            "Slurm answers",
            (("min (coldpress_slurm_up)", "up"), ("max (coldpress_slurm_read_seconds)", "seconds")),
            "0: the controller is down; what runs goes on. Slow answers: raise every_seconds of the exporter.",
            "none",
        ),
    ),
)
