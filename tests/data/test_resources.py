"""Cores and memory are shared fairly."""

import pytest

from data import resources
from data.views import ViewSpec


@pytest.mark.parametrize(
    ("environment", "bound", "want"),
    [
        ({}, 8, 8),
        ({"LOCAL_WORLD_SIZE": "4"}, 8, 2),
        ({"LOCAL_SIZE": "2"}, 8, 4),
        ({"LOCAL_WORLD_SIZE": "16"}, 8, 1),
        # Slurm bound the task to two of the node's eight cores: they are all its own.
        ({"SLURM_PROCID": "0", "LOCAL_WORLD_SIZE": "4"}, 2, 2),
        ({"SLURM_PROCID": "0", "LOCAL_WORLD_SIZE": "4"}, 8, 2),
    ],
)
def test_cores_are_shared_among_a_nodes_processes(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], bound: int, want: int
) -> None:
    for name in ("SLURM_PROCID", "LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(bound)))
    assert resources.share_of_cores() == want


@pytest.mark.parametrize(("batch_size", "want"), [(1, 2), (891, 2), (892, 1), (4096, 1)])
def test_large_batches_are_made_one_at_a_time(batch_size: int, want: int) -> None:
    """Two views at 224: 1,204,224 bytes a sample, so that 891 samples are the most below 1 GiB."""
    assert resources.usual_prefetch(batch_size, [ViewSpec(224)] * 2) == want
