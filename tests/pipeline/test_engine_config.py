"""What may be passed through to DeepSpeed, and what may not."""

import pytest

from pipeline.compose import load
from pipeline.engine_config import EngineConfig, Offload, Precision, Zero3, deepspeed_options, merged


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_group_names_the_stages(stage: int) -> None:
    config = load("train", ["run=x", "data.shards=y", "budget.value=1", f"engine=zero{stage}", "engine.precision=fp32"])
    assert (config.engine.stage, config.engine.precision) == (stage, Precision.fp32)


def test_options_are_passed_through_at_any_depth() -> None:
    words = [
        "engine.deepspeed.zero_optimization.reduce_bucket_size=1000",
        "engine.deepspeed.zero_optimization.overlap_comm=false",
        "engine.deepspeed={wall_clock_breakdown: true}",
    ]
    options = deepspeed_options(
        load("train", ["run=x", "data.shards=y", "budget.value=1", "engine=zero2", *words]).engine, 8, 0.0
    )
    assert options["zero_optimization"]["reduce_bucket_size"] == 1000
    assert options["zero_optimization"]["overlap_comm"] is False
    assert options["zero_optimization"]["stage"] == 2
    assert options["wall_clock_breakdown"] is True


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"zero_optimization": {"stage": 2}}, r"deepspeed\.zero_optimization\.stage is set by coldpress from keys of"),
        ({"zero_optimization": 3}, r"deepspeed\.zero_optimization is set by coldpress"),
        ({"gradient_clipping": 1.0}, r"deepspeed\.gradient_clipping is set by coldpress"),
        ({"fp16": {"enabled": True}}, r"deepspeed\.fp16 is decided by engine\.precision in coldpress; take it out"),
        ({"optimizer": {"type": "Lamb"}}, r"deepspeed\.optimizer is decided by optim in coldpress; take it out"),
        (
            {"zero_optimization": {"offload_param": {"device": "cpu"}}},
            r"offload_param is decided by engine\.offload",
        ),
        (
            {"zero_optimization": {"offload_optimizer": None}},
            r"offload_optimizer is decided by engine\.offload",
        ),
        ({"zero_optimization": {"cpu_offload": True}}, r"zero_optimization\.cpu_offload is decided by engine\.offload"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, r"weights does not go with coldpress's checkpoints"),
        ({"bf16": {"enabled": False}}, r"deepspeed\.bf16\.enabled is set by coldpress"),
    ],
)
def test_what_coldpress_decides_is_refused_by_name(given: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EngineConfig(deepspeed=given)


def test_small_tensors_are_sharded_too_and_torch_stays_as_it_is() -> None:
    options = deepspeed_options(Zero3(), 8, 0.0)["zero_optimization"]
    assert options["stage3_param_persistence_threshold"] == 0
    assert options["memory_efficient_linear"] is False


def test_merging_changes_neither() -> None:
    first, second = {"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "e": {"f": 4}}
    assert merged(first, second) == {"a": {"b": 1, "d": 3}, "c": 2, "e": {"f": 4}}
    assert (first, second) == ({"a": {"b": 1}, "c": 2}, {"a": {"d": 3}, "e": {"f": 4}})


@pytest.mark.parametrize(
    ("group", "offload", "moved"),
    [
        ("zero0", "none", set()),
        ("zero1", "optimizer", {"offload_optimizer"}),
        ("zero2", "optimizer", {"offload_optimizer"}),
        ("zero3", "optimizer", {"offload_optimizer"}),
        ("zero3", "parameters", {"offload_optimizer", "offload_param"}),
    ],
)
def test_a_word_names_what_is_on_the_host(group: str, offload: str, moved: set[str]) -> None:
    words = ["run=x", "data.shards=y", "budget.value=1", f"engine={group}", f"engine.offload={offload}"]
    engine = load("train", words).engine
    assert engine.offload is Offload(offload)
    options = deepspeed_options(engine, 8, 0.0)
    assert {key for key in options["zero_optimization"] if "offload" in key} == moved
    assert all(options["zero_optimization"][key]["device"] == "cpu" for key in moved)
    assert options.get("zero_force_ds_cpu_optimizer") is (False if moved else None)


@pytest.mark.parametrize(
    ("stage", "offload", "sentence"),
    [
        (
            0,
            Offload.optimizer,
            r"engine\.offload must be none with engine=zero0, .* got optimizer; take engine=zero1\.",
        ),
        (
            0,
            Offload.parameters,
            r"engine\.offload must be none with engine=zero0, .* got parameters; take engine=zero1\.",
        ),
        (1, Offload.parameters, r"engine\.offload=parameters needs .*, got engine=zero1; take engine=zero3, or"),
        (2, Offload.parameters, r"engine\.offload=parameters needs .*, got engine=zero2; take engine=zero3, or"),
    ],
)
def test_what_is_not_sharded_stays_where_it_is(stage: int, offload: Offload, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        EngineConfig(Precision.fp32, stage, offload)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["compression=adaptive", "budget.unit=cost"],
            r"compression=adaptive measures on whole weights, of which engine=z",
        ),
        (["model.compile=true"], r"model\.compile must be false with engine=zero3"),
    ],
)
def test_what_needs_whole_weights_is_refused_where_they_are_sharded(words: list[str], sentence: str) -> None:
    words = ["run=x", "data.shards=y", "budget.value=1", *words]
    load("train", [*words, "engine=zero2"])
    with pytest.raises(ValueError, match=sentence):
        load("train", [*words, "engine=zero3"])
