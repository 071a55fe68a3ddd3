"""Flexible patches: resized kernels, chosen patches."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.models.patches import resize_kernel, resize_matrix, take_patches


def upscaled(patch: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(patch, size=(size, size), mode="bilinear", align_corners=False, antialias=False)


@pytest.mark.parametrize("size", [20, 24, 30, 40, 48])
def test_embedding_of_an_upscaled_patch_is_the_originals(size: int) -> None:
    torch.manual_seed(size)
    kernel = torch.randn(7, 3, 16, 16, dtype=torch.float64)
    patch = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    want = torch.einsum("bcij,dcij->bd", patch, kernel)

    def embed(k: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bcij,dcij->bd", upscaled(patch, size), k)

    assert (embed(resize_kernel(kernel, size)) - want).abs().max() < 1e-10
    # The tempting wrong variant, interpolating the kernel itself, is far off.
    assert (embed(upscaled(kernel, size)) - want).abs().max() > 1


def test_downscaling_is_the_least_squares_solution() -> None:
    # pinv of a full-row-rank matrix: resizing the kernel down and the patch down are adjoint inverses.
    matrix = resize_matrix(16, 8).numpy()
    basis = np.eye(256).reshape(256, 1, 16, 16)
    down = upscaled(torch.from_numpy(basis), 8).reshape(256, 64).numpy()
    np.testing.assert_allclose(matrix, np.linalg.pinv(down), atol=1e-10)


def test_the_master_size_is_the_kernel_itself() -> None:
    kernel = torch.randn(2, 3, 16, 16)
    assert resize_kernel(kernel, 16) is kernel


def test_resizing_keeps_a_gradient_to_the_master() -> None:
    kernel = torch.randn(2, 3, 8, 8, requires_grad=True)
    resize_kernel(kernel, 12).sum().backward()
    assert kernel.grad is not None
    assert kernel.grad.abs().sum() > 0


def test_patches_times_kernel_is_a_convolution() -> None:
    images, kernel = torch.randn(2, 3, 24, 24), torch.randn(5, 3, 8, 8)
    want = F.conv2d(images, kernel, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(take_patches(images, 8, None) @ kernel.flatten(1).T, want, atol=1e-4, rtol=1e-4)


def test_chosen_patches_are_a_selection_of_all() -> None:
    images = torch.randn(3, 3, 32, 32)
    chosen = torch.tensor([[0, 5, 15], [1, 2, 3], [7, 8, 9]])
    everything = take_patches(images, 8, None)
    for i in range(3):
        assert torch.equal(take_patches(images, 8, chosen)[i], everything[i, chosen[i]])
