"""Who imports whom, one door per heavy dependency, small rooms."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
SOURCES = sorted(p for room in ("pipeline", "data", "monitoring") for p in (REPOSITORY / room).rglob("*.py"))
COMMANDS = {
    f"pipeline.{name}"
    for name in (
        "train",
        "doctor",
        "plan",
        "evaluate",
        "export",
        "status",
        "report",
        "analyze",
        "bench",
        "compare",
        "compare_freezing",
        "study",
        "demo",
    )
}

# A room may import itself and what stands here; what is not listed is forbidden. Longest name first wins.
ARROWS: dict[str, set[str]] = {
    "data": set(),
    "monitoring": set(),
    "pipeline.allocator": set(),
    "pipeline.distributed": {"pipeline.allocator", "pipeline.preemption"},
    "pipeline.compression": set(),
    "pipeline.freezing": set(),
    "pipeline.optim": set(),
    "pipeline.pieces": set(),
    "pipeline.shards": set(),
    "pipeline.optimizer_state": {"pipeline.shards"},
    "pipeline.gradients": {"pipeline.optimizer_state", "pipeline.shards"},
    "pipeline.engine_config": set(),
    "pipeline.engine_state": {
        "pipeline.methods",
        "pipeline.optimizer_state",
        "pipeline.pieces",
        "pipeline.shards",
    },
    "pipeline.preemption": set(),
    "pipeline.reports": {"monitoring.metrics", "pipeline.compose", "pipeline.run_status"},
    "pipeline.status_file": set(),
    "pipeline.run_status": {"pipeline.status_file"},
    "pipeline.heartbeat": {"monitoring.histogram", "monitoring.live", "monitoring.metrics"},
    "pipeline.peers": {"pipeline.distributed", "pipeline.heartbeat", "pipeline.preemption"},
    "pipeline.watchdog": {
        "pipeline.distributed",
        "pipeline.heartbeat",
        "pipeline.peers",
        "pipeline.preemption",
        "pipeline.status_file",
    },
    "pipeline.losses": {"pipeline.distributed"},
    "pipeline.models": {"pipeline.compression", "pipeline.distributed", "pipeline.shards"},
    "pipeline.schedules": {"pipeline.compression", "pipeline.freezing"},
    "pipeline.methods": {
        "pipeline.models",
        "pipeline.losses",
        "pipeline.schedules",
        "pipeline.compression",
        "pipeline.distributed",
        "data.views",
        "data.randaugment",
        "data.recipes",
    },
    "pipeline.interplay": {"pipeline.compression", "pipeline.freezing", "pipeline.schedules"},
    "pipeline.accumulation": {"pipeline.methods"},
    "pipeline.training_engine": {
        "pipeline.accumulation",
        "pipeline.engine_config",
        "pipeline.engine_state",
        "pipeline.gradients",
        "pipeline.heartbeat",
        "pipeline.methods",
        "pipeline.optim",
        "pipeline.optimizer_state",
        "pipeline.pieces",
        "pipeline.schedules",
    },
    "pipeline.engine": {
        "pipeline.accumulation",
        "pipeline.engine_config",
        "pipeline.gradients",
        "pipeline.heartbeat",
        "pipeline.methods",
        "pipeline.models",
        "pipeline.optim",
        "pipeline.optimizer_state",
        "pipeline.schedules",
        "pipeline.training_engine",
    },
    "pipeline.shard_optimizer": {"pipeline.optim", "pipeline.shards"},
    "pipeline.fsdp_engine": {
        "pipeline.accumulation",
        "pipeline.engine_config",
        "pipeline.gradients",
        "pipeline.heartbeat",
        "pipeline.methods",
        "pipeline.models",
        "pipeline.optim",
        "pipeline.optimizer_state",
        "pipeline.schedules",
        "pipeline.shard_optimizer",
        "pipeline.shards",
        "pipeline.training_engine",
    },
    "pipeline.engines": {
        "pipeline.engine",
        "pipeline.engine_config",
        "pipeline.fsdp_engine",
        "pipeline.methods",
        "pipeline.optim",
        "pipeline.training_engine",
    },
    "pipeline.skips": {
        "pipeline.distributed",
        "pipeline.methods",
        "pipeline.preemption",
        "pipeline.training_engine",
        "data.manifest",
        "data.order",
    },
    "pipeline.checkpoint_files": set(),
    "pipeline.checkpoint": {
        "pipeline.checkpoint_files",
        "pipeline.distributed",
        "pipeline.pieces",
        "pipeline.training_engine",
    },
    "pipeline.analysis": {
        "pipeline.compression",
        "pipeline.distributed",
        "pipeline.methods",
        "pipeline.models",
        "pipeline.schedules",
    },
    "pipeline.analysis_plots": {"pipeline.analysis"},
    "pipeline.tuning": {
        "pipeline.accumulation",
        "pipeline.analysis",
        "pipeline.checkpoint",
        "pipeline.compression",
        "pipeline.distributed",
        "pipeline.methods",
        "pipeline.schedules",
    },
    "pipeline.flops": {"pipeline.methods", "pipeline.models", "pipeline.schedules"},
    "pipeline.peaks": {"pipeline.engine_config"},
    "pipeline.traffic": {"pipeline.engine_config", "pipeline.methods", "pipeline.schedules"},
    "pipeline.scaling": {
        "pipeline.engine_config",
        "pipeline.flops",
        "pipeline.methods",
        "pipeline.schedules",
        "pipeline.traffic",
    },
    "pipeline.meter": {
        "pipeline.checkpoint",
        "pipeline.flops",
        "pipeline.methods",
        "pipeline.schedules",
        "pipeline.training_engine",
        "pipeline.tuning",
    },
    "pipeline.probes": {"pipeline.models", "pipeline.compression", "pipeline.distributed", "data"},
    "pipeline.networks": {
        "pipeline.config",
        "pipeline.engine_state",
        "pipeline.methods",
        "pipeline.models",
        "pipeline.pieces",
    },
    "pipeline.exports": {
        "pipeline.checkpoint_files",
        "pipeline.compression",
        "pipeline.config",
        "pipeline.engine_state",
        "pipeline.methods",
        "pipeline.models",
        "pipeline.networks",
        "pipeline.pieces",
        "pipeline.schedules",
        "data.manifest",
        "data.views",
    },
    "pipeline.prewarm": {"pipeline.methods", "pipeline.models", "pipeline.schedules"},
    "pipeline.plots": {"pipeline.methods", "pipeline.schedules"},
    "pipeline.config": {"pipeline", "data", "monitoring"},
    "pipeline.compose": set(),
    "pipeline.children": set(),
    "pipeline.trials": {
        "data",
        "pipeline.children",
        "pipeline.compose",
        "pipeline.config",
        "pipeline.methods",
        "pipeline.models",
        "pipeline.schedules",
    },
    "pipeline.study_plots": {"pipeline.plots"},
    "pipeline.bench_plots": {"pipeline.plots"},
    "pipeline.freezing_plots": {"pipeline.plots"},
    "pipeline.identity": {
        "data.order",
        "pipeline.compression",
        "pipeline.config",
        "pipeline.freezing",
        "pipeline.schedules",
    },
    "pipeline.linear_protocol": {"pipeline.distributed", "pipeline.models", "pipeline.probes", "data"},
    # Fine-tuning is a training run: the one case where a command is called.
    "pipeline.finetune_protocol": {
        "data",
        "monitoring.sinks",
        "pipeline.checkpoint_files",
        "pipeline.compose",
        "pipeline.config",
        "pipeline.distributed",
        "pipeline.exports",
        "pipeline.linear_protocol",
        "pipeline.methods",
        "pipeline.networks",
        "pipeline.preemption",
        "pipeline.probes",
        "pipeline.train",
        "pipeline.watchdog",
    },
    "pipeline.following": {"pipeline.checkpoint_files", "pipeline.distributed", "pipeline.run_directory"},
    "pipeline.run_directory": {
        "pipeline.compose",
        "pipeline.compression",
        "pipeline.config",
        "pipeline.run_status",
        "pipeline.status_file",
    },
    "pipeline.benchmarks": {
        "pipeline.accumulation",
        "pipeline.checkpoint",
        "pipeline.checkpoint_files",
        "pipeline.children",
        "pipeline.compression",
        "pipeline.config",
        "pipeline.distributed",
        "pipeline.engine",
        "pipeline.engine_config",
        "pipeline.engines",
        "pipeline.flops",
        "pipeline.freezing",
        "pipeline.heartbeat",
        "pipeline.meter",
        "pipeline.methods",
        "pipeline.models",
        "pipeline.optim",
        "pipeline.peaks",
        "pipeline.preemption",
        "pipeline.prewarm",
        "pipeline.schedules",
        "pipeline.traffic",
        "pipeline.training_engine",
        "data",
        "monitoring",
    },
    "pipeline.benchmarks.peers": {
        "pipeline.benchmarks.timing",
        "pipeline.distributed",
        "pipeline.engine_config",
        "pipeline.heartbeat",
        "pipeline.methods",
        "pipeline.models",
        "pipeline.optim",
        "pipeline.schedules",
        "data.dali",
        "data.manifest",
        "data.views",
    },
    "pipeline.parts": {
        "data.loader",
        "pipeline.checkpoint",
        "pipeline.compression",
        "pipeline.config",
        "pipeline.distributed",
        "pipeline.engines",
        "pipeline.identity",
        "pipeline.interplay",
        "pipeline.methods",
        "pipeline.models",
        "pipeline.probes",
        "pipeline.schedules",
        "pipeline.training_engine",
        "pipeline.tuning",
    },
    "pipeline.checkups": {
        "data",
        "pipeline.checkpoint",
        "pipeline.distributed",
        "pipeline.schedules",
        "pipeline.training_engine",
    },
    "pipeline.cli": {"pipeline.compose", "pipeline.preemption", "data.verify"},
}
# Commands stand on everything below them; only the command line and `plan`, which plans a training run, name one.
COMMAND_ARROWS = {"pipeline", "data", "monitoring"}
DOORS = {
    "deepspeed": {"pipeline/engine.py"},
    # The second one measures DALI's own readers, as a peer of ours.
    "nvidia": {"data/dali/", "pipeline/benchmarks/peers/dali_reader.py"},
    "prometheus_client": {"monitoring/"},
    "pynvml": {"monitoring/exporters/gpu_exporter.py"},
    "hydra": {"pipeline/compose.py"},
    "yaml": {"pipeline/compression/schedule_file.py"},
    "omegaconf": {"pipeline/compose.py", "pipeline/config.py"},
}


def module_name(path: Path) -> str:
    name = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
    return name.removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, room: str) -> bool:
    return name == room or name.startswith(room + ".")


def room_of(name: str) -> str:
    rooms = [room for room in ARROWS if within(name, room)]
    return max(rooms, key=len) if rooms else name


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_arrows(path: Path) -> None:
    name = module_name(path)
    if name == "pipeline":
        return
    room = room_of(name)
    allowed = ARROWS.get(room, set()) | {room}
    if name in COMMANDS:
        allowed |= COMMAND_ARROWS
    assert room in ARROWS or name in COMMANDS, f"{name} has no arrows in this test"
    for target in imports(path):
        if not any(within(target, ours) for ours in ("pipeline", "data", "monitoring")):
            continue
        assert any(within(target, a) for a in allowed), f"{name} -> {target}"
        commanded = next((c for c in COMMANDS if within(target, c)), None)
        assert commanded in (None, name) or commanded in allowed, f"{name} imports the command {commanded}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_doors(path: Path) -> None:
    relative = str(path.relative_to(REPOSITORY))
    for target in imports(path):
        doors = DOORS.get(target.split(".")[0])
        assert doors is None or any(relative.startswith(d) for d in doors), f"{relative} imports {target}"


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_rooms_are_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 350, "split this file"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is long"


def test_no_drawers() -> None:
    assert not [p for p in SOURCES if p.stem in ("utils", "helpers", "misc", "common", "core")]
