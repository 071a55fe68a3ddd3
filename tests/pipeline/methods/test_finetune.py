"""Fine-tuning against a reference in fp64, what of a network learns and how fast, and the average of its weights."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from monitoring.metrics import check
from pipeline.compose import load
from pipeline.compression.schedule import compression
from pipeline.config import TrainConfig
from pipeline.methods import FineTuneDeiTConfig, FineTuneMAEConfig, build_method
from pipeline.methods.finetune import FineTune
from pipeline.methods.mixing import erased
from pipeline.models.vit import Positions, ViT, ViTConfig
from pipeline.optim import HEADS, VECTORS, parameter_groups
from pipeline.parts import build_schedules
from pipeline.schedules import StepPlan

MakePlan = Callable[..., StepPlan]
CLASSES = 5
PLAIN = {"mixup": 0.0, "cutmix": 0.0, "erasing": 0.0, "randaugment": 0.0}
TINY = ["run=r", "budget.value=10", "method.classes=5", "model.image_size=32", "model.patch_size=8", "model.depth=3"]


@dataclass(frozen=True)
class Labeled:
    views: tuple[Tensor, ...]
    labels: Tensor
    index: Tensor


def make(kind: type[FineTuneDeiTConfig] = FineTuneDeiTConfig, depth: float = 0.0, **changes: object) -> FineTune:
    torch.manual_seed(0)
    config = ViTConfig("vit_tiny_patch16_224", 32, 8, 48, 3, 3, Positions.learned, depth)
    method = build_method(kind(classes=CLASSES, **changes), ViT(config, seed=0))  # type: ignore[arg-type]
    assert isinstance(method, FineTune)
    # A classifier of almost zero says almost nothing.
    torch.nn.init.normal_(method.classifier.linear.weight, std=0.3)
    return method


def make_batch(size: int = 6, dtype: torch.dtype = torch.float64) -> Labeled:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, 32, 32, generator=generator, dtype=dtype)
    return Labeled((images,), torch.randint(CLASSES, (size,), generator=generator), torch.arange(40, 40 + size))


def reference_logits(method: FineTune, images: Tensor) -> Tensor:
    """Spell every step out, image by image."""
    vit, rows = method.encoder, []
    for image in images:
        patches = F.unfold(image[None], 8, stride=8)[0].T
        x = patches @ vit.patch.weight.flatten(1).T + vit.patch.bias
        x = (torch.cat([vit.class_token[0], x]) + vit.positions)[None]
        for block in vit.blocks:
            x = block(x)
        if isinstance(method.classifier.norm, torch.nn.Identity):
            pooled = vit.norm(x)[0, 0]
        else:
            norm = method.classifier.norm
            pooled = F.layer_norm(x[0, 1:].mean(0), (48,), norm.weight, norm.bias, 1e-6)  # type: ignore[arg-type]
        rows.append(method.classifier.linear.weight @ pooled + method.classifier.linear.bias)
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [FineTuneDeiTConfig, FineTuneMAEConfig])
def test_loss_and_gradients_are_the_reference_in_fp64(kind: type[FineTuneDeiTConfig], make_plan: MakePlan) -> None:
    method, batch = make(kind, **PLAIN, smoothing=0.1).double(), make_batch()
    got = method(batch, make_plan(method)).loss
    smoothed = torch.full((6, CLASSES), 0.1 / CLASSES, dtype=torch.float64)
    smoothed[torch.arange(6), batch.labels] += 0.9
    want = -(smoothed * reference_logits(method, batch.views[0]).log_softmax(1)).sum(1).mean()
    # timm's targets are fp32.
    torch.testing.assert_close(got, want, atol=2e-7, rtol=0)
    learning = [p for p in method.parameters() if p.requires_grad]
    pairs = zip(torch.autograd.grad(got, learning), torch.autograd.grad(want, learning), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=2e-7, rtol=0)


def test_everything_that_is_said_to_learn_does(make_plan: MakePlan) -> None:
    for kind in (FineTuneDeiTConfig, FineTuneMAEConfig):
        method = make(kind)
        method(make_batch(dtype=torch.float32), make_plan(method)).loss.backward()
        still = {name for name, p in method.named_parameters() if p.grad is None}
        # The mean of the patches does not come through the encoder's last norm.
        assert still == ({"encoder.norm.weight", "encoder.norm.bias"} if kind is FineTuneMAEConfig else set())
        assert still == {name for name, p in method.named_parameters() if not p.requires_grad}


def test_images_are_erased_then_mixed_and_the_mixed_ones_are_classified(make_plan: MakePlan) -> None:
    method, batch = make(erasing=0.9).double(), make_batch(8)
    plan = make_plan(method)
    images = erased(batch.views[0], batch.index, 0, 0.9)
    mixed, targets = method._mixing(images, batch.labels, 0, plan.progress)
    assert not torch.equal(images, batch.views[0])
    assert not torch.equal(mixed, images)
    want = -(targets * reference_logits(method, mixed).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(method(batch, plan).loss, want, atol=1e-12, rtol=0)


def test_a_step_is_a_pure_function_of_its_batch_and_plan(make_plan: MakePlan) -> None:
    method, batch = make(depth=0.5), make_batch(8, torch.float32)
    losses = [float(method(batch, make_plan(method, progress=p)).loss.detach()) for p in (0.5, 0.5, 0.5000001)]
    assert losses[0] == losses[1] != losses[2]


def test_evaluation_changes_nothing_and_drops_nothing() -> None:
    method, (images,) = make(depth=0.9).double(), make_batch().views
    logits = method.logits(images, torch.arange(6))
    torch.testing.assert_close(logits, reference_logits(method, images), atol=1e-12, rtol=0)


def test_fewer_tokens_are_classified_where_the_plan_says_so(make_plan: MakePlan) -> None:
    method, batch = make(FineTuneMAEConfig, **PLAIN), make_batch(dtype=torch.float32)
    whole, few = (make_plan(method, query) for query in (compression(8, 0.0), compression(16, 0.5)))
    assert (method.lengths(whole), method.lengths(few)) == ((17, 0), (3, 0))
    assert method.sample_cost(whole) == pytest.approx(3 * 17 / 197)
    assert float(method(batch, whole).loss.detach()) != float(method(batch, few).loss.detach())


def test_the_average_follows_and_is_classified_by_itself(make_plan: MakePlan) -> None:
    method, batch = make(average=0.75), make_batch(dtype=torch.float32)
    plan = make_plan(method, momentum=method.momentum(0.3))
    average = method.classifier_of(averaged=True).linear.weight
    expected = 0.75 * average + 0.25 * method.classifier.linear.weight.detach()
    first = method.logits(batch.views[0], batch.index, averaged=True)
    method.after_step(plan, method(batch, plan))
    torch.testing.assert_close(average, expected)
    second = method.logits(batch.views[0], batch.index, averaged=True)
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, method.logits(batch.views[0], batch.index))
    assert {name.partition(".")[0] for name in method.state()} == {"encoder", "classifier", "gaps"}
    restored = make(average=0.75)
    restored.load(method.state())
    assert torch.equal(restored.logits(batch.views[0], batch.index, averaged=True), second)


def test_without_an_average_there_is_none(make_plan: MakePlan) -> None:
    method = make(FineTuneMAEConfig)
    plan = make_plan(method)
    method.after_step(plan, method(make_batch(dtype=torch.float32), plan))
    assert not method.momentum_encoders()
    assert not method.state()
    assert method.momentum(0.5) == 1.0


def test_the_classifier_starts_as_the_recipes_say() -> None:
    torch.manual_seed(0)
    vit = ViT(ViTConfig("vit_tiny_patch16_224"), seed=0)
    for config, deviation in ((FineTuneDeiTConfig(classes=1000), 0.02), (FineTuneMAEConfig(classes=1000), 2e-5)):
        linear = FineTune(config, vit).classifier.linear
        assert float(linear.weight.detach().std()) == pytest.approx(deviation, rel=0.02)
        assert not linear.bias.detach().any()


def test_class_token_positions_and_vectors_do_not_decay() -> None:
    method = make(average=0.0)
    groups = parameter_groups(method.layers(), method.parameters(), decay_vectors=False, undecayed=method.undecayed())
    names = {parameter: name for name, parameter in method.named_parameters()}
    decaying = {names[p] for group in groups if not group["name"].endswith(VECTORS) for p in group["params"]}
    assert "encoder.patch.weight" in decaying
    assert "classifier.linear.weight" in decaying
    assert all(name.endswith(".weight") and "norm" not in name for name in decaying)
    still = {names[p] for group in groups if group["name"] == f"layer00{VECTORS}" for p in group["params"]}
    assert still == {"encoder.class_token", "encoder.positions", "encoder.patch.bias"}
    # Whatever does not decay, all of it learns.
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert {group["name"].removesuffix(VECTORS) for group in groups} == {f"layer0{i}" for i in range(4)} | {HEADS}


@pytest.mark.parametrize(
    ("name", "peak", "decay", "warmup", "least"),
    [
        # 5e-4 per 512 to 1e-5 at batch 1024; 5 of 150 epochs.
        ("deit", 1e-3, 1.0, 5 / 150, 1e-5),
        # 5e-4 per 256 to 1e-6; 5 of 100 epochs.
        ("mae", 2e-3, 0.65, 0.05, 1e-6),
        # 4e-3 at batch 1024 to 1e-6; 20 of 100 epochs.
        ("localmim", 4e-3, 0.75, 0.2, 1e-6),
    ],
)
def test_rates_are_those_of_the_recipes(name: str, peak: float, decay: float, warmup: float, least: float) -> None:
    config: TrainConfig = load("train", [*TINY, f"method=finetune_{name}"])
    schedules = build_schedules(config, build_method(config.method, ViT(config.model, 0)))
    at_peak = schedules.at(config.rate.warmup)
    assert config.batch_size == 1024
    assert config.rate.warmup == pytest.approx(warmup, abs=1e-4)
    assert at_peak.learning_rate == pytest.approx(peak)
    # decay^(blocks + 1 - layer): the embedding is layer 0, the classifier one more than the blocks.
    assert at_peak.layer_rates == pytest.approx([peak * decay**power for power in (4, 3, 2, 1)])
    assert schedules.at(1.0).learning_rate == pytest.approx(least)
    assert (config.optim.weight_decay, config.optim.decay_vectors, config.optim.betas) == (0.05, False, [0.9, 0.999])
    assert config.model.stochastic_depth == 0.1
    assert config.model.positions is Positions.learned
    method = config.method
    assert (method.mixup, method.cutmix, method.smoothing, method.erasing, method.randaugment) == (0.8, 1, 0.1, 0.25, 9)
    assert method.average == (0.99996 if name == "deit" else 0)


def test_a_view_is_cropped_flipped_and_augmented_and_colors_are_randaugments() -> None:
    (view,) = make(randaugment=7.0, crop_min=0.2).views()
    assert (view.size, view.scale, view.randaugment, view.interpolation) == (32, (0.2, 1.0), 7.0, "bicubic")
    assert (view.jitter_probability, view.grayscale, view.blur, view.solarize) == (0, 0, 0, 0)
    (plain,) = make(**PLAIN).views()
    assert plain.randaugment == 0


def test_what_it_reports_is_in_the_catalogue(make_plan: MakePlan) -> None:
    method = make()
    check(dict.fromkeys(method(make_batch(dtype=torch.float32), make_plan(method)).metrics, 0.0))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"classes": 0}, "method.classes must be the number of classes of the shards, got 0"),
        ({"classes": 1}, "method.classes must be the number of classes of the shards, got 1"),
        ({"smoothing": 1.5}, r"method\.smoothing must be in \[0, 1\], got 1\.5"),
        ({"erasing": -0.1}, r"method\.erasing must be in \[0, 1\], got -0\.1"),
        ({"mixup": -1.0}, r"method\.mixup must be at least 0, got -1"),
        ({"head_std": float("inf")}, r"method\.head_std must be at least 0, got inf"),
        ({"randaugment": 11.0}, r"method\.randaugment must be in \[0, 10\], got 11"),
        ({"average": 1.0}, r"method\.average must be in \[0, 1\), got 1"),
        ({"crop_min": 0.0}, r"method\.crop_min must be a share of the image in \(0, 1\], got 0"),
    ],
)
def test_refusals(changes: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(FineTuneDeiTConfig(classes=2), **changes)  # type: ignore[arg-type]
