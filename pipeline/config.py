"""The Hydra door: root configs, one table of groups, and `load`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from data.loader import LoaderConfig
from data.shard import ShardConfig
from data.verify import VerifyConfig
from monitoring.sinks import MonitorConfig
from pipeline.checkpoint import CheckpointConfig
from pipeline.compression import CompressionSchedule, Constant, NoCompression, Staged
from pipeline.engine import EngineConfig
from pipeline.freezing import FreezeOut, FreezeSchedule, NoFreeze
from pipeline.methods import MoCoConfig
from pipeline.models.vit import ViTConfig
from pipeline.optim import OptimConfig
from pipeline.probes.knn import ProbeConfig
from pipeline.schedules import BudgetConfig, RateConfig

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


@dataclass
class TrainConfig:
    """One pre-training run."""

    # The run's name; everything it writes is below runs/run.
    run: str = MISSING
    runs: str = "runs"
    # auto goes on from the newest valid checkpoint of this run; never starts anew.
    resume: str = "auto"
    # Delete what an earlier run of this name left.
    overwrite: bool = False
    seed: int = 0
    # Global: the sum over all processes.
    batch_size: int = 256
    log_every: int = 10
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    data: LoaderConfig = field(default_factory=LoaderConfig)
    model: ViTConfig = field(default_factory=ViTConfig)
    method: Any = MISSING
    compression: CompressionSchedule = MISSING
    freeze: FreezeSchedule = MISSING
    rate: RateConfig = field(default_factory=RateConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    probe: ProbeConfig = field(default_factory=ProbeConfig)
    monitor: MonitorConfig = field(default_factory=MonitorConfig)

    def __post_init__(self) -> None:
        if not self.budget.value > 0:
            raise ValueError(
                f"budget.value must be above 0, got {self.budget.value:g}; "
                "say for instance budget.value=1000 budget.unit=steps."
            )
        if self.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 to have negatives, got {self.batch_size}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")
        if self.log_every < 1:
            raise ValueError(f"log_every must be at least 1 step, got {self.log_every}.")
        if self.resume not in ("auto", "never"):
            raise ValueError(f"resume must be auto or never, got {self.resume}.")
        if not self.run or Path(self.run).name != self.run:
            raise ValueError(f"run must be a plain name without slashes, got {self.run!r}; use runs=DIR for the place.")

    @property
    def directory(self) -> Path:
        """Return the run's own directory."""
        return Path(self.runs) / self.run


@dataclass
class EvaluateConfig:
    """Evaluation of one run's encoder."""

    run: str = MISSING
    runs: str = "runs"
    # latest, init (the untrained encoder of the same seed) or a step number.
    checkpoint: str = "latest"
    # Labelled shards to classify by the training shards; without, a held-out fifth of the training shards.
    shards: str = ""
    # At most so many support samples; 0 takes all.
    support: int = 0
    k: list[int] = field(default_factory=lambda: [10, 20, 100, 200])

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k must list numbers of neighbors of at least 1, got {self.k}.")


@dataclass
class DemoConfig:
    """The whole pipeline in minutes, on drawn images or on a folder or tar of one's own."""

    images: str = ""
    output: str = "runs/demo"


@dataclass
class BenchConfig:
    """Measurements against a baseline in the same run."""

    # step: over compressions; freezing: over frozen layers; loader: images per CPU second; start: time to the index.
    what: str = "step"
    batch_size: int = 64
    rounds: int = 7
    model: ViTConfig = field(default_factory=ViTConfig)
    method: Any = MISSING
    engine: EngineConfig = field(default_factory=EngineConfig)
    patch_sizes: list[int] = field(default_factory=list)
    dropouts: list[float] = field(default_factory=lambda: [0.0, 0.5])
    # Of what=loader: the set, whose views to make, and images of a round (rounded up to batches).
    data: LoaderConfig = field(default_factory=LoaderConfig)
    methods: list[str] = field(default_factory=lambda: ["moco", "simclr", "dino", "localmim"])
    images: int = 256
    # What the model eats; the loader's benchmark says how many cores that takes.
    samples_per_second: float = 1000.0
    output: str = ""

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.batch_size < 2:
            raise ValueError(
                f"rounds and batch_size must be at least 1 and 2, got {self.rounds} and {self.batch_size}."
            )
        if self.images < 1:
            raise ValueError(f"images must be at least 1, got {self.images}; 256 is usual.")
        if not self.samples_per_second > 0:
            raise ValueError(f"samples_per_second must be above 0, got {self.samples_per_second:g}.")


# command -> its root config; `plan` looks at a training run without running it.
ROOTS: dict[str, type[Any]] = {
    "shard": ShardConfig,
    "verify": VerifyConfig,
    "plan": TrainConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "bench": BenchConfig,
    "demo": DemoConfig,
}

# group -> option -> config. A new method, compression schedule or freeze rule is one line here.
GROUPS: dict[str, dict[str, type[Any]]] = {
    "method": {"moco": MoCoConfig},
    "compression": {"none": NoCompression, "constant": Constant, "staged": Staged},
    "freeze": {"none": NoFreeze, "freezeout": FreezeOut},
}


def load(command: str, overrides: list[str]) -> Any:
    """Return a command's root config, composed and resolved, as plain dataclasses.

    Raises:
        ValueError: an unknown key or group option, a value of the wrong type or out of range, a missing value;
            one sentence that names key, value and remedy.
    """
    try:
        return OmegaConf.to_object(_compose(command, overrides))
    except MissingMandatoryValue as error:
        raise ValueError(f"{error.full_key} is required; say {error.full_key}=VALUE.") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(command, error)) from error
    except ValueError as error:
        # OmegaConf appends lines of its own to what a config says of itself.
        raise ValueError(str(error).split("\n")[0]) from error


def show(command: str, overrides: list[str]) -> str:
    """Return a command's composed config as YAML, missing values as ???."""
    try:
        return OmegaConf.to_yaml(_compose(command, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(command, error)) from error


def to_yaml(config: object) -> str:
    """Return a dataclass config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def groups_of(command: str) -> dict[str, list[str]]:
    """Return the groups that a command chooses from, experiments included."""
    names = {entry.name for entry in fields(ROOTS[command])}
    chosen = {group: list(options) for group, options in GROUPS.items() if group in names}
    return chosen | ({"experiment": experiments()} if "compression" in names else {})


def experiments() -> list[str]:
    """Return the names of the experiments that ship."""
    return sorted(p.stem for p in (CONFIG_DIR / "experiment").glob("*.yaml"))


def _check_words(command: str, overrides: list[str]) -> None:
    """Refuse what Hydra would refuse in several lines: words without =, unknown options of a group."""
    choices = groups_of(command)
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"{word} is not key=value; `coldpress {command} --help` lists the keys.")
        if key in choices and value not in choices[key]:
            raise ValueError(f"{word} is not an option; choose from {', '.join(choices[key])}.")


def _compose(command: str, overrides: list[str]) -> Any:
    _check_words(command, overrides)
    store = ConfigStore.instance()
    store.store(name=f"{command}_schema", node=ROOTS[command])
    for group, options in GROUPS.items():
        for option, node in options.items():
            store.store(group=group, name=option, node=node)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(command, overrides)


def _explain(command: str, error: Exception) -> str:
    """Turn what Hydra and OmegaConf say in several lines into one sentence with a remedy."""
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    key = getattr(cause, "full_key", None)
    text = " ".join(str(error).split("\n")[0].split())
    if key and "not in" in str(cause):
        close = difflib.get_close_matches(key, _keys(ROOTS[command]), n=1, cutoff=0.75)
        hint = f"did you mean {close[0]}?" if close else f"`coldpress {command} --help` lists the keys."
        return f"{key} is not a key of coldpress {command}; {hint}"
    if key:
        reason = " ".join(str(cause).split("\n")[0].split())
        return f"{key}: {reason}; `coldpress {command} --help` shows its type and default."
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read ({text}); quote the value if it holds special characters."
    return f"{text.rstrip('.')}; `coldpress {command} --help` shows keys and groups."


def _keys(node: type[Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for entry in fields(node):
        names.append(prefix + entry.name)
        default = entry.default_factory() if callable(entry.default_factory) else None
        options = [*GROUPS.get(prefix + entry.name, {}).values(), type(default)]
        for option in filter(is_dataclass, options):
            names += _keys(cast(type[Any], option), f"{prefix}{entry.name}.")
    return names
