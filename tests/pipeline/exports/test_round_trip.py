"""What others load is what evaluation sees: in an interpreter that has never heard of coldpress."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import pytest
import torch

from pipeline import export
from pipeline.compose import load

# Of fp32: timm projects patches by a convolution, which adds up in another order. The weights are equal to the bit.
TOLERANCE = 1e-5
READER = """
import json, sys
import timm, torch

def timm_model(folder):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    config = json.load(open(f"{folder}/config.json"))
    weights = f"{folder}/model.safetensors"
    again = timm.create_model(config["architecture"], checkpoint_path=weights, **config["model_args"])
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    size = config["model_args"]["img_size"]
    assert timm.data.resolve_model_data_config(model) == {
        "input_size": (3, size, size),
        "interpolation": "bicubic",
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop_pct": 0.875,
        "crop_mode": "center",
    }
    return model.eval()

def torch_model(folder):
    config = json.load(open(f"{folder}/config.json"))
    model = timm.create_model(config["architecture"], **config["model_args"]).eval()
    keys = model.load_state_dict(torch.load(f"{folder}/model.pth", weights_only=True), strict=True)
    assert not keys.missing_keys and not keys.unexpected_keys
    return model

features = {}
for folder, format, size in json.loads(sys.argv[1]):
    images = torch.load(sys.argv[2], weights_only=True)[str(size)]
    with torch.no_grad():
        features[folder] = globals()[f"{format}_model"](folder)(images)
assert not {"pipeline", "data", "hydra", "deepspeed"} & sys.modules.keys()
torch.save(features, sys.argv[3])
"""
FORMS = [(4, 32), (12, 48), (0, 48)]
LEARNED = "model.positions=learned"
DEIT3 = "model.name=deit3_small_patch16_224"


@dataclass(frozen=True)
class Case:
    """An export: of which run, which encoder, in which form."""

    method: str
    format: str
    encoder: str = "representation"
    patch_size: int = 0
    image_size: int = 0
    # Further words of the run.
    words: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        return self.image_size or 32

    def __str__(self) -> str:
        form = f"{self.patch_size}-{self.image_size}" if self.patch_size or self.image_size else "own"
        words = [word.partition("=")[2] for word in self.words]
        return "-".join([self.method, self.format, self.encoder, form, *words])


CASES = [
    *(Case(method, format) for method in ("moco", "simclr", "dino", "localmim") for format in ("timm", "torch")),
    *(Case("moco", "timm", encoder, 16) for encoder in ("online", "momentum")),
    *(Case("dino", "timm", encoder, 16, words=(LEARNED,)) for encoder in ("online", "momentum")),
    # Smaller patches than its own, patches that no multiple of its own are, and other images.
    *(Case("moco", "timm", "representation", *form, words) for words in ((), (LEARNED,)) for form in FORMS),
    # No position of the class token, scaled layers; a norm in front and no bias of the projection.
    *(Case("simclr", "timm", patch_size=16, words=(DEIT3, *more)) for more in ((), (LEARNED,))),
    Case("simclr", "torch", words=("model.name=vit_base_patch16_clip_224", LEARNED)),
    # With classifiers: of the class token, and of the mean patch after a norm that stands in the encoder's place.
    *(
        Case(method, format, encoder)
        for method in ("finetune_deit", "finetune_mae")
        for format, encoder in (("timm", "representation"), ("timm", "momentum"), ("torch", "online"))
    ),
    # Masters in fp32, of which evaluation takes all digits.
    Case("moco", "timm", "representation", words=("engine.precision=bf16",)),
]


@dataclass(frozen=True)
class Read:
    """Features of one export as others compute them, and as evaluation does."""

    theirs: torch.Tensor
    ours: torch.Tensor


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory, save_run: Callable) -> dict[Case, Read]:
    """Return what one fresh interpreter makes of all exports."""
    scratch = tmp_path_factory.mktemp("exports")
    generator = torch.Generator().manual_seed(7)
    images = {str(size): torch.randn(5, 3, size, size, generator=generator) for size in (32, 48)}
    torch.save(images, scratch / "images.pt")
    runs = {key: save_run(key[0], *key[1]) for key in {(case.method, case.words) for case in CASES}}
    folders = {}
    for number, case in enumerate(CASES):
        folders[case] = scratch / str(number)
        words = [f"{name}={getattr(case, name)}" for name in ("format", "encoder", "patch_size", "image_size")]
        runs_of = f"runs={runs[case.method, case.words].runs}"
        export.run(load("export", ["run=r", runs_of, f"output={folders[case]}", *words]))
    asked = json.dumps([[str(folder), case.format, case.size] for case, folder in folders.items()])
    # -I: neither this directory nor PYTHONPATH are there to import from.
    command = [sys.executable, "-I", "-c", READER, asked, str(scratch / "images.pt"), str(scratch / "features.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=scratch)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(scratch / "features.pt", weights_only=True)
    return {
        case: Read(
            theirs[str(folders[case])],
            runs[case.method, case.words].features(case.encoder, images[str(case.size)], case.patch_size),
        )
        for case in CASES
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_others_see_the_features_that_evaluation_sees(read: dict[Case, Read], case: Case) -> None:
    ours, theirs = read[case].ours, read[case].theirs
    # Features that tell images apart, or the comparison would mean nothing.
    assert ours.std(0).mean() > 0.05
    torch.testing.assert_close(theirs, ours, atol=TOLERANCE, rtol=0)


def test_encoders_and_forms_have_features_of_their_own(read: dict[Case, Read]) -> None:
    """What the comparison above would not notice if an export took no heed of what was asked for."""
    of_moco = {case: result.ours for case, result in read.items() if (case.method, case.size) == ("moco", 32)}
    different = {
        (case.encoder.replace("representation", "online"), case.patch_size, case.words): features
        for case, features in of_moco.items()
        if case.format == "timm" and "engine.precision=bf16" not in case.words
    }
    assert len(different) == 5
    for (one, ours), (other, theirs) in combinations(different.items(), 2):
        assert (ours - theirs).abs().max() > 0.05, (one, other)
