"""The demo keeps its hands off what is not its own; the whole of it is a slow test."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from data.drawn import draw_image_folder
from pipeline.compose import load
from pipeline.demo import MARKER, run

REPOSITORY = Path(__file__).parents[2]


def demo(*words: str) -> str:
    command = [sys.executable, "-m", "pipeline.cli", "demo", *words]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_directory_of_somebody_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match=r"output: .* holds something else than an earlier result; choose"):
        run(load("demo", [f"output={tmp_path}"]))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_images_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="images: nothing at /nowhere"):
        run(load("demo", [f"output={tmp_path}", "images=/nowhere"]))
    assert not (tmp_path / MARKER).exists()


@pytest.mark.slow
def test_the_whole_demo_learns(tmp_path: Path) -> None:
    said = demo(f"output={tmp_path}")
    before, after = map(float, re.search(r"k-NN top-1, before -> after +([0-9.]+) % -> ([0-9.]+) %", said).groups())  # type: ignore[union-attr]
    assert after > before + 5
    assert "resumed at step" in said
    for picture in re.findall(r"^picture: (.+)$", said, re.M):
        with Image.open(picture) as image:
            assert min(image.size) > 500


@pytest.mark.slow
def test_the_demo_on_ones_own_unlabelled_images(tmp_path: Path) -> None:
    draw_image_folder(tmp_path / "drawn", classes=1, per_class=40, size=200)
    flat = next((tmp_path / "drawn").iterdir())
    said = demo(f"output={tmp_path / 'out'}", f"images={flat}")
    assert "budget spent                 500 of 500 steps" in said
    assert "k-NN" not in said.split("budget spent")[-1]
