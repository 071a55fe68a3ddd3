"""What start-up costs is paid once: a life forks from a process that has imported everything and run nothing.

A fork takes threads and process groups along in name only, so the process that lives fork from must have neither.
"""

from __future__ import annotations

import gc
import importlib
import os
from pathlib import Path
from typing import NoReturn

import torch
from chaos.tiny_run import words_of

from data.dali import Decoding, build_graph
from pipeline.compose import load
from pipeline.methods import build_method
from pipeline.models.vit import ViT


def warm_up() -> None:
    """Import what a run imports on its way, and let DALI translate the graph's functions, without starting it."""
    # DeepSpeed asks for the second one when it looks at an optimizer, and gets all of the compiler with it.
    for name in ("pipeline.train", "deepspeed.runtime.zero.muon.muon_optimizer"):
        importlib.import_module(name)
    config = load("train", words_of(Path(), Path(), engine="zero1"))
    with torch.device("meta"):
        views = build_method(config.method, ViT(config.model, seed=0)).views()
    build_graph(views, _no_source, 2, torch.device("cpu"), 1, 1, config.data.color, Decoding())
    gc.collect()
    gc.freeze()
    check_alone()


def check_alone() -> None:
    """Refuse to go on in a process that must not fork."""
    assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not fork"
    assert not torch.distributed.is_initialized()


def _no_source() -> NoReturn:
    raise AssertionError("the graph is never run")
