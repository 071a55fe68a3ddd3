"""Linear classifiers: against scikit-learn, against rates by hand, and killed on the way."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from data.loader import LoaderConfig
from pipeline.compose import load
from pipeline.distributed import World
from pipeline.linear_protocol import LinearProtocol, Split
from pipeline.models.vit import ViT, ViTConfig
from pipeline.probes import linear
from pipeline.probes.linear import RECIPES, Classifiers, Form, LinearConfig, Trainer, best_of, features_of, width_of

WORLD = World(0, 0, 1, torch.device("cpu"))


def toy(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return overlapping clouds of three classes; one direction is long, as in features of an encoder."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (samples,), generator=generator)
    centers = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    features = 0.8 * centers[labels] + torch.randn(samples, 8, generator=generator)
    features[:, 0] *= 3
    return features + 1, labels


@pytest.mark.parametrize("form", list(Form))
def test_as_accurate_as_logistic_regression(form: Form) -> None:
    (features, labels), (asked, truth) = toy(2000, 1), toy(4000, 2)
    reference = LogisticRegression(max_iter=1000).fit(features.numpy(), labels.numpy())
    expected = reference.score(asked.numpy(), truth.numpy())
    # The rates of DINO and of LARS are made for more steps.
    config = LinearConfig(form, epochs=60, batch_size=200, rates=[0.01, 1.0, 100.0], held_out=0.5)
    classifiers = Classifiers(config, 8, 3, seed=0)
    trainer = Trainer(config, classifiers)
    for step in range(600):
        rows = torch.arange(200) + 200 * (step % 10)
        trainer.step(features[rows], labels[rows], step / 600)
    classifiers.eval()
    found = [float((logits.argmax(1) == truth).float().mean()) for logits in classifiers(asked)]
    assert 0.6 < expected < 0.95
    assert max(found) == pytest.approx(expected, abs=0.01)


def test_classifiers_do_not_know_of_each_other() -> None:
    features, labels = toy(200, 1)

    def learned(rates: list[float]) -> list[torch.Tensor]:
        config = LinearConfig(Form.moco, epochs=2, batch_size=100, rates=rates)
        classifiers = Classifiers(config, 8, 3, seed=0)
        with torch.no_grad():
            for head in classifiers.heads:
                head.weight.fill_(0.1)
        trainer = Trainer(config, classifiers)
        for step in range(4):
            trainer.step(features, labels, step / 4)
        return [head.weight.detach() for head in classifiers.heads]

    together = learned([0.1, 1e30, 1.0])
    assert torch.equal(together[0], learned([0.1])[0])
    assert torch.equal(together[2], learned([1.0])[0])


def test_rates_by_hand() -> None:
    moco = LinearConfig(Form.moco, batch_size=1024)
    # 3 x 1024 / 256, kept over an epoch, on a cosine over 90.
    assert moco.rate(1.0, 0.0) == moco.rate(1.0, 0.99 / 90) == 12
    assert moco.rate(0.5, 1.5 / 90) == pytest.approx(6 * 0.5 * (1 + math.cos(math.pi / 90)))
    mae = LinearConfig(Form.mae, batch_size=16384)
    assert mae.rate(1.0, 5 / 90) == pytest.approx(3.2)
    assert mae.rate(1.0, 10 / 90) == pytest.approx(6.4)
    assert mae.rate(1.0, 50 / 90) == pytest.approx(3.2)
    assert LinearConfig(Form.dino, batch_size=256).rate(1.0, 0.5) == pytest.approx(0.0005)


def test_how_images_are_resized_in_training_and_where_it_is_judged() -> None:
    resized = {form.value: (recipe.interpolation, recipe.judged) for form, recipe in RECIPES.items()}
    assert resized == {
        "moco": ("bilinear", "bilinear"),
        "dino": ("bilinear", "bicubic"),
        "mae": ("bicubic", "bicubic"),
    }


def test_statistics_are_those_of_torchs_batch_norm() -> None:
    config = LinearConfig(Form.mae, rates=[1.0])
    classifiers, norm = Classifiers(config, 8, 3, seed=0), torch.nn.BatchNorm1d(8, affine=False, eps=1e-6)
    (head,) = classifiers.heads
    for seed in range(3):
        features, _ = toy(50, seed)
        torch.testing.assert_close(classifiers(features)[0], head(norm(features)))
    classifiers.eval(), norm.eval()
    torch.testing.assert_close(classifiers(features)[0], head(norm(features)))


def vit(depth: int = 2, width: int = 48) -> ViT:
    torch.manual_seed(0)
    return ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, width, depth, 3), seed=0)


@pytest.mark.parametrize(
    ("form", "depth", "width"), [("moco", 2, 48), ("mae", 2, 48), ("dino", 6, 48), ("dino", 2, 768)]
)
def test_what_each_form_classifies(form: str, depth: int, width: int) -> None:
    encoder = vit(depth, width).eval()
    images, index = torch.randn(2, 3, 32, 32), torch.arange(2)
    with torch.no_grad():
        found = features_of(encoder, Form(form))(images, index)
        tokens = encoder.tapped(images, linear.Compression(), index, range(1, depth + 1))
    assert found.shape == (2, width_of(encoder, Form(form)))
    normed = {block: encoder.norm(each) for block, each in tokens.items()}
    if form != "dino":
        expected = normed[depth][:, 0]
    elif width == 768:
        expected = torch.cat([normed[depth][:, 0], normed[depth][:, 1:].mean(1)], 1)
    else:
        expected = torch.cat([normed[block][:, 0] for block in (3, 4, 5, 6)], 1)
    torch.testing.assert_close(found, expected)


def protocol(shards: Path, place: Path, epochs: int = 3, world: World = WORLD) -> tuple[LinearProtocol, Split]:
    data = LoaderConfig(str(shards), threads=1)
    config = LinearConfig(Form.moco, epochs=epochs, batch_size=8, rates=[0.1, 1.0], held_out=0.2)
    ids = np.arange(48)
    return LinearProtocol(config, vit(), Split(data, ids[:40]), 0, world, place), Split(data, ids[40:])


def test_a_killed_one_goes_on_where_it_was(drawn_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, queries = protocol(drawn_shards, tmp_path / "whole")
    expected = whole.run(queries)
    assert not (tmp_path / "whole").exists()

    steps = []
    step = Trainer.step

    def dying(self: Trainer, features: torch.Tensor, labels: torch.Tensor, progress: float) -> torch.Tensor:
        steps.append(progress)
        if len(steps) == 7:
            raise KeyboardInterrupt
        return step(self, features, labels, progress)

    monkeypatch.setattr(Trainer, "step", dying)
    killed, _ = protocol(drawn_shards, tmp_path / "killed")
    with pytest.raises(KeyboardInterrupt):
        killed.run(queries)
    assert len(steps) == 7
    again, _ = protocol(drawn_shards, tmp_path / "killed")
    found = again.run(queries)
    # An epoch is 4 steps: the fifth and sixth are taken again, of 12.
    assert [round(12 * progress) for progress in steps[7:]] == list(range(4, 12))
    for head, other in zip(again._classifiers.heads, whole._classifiers.heads, strict=True):
        assert torch.equal(head.weight, other.weight)
    assert found.held_out == expected.held_out
    assert found.scores.per_class == expected.scores.per_class


def test_what_another_training_left_is_not_taken(drawn_shards: Path, tmp_path: Path) -> None:
    first, _ = protocol(drawn_shards, tmp_path / "a", epochs=2)
    first._learn()
    assert (tmp_path / "a").exists()
    assert protocol(drawn_shards, tmp_path / "a", epochs=2)[0]._restore() == 8
    assert protocol(drawn_shards, tmp_path / "a", epochs=3)[0]._restore() == 0


def test_two_processes_learn_the_same(drawn_shards: Path, tmp_path: Path, run_ranks: Callable[..., list[str]]) -> None:
    code = f"""
    import numpy as np
    import torch
    from pathlib import Path
    from data.loader import LoaderConfig
    from pipeline import distributed
    from pipeline.linear_protocol import LinearProtocol, Split
    from pipeline.models.vit import ViT, ViTConfig
    from pipeline.probes.linear import Form, LinearConfig
    world = distributed.start()
    torch.manual_seed(0)
    vit = ViT(ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 2, 3), seed=0)
    data = LoaderConfig({str(drawn_shards)!r}, threads=1)
    config = LinearConfig(Form.mae, epochs=3, batch_size=8, rates=[0.1, 1.0], held_out=0.2)
    place = Path({str(tmp_path)!r}) / str(world.size)
    it = LinearProtocol(config, vit, Split(data, np.arange(40)), 0, world, place)
    found = it.run(Split(data, np.arange(40, 47)))
    norms = [float(each.detach().norm()) for each in it._classifiers.state_dict().values()]
    print(int(found.scores.samples.sum()), [round(norm, 4) for norm in norms])
    distributed.stop()
    """
    alone, together = run_ranks(code, 1), run_ranks(code, 2)
    assert together[0] == together[1] == alone[0]
    assert alone[0].startswith("7 ")


def test_the_lower_of_equal_rates_is_best() -> None:
    assert best_of([0.1, 0.5, 0.5, 0.2]) == 1


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("linear.rates=[]", r"linear\.rates must list numbers above 0, got \[\]"),
        ("linear.rates=[1,0]", r"linear\.rates must list numbers above 0, got \[1\.0, 0\.0\]"),
        ("linear.held_out=1", r"linear\.held_out must be a share in \(0, 1\), got 1"),
        ("linear.batch_size=0", r"linear\.batch_size at least 1, got 0 and 0"),
        ("linear.form=simclr", "linear.form"),
    ],
)
def test_refusals(word: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load("evaluate", ["run=r", "protocol=linear", word])


def test_too_few_samples_are_refused(drawn_shards: Path, tmp_path: Path) -> None:
    data = LoaderConfig(str(drawn_shards), threads=1)
    with pytest.raises(ValueError, match=r"linear\.held_out=0\.05 of 10 samples leaves too few"):
        LinearProtocol(LinearConfig(), vit(), Split(data, np.arange(10)), 0, WORLD, tmp_path / "a")
