"""The Hydra door: a command line in, plain dataclasses out."""

from __future__ import annotations

import difflib
import importlib
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_origin, get_type_hints

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
RUNS = "pipeline.config"
Groups = dict[str, dict[str, type[Any]]]

# command -> module and name of its root config, imported when asked for: sharding needs neither torch nor DeepSpeed,
# which cost seconds and most of a gigabyte. `plan` looks at a training run without running it.
ROOTS: dict[str, tuple[str, str]] = {
    "shard": ("data.shard", "ShardConfig"),
    "verify": ("data.verify", "VerifyConfig"),
    "plan": (RUNS, "PlanConfig"),
    "train": (RUNS, "TrainConfig"),
    "doctor": (RUNS, "DoctorConfig"),
    "evaluate": ("pipeline.evaluate", "EvaluateConfig"),
    "export": ("pipeline.export", "ExportConfig"),
    "status": ("pipeline.status", "StatusConfig"),
    "report": ("pipeline.report", "ReportConfig"),
    "analyze": (RUNS, "AnalyzeConfig"),
    "compare": ("pipeline.compare", "CompareConfig"),
    "compare-freezing": ("pipeline.compare_freezing", "CompareFreezingConfig"),
    "study": ("pipeline.study", "StudyConfig"),
    "bench": (RUNS, "BenchConfig"),
    "gpu-exporter": ("monitoring.exporters.gpu_exporter", "GpuExporterConfig"),
    "slurm-exporter": ("monitoring.exporters.slurm_exporter", "SlurmExporterConfig"),
    "demo": ("pipeline.demo", "DemoConfig"),
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
        raise ValueError(_explain(command, overrides, error)) from error
    except ValueError as error:
        # OmegaConf appends lines of its own to what a config says of itself.
        raise ValueError(str(error).split("\n")[0]) from error


def show(command: str, overrides: list[str]) -> str:
    """Return a command's composed config as YAML, missing values as ???."""
    try:
        return OmegaConf.to_yaml(_compose(command, overrides))
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_explain(command, overrides, error)) from error


def to_yaml(config: object) -> str:
    """Return a dataclass config as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def read_yaml(path: Path) -> dict[str, Any]:
    """Return what a YAML file maps, nothing if it is missing, damaged or something else."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception:  # of the file system, of OmegaConf, or of PyYAML, which has a door of its own
        return {}
    return {str(key): value for key, value in content.items()} if isinstance(content, dict) else {}


def groups_of(command: str) -> dict[str, list[str]]:
    """Return the groups that a command chooses from, experiments included."""
    names = {entry.name for entry in fields(root_of(command))}
    chosen = {group: list(options) for group, options in _groups(command).items() if group in names}
    return chosen | ({"experiment": experiments()} if "compression" in names else {})


def experiments() -> list[str]:
    """Return the names of the experiments that ship."""
    return sorted(p.stem for p in (CONFIG_DIR / "experiment").glob("*.yaml"))


def _check_words(command: str, overrides: list[str]) -> None:
    """Refuse what Hydra would refuse in several lines: words without =, unknown options of a group."""
    choices = groups_of(command)
    for word in overrides:
        key, equals, value = word.partition("=")
        if not equals or key.startswith("~"):
            raise ValueError(f"{word} is not key=value; `coldpress {command} --help` lists the keys.")
        if key in choices and value not in choices[key]:
            raise ValueError(f"{word} is not an option; choose from {', '.join(choices[key])}.")


def _compose(command: str, overrides: list[str]) -> Any:
    # Hydra's + adds keys, which no command knows what to do with.
    overrides = [word.lstrip("+") for word in overrides]
    _check_words(command, overrides)
    store = ConfigStore.instance()
    store.store(name=f"{command}_schema", node=root_of(command))
    for group, options in _groups(command).items():
        for option, node in options.items():
            # An option with a file of its own brings more than its keys; the file names the schema.
            has_file = (CONFIG_DIR / group / f"{option}.yaml").exists()
            store.store(group=group, name=f"{option}_schema" if has_file else option, node=node)
    GlobalHydra.instance().clear()
    kinds = dict(_fields(root_of(command), _groups(command)))
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(command, [_for_hydra(word, kinds) for word in overrides])


def _for_hydra(word: str, kinds: dict[str, Any]) -> str:
    """Return an override as Hydra wants it, by the type of its key."""
    key = word.partition("=")[0]
    if kinds.get(key) is str:
        return _quoted(word)
    if kinds.get(key) == list[str]:
        return _quoted_list(word)
    # Where another program's options are passed through, any key may be new.
    is_open = any(get_origin(kind) is dict and f"{key}.".startswith(f"{name}.") for name, kind in kinds.items())
    return f"++{word}" if is_open else word


def _quoted(word: str) -> str:
    """Quote a text for Hydra, whose grammar knows neither umlauts nor parentheses nor a number that is a name.

    What the user has quoted, and an interpolation as a whole, stay as they are.
    """
    key, _, value = word.partition("=")
    if not value or value.startswith("${") or re.fullmatch(r"(['\"]).*\1", value, re.DOTALL):
        return word
    # In Hydra's quotes a backslash means itself, but for those before a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + ("\\'" if found[2] else ""), value)
    return f"{key}='{escaped}'"


def _quoted_list(word: str) -> str:
    """Quote the texts of a list, which may be words of a command with lists of their own."""
    key, _, value = word.partition("=")
    if not re.fullmatch(r"\[.+\]", value, re.DOTALL):
        return word
    # At commas outside of brackets and quotes.
    texts = re.findall(r"(?:\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[^,\[])+", value[1:-1])
    return f"{key}=[{','.join(_quoted(f'={text.strip()}')[1:] for text in texts)}]"


def _explain(command: str, overrides: list[str], error: Exception) -> str:
    """Turn what Hydra and OmegaConf say in several lines into one sentence with a remedy."""
    cause = error.__cause__ or error.__context__
    cause = cause if isinstance(cause, OmegaConfBaseException) else error
    text = " ".join(str(error).split("\n")[0].split())
    key = _full_key(cause, text)
    if key and "not in" in str(cause):
        return _explain_unknown(command, overrides, key, from_experiment=text.startswith("In 'experiment/"))
    if key:
        reason = " ".join(str(cause).split("\n")[0].split())
        return f"{key}: {reason}; `coldpress {command} --help` shows its type and default."
    if isinstance(error, OverrideParseException):
        key, _, value = error.override.partition("=")
        return f"{error.override} cannot be read ({text}); a text with special characters is \"{key}='{value}'\"."
    return f"{text.rstrip('.')}; `coldpress {command} --help` shows keys and groups."


def _full_key(cause: BaseException, text: str) -> str:
    """Return the dotted key that an error is about; OmegaConf leaves out in which list an entry stands."""
    key = getattr(cause, "full_key", None) or ""
    overridden = re.search(r"override '?([\w.]+)", text)
    if not key or not overridden or f"{overridden[1]}.".startswith(f"{key}."):
        return key
    return f"{overridden[1]}.{key}"


def _explain_unknown(command: str, overrides: list[str], key: str, *, from_experiment: bool) -> str:
    root, groups = root_of(command), _groups(command)
    choice = next((word for word in overrides if word.startswith(f"{key.partition('.')[0]}=")), "")
    if from_experiment and choice:
        return (
            f"the experiment sets {key}, which {choice} does not have; leave {choice} out, or take another experiment."
        )
    owners = [
        f"{group}={option}"
        for group, options in groups.items()
        for option, node in options.items()
        if key in (known for known, _ in _fields(node, groups, f"{group}."))
    ]
    if owners:
        how = f"instead of {choice}" if choice else "too"
        return f"{key} belongs to {' and '.join(owners)}, which is not chosen; say {' or '.join(owners)} {how}."
    close = difflib.get_close_matches(key, [known for known, _ in _fields(root, groups)], n=1, cutoff=0.75)
    hint = f"did you mean {close[0]}?" if close else f"`coldpress {command} --help` lists the keys."
    return f"{key} is not a key of coldpress {command}; {hint}"


def _fields(node: type[Any], groups: Groups, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the type of every field, those of all options of a group and of lists among them."""
    types = get_type_hints(node)
    for entry in fields(node):
        yield prefix + entry.name, types[entry.name]
        default = entry.default_factory() if callable(entry.default_factory) else None
        options = [*groups.get(prefix + entry.name, {}).values(), type(default), *get_args(types[entry.name])]
        for option in filter(is_dataclass, options):
            yield from _fields(cast(type[Any], option), groups, f"{prefix}{entry.name}.")


def root_of(command: str) -> type[Any]:
    """Return the class of a command's root config."""
    module, name = ROOTS[command]
    return cast(type[Any], getattr(importlib.import_module(module), name))


def _groups(command: str) -> Groups:
    """Return the groups that a command may know; only those of runs have any."""
    module, _ = ROOTS[command]
    return cast(Groups, importlib.import_module(module).GROUPS) if module == RUNS else {}
