"""The course of a run: what its schedules said, and the norms and indicators by which one sees whether it is well."""

from __future__ import annotations

from pipeline.reports import html
from pipeline.reports.charts import Line, Look, curves
from pipeline.reports.record import Record

# Title, unit of the axis, whether values hold until the next report, where the axis begins, metrics with their names.
SCHEDULES = (
    ("Tokens of an image", "tokens", True, "zero", {"query_tokens": "query", "key_tokens": "key"}),
    ("Patch size", "pixels", True, "zero", {"patch_size_pixels": "patch size"}),
    ("Token dropout", "share", True, "zero", {"token_dropout_ratio": "dropout"}),
    ("Freeze path", "frozen layers", True, "zero", {"frozen_layers": "frozen layers"}),
    ("Learning rate", "learning rate", False, "zero", {"learning_rate": "heads"}),
    ("Weight decay", "weight decay", False, "zero", {"weight_decay": "weight decay"}),
    ("Momentum encoder", "share kept a step", False, "", {"momentum_ratio": "momentum"}),
)
HEALTH = (
    ("Gradient norm", "norm before clipping", False, "log", {"grad_norm": "all"}),
    (
        "Gradient norms of layers",
        "norm before clipping",
        False,
        "log",
        {
            "grad_norm_embedding": "embedding",
            "grad_norm_first_block": "first block",
            "grad_norm_last_block": "last block",
            "grad_norm_heads": "heads",
        },
    ),
    ("Spread of features", "standard deviation; 0: collapsed", False, "zero", {"feature_std": "features"}),
    ("Effective rank", "directions; 1: collapsed", False, "zero", {"effective_rank": "features"}),
    (
        "Entropy of the teacher",
        "share of the largest",
        False,
        "zero",
        {"teacher_entropy_ratio": "of an output", "prototype_entropy_ratio": "of the mean output"},
    ),
    ("Optimizer memory", "bytes of the main process", True, "zero", {"optimizer_bytes": "optimizer"}),
    ("GPU memory", "peak, bytes", False, "zero", {"gpu_memory_peak_bytes": "peak"}),
)
Chart = tuple[str, str, bool, str, dict[str, str]]


def course(record: Record) -> str:
    """Return schedules, then norms and indicators, each as far as the run reported it."""
    health = [drawn for chart in HEALTH if (drawn := _drawn(record, chart))]
    schedules = [drawn for chart in SCHEDULES if (drawn := _drawn(record, chart))]
    told = _constants(record)
    return "\n".join(
        filter(
            None,
            (
                html.section("Schedules", html.charts(schedules), html.paragraph(told, "note") if told else ""),
                html.section("Norms and indicators", html.charts(health)),
            ),
        )
    )


def _drawn(record: Record, chart: Chart) -> tuple[str, str] | None:
    """Return a chart, None of what was not reported, or never changed."""
    title, unit, steps, begin, metrics = chart
    history = record.history
    named = {name: label for name, label in metrics.items() if history.has(name) and any(history.curve(name))}
    if not named or all(_constant(record, name) for name in named):
        return None
    x = history.curve("budget_spent")
    lines = [Line(label, x, history.curve(name)) for name, label in named.items()]
    look = Look(f"budget ({record.budget_unit})", unit, steps=steps, log=begin == "log", from_zero=begin == "zero")
    return title, curves(lines, look)


def _constant(record: Record, name: str) -> bool:
    return len(record.history.points) > 1 and len(set(record.history.curve(name))) == 1


def _constants(record: Record) -> str:
    """Say what the schedules left as it was."""
    last = record.history.last
    if last is None:
        return ""
    names = [name for *_, metrics in SCHEDULES for name in metrics if _constant(record, name)]
    told = ", ".join(f"{name.removesuffix('_ratio').replace('_', ' ')} {last[name]:g}" for name in names)
    return f"The same all the time: {told}." if told else ""
