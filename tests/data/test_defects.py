"""Images that DALI gives up on are found one by one; too many broken samples are an error."""

import io

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from data.defects import Defects, find_undecodable
from data.reader import Damage


def jpeg(seed: int) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


@pytest.mark.parametrize("broken", [[], [0], [5], [2, 3], [0, 1, 2, 3, 4, 5]])
def test_every_undecodable_image_is_found(broken: list[int]) -> None:
    images = [jpeg(k)[: 300 if k in broken else None] for k in range(6)]
    assert list(find_undecodable(images, torch.device("cpu"))) == broken


def test_images_are_not_blamed_for_a_decoder_that_fails_always(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> None:
        raise RuntimeError("cudaErrorMemoryAllocation")

    monkeypatch.setattr("data.dali.ViewPipeline.__next__", fail)
    assert list(find_undecodable([jpeg(0), jpeg(1)], torch.device("cpu"))) == []


def test_a_sample_counts_once_and_one_too_many_is_named(caplog: pytest.LogCaptureFixture) -> None:
    defects = Defects(limit=2)
    for sample in (7, 8, 7, 8):
        defects.add(Damage(sample, f"sample {sample} is broken"))
    assert len(defects) == 2
    assert 8 in defects
    assert 9 not in defects
    assert [message.partition(";")[0] for message in caplog.messages] == ["sample 7 is broken", "sample 8 is broken"]
    with pytest.raises(ValueError, match=r"3 samples are broken, 2 may be; the last: sample 9 is broken"):
        defects.add(Damage(9, "sample 9 is broken"))
