"""Sinkhorn-Knopp: balanced, robust, the same over ranks as in one process."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dinov3.errors import ConfigError
from dinov3.losses.sinkhorn import sinkhorn_knopp

SHARES = ((0, 5), (5, 12), (12, 12))  # rows of each rank; the last has none


def logits(*, rows: int = 12, prototypes: int = 8) -> torch.Tensor:
    return torch.randn(rows, prototypes, generator=torch.Generator().manual_seed(0))


def plain_algorithm(logits: torch.Tensor, temperature: float, num_iterations: int) -> torch.Tensor:
    """The published algorithm, exponential first, in fp64."""
    assignment = (logits.double() / temperature).exp().T  # [K, B]
    num_prototypes, num_samples = assignment.shape
    assignment /= assignment.sum()
    for _ in range(num_iterations):
        assignment /= assignment.sum(dim=1, keepdim=True) * num_prototypes
        assignment /= assignment.sum(dim=0, keepdim=True) * num_samples
    return (assignment * num_samples).T.float()


@pytest.mark.parametrize("num_iterations", [1, 2, 3, 10])
@pytest.mark.parametrize("temperature", [0.02, 0.07, 1.0])
def test_it_equals_the_published_algorithm(temperature, num_iterations):
    probs = sinkhorn_knopp(logits(), temperature=temperature, num_iterations=num_iterations)
    expected = plain_algorithm(logits(), temperature, num_iterations)
    torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-6)


def test_it_converges_to_equal_use_of_all_prototypes():
    biased = logits() + torch.linspace(-3, 3, 8)
    probs = sinkhorn_knopp(biased, temperature=1.0, num_iterations=200)
    torch.testing.assert_close(probs.sum(1), torch.ones(12))
    torch.testing.assert_close(probs.sum(0), torch.full((8,), 12 / 8))
    assert biased.softmax(1).sum(0).max() > 3 * 12 / 8


@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_huge_logits_give_finite_distributions(offset, scale):
    probs = sinkhorn_knopp(logits() * scale + offset, temperature=0.02)
    assert torch.isfinite(probs).all()
    torch.testing.assert_close(probs.sum(1), torch.ones(12))


def test_the_published_algorithm_overflows_on_them():
    assert not torch.isfinite(plain_algorithm(logits() * 1e4, 0.02, 3)).all()


def test_a_sample_far_below_all_others_keeps_its_distribution():
    shifted = logits()
    shifted[3] -= 1e4
    probs = sinkhorn_knopp(shifted, temperature=0.07)
    assert torch.isfinite(probs).all()
    assert probs[3].sum().item() == pytest.approx(1)


def test_targets_carry_no_gradient_and_are_fp32():
    probs = sinkhorn_knopp(logits().bfloat16().requires_grad_(), temperature=0.1)
    assert not probs.requires_grad
    assert probs.dtype == torch.float32


def test_the_logits_are_left_as_they_are():
    given = logits()
    sinkhorn_knopp(given, temperature=1.0)
    assert torch.equal(given, logits())


def test_no_rows_give_no_rows():
    assert sinkhorn_knopp(torch.zeros(0, 8), temperature=0.1).shape == (0, 8)


@pytest.mark.parametrize("temperature", [0.0, -0.1, float("nan")])
def test_an_impossible_temperature_is_refused(temperature):
    with pytest.raises(ConfigError, match="temperature: must be positive"):
        sinkhorn_knopp(logits(), temperature=temperature)


def test_no_iterations_are_refused():
    with pytest.raises(ConfigError, match="num_iterations: must be at least 1, got 0"):
        sinkhorn_knopp(logits(), temperature=0.1, num_iterations=0)


def _run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=len(SHARES)
    )
    start, end = SHARES[rank]
    probs = sinkhorn_knopp(logits()[start:end], temperature=0.5)
    torch.save(probs, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_ranks_with_unequal_and_no_rows_share_one_assignment(tmp_path):
    mp.spawn(_run_rank, (str(tmp_path),), nprocs=len(SHARES))
    parts = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SHARES))]
    expected = sinkhorn_knopp(logits(), temperature=0.5)
    assert parts[2].shape == (0, 8)
    torch.testing.assert_close(torch.cat(parts), expected)
