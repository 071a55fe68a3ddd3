"""The linear protocol: train classifiers on frozen features of augmented images, choose a rate, and classify."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.loader import Loader, LoaderConfig
from data.manifest import Manifest, SampleIndex
from data.order import ShuffledOrder, SubsetOrder
from data.publishing import write_atomically
from data.views import ViewSpec
from pipeline.distributed import World, barrier
from pipeline.models.vit import ViT
from pipeline.probes.features import extract_share, resting
from pipeline.probes.linear import Classifiers, LinearConfig, Trainer, best_of, features_of, width_of
from pipeline.probes.scores import MOST, Scores

CHUNK = 1024


@dataclass(frozen=True)
class Split:
    """Which samples of which shards."""

    data: LoaderConfig
    ids: np.ndarray


@dataclass(frozen=True)
class LinearResult:
    """What the classifier of the best rate gets right, and how all did on what was held out, by rate."""

    scores: Scores
    rate: float
    held_out: dict[float, float]


class LinearProtocol:
    """Training and judging the classifiers of one encoder; what is learned is saved after every epoch in `place`."""

    def __init__(self, config: LinearConfig, encoder: ViT, support: Split, seed: int, world: World, place: Path):
        """Hold some samples out and draw the classifiers.

        Raises:
            ValueError: there are too few samples.
        """
        self._config, self._encoder, self._world, self._place = config, encoder, world, place
        self._data, self._seed = support.data, seed
        shuffled = np.random.default_rng(seed).permutation(support.ids)
        count = int(len(shuffled) * config.held_out)
        self._held_out, self._learned = shuffled[:count], shuffled[count:]
        self._batch_size = min(config.batch_size, len(self._learned)) // world.size * world.size
        if not count or not self._batch_size:
            raise ValueError(
                f"linear.held_out={config.held_out:g} of {len(shuffled)} samples leaves too few to learn from or to "
                "choose a rate by; give more, or another share."
            )
        self._classes = len(Manifest.load(Path(support.data.shards)).classes)
        self._encode = features_of(encoder, config.form)
        width = width_of(encoder, config.form)
        self._classifiers = Classifiers(config, width, self._classes, seed).to(world.device)
        self._trainer = Trainer(config, self._classifiers)

    def run(self, queries: Split) -> LinearResult:
        """Learn, or go on learning, choose a rate and classify. Every process must call this."""
        with resting(self._encoder):
            self._learn()
        chosen = self._judge(Split(self._data, self._held_out), range(len(self._config.rates)))
        best = best_of([scores.top1 for scores in chosen])
        result = LinearResult(
            self._judge(queries, [best])[0],
            self._config.rates[best],
            {rate: scores.top1 for rate, scores in zip(self._config.rates, chosen, strict=True)},
        )
        barrier()
        if self._world.is_main:
            self._place.unlink(missing_ok=True)
        return result

    def _learn(self) -> None:
        steps = self._config.num_epochs * len(self._learned) // self._batch_size
        an_epoch = max(1, len(self._learned) // self._batch_size)
        step = self._restore()
        loader = self._loader()
        # On a terminal, and once.
        hidden = None if self._world.is_main else True
        batches = loader.batches(step * self._batch_size, steps * self._batch_size)
        try:
            with tqdm(total=steps, initial=step, desc="linear", unit=" steps", disable=hidden) as bar:
                for batch in batches:
                    if batch.labels is None:
                        raise ValueError(f"data.shards={self._data.shards} has no labels; a classifier needs some.")
                    with torch.no_grad():
                        features = self._encode(batch.views[0], batch.index).float()
                    self._trainer.step(features, batch.labels, step / steps)
                    step += 1
                    bar.update()
                    if step % an_epoch == 0:
                        self._save(step)
        finally:
            loader.close()

    def _loader(self) -> Loader:
        interpolation = self._config.recipe.interpolation
        size = self._encoder.config.image_size
        view = ViewSpec(size, jitter_probability=0.0, grayscale=0.0, interpolation=interpolation)
        directory = Path(self._data.shards)
        counts = SampleIndex.load(directory, Manifest.load(directory)).counts
        return Loader(
            self._data,
            [view],
            SubsetOrder(ShuffledOrder(counts, self._seed), self._learned),
            seed=self._seed,
            batch_size=self._batch_size,
            rank=self._world.rank,
            world_size=self._world.size,
            device=self._world.device,
        )

    @torch.no_grad()
    def _judge(self, split: Split, numbers: Sequence[int]) -> list[Scores]:
        """Return what the classifiers of these numbers get right."""
        how = self._config.recipe.judged
        features, labels = extract_share(
            self._encoder, split.data, split.ids, self._world, self._encode, how, title="judging"
        )
        scores = [Scores.none(self._classes) for _ in numbers]
        self._classifiers.eval()
        # Logits of many classes take more memory than features.
        for some, truth in zip(torch.split(features, CHUNK), torch.split(labels, CHUNK), strict=True):
            logits = self._classifiers(some)
            scores = [each + self._score(logits[n], truth) for each, n in zip(scores, numbers, strict=True)]
        self._classifiers.train()
        return [each.of_all_ranks() for each in scores]

    def _score(self, logits: Tensor, labels: Tensor) -> Scores:
        return Scores.of(logits.topk(min(MOST, self._classes)).indices, labels, self._classes)

    def _identity(self) -> dict[str, Any]:
        config = self._config
        return {
            "form": config.form.value,
            "epochs": config.num_epochs,
            "batch_size": self._batch_size,
            "rates": list(config.rates),
            "held_out": config.held_out,
            "samples": len(self._learned),
        }

    def _save(self, step: int) -> None:
        if self._world.is_main:
            content = io.BytesIO()
            torch.save({"identity": self._identity(), "step": step, **self._trainer.state()}, content)
            self._place.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self._place, content.getvalue())

    def _restore(self) -> int:
        """Return the step after which this very training was left, 0 if it was not."""
        if not self._place.exists():
            return 0
        saved = torch.load(self._place, map_location=self._world.device, weights_only=True)
        if saved["identity"] != self._identity():
            return 0
        self._trainer.load(saved)
        return int(saved["step"])
