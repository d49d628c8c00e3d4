import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from fewbits.core.errors import FewbitsError
from fewbits.vectors import _csce_network as network
from fewbits.vectors.csce_net import CSCENet


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- AIE: acceptance 2 ---------------------------------------------------------------------


def test_exact_aie_leaves_nothing_that_the_windows_explain() -> None:
    local, windows = normal(3, 72, 64), normal(3, 72, 13, seed=1)
    rest = network.remove_explained(local, windows, "exact")
    assert (windows.transpose(1, 2) @ rest).abs().max() < 1e-4 * windows.norm() / 10
    unit = functional.normalize(windows, dim=1)
    assert (unit.transpose(1, 2) @ rest).abs().max() < 1e-5
    # What was there is the rest and a combination of the windows.
    explained = local - rest
    within = windows @ torch.linalg.lstsq(windows, explained).solution
    torch.testing.assert_close(within, explained, atol=1e-4, rtol=1e-4)


def test_exact_aie_of_windows_that_repeat_is_still_a_projection() -> None:
    local, windows = normal(2, 20, 9), normal(2, 20, 3, seed=1)
    repeated = windows[:, :, [0, 1, 2, 0, 1, 0]]
    torch.testing.assert_close(
        network.remove_explained(local, repeated, "exact"),
        network.remove_explained(local, windows, "exact"),
        atol=1e-5,
        rtol=1e-4,
    )


def test_paper_and_exact_aie_are_one_with_one_window() -> None:
    local, windows = normal(4, 12, 10), normal(4, 12, 1, seed=1)
    exact, paper = (network.remove_explained(local, windows, m) for m in ("exact", "paper"))
    torch.testing.assert_close(exact, paper, atol=1e-5, rtol=1e-5)
    assert network.remove_explained(local, windows, "off") is local


def test_paper_aie_is_the_formula_and_no_projection() -> None:
    local, windows = normal(2, 6, 5), normal(2, 6, 3, seed=1)
    rest = network.remove_explained(local, windows, "paper")
    for x, w, found in zip(local, windows, rest, strict=True):
        torch.testing.assert_close(found, x - w @ (w.T @ x) / (w**2).sum())
    again = network.remove_explained(rest, windows, "paper")
    assert (again - rest).abs().max() > 1e-3
    assert network.remove_explained(local, 0 * windows, "paper").isfinite().all()


# -- the dynamic sign function: acceptance 3 -----------------------------------------------


def slow_dynamic_sign(v: np.ndarray, threshold: float) -> list[float]:
    fill = -1.0 if (v >= 0).sum() > len(v) / 2 else 1.0
    return [fill if -threshold < x < threshold else (1.0 if x >= 0 else -1.0) for x in v]


def test_dynamic_sign_is_what_its_definition_says() -> None:
    rng = np.random.default_rng(0)
    v = rng.standard_normal((200, 16)).astype(np.float32) * 0.5
    v[:5, :3] = 0.0
    v[7] = np.abs(v[7])
    t = rng.uniform(-0.3, 0.3, 200).astype(np.float32)
    t[:20] = 0
    found = network.dynamic_sign(torch.from_numpy(v), torch.from_numpy(t)).numpy()
    assert (found == [slow_dynamic_sign(*pair) for pair in zip(v, t, strict=True)]).all()
    assert set(np.unique(found)) == {-1.0, 1.0}
    plain = np.where(v >= 0, 1, -1)
    assert (found[t <= 0] == plain[t <= 0]).all()
    sure = np.abs(v) >= t[:, None]
    assert (found[sure] == plain[sure]).all()
    assert (found != plain).any()
    before, after = (plain > 0).sum(axis=1), (found > 0).sum(axis=1)
    majority = before > 8
    assert (after[majority] <= before[majority]).all()
    assert (after[~majority] >= before[~majority]).all()
    # Half of the bits counts in the length that there is, not in 64.
    assert majority.any()
    again = network.dynamic_sign(torch.from_numpy(v[::-1].copy()), torch.from_numpy(t[::-1].copy()))
    assert (again.numpy()[::-1] == found).all()


def test_zero_never_leaks() -> None:
    v = torch.tensor([[0.0, -0.0, 0.0, 0.0], [0.0, -1.0, -1.0, -1.0]])
    for t in (-0.01, 0.0, 0.01):
        found = network.dynamic_sign(v, torch.full((2,), t))
        assert (found.abs() == 1).all()


# -- losses: acceptance 4 ------------------------------------------------------------------


@pytest.mark.parametrize("quantization", ["cs", "l1", "l2"])
@pytest.mark.parametrize("dsf", ["off", "paper", "fixed", "ste"])
def test_quantization_reaches_v_only_below_a_half(dsf: Any, quantization: Any) -> None:
    plan = CSCENet.small(16, dsf=dsf, quantization=quantization)
    v = (normal(40, 16) * 0.5).requires_grad_()
    t = torch.full((40,), 0.005, requires_grad=True)
    network.quantization_loss(v, t, plan).backward()
    assert v.grad is not None
    inside = v.detach().abs() < 0.5
    assert (v.grad[~inside] == 0).all()
    assert (v.grad[inside] != 0).float().mean() > 0.9
    assert (t.grad is not None and bool((t.grad != 0).any())) == (dsf == "ste")


@pytest.mark.parametrize(("dsf", "learns"), [("paper", False), ("ste", True)])
def test_the_threshold_head_learns_only_through_a_straight_path(dsf: Any, learns: bool) -> None:
    model = network.HashNetwork(torch.nn.Identity(), 5, CSCENet.small(16, dsf=dsf))
    with torch.no_grad():
        model.threshold.weight.mul_(1e-3)
        model.threshold.bias.fill_(0.005)  # within ±0.01, where the clamp lets gradients pass
    v, t = model(normal(30, 5))
    plan = CSCENet.small(16, dsf=dsf)
    (network.quantization_loss(0.05 * v, t, plan)).backward()
    grad = model.threshold.weight.grad
    assert (grad is not None and bool((grad != 0).any())) == learns
    assert model.code.weight.grad is not None


def test_the_soft_path_has_the_hard_values_and_its_own_slope() -> None:
    v = torch.tensor([[0.02, 0.5, 0.7, -0.6]], dtype=torch.float64)
    t = torch.tensor([0.05], dtype=torch.float64, requires_grad=True)
    bits = network.dynamic_sign_through(v, t, 0.01)
    assert bits.tolist() == [[-1, 1, 1, -1]]
    bits.sum().backward()
    # Only bits of another sign than the filling move: d/dt of −2·sigmoid-like kept.
    slope = sum(
        -2 / 0.01 * math.exp(-z) / (1 + math.exp(-z)) ** 2
        for z in [(x - 0.05) / 0.01 for x in (0.02, 0.5, 0.7)]
    )
    assert t.grad is not None
    assert t.grad.item() == pytest.approx(slope)


@pytest.mark.parametrize("t", [-0.3, 0.0, 0.2, 0.4])
def test_no_threshold_lowers_the_cosine_term_below_that_of_plain_signs(t: float) -> None:
    plan = CSCENet.small(16)
    v = normal(50, 16) * 0.5
    plain = network.quantization_loss(v, torch.zeros(50), plan)
    assert network.quantization_loss(v, torch.full((50,), t), plan) >= plain


def test_classification_is_cross_entropy_of_cosines_with_margins() -> None:
    centers, v, labels = (
        torch.sign(normal(3, 16)),
        normal(4, 16, seed=1),
        torch.tensor([0, 2, 1, 1]),
    )
    for kind in ("arc", "cos"):
        plan = CSCENet.small(16, margin_deviation=0.0, margin_kind=kind)  # type: ignore[arg-type]
        cosines = functional.cosine_similarity(v[:, None], centers[None], dim=2)
        for i, c in enumerate(labels):
            harder = cosines[i, c] - 0.15
            if kind == "arc":
                harder = torch.cos(torch.acos(cosines[i, c]) + 0.15)
            cosines[i, c] = harder
        wanted = functional.cross_entropy(10 * cosines, labels)
        found = network.classification_loss(v, labels, centers, plan)
        assert found.item() == pytest.approx(wanted.item(), abs=1e-5)
        one_hot = functional.one_hot(labels, 3).float()
        same = network.classification_loss(v, one_hot, centers, plan)
        assert same.item() == pytest.approx(found.item(), abs=1e-6)


def test_several_labels_share_the_target() -> None:
    centers, v = torch.sign(normal(4, 16)), normal(1, 16, seed=1)
    plan = CSCENet.small(16, margin=0.0)
    cosines = functional.cosine_similarity(v[:, None], centers[None], dim=2)
    logs = functional.log_softmax(10 * cosines, dim=1)[0]
    labels = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
    found = network.classification_loss(v, labels, centers, plan)
    assert found.item() == pytest.approx(-logs[[0, 2, 3]].mean().item(), abs=1e-5)


def test_margins_are_drawn_for_each_item_and_only_for_single_labels() -> None:
    centers, v, labels = (
        torch.sign(normal(3, 16)),
        normal(4, 16, seed=1),
        torch.tensor([0, 2, 1, 1]),
    )
    plan, one_hot = CSCENet.small(16), functional.one_hot(labels, 3).float()
    drawn = {network.classification_loss(v, labels, centers, plan).item() for _ in range(3)}
    fixed = {network.classification_loss(v, one_hot, centers, plan).item() for _ in range(3)}
    assert (len(drawn), len(fixed)) == (3, 1)


def test_a_cosine_of_one_has_a_finite_gradient() -> None:
    centers = torch.sign(normal(3, 16))
    v = centers.clone().requires_grad_()
    network.classification_loss(v, torch.arange(3), centers, CSCENet.small(16)).backward()
    assert v.grad is not None
    assert v.grad.isfinite().all()


# -- shapes: acceptance 5 ------------------------------------------------------------------


@pytest.mark.parametrize("size", [32, 33, 48, 70])
def test_windows_unfold_to_the_channels_of_the_local_branch(size: int) -> None:
    model = network.image_network(CSCENet.small(16, size=size), network.SmallBackbone()).eval()
    before, last = model.features.backbone(normal(2, 3, size, size))
    side = last.shape[2]
    assert before.shape[:2] == (2, 96)
    assert last.shape[:2] == (2, 128)
    windows = model.features.join.windows(last)
    assert windows.shape == (2, 72, (side - 1) ** 2 + (side - 2) ** 2)
    assert model.features.join.local(before).shape == (2, 72, *before.shape[2:])
    v, t = model(normal(2, 3, size, size))
    assert (v.shape, t.shape) == ((2, 16), (2,))
    assert (t.abs() <= 0.01).all()


def test_the_small_network_has_the_maps_of_the_tiny_configuration() -> None:
    before, last = network.map_shapes(network.SmallBackbone(), 32)
    assert (tuple(before), tuple(last)) == ((1, 96, 8, 8), (1, 128, 4, 4))
    model = network.image_network(CSCENet.small(16), network.SmallBackbone())
    assert [layer.out_channels for layer in model.features.join.windows.reduce] == [18, 8]
    assert model.code.in_features == 144
    assert model.features.join.weigh.in_features == 13


def test_a_window_holds_its_places_channel_by_channel() -> None:
    windows = network.SlidingWindows(4, 8, (2,))
    x = normal(1, 4, 3, 3)
    reduced, found = windows.reduce[0](x), windows(x)
    assert found.shape == (1, 8, 4)
    torch.testing.assert_close(found[0, :, 3], reduced[0, :, 1:, 1:].reshape(-1))


def test_the_published_head_is_as_large_as_published() -> None:
    before, last = torch.Size((1, 1024, 14, 14)), torch.Size((1, 2048, 7, 7))
    plan = CSCENet()
    branches = network.Branches(plan, before, last)
    assert (branches.channels, branches.weigh.in_features, branches.dims) == (1024, 52, 2048)
    assert [tuple(c.weight.shape[:2]) for c in branches.windows.reduce] == [(256, 2048), (64, 2048)]
    head = network.HashNetwork(torch.nn.Identity(), branches.dims, plan)
    count = sum(p.numel() for part in (branches, head) for p in part.parameters())
    parts = 1024**2 + 1024 + 2048 * 320 + 2048 * 65
    assert parts < count < parts * 1.01
    assert branches(normal(2, 1024, 14, 14), normal(2, 2048, 7, 7)).shape == (2, 2048)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"channels": 70}, "must be a multiple of 36"),
        ({"windows": (2, 7)}, "must be a multiple of 196"),
        ({"windows": (5,)}, "does not fit the last map of 4×4"),
        ({"aie": "exact", "channels": 36, "size": 48}, "leaves nothing"),
    ],
)
def test_branches_that_do_not_fit_are_refused_at_once(
    options: dict[str, Any], complaint: str
) -> None:
    if options.get("windows") == (2, 7):
        options = options | {"size": 64}
    with pytest.raises(FewbitsError, match=complaint):
        network.image_network(CSCENet.small(16, **options), network.SmallBackbone())


# -- inputs --------------------------------------------------------------------------------


def test_the_centre_is_taken_and_channels_are_standardised() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3)).astype(np.uint8)
    found = network.prepared(images, 32, True, False)
    part = images[:, 4:36, 4:36].transpose(0, 3, 1, 2) / 255
    mean, deviation = (np.array(x)[:, None, None] for x in (network.MEAN, network.DEVIATION))
    np.testing.assert_allclose(found.numpy(), (part - mean) / deviation, atol=1e-5)


def test_training_crops_and_mirrors_each_image_by_itself() -> None:
    image = np.random.default_rng(0).integers(0, 256, (34, 34, 3)).astype(np.uint8)
    images = np.repeat(image[None], 200, axis=0)
    parts = {}
    for flip in (False, True):
        torch.manual_seed(0)
        x = network.prepared(images, 32, flip, True)
        parts[flip] = {part.numpy().tobytes() for part in x}
    assert len(parts[False]) == 9
    assert len(parts[True]) == 18
    assert parts[False] < parts[True]
