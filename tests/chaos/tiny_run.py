"""The run that every chain drives: seconds long, yet its compression and its freezing change the shapes within it."""

from __future__ import annotations

from pathlib import Path

STEPS = 30
BATCH = 16
SAVE_EVERY = 3
# A chain may damage the newest one as long as another is whole.
KEPT = 3
NAME = "run"
IMAGE_SIZE, PATCH_SIZE = 32, 8

_WORDS = [
    f"run={NAME}",
    f"batch_size={BATCH}",
    f"budget.value={STEPS}",
    "log_every=1",
    "model.name=vit_tiny_patch16_224",
    f"model.image_size={IMAGE_SIZE}",
    f"model.patch_size={PATCH_SIZE}",
    "model.embed_dim=48",
    "model.depth=3",
    "model.num_heads=3",
    "model.reference_length=17",
    # DINO has the most state, and is smooth: behind a ReLU a resized run's rounding would grow now and then.
    "method=dino",
    "method.hidden_dim=64",
    "method.bottleneck_dim=16",
    "method.out_dim=32",
    "method.small_crops=1",
    "method.small_size=16",
    "method.last_layer_start=0.2",
    "rate.base=1e-2",
    "compression=staged",
    "compression.stages=[{until:0.4,patch_size:16,dropout:0.5},{until:0.7,patch_size:null,dropout:0.25}]",
    "freeze=freezeout",
    "freeze.t0=0.3",
    "freeze.curve=linear",
    "engine.precision=fp32",
    f"checkpoint.every_steps={SAVE_EVERY}",
    f"checkpoint.keep_last={KEPT}",
    "probe.share=0",
    "data.threads=1",
]


def words_of(runs: Path, shards: Path, engine: str) -> list[str]:
    """Return the command's words for the run below `runs`."""
    return [*_WORDS, f"runs={runs}", f"data.shards={shards}", f"engine={engine}"]
