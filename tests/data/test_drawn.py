import numpy as np
import pytest
from PIL import Image

from data.drawn import SHAPES, draw_image_folder


def pixels(folder, side=None) -> np.ndarray:
    """Return all images [N, side * side * 3], class by class."""
    images = [Image.open(path) for path in sorted(folder.glob("*/*.jpg"))]
    if side is not None:
        images = [image.resize((side, side), Image.Resampling.BOX) for image in images]
    return np.stack([np.asarray(image, dtype=np.float32).ravel() for image in images])


def neighbors_accuracy(features: np.ndarray, labels: np.ndarray, k: int = 10) -> float:
    """Return the leave-one-out accuracy of a vote of the k nearest."""
    squares = (features**2).sum(axis=1)
    distance = squares[:, None] + squares[None, :] - 2 * features @ features.T
    np.fill_diagonal(distance, np.inf)
    votes = labels[np.argsort(distance, axis=1)[:, :k]]
    chosen = np.array([np.bincount(row).argmax() for row in votes])
    return float((chosen == labels).mean())


def test_the_folder_holds_what_was_asked_for(tmp_path):
    draw_image_folder(tmp_path, classes=3, per_class=2, size=40)
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("*/*"))
    assert files == sorted(f"{name}/{number:06d}.jpg" for name in list(SHAPES)[:3] for number in range(2))
    for path in tmp_path.glob("*/*"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (40, 40))


def test_the_same_seed_draws_the_same_bytes(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw_image_folder(tmp_path / name, classes=2, per_class=3, size=32, seed=seed)
    content = {name: [f.read_bytes() for f in sorted((tmp_path / name).glob("*/*"))] for name in "abc"}
    assert content["a"] == content["b"]
    assert all(one != other for one, other in zip(content["a"], content["c"], strict=True))


def test_more_images_do_not_change_the_first_ones(tmp_path):
    draw_image_folder(tmp_path / "few", classes=2, per_class=1, size=32)
    draw_image_folder(tmp_path / "many", classes=3, per_class=2, size=32)
    for path in (tmp_path / "few").glob("*/*"):
        assert path.read_bytes() == (tmp_path / "many" / path.relative_to(tmp_path / "few")).read_bytes()


def test_pixels_alone_are_a_poor_guide_to_the_class(tmp_path):
    draw_image_folder(tmp_path, classes=8, per_class=60)
    accuracy = neighbors_accuracy(pixels(tmp_path, side=16), np.repeat(np.arange(8), 60))
    assert 1 / 8 + 0.05 < accuracy < 0.6


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_stands_inside_its_square(name):
    axis = (np.arange(200) + 0.5) / 100 - 1
    mask = SHAPES[name](axis[None, :] * 1.5, axis[:, None] * 1.5)
    u, v = np.broadcast_arrays(axis[None, :] * 1.5, axis[:, None] * 1.5)
    assert 0.08 < mask.sum() * 0.015**2 / 4 < 0.8
    assert max(np.abs(u[mask]).max(), np.abs(v[mask]).max()) <= 1.05


def test_shapes_differ():
    axis = np.linspace(-1, 1, 50)
    masks = [shape(axis[None, :], axis[:, None]).tobytes() for shape in SHAPES.values()]
    assert len(set(masks)) == len(SHAPES)


def test_more_classes_than_shapes_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"drawn\.classes: must be 1 to 10, not 11"):
        draw_image_folder(tmp_path, classes=11)
