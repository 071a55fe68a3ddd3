"""The published rows: their files, what their headers promise, and what plans make of them."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from pipeline.compose import CONFIG_DIR, experiments, load
from pipeline.config import TrainConfig
from pipeline.parts import build_schedules
from pipeline.plan import imagine, stages
from pipeline.schedules import Shape

REPOSITORY = Path(__file__).parents[1]
DOCUMENT = (REPOSITORY / "docs" / "experiments.md").read_text()
OUR_OWN = ("demo", "small_", "tiny_", "vits_")
# tests/test_freezing_experiments.py has those of the other paper.
PUBLISHED = [name for name in experiments() if not name.startswith((*OUR_OWN, "localmim")) and "frozen" not in name]
# Images of an epoch: of ImageNet-100 (the list that comes with coldpress), as the paper seems to count it, of ImageNet.
IN100, NOMINAL_IN100, IN1K = 126_689, 130_000, 1_281_167


@dataclass(frozen=True)
class Row:
    """A row of the paper as the header of a file promises it."""

    title: str
    gpus: int
    hours: float
    words: str

    @property
    def given(self) -> tuple[str, ...]:
        """Return the words that tell it from other rows: the experiment and overrides."""
        return tuple(w for w in self.words.split() if not w.startswith(("run=", "data.shards=")))


@dataclass(frozen=True)
class Planned:
    """Totals of a plan; costs are means over the samples."""

    units: float
    samples: float
    real: float
    formula: float


def header(name: str) -> str:
    text = (CONFIG_DIR / "experiment" / f"{name}.yaml").read_text()
    return "".join(line for line in text.splitlines(keepends=True) if line.startswith("#"))


def rows_of(name: str) -> Iterator[Row]:
    pattern = r"^# Row: (.+?)\. Expected: .+\. Estimate: (\d+) A100 x ([\d.]+) h\.\n# Command: coldpress train (.+)$"
    for title, gpus, hours, words in re.findall(pattern, header(name), re.M):
        yield Row(title, int(gpus), float(hours), words)


ROWS = [row for name in PUBLISHED for row in rows_of(name)]


@cache
def loaded(command: str, *words: str) -> TrainConfig:
    config: TrainConfig = load(command, ["run=NAME", "data.shards=DIR", *words])
    return config


@cache
def planned(*words: str) -> Planned:
    config = loaded("plan", *words)
    method = imagine(config)
    pieces = stages(config, build_schedules(config, method), method)
    samples = sum(p.samples for p in pieces)
    units = sum(p.samples * p.cost for p in pieces)
    return Planned(units, samples, units / samples, sum(p.samples * p.nominal_cost for p in pieces) / samples)


def documented() -> dict[tuple[str, tuple[str, ...]], list[float]]:
    """Return the document's rows: title and words -> printed, planned, samples, epochs, real, formula."""
    found = re.findall(r"^\| (.+?) \| `(\w+)((?: \S+)*)` \| (.+) \|$", DOCUMENT, re.M)
    return {
        (title, (f"experiment={name}", *words.split())): [float(n.replace(",", "")) for n in numbers.split(" | ")]
        for title, name, words, numbers in found
    }


def assumed_rate() -> float:
    """Return the units a second on one GPU that the document estimates hours with."""
    (rate,) = re.findall(r"about ([\d,]+) units/s", DOCUMENT)
    return float(rate.replace(",", ""))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_header_gives_every_row_its_hours_and_a_command_of_its_own_file(name: str) -> None:
    rows = list(rows_of(name))
    assert rows
    assert header(name).count("# Row:") == header(name).count("coldpress") == len(rows)
    assert "# Paper: Lin et al., 2024, " in header(name)
    assert {row.given[0] for row in rows} == {f"experiment={name}"}
    assert max(len(line) for line in header(name).splitlines()) <= 120


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_a_command_trains_what_plan_plans(row: Row) -> None:
    assert row.words.split()[1:3] == ["run=NAME", "data.shards=DIR"]
    trained, looked_at = (loaded(command, *row.given) for command in ("train", "plan"))
    assert vars(trained).items() <= vars(looked_at).items()


def test_no_two_rows_are_the_same_run() -> None:
    runs = {repr(loaded("train", *row.given)) for row in ROWS}
    assert len(runs) == len(ROWS) == 38


def test_bases_are_no_experiments() -> None:
    assert list((CONFIG_DIR / "experiment" / "base").glob("*.yaml"))
    with pytest.raises(ValueError, match="experiment=base/in100 is not an option"):
        load("train", ["run=x", "experiment=base/in100"])


def test_the_document_has_the_rows_of_the_headers_and_their_budgets() -> None:
    assert sorted(documented()) == sorted((row.title, row.given) for row in ROWS)
    for (title, _), (printed, *_) in documented().items():
        assert printed == float((re.search(r"(\d+)M", title) or ["", "100"])[1]), title


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.title)
def test_the_document_and_the_hours_agree_with_the_plan(row: Row) -> None:
    plan = planned(*row.given)
    epoch = IN100 if "in100" in row.given[0] else IN1K
    numbers = documented()[row.title, row.given][1:]
    expected = (plan.units / 1e6, plan.samples / 1e6, plan.samples / epoch, plan.real, plan.formula)
    # What is printed with 0, 1, 1, 3 and 3 decimals.
    for number, value, unit in zip(numbers, expected, (1, 0.1, 0.1, 0.001, 0.001), strict=True):
        assert abs(number - value) <= 0.5001 * unit
    assert abs(row.hours - plan.units / assumed_rate() / 3600 / row.gpus) <= 0.05001


@pytest.mark.parametrize(
    ("words", "epoch", "epochs", "tolerance"),
    [
        # Figure 5: as printed if an epoch of ImageNet-100 has 130,000 images; ImageNet-1k within the paper's rounding.
        ("mocov3_in100_200ep", NOMINAL_IN100, 200, 1e-9),
        ("mocov3_in100_600ep", NOMINAL_IN100, 600, 1e-9),
        ("mocov3_in100", NOMINAL_IN100, 1000, 1e-9),
        ("mocov3_in1k_100ep", IN1K, 100, 0.0031),
        ("mocov3_in1k_300ep", IN1K, 300, 0.0031),
        ("mocov3_in1k", IN1K, 600, 0.0031),
        ("mocov3_in1k_official", IN1K, 300, 1e-4),
        # Table 3, by hand: millions / cost a sample / 126,689, with costs of (3 * 50 + 197) / 197 and 4 * 65 / 197.
        *((f"mocov3_in100_dropout budget.value={m}e6", IN100, e, 0.005)
          for m, e in ((25, 112), (50, 224), (100, 448), (150, 672), (200, 896))),
        *((f"mocov3_in100_patch budget.value={m}e6", IN100, e, 0.005)
          for m, e in ((25, 150), (50, 299), (100, 598), (150, 897), (200, 1196))),
        ("mocov3_in100_dropout compression.dropout=0", IN100, 197, 0.005),
        ("mocov3_in100_patch compression.patch_size=16", IN100, 172, 0.005),
        # Table 4: SimCLR at 6 units a sample, DINO at 4 + 3 * 6 * 37 / 197.
        ("simclr_in1k", IN1K, 400.03, 1e-4),
        ("dino_in1k", IN1K, 301.0, 1e-3),
    ],
)  # fmt: skip
def test_budgets_last_the_epochs_computed_by_hand(words: str, epoch: int, epochs: float, tolerance: float) -> None:
    assert planned(*f"experiment={words}".split()).samples / epoch == pytest.approx(epochs, rel=tolerance)


@pytest.mark.parametrize(
    ("words", "real"),
    [
        *((f"mocov3_in100_dropout compression.dropout={d}", c)
          for d, c in ((0, 4.0), (0.5, 2.508), (0.75, 1.761), (0.9, 1.305))),
        *((f"mocov3_in100_dropout_both compression.dropout={d}", c) for d, c in ((0.5, 2.010), (0.75, 1.015))),
        *((f"mocov3_in100_patch_query compression.key_patch_size={p}", c)
          for p, c in ((16, 2.137), (20, 1.726), (24, 1.503), (30, 1.320))),
    ],
)  # fmt: skip
def test_tables_2a_and_2c_cost_what_was_computed_by_hand(words: str, real: float) -> None:
    assert planned(*f"experiment={words}".split()).real == pytest.approx(real, abs=0.0005)


@pytest.mark.parametrize(
    ("patch_size", "printed", "real"),
    [(16, 4.59, 4.59), (20, 2.94, 2.94), (24, 2.04, 2.05), (30, 1.31, 1.32), (40, 0.73, 0.75)],
)
def test_table_2b_counts_patches_over_196_and_plans_count_class_tokens(
    patch_size: int, printed: float, real: float
) -> None:
    plan = planned("experiment=mocov3_in100_patch", f"compression.patch_size={patch_size}")
    assert round(plan.real, 2) == round(plan.formula, 2) == real
    # The same sample in Table 2b's own count: 4 forwards of patches only.
    assert round(4 * (plan.real * 197 / 4 - 1) / 196, 2) == printed


@pytest.mark.parametrize(("method", "ratio"), [("mocov3", 0.25), ("simclr", 0.2998), ("dino", 0.3999)])
def test_accelerated_runs_of_table_4_have_the_papers_share_of_the_budget(method: str, ratio: float) -> None:
    fast, slow = planned(f"experiment={method}_in1k_accelerated"), planned(f"experiment={method}_in1k")
    assert fast.units / slow.units == pytest.approx(ratio, abs=5e-5)
    assert fast.real < slow.real


@pytest.mark.parametrize(
    ("name", "peak", "warmup_epochs", "epochs"),
    [
        ("mocov3_in100_200ep", 1e-3, 40, 200),
        ("mocov3_in100_600ep", 1e-3, 40, 600),
        ("mocov3_in100", 1e-3, 40, 1000),
        ("mocov3_in1k_100ep", 6e-4, 40, 100),
        ("mocov3_in1k_300ep", 6e-4, 40, 300),
        ("mocov3_in1k", 6e-4, 40, 600),
        ("mocov3_in1k_official", 2.4e-3, 40, 300),
        ("simclr_in1k", 8e-4, 40, 400),
    ],
)
def test_baselines_have_the_published_rate_and_warm_up(name: str, peak: float, warmup_epochs: int, epochs: int) -> None:
    config = loaded("train", f"experiment={name}")
    assert config.rate.peak(config.batch_size) == pytest.approx(peak)
    assert config.rate.warmup * epochs == pytest.approx(warmup_epochs, rel=1e-3)
    assert config.rate.shape is Shape.cosine


@pytest.mark.parametrize("method", ["mocov3", "simclr", "dino"])
def test_acceleration_changes_compression_decay_resolution_and_budget_only(method: str) -> None:
    slow, fast = (loaded("train", f"experiment={method}_in1k{end}") for end in ("", "_accelerated"))
    assert fast.rate == replace(slow.rate, shape=Shape.polynomial)
    assert fast.model == replace(slow.model, image_size=240)
    changed = {name for name, value in vars(fast).items() if value != vars(slow)[name]}
    assert changed == {"rate", "model", "compression", "budget"}
