"""Muon in float32: the library's update, without its rounding."""

import pytest
import torch
from torch import nn

from latlib.world.muon import Muon, orthogonalise

SHAPES = [(6, 4), (4, 6), (5, 5), (6, 4)]


def stepped(optimiser_class, steps=5):
    """Matrices after some steps with the same gradients."""
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimiser = optimiser_class(matrices, lr=0.02, momentum=0.95, weight_decay=0.1)
    for _ in range(steps):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimiser.step()
    return matrices


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch < 2.9 has no Muon")
def test_it_takes_the_librarys_steps_but_for_bfloat16():
    for ours, theirs in zip(stepped(Muon), stepped(torch.optim.Muon), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * 5 * 2**-6)
        assert ours.dtype == torch.float32 and not torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(3, 8, 5), (3, 5, 8), (2, 4, 4)])
def test_what_it_makes_is_nearly_orthogonal_and_points_the_same_way(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = orthogonalise(matrices)
    left, before, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ made @ right.mT
    off = values - torch.diag_embed(values.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 1e-10
    large = values.diagonal(dim1=1, dim2=2)[before > 0.1 * before.amax(1, keepdim=True)]
    assert large.min() > 0.5 and large.max() < 1.3


def test_a_matrix_without_a_gradient_stays_as_it_is():
    kept, moved = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    moved.grad = torch.eye(3)
    Muon([kept, moved], lr=0.1).step()
    assert torch.equal(kept, torch.ones(3, 3)) and not torch.equal(moved, torch.ones(3, 3))
