"""The command: what it refuses, what it leaves when it fails, what its card says, what coldpress itself loads."""

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from pipeline import export
from pipeline.cli import dispatch
from pipeline.compose import load
from pipeline.compression import Compression, PatchScaling
from pipeline.exports import FORMATS
from pipeline.networks import networks

STAGED = ["compression=staged", "compression.stages=[{until:0.4,patch_size:16,dropout:0.5}]", "freeze=freezeout"]


@pytest.fixture(scope="module")
def moco(save_run: Callable):
    return save_run("moco", *STAGED)


@pytest.fixture(scope="module")
def simclr(save_run: Callable):
    return save_run("simclr", "model.positions=learned")


@pytest.fixture
def copy(moco, tmp_path: Path):
    """Return a copy of a run that may be broken."""
    shutil.copytree(moco.runs, tmp_path / "runs")
    return tmp_path / "runs"


def write(saved, output: Path, *words: str) -> Path:
    export.run(load("export", ["run=r", f"runs={saved.runs}", f"output={output}", *words]))
    return output


def loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict:
    """Return the names that the code of a folder's model card defines."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(code, names)
    return names


@pytest.fixture(scope="module")
def graph(moco, tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.Tensor], torch.Tensor]:
    words = ["format=onnx", "encoder=momentum", "patch_size=16", "image_size=48"]
    folder = write(moco, tmp_path_factory.mktemp("graph") / "x", *words)
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def refused(runs: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert dispatch(["export", "run=r", f"runs={runs}", *words]) == 2
    said = capsys.readouterr().err
    assert said.startswith("coldpress: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("format=jax", "format must be one of timm, safetensors, torch, onnx, got jax."),
        ("encoder=teacher", "encoder must be one of representation, online, momentum, got teacher."),
        ("encoder=momentum", "encoder=momentum: SimCLR keeps no such encoder; choose from representation, online."),
        (
            "patch_size=12",
            "patch_size must divide image_size=32, got 12; say image_size=36, or one of patch_size=8, 16",
        ),
        ("patch_size=-1", "patch_size must be a number of pixels, got -1; 0 is the run's own."),
        ("image_size=33", "patch_size must divide image_size=33, got 8; say image_size=32"),
        ("license=My_License", "license must be a name like apache-2.0 or cc-by-nc-4.0, got 'My_License'."),
        ("checkpoint=7", "checkpoint: step 7 is not usable (there is none); steps there: 5."),
        ("checkpoint=best", "checkpoint must be latest, init or a step number, got best."),
        ("run=other", "give run=NAME and, if it is elsewhere, runs=DIR."),
    ],
)
def test_refusals(simclr, capsys: pytest.CaptureFixture[str], words: str, sentence: str) -> None:
    assert sentence in refused(simclr.runs, capsys, words)
    assert not (simclr.directory / "export").exists()


@pytest.mark.parametrize("checkpoint", ["latest", "5"])
def test_a_damaged_checkpoint_is_refused(copy: Path, capsys: pytest.CaptureFixture[str], checkpoint: str) -> None:
    (victim,) = (copy / "r" / "checkpoints").glob("step_*/*.safetensors")
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)
    said = refused(copy, capsys, f"checkpoint={checkpoint}")
    assert ("is not usable (" if checkpoint == "5" else "none of its 1 checkpoints is whole") in said


@pytest.mark.parametrize(
    ("word", "sentence"),
    [("embed_dim=60", "class_token of shape [1, 1, 60] and has [1, 1, 48]"), ("depth=4", "blocks.3.")],
)
def test_a_checkpoint_of_another_model_is_refused(
    copy: Path, capsys: pytest.CaptureFixture[str], word: str, sentence: str
) -> None:
    with (copy / "r" / "overrides.yaml").open("a") as file:
        file.write(f'- "model.{word}"\n')
    said = refused(copy, capsys)
    assert sentence in said
    assert "it is of another model than overrides.yaml says; take another checkpoint=STEP" in said
    assert not (copy / "r" / "export").exists()


def test_onnx_is_asked_for_by_name(simclr, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("pipeline.exports.onnx_graph.find_spec", lambda name: None)
    said = refused(simclr.runs, capsys, "format=onnx")
    assert "needs onnx and onnxscript; say `pip install coldpress[onnx]`, or take format=timm." in said


def test_nothing_is_overwritten(
    simclr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = write(simclr, tmp_path / "here")
    before = {path.name: path.stat().st_mtime_ns for path in output.iterdir()}
    # Said before anything is written, which may take a while.
    monkeypatch.setattr("pipeline.exports.timm_folder.write_tensors", None)
    said = refused(simclr.runs, capsys, f"output={output}", "encoder=online")
    assert said == f"coldpress: output: {output} exists; delete it, or give another output=DIR.\n"
    assert {path.name: path.stat().st_mtime_ns for path in output.iterdir()} == before


def test_not_even_what_came_while_it_was_written(
    simclr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def be_overtaken(*_: object) -> None:
        (tmp_path / "here").mkdir()
        (tmp_path / "here" / "mine").touch()

    monkeypatch.setattr("pipeline.export.Card.write", be_overtaken)
    assert "exists; delete it" in refused(simclr.runs, capsys, f"output={tmp_path / 'here'}")
    assert [path.name for path in tmp_path.rglob("*")] == ["here", "mine"]


def test_a_failure_leaves_nothing(simclr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.export.Card.write", fail)
    with pytest.raises(OSError, match="No space left"):
        write(simclr, tmp_path / "a" / "here")
    assert not list((tmp_path / "a").iterdir())


def test_a_kill_leaves_nothing_that_looks_finished(
    simclr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"runs={simclr.runs}", f"output={tmp_path / 'here'}"]
    # Half-way: the tensors are there, the card is not.
    monkeypatch.setattr("pipeline.export.Card.write", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    child = os.fork()
    if not child:
        signal.alarm(60)
        export.run(load("export", ["run=r", *words]))
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    monkeypatch.undo()
    (left,) = tmp_path.iterdir()
    assert left.name == ".tmp-here"
    assert {path.name for path in left.iterdir()} == {"model.safetensors", "config.json"}
    assert f"output: {left} is there, so another export to" in refused(simclr.runs, capsys, *words[1:])
    shutil.rmtree(left)
    assert dispatch(["export", "run=r", *words]) == 0


@pytest.mark.parametrize("format", FORMATS)
def test_the_code_of_the_card_runs(moco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str) -> None:
    names = loaded(write(moco, tmp_path / "x", f"format={format}", "patch_size=16"), monkeypatch)
    features = torch.as_tensor(names["features"])
    expected = moco.features("representation", torch.zeros(1, 3, 32, 32), 16)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_graph_takes_any_number_of_images(graph: Callable, moco, batch: int) -> None:
    images = torch.randn(batch, 3, 48, 48)
    expected = moco.features("momentum", images, 16)
    torch.testing.assert_close(graph(images), expected, atol=1e-5, rtol=0)


def test_the_flexible_master_is_that_of_training(moco, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(write(moco, tmp_path / "x", "format=safetensors"), monkeypatch)["model"]
    images = torch.randn(3, 3, 32, 32)
    for size in (4, 8, 16):
        with torch.no_grad():
            features = model(images, Compression((PatchScaling(size),)), torch.arange(3))
        assert torch.equal(features, moco.features("representation", images, size))


@pytest.mark.parametrize("run", ["moco", "simclr"])
def test_another_patch_size_by_our_names_is_the_same_to_the_bit(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """MoCo's positions are a formula, SimCLR's are learned here."""
    saved, images = request.getfixturevalue(run), torch.randn(3, 3, 60, 60)
    folder = write(saved, tmp_path / "x", "format=safetensors", "patch_size=12", "image_size=60")
    model = loaded(folder, monkeypatch)["model"]
    with torch.no_grad():
        features = model(images, Compression(), torch.arange(3))
    assert torch.equal(features, saved.features("representation", images, 12))


@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_a_bias_that_came_with_weights_is_kept(
    save_run: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """CLIP's projection has none, and gets one where its normalization of pixels is folded into it."""
    words = ("model.name=vit_base_patch16_clip_224", "model.positions=learned", "method.freeze_patch_projection=false")
    saved, images = save_run("moco", *words, folded=True), torch.randn(3, 3, 32, 32)
    for which in ("online", "momentum"):
        method = networks(saved.training, saved.checkpoint)
        encoder = method.encoder if which == "online" else method.momentum_encoders()[0].network["encoder"]
        assert encoder.patch.bias.abs().max() > 0.05
        model = loaded(write(saved, tmp_path / which, f"format={format}", f"encoder={which}"), monkeypatch)["model"]
        with torch.no_grad():
            features = model(images) if format == "timm" else model(images, Compression(), torch.arange(3))
        torch.testing.assert_close(features, saved.features(which, images), atol=1e-5, rtol=0)


def test_weights_in_timms_names_are_those_of_the_encoder_to_the_bit(simclr, tmp_path: Path) -> None:
    tensors = load_file(write(simclr, tmp_path / "x") / "model.safetensors")
    live = dict(networks(simclr.training, simclr.checkpoint).representation.named_parameters())
    names = {
        "patch.weight": "patch_embed.proj.weight",
        "patch.bias": "patch_embed.proj.bias",
        "class_token": "cls_token",
    }
    assert torch.equal(tensors.pop("pos_embed")[0], live.pop("positions"))
    assert tensors.keys() == {names.get(name, name) for name in live}
    assert all(torch.equal(tensors[names.get(name, name)], each) for name, each in live.items())


def test_the_untrained_encoder(simclr, tmp_path: Path) -> None:
    tensors = load_file(write(simclr, tmp_path / "x", "checkpoint=init", "format=safetensors") / "model.safetensors")
    live = networks(simclr.training, None).representation
    assert all(torch.equal(tensors[name], each) for name, each in live.named_parameters())
    assert "none: untrained" in (tmp_path / "x" / "README.md").read_text()


def test_exports_of_a_run_have_places_of_their_own(copy: Path) -> None:
    for words in ([], ["patch_size=16"], ["encoder=momentum"], ["checkpoint=init", "format=safetensors"]):
        assert dispatch(["export", "run=r", f"runs={copy}", *words]) == 0
    assert sorted(path.name for path in (copy / "r" / "export").iterdir()) == [
        "safetensors-init",
        "timm-step_00000005",
        "timm-step_00000005-momentum",
        "timm-step_00000005-patch16-image32",
    ]


def test_what_the_card_says(copy: Path, tmp_path: Path, drawn_shards: Path) -> None:
    result = {
        "protocol": "knn",
        "checkpoint": "step_00000005",
        "support": {"shards": str(drawn_shards), "samples": 39},
        "queries": {"shards": str(drawn_shards), "samples": 9},
        "top1": {"10": 0.5, "20": 0.625},
        "interval": {"20": [0.3, 0.9]},
    }
    linear = {"protocol": "linear", "top1": {"cls": 0.75}, "interval": {"cls": [0.5, 0.9]}}
    (copy / "r" / "eval").mkdir()
    (copy / "r" / "eval" / "knn-step_00000005.json").write_text(json.dumps(result))
    (copy / "r" / "eval" / "linear-cls-step_00000005.json").write_text(json.dumps(result | linear))
    (copy / "r" / "eval" / "knn-step_00000004.json").write_text(json.dumps(result | {"top1": {"10": 0.11}}))
    environment = {"packages": {"torch": "2.11.0"}, "command": ["/home/somebody/bin/coldpress"]}
    (copy / "r" / "environment.json").write_text(json.dumps(environment))
    words = ["run=r", f"runs={copy}", "license=apache-2.0", f"output={tmp_path / 'x'}"]
    export.run(load("export", words))
    card = (tmp_path / "x" / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for line in (
        "| method | moco |",
        "| data | shards: 48 images, 4 classes, whose labels were not used |",
        "| budget | 10 steps, batches of 8 |",
        "| checkpoint | step 5, 50.0% of the budget |",
        "| 0.0% to 40.0% | 16 | 0.5 | 0 of 4 |",
        "| k-NN, k = 10 | 9 of shards | 50.00% |",
        "| k-NN, k = 20 | 9 of shards | 62.50% (30.00% to 90.00%) |",
        "| linear, cls | 9 of shards | 75.00% (50.00% to 90.00%) |",
        "| torch | 2.11.0 |",
    ):
        assert line in card, line
    assert "11.00%" not in card
    assert "not of this export" not in card
    # Names only: nobody's folders.
    for text in (card, (tmp_path / "x" / "config.json").read_text()):
        assert not re.findall(r"(?<![\w)])/\w+/", text)
    export.run(load("export", ["run=r", f"runs={copy}", "encoder=momentum", f"output={tmp_path / 'y'}"]))
    other = (tmp_path / "y" / "README.md").read_text()
    assert other.startswith("---\nlicense: other\n")
    assert "not of this export" in other
    assert "momentum encoder (the teacher)" in other
