"""Exports of what engines on two processes have saved: the same weights, to the bit.

DINO, whose momentum encoder, too, is cut. Stages in which each process has pieces of what is optimized, and those in
which it has pieces of everything. Others need no test here: a checkpoint is tensors by name, whoever saved it,
test_elastic.py moves all of them between all, and the other tests export what one process saved.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipeline import export
from pipeline.compose import load
from pipeline.methods import Method

STAGES = ("zero1", "zero3", "fsdp2")
SCRIPT = """
    import os, sys, json
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from pipeline import distributed
    from pipeline.compose import load
    from pipeline.engines import build_engine
    from pipeline.methods import build_method
    from pipeline.models.vit import ViT

    # The second process is a copy of the first, which has imported everything.
    second = os.fork()
    os.environ.update(RANK=str(int(not second)), WORLD_SIZE="2")
    world = distributed.start()
    assert world.size == 2
    weights = torch.load("{scratch}/weights.pt", weights_only=True)
    for stage in {stages}:
        training = load("train", json.loads('{words}') + [f"engine={{stage}}"])
        method = build_method(training.method, ViT(training.model, 0))
        method.load_state_dict(weights["online"])
        method.load(weights["state"])
        engine = build_engine(
            method, training.engine, training.optim, local_batch=8 // world.size, device=world.device
        )
        engine.save(Path("{scratch}") / stage)
    dist.barrier()
    sys.stdout.flush()
    # ZeRO 3 over gloo aborts now and then when the interpreter ends.
    os._exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) if second else 0)
    """


def test_what_is_in_pieces_is_whole_again(
    tmp_path: Path,
    run_ranks: Callable[..., list[str]],
    words_of: Callable[..., list[str]],
    make_disturbed: Callable[..., Method],
    make_run: Callable,
) -> None:
    words = words_of("dino", "model.positions=learned")
    method = make_disturbed(load("train", words))
    torch.save({"online": method.state_dict(), "state": method.state()}, tmp_path / "weights.pt")
    run_ranks(SCRIPT.format(scratch=tmp_path, stages=STAGES, words=json.dumps(words)), ranks=1)
    for stage in STAGES:
        saved = make_run(tmp_path / "runs" / stage, words, tmp_path / stage)
        for which, encoder in (("online", method.encoder), ("momentum", method.representation)):
            output = tmp_path / stage / which
            asked = ["run=r", f"runs={saved.runs}", f"encoder={which}", f"output={output}", "format=safetensors"]
            export.run(load("export", asked))
            exported, live = load_file(output / "model.safetensors"), dict(encoder.named_parameters())
            assert exported.keys() == live.keys()
            assert not [name for name in live if not torch.equal(exported[name], live[name])], (stage, which)
