"""All benchmarks one after the other, each as a command of its own: none inherits another's memory or threads."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.benchmarks.peers.plain_methods import PLAIN
from pipeline.benchmarks.regressions import Baseline
from pipeline.benchmarks.report import heading, write_json
from pipeline.children import running
from pipeline.config import BenchConfig
from pipeline.engine_config import FSDP2
from pipeline.methods import METHODS, LocalMIMConfig

ALL = "all"
# What a report of its own says, and one of several says once.
_ONCE = ("schema_version", "what", "settings")


def command_line(words: Sequence[str]) -> str:
    """Return the command that a user typed."""
    return shlex.join(["coldpress", "bench", *words])


def run_all(config: BenchConfig, words: Sequence[str], baseline: Baseline | None) -> int:
    """Run every benchmark that fits the settings; return 1 if one has become worse or has not ended well."""
    reports: dict[str, Any] = {}
    codes: dict[str, int] = {}
    place = Path(config.output).absolute().parent if config.output else Path.cwd()
    # Beside the report: on the disk that a run would use.
    with TemporaryDirectory(prefix="coldpress-bench-", dir=place) as folder:
        for what in fitting(config):
            file = Path(folder) / f"{what}.json"
            codes[what] = _run(config, words, what, file, baseline)
            if file.exists():
                content = json.loads(file.read_text(encoding="utf-8"))
                reports[what] = {key: value for key, value in content.items() if key not in _ONCE}
                _keep_picture(config, what, file.with_suffix(".png"))
    if config.output:
        head = heading(ALL, asdict(config), command_line(words))
        write_json(Path(config.output), head | {"exit_codes": codes, "reports": reports})
    failed = [what for what, code in codes.items() if code]
    print(
        f"{len(reports)} of {len(codes)} benchmarks measured" + (f"; not well: {', '.join(failed)}" if failed else "")
    )
    return int(bool(failed))


def fitting(config: BenchConfig) -> list[str]:
    """Return the benchmarks that measure something with these settings; with a loader's where there are shards."""
    local, sharded = isinstance(config.method, LocalMIMConfig), isinstance(config.engine, FSDP2)
    fits = {
        "start": True,
        "loader": bool(config.data.shards),
        "step": True,
        "loop": METHODS[type(config.method)] in PLAIN,
        "freezing": not sharded,
        "targets": local,
        "checkpoint": not sharded,
        "monitoring": True,
        "scale": True,
    }
    return [what for what, fit in fits.items() if fit]


def _run(config: BenchConfig, words: Sequence[str], what: str, file: Path, baseline: Baseline | None) -> int:
    own = [word for word in words if word.partition("=")[0].lstrip("+") not in ("what", "output", "compare")]
    own += [f"what={what}", f"output={file}"]
    if what == "step" and METHODS[type(config.method)].incompressible:
        own += ["dropouts=[0]", "patch_sizes=[]"]
    if baseline is not None and what in baseline:
        own.append(f"compare={baseline.path.absolute()}")
    with running("bench", *own) as process:
        return process.wait()


def _keep_picture(config: BenchConfig, what: str, picture: Path) -> None:
    if config.output and picture.exists():
        output = Path(config.output)
        picture.replace(output.with_name(f"{output.stem}-{what}.png"))
