"""Factors of low rank: optimal in the sense that each promises."""

from __future__ import annotations

from collections.abc import Callable

import pytest

torch = pytest.importorskip("torch")

from fewbits.primitives.low_rank import (  # noqa: E402
    LowRank,
    fitted_to_outputs,
    input_scale,
    truncated,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_with_structure(count: int = 300, width: int = 24) -> torch.Tensor:
    """Inputs of very different sizes that go together."""
    return drawn(count, width, seed=1) * torch.linspace(0.1, 4, width) @ drawn(width, width, seed=2)


def perturbed(maps: LowRank, seed: int) -> LowRank:
    return LowRank(
        maps.down + 0.01 * drawn(*maps.down.shape, seed=seed),
        maps.up + 0.01 * drawn(*maps.up.shape, seed=seed + 50),
    )


@pytest.mark.parametrize("rank", [1, 5, 16])
def test_truncation_is_that_of_singular_values(rank: int) -> None:
    weight = drawn(16, 24)
    left, sizes, right = torch.linalg.svd(weight.T)
    best = left[:, :rank] @ torch.diag(sizes[:rank]) @ right[:rank]
    maps = truncated(weight, rank)
    assert (maps.rank, maps.shape) == (rank, (24, 16))
    torch.testing.assert_close(maps.product, best, rtol=1e-4, atol=1e-5)
    # The singular values are shared equally.
    torch.testing.assert_close(maps.down.norm(dim=0), maps.up.norm(dim=1))
    torch.testing.assert_close(maps.down.norm(dim=0) ** 2, sizes[:rank], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [truncated, lambda w, r: fitted_to_outputs(w, w @ w.T, r)])
def test_the_full_rank_loses_nothing(make: Callable[..., LowRank]) -> None:
    weight = drawn(16, 24)
    torch.testing.assert_close(make(weight, 16).product, weight.T, rtol=1e-5, atol=1e-5)


def test_a_scale_makes_its_inputs_count() -> None:
    """The scaled error is the least that rank 4 can have, by the singular values cut off."""
    weight, scale = drawn(16, 24), torch.linspace(0.1, 3, 24)
    maps = truncated(weight, 4, scale)
    error = (scale[:, None] * (weight.T - maps.product)).norm()
    cut = torch.linalg.svdvals(scale[:, None] * weight.T)[4:].norm()
    torch.testing.assert_close(error, cut, rtol=1e-4, atol=0)
    plain = truncated(weight, 4)
    assert error < (scale[:, None] * (weight.T - plain.product)).norm()
    assert (weight.T - plain.product).norm() < (weight.T - maps.product).norm()


def test_a_common_scale_changes_nothing() -> None:
    weight = drawn(16, 24)
    plain, scaled = truncated(weight, 4), truncated(weight, 4, torch.full((24,), 7.0))
    torch.testing.assert_close(scaled.product, plain.product, rtol=1e-4, atol=1e-5)
    assert torch.equal(input_scale(torch.rand(24), 0), torch.ones(24))
    constant = [truncated(weight, 4, input_scale(torch.full((24,), 0.3), a)) for a in (0.2, 0.9)]
    torch.testing.assert_close(constant[0].product, constant[1].product, rtol=1e-4, atol=1e-5)


def test_inputs_that_are_always_zero_can_be_scaled() -> None:
    sizes = torch.rand(24)
    sizes[3] = 0
    maps = truncated(drawn(16, 24), 16, input_scale(sizes))
    assert bool(maps.down.isfinite().all())


@pytest.mark.parametrize("seed", range(3))
def test_no_factors_have_better_outputs(seed: int) -> None:
    rows, weight = rows_with_structure(), drawn(16, 24)
    y = rows @ weight.T
    maps = fitted_to_outputs(weight, y.T @ y, 5)

    def error(one: LowRank) -> float:
        return float((y - rows @ one.product).square().sum())

    cut = torch.linalg.svdvals(y)[5:].square().sum()
    assert error(maps) == pytest.approx(float(cut), rel=1e-3)
    torch.testing.assert_close(maps.up @ maps.up.T, torch.eye(5), rtol=0, atol=1e-5)
    for other in (truncated(weight, 5), truncated(weight, 5, rows.abs().mean(0).sqrt())):
        assert error(maps) < 0.9 * error(other)
    assert error(maps) < error(perturbed(maps, seed))


def test_outputs_may_come_from_the_moment_of_the_inputs() -> None:
    rows, weight = rows_with_structure(), drawn(16, 24)
    y = rows @ weight.T
    one, other = (
        fitted_to_outputs(weight, moment, 5)
        for moment in (y.T @ y, weight @ (rows.T @ rows) @ weight.T)
    )
    torch.testing.assert_close(one.product, other.product, rtol=1e-3, atol=1e-3)


def test_factors_go_where_another_tensor_is() -> None:
    maps = truncated(drawn(16, 24), 4).to(torch.zeros(1, dtype=torch.bfloat16))
    assert maps.down.dtype == maps.up.dtype == torch.bfloat16
    assert truncated(drawn(16, 24).double(), 4).down.dtype == torch.float64


@pytest.mark.parametrize(
    ("weight", "rank", "says"),
    [
        (torch.ones(4, 6), 0, "rank=0 must be 1 to 4"),
        (torch.ones(4, 6), 5, "rank=5 must be 1 to 4"),
        (torch.ones(4), 1, "matrix of floats"),
        (torch.ones(4, 6, dtype=torch.long), 1, "matrix of floats"),
        (torch.full((4, 6), torch.nan), 1, "NaN or infinity"),
        (torch.full((4, 6), torch.inf), 1, "NaN or infinity"),
    ],
)
def test_maps_that_have_no_factors_are_refused(weight: torch.Tensor, rank: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        truncated(weight, rank)
    with pytest.raises(ValueError, match=says):
        fitted_to_outputs(weight, torch.eye(4), rank)


def test_a_scale_or_a_moment_that_does_not_fit_is_refused() -> None:
    for scale in (torch.ones(5), torch.zeros(6), torch.full((6,), torch.nan)):
        with pytest.raises(ValueError, match="6 numbers above 0"):
            truncated(torch.ones(4, 6), 1, scale)
    with pytest.raises(ValueError, match=r"outputs must be \(4, 4\)"):
        fitted_to_outputs(torch.ones(4, 6), torch.eye(6), 1)


def test_a_constant_map_has_rank_one() -> None:
    maps = truncated(torch.ones(4, 6), 1)
    torch.testing.assert_close(maps.product, torch.ones(6, 4))
