"""Schedules as files: written, read, refused with a remedy, and not needed once a run has started."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.compose import load
from pipeline.compression import Stage, Staged
from pipeline.compression.schedule_file import SHIPPED, in_line, read_schedule, write_schedule
from pipeline.config import TrainConfig
from pipeline.parts import build_schedules
from pipeline.plan import imagine, stages, uncompressed_cost
from pipeline.run_directory import without_files

TWO = [Stage(30, 0.5, until=0.25), Stage(None, 0.1, key_patch_size=24, key_dropout=0.0, until=1.0)]
fractions = st.floats(0, 0.999)
patch_sizes = st.none() | st.integers(1, 64)


def staged(*words: str) -> TrainConfig:
    config: TrainConfig = load(
        "train", ["run=r", "budget.value=1", "model.image_size=240", "compression=staged", *words]
    )
    return config


def written(directory: Path, text: str) -> str:
    path = directory / "some.yaml"
    path.write_text(text)
    return str(path)


@given(
    lists=st.lists(
        st.builds(Stage, patch_sizes, fractions, patch_sizes, st.none() | fractions, st.floats(1e-6, 1)),
        min_size=1,
        max_size=4,
    )
)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, lists: list[Stage]) -> None:
    path = tmp_path_factory.mktemp("schedules") / "new" / "schedule.yaml"
    write_schedule(lists, path, ["of run: first", "", "two\nlines: [\t{"])
    assert path.read_text().startswith("# of run: first\n#\n# two\n# lines: [\t{\nstages:\n  - {until: ")
    assert read_schedule(str(path), Stage) == lists


@pytest.mark.parametrize(("until", "dropout"), [(1.0, 0.0), (0.123456, 1 / 3), (1e-06, 1e-09)])
def test_a_line_means_the_same_on_a_command_line(until: float, dropout: float) -> None:
    stage = Stage(24, dropout, key_dropout=0.5, until=until)
    assert staged(f"compression.stages=[{in_line(stage)}]").compression == Staged([stage])


def test_a_file_is_as_good_as_its_stages(tmp_path: Path) -> None:
    path = tmp_path / "it's mine.yaml"
    write_schedule(TWO, path, [])
    assert staged(f"compression.file={path}").compression == Staged(TWO)


def test_a_bare_name_is_a_schedule_that_ships_and_all_else_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_schedule(TWO, Path("imagenet_by_hand"), [])
    assert len(staged("compression.file=imagenet_by_hand").compression.stages) == 5  # type: ignore[attr-defined]
    assert staged("compression.file=./imagenet_by_hand").compression == Staged(TWO)
    write_schedule(TWO, Path("other.yaml"), [])
    assert staged("compression.file=other.yaml").compression == Staged(TWO)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("stages: [", r"some\.yaml is no YAML; it must hold stages:, a list of \{until"),
        ("\0", r"some\.yaml is no YAML"),
        ("", r"some\.yaml is no schedule; it must hold stages:"),
        ("- 1", r"some\.yaml is no schedule"),
        ("stages: 5", r"some\.yaml is no schedule"),
        ("stages: []", r"some\.yaml: stages must list at least one stage"),
        ("stages: [{until: 1}]\nstage: 5", r"some\.yaml: stage is not a key; did you mean stages\?$"),
        ("stages: [5]", r"some\.yaml: stages\[0\] is 5 and no stage; it must hold"),
        ("stages: [{until: 0.5}, {patchsize: 5}]", r"stages\[1\] patchsize is not a key; did you mean patch_size\?$"),
        ("stages: [{x: 5}]", r"stages\[0\] x is not a key; choose from dropout, key_dropout, .*, patch_size, until\.$"),
        ("stages: [{patch_size: 16.5}]", r"stages\[0\]\.patch_size must be a whole number, got 16\.5; it must hold"),
        ("stages: [{patch_size: true}]", r"stages\[0\]\.patch_size must be a whole number, got True"),
        ("stages: [{dropout: half}]", r"stages\[0\]\.dropout must be a number, got 'half'"),
        ("stages: [{dropout: 1}]", r"some\.yaml: stages\[0\]\.dropout must be in \[0, 1\), got 1"),
        ("stages: [{until: 0.5}, {until: 0.5}]", r"some\.yaml: stages\[1\]\.until must rise .* got 0\.5 after 0\.5"),
        ("stages: [{until: .nan}]", r"stages\[0\]\.until must rise .* got nan after 0\.0"),
    ],
)
def test_what_is_no_schedule_is_refused_by_file_and_place(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^compression\.file: .*{sentence}"):
        staged(f"compression.file={written(tmp_path, text)}")


def test_a_missing_file_is_refused_with_where_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"compression\.file: .*/gone\.yaml cannot be read \(No such file.*\); `cold"):
        staged(f"compression.file={tmp_path}/gone.yaml")
    with pytest.raises(ValueError, match=r"no schedule imagenet comes with .* say one of .*imagenet_by_hand.*\./imag"):
        staged("compression.file=imagenet")


def test_stages_and_file_exclude_each_other(tmp_path: Path) -> None:
    words = ["compression.stages=[{until:0.5,patch_size:24}]", "compression.file=imagenet_by_hand"]
    with pytest.raises(ValueError, match=r"^compression\.stages and compression\.file=imag.* add compression\.stages="):
        staged(*words)
    # Both remedies that the sentence names.
    assert len(staged(*words, "compression.stages=[]").compression.stages) == 5  # type: ignore[attr-defined]
    assert len(staged(*words, "compression.file=''").compression.stages) == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "words",
    [
        ["compression.file=FILE"],
        ["+compression.file=FILE"],
        ["compression.stages=[{until:0.5}]", "compression.file=FILE", "compression.stages=[]", "seed=3"],
    ],
)
def test_what_a_run_keeps_of_its_command_needs_no_file(tmp_path: Path, words: list[str]) -> None:
    path = tmp_path / "schedule.yaml"
    write_schedule(TWO, path, [])
    words = [word.replace("FILE", str(path)) for word in words]
    before = staged(*(word.lstrip("+") for word in words))
    path.unlink()
    kept = without_files(words, before.compression)
    assert staged(*kept) == before
    assert ("seed=3" in kept) == ("seed=3" in words)


def test_commands_without_a_file_are_kept_as_they_are() -> None:
    words = ["compression=staged", "compression.stages=[{until:0.5}]"]
    assert without_files(words, Staged([Stage(until=0.5)])) is words


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.yaml")), ids=lambda path: path.stem)
def test_schedules_that_ship_say_where_they_come_from_and_plan(path: Path) -> None:
    config = staged(f"compression.file={path.stem}", "model.image_size=240", "model.depth=2")
    method = imagine(config)
    rows = stages(config, build_schedules(config, method), method)
    assert rows[-1].end == 1
    comments = "".join(line for line in path.read_text().splitlines() if line.startswith("#"))
    assert ("not measured" in comments) != ("coldpress analyze" in comments)


def test_the_hand_written_schedule_costs_what_its_header_says() -> None:
    words = ["compression.file=imagenet_by_hand", "model.image_size=240", "model.depth=2", "budget.unit=cost"]
    config = staged(*words)
    method = imagine(config)
    schedules = build_schedules(config, method)
    mean = config.budget.value / sum(row.samples for row in stages(config, schedules, method))
    dense = uncompressed_cost(schedules, method)
    text = (SHIPPED / "imagenet_by_hand.yaml").read_text()
    assert f"{mean:.2f} on average, {100 * mean / dense:.0f} % of the {dense:.2f} without" in text
