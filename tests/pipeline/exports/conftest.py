"""Runs to export, saved by an engine, whose online and momentum encoders are far from untrained and from each other."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline import distributed
from pipeline.checkpoint_files import publish, seal, temporary_of
from pipeline.compose import load
from pipeline.compression import Compression, PatchScaling
from pipeline.config import TrainConfig
from pipeline.engines import build_engine
from pipeline.methods import FineTune, Method, build_method
from pipeline.models.vit import ViT
from pipeline.networks import networks

SHAPE = [
    "run=r",
    "budget.value=10",
    "batch_size=8",
    "model.name=vit_tiny_patch16_224",
    "model.image_size=32",
    "model.patch_size=8",
    "model.embed_dim=48",
    "model.depth=3",
    "model.num_heads=3",
    "model.reference_length=17",
    "engine.precision=fp32",
]
METHODS = {
    "moco": ["method.hidden_dim=64", "method.out_dim=32"],
    "simclr": ["method=simclr", "method.hidden_dim=64", "method.out_dim=32"],
    "dino": [
        "method=dino",
        "method.out_dim=24",
        "method.hidden_dim=40",
        "method.bottleneck_dim=16",
        "method.small_crops=1",
        "method.small_size=16",
    ],
    "localmim": [
        "method=localmim",
        "method.taps=[1,2,3]",
        "method.doublings=[1,0,-1]",
        "method.decoder_dim=32",
        "method.decoder_heads=2",
    ],
    # Drawn shards have four classes.
    "finetune_deit": ["method=finetune_deit", "method.classes=4"],
    "finetune_mae": ["method=finetune_mae", "method.classes=4", "method.average=0.9"],
}


@dataclass(frozen=True)
class SavedRun:
    """A run with one checkpoint."""

    runs: Path
    training: TrainConfig
    checkpoint: Path

    @property
    def directory(self) -> Path:
        return self.runs / "r"

    def features(self, which: str, images: torch.Tensor, patch_size: int = 0) -> torch.Tensor:
        """Return what evaluation would make of images, by the encoder of a name; logits of a run that fine-tunes."""
        method = networks(self.training, self.checkpoint)
        if isinstance(method, FineTune):
            with torch.no_grad():
                return method.eval().logits(images, torch.arange(len(images)), averaged=which == "momentum")
        encoder = {
            "representation": lambda: method.representation,
            "online": lambda: method.encoder,
            "momentum": lambda: method.momentum_encoders()[0].network["encoder"],  # type: ignore[index]
        }[which]()
        compression = Compression((PatchScaling(patch_size),)) if patch_size else Compression()
        with torch.no_grad():
            features: torch.Tensor = encoder.eval()(images, compression, torch.arange(len(images)))
        return features


def disturb(parameters: Iterable[torch.Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def disturbed(training: TrainConfig, *, folded: bool = False) -> Method:
    """Return the method of a run; `folded`: as if it had started from weights whose pixels are normalized otherwise."""
    torch.manual_seed(0)
    vit = ViT(training.model, 0)
    if folded:
        vit.patch.bias = nn.Parameter(torch.zeros(vit.embed_dim))
    method = build_method(training.method, vit)
    disturb(method.parameters(), 1)
    for average in method.momentum_encoders():
        average.update(0.0)
    disturb(method.parameters(), 2)
    return method


def as_run(runs: Path, words: list[str], written: Path) -> SavedRun:
    """Make a run with one checkpoint of what an engine has written."""
    checkpoint = runs / "r" / "checkpoints" / "step_00000005"
    checkpoint.parent.mkdir(parents=True)
    (runs / "r" / "overrides.yaml").write_text("".join(f"- {json.dumps(word)}\n" for word in words))
    names = [path.name for path in written.iterdir()]
    written.rename(temporary_of(checkpoint))
    for name in names:
        seal(temporary_of(checkpoint) / name)
    state = {"step": 5, "samples": 40, "cost": 170.0, "tuning": {}}
    publish(checkpoint, names, {"state": state, "progress": 0.5, "score": None, "identity": {}})
    return SavedRun(runs, load("train", words), checkpoint)


@pytest.fixture(scope="session")
def words_of(drawn_shards: Path) -> Callable[..., list[str]]:
    """Return a function that returns the words of a tiny run of a method, and more."""
    return lambda method, *more: [*SHAPE, *METHODS[method], f"data.shards={drawn_shards}", *more]


@pytest.fixture(scope="session")
def make_disturbed() -> Callable[[TrainConfig], Method]:
    return disturbed


@pytest.fixture(scope="session")
def make_run() -> Callable[[Path, list[str], Path], SavedRun]:
    return as_run


@pytest.fixture(scope="module")
def save_run(tmp_path_factory: pytest.TempPathFactory, words_of: Callable[..., list[str]]) -> Callable[..., SavedRun]:
    """Return a function that saves a run of a method, with further words of `coldpress train`."""

    def save(method: str, *more: str, folded: bool = False) -> SavedRun:
        scratch = tmp_path_factory.mktemp("run")
        words = words_of(method, *more)
        training: TrainConfig = load("train", words)
        device = distributed.start().device
        disturbed_method = disturbed(training, folded=folded)
        engine = build_engine(disturbed_method, training.engine, training.optim, local_batch=8, device=device)
        engine.save(scratch / "written")
        return as_run(scratch / "runs", words, scratch / "written")

    return save
