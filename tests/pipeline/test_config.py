"""Every config that ships composes; every refusal is one sentence with a remedy."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pipeline import compose
from pipeline.compose import ROOTS, load
from pipeline.compression import NoCompression, Stage, Staged
from pipeline.config import GROUPS, TrainConfig
from pipeline.freezing import Curve, FreezeOut, NoFreeze
from pipeline.methods.moco import MoCoConfig
from pipeline.schedules import Unit

GIVEN = ["run=test", "data.shards=shards", "budget.value=10"]


def test_defaults_compose_to_plain_dataclasses() -> None:
    config = load("train", GIVEN)
    assert type(config) is TrainConfig
    assert (type(config.method), type(config.compression), type(config.freeze)) == (MoCoConfig, NoCompression, NoFreeze)
    assert config.budget.unit is Unit.steps
    assert config.directory == Path("runs/test")


def test_groups_and_nested_values() -> None:
    config = load(
        "train",
        [
            *GIVEN,
            "compression=staged",
            "compression.stages=[{until:0.4,patch_size:28,dropout:0.5}]",
            "freeze=freezeout",
            "freeze.curve=linear",
            "budget.unit=cost",
            "method.symmetric=true",
        ],
    )
    assert config.compression == Staged([Stage(28, 0.5, until=0.4)])
    assert config.freeze == FreezeOut(curve=Curve.linear)
    assert config.method.symmetric
    assert config.budget.unit is Unit.cost


@pytest.mark.parametrize("name", compose.experiments())
def test_every_experiment_composes(name: str) -> None:
    config = load("train", [f"experiment={name}", "run=test", "data.shards=shards"])
    assert config.budget.value > 0
    text = (compose.CONFIG_DIR / "experiment" / f"{name}.yaml").read_text()
    assert re.search(r"^# Command: coldpress train experiment=" + name, text, re.M), "an experiment names its command"


@pytest.mark.parametrize("command", ROOTS)
def test_every_command_shows_its_config(command: str) -> None:
    assert compose.show(command, []).strip()


@pytest.mark.parametrize(("group", "option"), [(g, o) for g, options in GROUPS.items() for o in options])
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    text = compose.show("train", [f"{group}={option}"])
    assert f"{group}:" in text


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["budget.valeu=10"], "budget.valeu is not a key of coldpress train; did you mean budget.value?"),
        (["zebra=1"], "zebra is not a key of coldpress train; `coldpress train --help` lists the keys."),
        (["batch_size=many"], "batch_size: Value 'many' of type 'str' could not be converted to Integer; `cold"),
        (["budget.unit=years"], "budget.unit: Invalid value 'years', expected one of [steps, samples, cost]; `"),
        (["compression=magic"], "compression=magic is not an option; choose from none, constant, staged, adaptive."),
        (["experiment=magic"], "experiment=magic is not an option; choose from demo, "),
        (["compression.dropout=0.5"], "compression.dropout belongs to compression=constant, which is not chosen; say"),
        (["compression=none", "compression.patch_size=8"], "; say compression=constant instead of compression=none."),
        (["compression=staged", "compression.dropout=0"], "; say compression=constant instead of compression=staged."),
        (["method.symmetric=1", "method=dino", "method.crop_min=1"], "localmim and method=finetune_deit and"),
        (["experiment=small_dino", "method.crop_min=1"], "say method=moco or method=simclr or method=localmim or"),
        (["experiment=demo", "freeze=none"], "the experiment sets freeze.t0, which freeze=none does not have; leave"),
        (["experiment=mocov3_in1k_accelerated", "compression=constant"], "sets compression.file, which compr"),
        (["experiment=small_dino", "method=moco"], "which method=moco does not have; leave method=moco out, or"),
        (["compression=staged", "compression.stages=[{untl:0.5}]"], "compression.stages.untl is not a key of coldpress "
         "train; did you mean compression.stages.until?"),
        (["compression=staged", "compression.stages=[{until:soon}]"], "compression.stages.until: Value 'soon' of type"),
        (["budget.value=inf"], "budget.value must be above 0, got inf; say"),
        (["rate.base=inf"], "rate.base must be above 0, got inf; MoCo-v3"),
        (["optim.weight_decay=nan"], "optim.clip_each must be finite numbers of at least 0, got nan, 0 and 0."),
        (["optim.clip=inf"], "optim.clip_each must be finite numbers of at least 0, got 0.1, inf and 0."),
        (["optim.weight_decay_end=nan"], "optim.weight_decay_end must be a finite number of at least 0, got nan"),
        (["method.temperature=inf"], "method.temperature must be above 0, got inf;"),
        (["method=simclr", "method.temperature=inf"], "method.temperature must be above 0, got inf;"),
        (["method=dino", "method.teacher_temperature=inf"], "method.teacher_temperature must be above 0, got inf."),
        (["compression=constant", "compression.patch_size=24"], "compression.patch_size must divide model.image_size="
         "224, got 24; sizes that do: 16, 28, 32, 56, 112, 224."),
        (["compression=constant", "compression.key_patch_size=24"], "compression.key_patch_size must divide model."),
        (["compression=staged", "compression.stages=[{until:0.1},{until:0.5,patch_size:24}]"],
         "compression.stages[1].patch_size must divide model.image_size=224, got 24;"),
        (["compression=staged", "compression.stages=[{until:0.1,key_patch_size:30}]"],
         "compression.stages[0].key_patch_size must divide model.image_size=224, got 30;"),
        (["+zebra=1"], "zebra is not a key of coldpress train"),
        (["+model.zebra=1"], "model.zebra is not a key of coldpress train"),
        (["++method.zebra=1"], "method.zebra is not a key of coldpress train"),
        (["~seed=0"], "~seed=0 is not key=value"),
        (["compression=constant", "compression.dropout=2"], "compression.dropout must be in [0, 1), got 2.0; 0"),
        (["budget.value=0"], "budget.value must be above 0, got 0; say for instance budget.value=1000"),
        (["batch_size=1"], "batch_size must be at least 2 to have negatives, got 1."),
        (["resume=maybe"], "resume must be auto or never, got maybe."),
        (["seed=-1"], "seed must not be negative, got -1."),
        (["model.patch_size=-1"], "model.patch_size must be at least 1, got -1."),
        (["model.depth=0"], "model.depth must be at least 1, got 0."),
        (["method.out_dim=0"], "method.out_dim and method.hidden_dim must be at least 1, got 0 and 4096."),
        (["log_every=0"], "log_every must be at least 1 step, got 0."),
        (["run=a/b"], "run must be a plain name without slashes, got 'a/b'; use runs=DIR for the place."),
        (["model.patch_size=17"], "model.patch_size must divide model.image_size=224, got 17"),
        (["batch_size"], "batch_size is not key=value"),
        (["batch_size=(1"], "batch_size=(1 cannot be read"),
        (["seed=é"], "a text with special characters is \"seed='é'\"."),
        (["probe.share=1"], "probe.share must be a share of the time in [0, 1), got 1; 0 is off."),
        (["probe.k=0"], "probe.support, probe.queries and probe.k must be at least 1"),
        (["monitor.port=-1"], "monitor.port must be in [0, 65535], got -1"),
    ],
)  # fmt: skip
def test_refusals(overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError) as refusal:
        load("train", [*GIVEN, *overrides])
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("command", "overrides", "sentence"),
    [
        ("train", ["budget.value=10"], "run is required; say run=VALUE."),
        ("shard", ["output=x"], "source is required; say source=VALUE."),
        ("evaluate", [], "run is required; say run=VALUE."),
        ("evaluate", ["run=x", "k=[0]"], "k must list numbers of neighbors of at least 1, got [0]."),
        ("evaluate", ["run=x", "support=-1"], "support must be a number of samples, got -1; 0 takes all."),
        ("compare", ["shards=x", "support=-1"], "support must be a number of samples, got -1; 0 takes all."),
        ("compare", ["shards=x", "budget=inf"], "budget must be above 0, got inf; 120e3"),
        (
            "plan",
            ["run=x", "budget.value=1", "cost_per_gpu_second=inf"],
            "cost_per_gpu_second must be at least 0, got inf",
        ),
        ("bench", ["dropouts=[2]"], "dropouts must list shares in [0, 1), got [2.0]; 0 keeps every token."),
        ("bench", ["dropouts=[]"], "dropouts must list shares in [0, 1), got []; 0 keeps every token."),
        (
            "bench",
            ["patch_sizes=[16,24]"],
            "patch_sizes must divide model.image_size=224, got 24; sizes that do: 16, 28,",
        ),
        ("bench", ["patch_sizes=[0]"], "patch_sizes must be numbers of pixels, got [0]; [] is the model's own."),
        ("bench", ["samples_per_second=inf"], "samples_per_second must be above 0, got inf."),
        ("bench", ["ranks=[0,2]"], "ranks must be numbers of processes, got [0, 2]; [1,2] is usual."),
        ("bench", ["peak_teraflops=-1"], "peak_teraflops must be at least 0, got -1; 0 takes that of known GPUs."),
        ("bench", ["rounds=0"], "rounds and batch_size must be at least 1 and 2, got 0 and 64."),
    ],
)
def test_refusals_of_other_commands(command: str, overrides: list[str], sentence: str) -> None:
    with pytest.raises(ValueError) as refusal:
        load(command, overrides)
    assert sentence in str(refusal.value)


def test_a_plus_before_a_key_that_is_known_changes_nothing() -> None:
    assert load("train", [*GIVEN, "+seed=3", "++budget.value=2", "+data.shards=ü"]) == load(
        "train", [*GIVEN, "seed=3", "budget.value=2", "data.shards=ü"]
    )


# Of OmegaConf's and Hydra's own marks: interpolations, the missing value, quotes around a whole text.
PLAIN = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(
    lambda text: "${" not in text and text != "???" and not (text[0] == text[-1] and text[0] in "'\"")
)


@settings(max_examples=40, deadline=None)
@given(PLAIN)
@example("h/für (alt) {1} & [2], ~=;")
@example("007")
@example("null")
@example("it's a \\'quote\\")
def test_texts_arrive_as_they_are(text: str) -> None:
    assert load("train", [f"data.shards={text}", "run=x", "budget.value=1"]).data.shards == text


@pytest.mark.parametrize("word", ["'a b'", '"a b"'])
def test_what_is_quoted_is_not_quoted_again(word: str) -> None:
    assert load("shard", [f"source={word}", "output=x"]).source == "a b"


@pytest.mark.parametrize(
    ("said", "texts"),
    [
        ("[batch_size=512,optim.betas=[0.9,0.95]]", ["batch_size=512", "optim.betas=[0.9,0.95]"]),
        ("['a,b',c=d e, \"f\"]", ["a,b", "c=d e", "f"]),
        ("[method.taps=[1,2],method.doublings=[1,0]]", ["method.taps=[1,2]", "method.doublings=[1,0]"]),
        ("[]", []),
    ],
)
def test_lists_of_texts_may_hold_words_of_commands(said: str, texts: list[str]) -> None:
    assert load("evaluate", ["run=r", f"finetune.words={said}"]).finetune.words == texts


def test_interpolations_are_resolved() -> None:
    config = load("shard", ["source=${output}", "output=ü", "labels=${output}/labels"])
    assert (config.source, config.labels) == ("ü", "ü/labels")
