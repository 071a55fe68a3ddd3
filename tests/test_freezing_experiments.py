"""The published rows with freezing: their files, the document's table, and what plans make of them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from pipeline.compose import CONFIG_DIR, load
from pipeline.config import TrainConfig
from pipeline.freezing import Curve, FreezeOut, NoFreeze, Warmup
from pipeline.methods.localmim import DecoderRates
from pipeline.parts import build_schedules
from pipeline.plan import imagine, stages
from pipeline.schedules import Schedules

DOCUMENT = (Path(__file__).parents[1] / "docs" / "freezing.md").read_text()
PUBLISHED = ("localmim_in1k", "localmim_in1k_frozen")
OWN = ("mocov3_in1k_frozen", "mocov3_in1k_accelerated_frozen")
IN1K = 1_281_167


@dataclass(frozen=True)
class Row:
    """A row as the header of a file promises it: the words that tell it from others, and the printed accuracy."""

    title: str
    words: tuple[str, ...]
    accuracy: str


def rows_of(name: str) -> Iterator[Row]:
    header = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text()
    pattern = r"^# Row: (.+?)\. Expected: (.+?)\.(?: Printed: .+?\.)?\n# Command: coldpress train (.+)$"
    for title, expected, words in re.findall(pattern, header, re.M):
        given = tuple(w for w in words.split() if not w.startswith(("run=", "data.shards=")))
        accuracy = re.match(r"FT ([\d.]+)", expected)
        yield Row(title, given, accuracy[1] if accuracy else "")


ROWS = [row for name in PUBLISHED for row in rows_of(name)]


def loaded(*words: str) -> TrainConfig:
    config: TrainConfig = load("plan", ["run=NAME", "data.shards=DIR", *words])
    return config


@cache
def cost(*words: str) -> float:
    config = loaded(*words)
    method = imagine(config)
    return sum(row.samples * row.cost for row in stages(config, build_schedules(config, method), method))


def schedules(*words: str) -> Schedules:
    config = loaded(*words)
    return build_schedules(config, imagine(config))


@pytest.mark.parametrize("name", [*PUBLISHED, *OWN])
def test_a_header_has_a_command_of_its_own_file_for_every_row(name: str) -> None:
    text = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text()
    rows = list(rows_of(name))
    assert text.count("# Row:") == text.count("# Command: coldpress") == len(rows) >= 1
    assert {row.words[0] for row in rows} == {f"experiment={name}"}
    assert max(len(line) for line in text.splitlines() if not line.startswith("# Command:")) <= 120


def test_no_two_rows_are_the_same_run() -> None:
    assert len({repr(loaded(*row.words)) for row in ROWS}) == len(ROWS) == 12


def test_the_document_has_the_rows_with_their_accuracies_and_costs() -> None:
    found = re.findall(
        r"^\| (.+?) \| `(experiment=localmim\S*(?: \S+)*)` \| ([\d.]*) \| .*? \| ([\d.]+) % \|$", DOCUMENT, re.M
    )
    assert [(t, tuple(w.split()), a) for t, w, a, _ in found] == [(r.title, r.words, r.accuracy) for r in ROWS]
    whole = cost("experiment=localmim_in1k")
    for (_, words, _, printed), row in zip(found, ROWS, strict=True):
        assert float(printed) == pytest.approx(100 * cost(*row.words) / whole, abs=0.051), words


def test_the_document_has_the_costs_of_our_own_runs() -> None:
    found = dict(re.findall(r"`experiment=(mocov3_in1k\w+)` \| ([\d.]+) % \|$", DOCUMENT, re.M))
    assert set(found) == set(OWN)
    for name, printed in found.items():
        ratio = cost(f"experiment={name}") / cost("experiment=mocov3_in1k")
        assert float(printed) == pytest.approx(100 * ratio, abs=0.051)


def test_the_recipe_of_localmim() -> None:
    config = loaded("experiment=localmim_in1k")
    assert config.budget.value / IN1K == pytest.approx(100, rel=1e-6)
    assert config.rate.peak(config.batch_size) == pytest.approx(1.6e-3)
    assert config.rate.peak(config.batch_size) * config.rate.final == pytest.approx(1e-6)
    assert (config.optim.weight_decay, config.optim.betas, config.optim.decay_vectors) == (0.05, [0.9, 0.95], False)
    assert isinstance(config.freeze, NoFreeze)


def test_the_frozen_run_is_by_the_published_code_and_can_be_by_the_text() -> None:
    code = loaded("experiment=localmim_in1k_frozen")
    assert code.freeze == FreezeOut(0.8, Curve.cubic, scaled=True, warmup=Warmup.shared)
    assert (code.method.decoder_rates, code.optim.weight_decay) == (DecoderRates.tapped, 1e-5)
    changed = {name for name, value in vars(code).items() if value != vars(loaded("experiment=localmim_in1k"))[name]}
    assert changed == {"freeze", "optim"}
    text = loaded(*next(row.words for row in ROWS if row.title == "as the paper's text has it"))
    assert text.freeze == replace(code.freeze, warmup=Warmup.own)  # type: ignore[type-var]
    assert (text.method.decoder_rates, text.optim.weight_decay) == (DecoderRates.shared, 0.05)


def test_the_shortened_run_costs_what_the_frozen_one_does() -> None:
    shortened = next(row.words for row in ROWS if row.title.startswith("shortened"))
    assert cost(*shortened) == pytest.approx(cost("experiment=localmim_in1k_frozen"), rel=1e-4)


def test_every_layer_sees_images_whole_before_it_freezes() -> None:
    both = schedules("experiment=mocov3_in1k_accelerated_frozen")
    assert both.whole_from == 0.5
    assert both.freezes()[0] > 0.5
    # The stages of the accelerated run itself would come too late.
    late = schedules("experiment=mocov3_in1k_accelerated", "freeze=freezeout")
    assert late.freezes()[0] < late.whole_from == 0.9


def test_frozen_moco_sees_as_many_samples() -> None:
    samples = loaded("experiment=mocov3_in1k").budget.value / 4
    assert loaded("experiment=mocov3_in1k_frozen").budget.value == samples
