import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fewbits.core.devices import seeded
from fewbits.core.errors import FewbitsError
from fewbits.core.search import search_array
from fewbits.primitives.retrieval import hit_rate, mean_reciprocal_rank
from fewbits.primitives.rotation import random_rotation
from fewbits.vectors._bt2_network import (
    Items,
    Model,
    aligned_bases,
    class_means,
    made,
    objective,
)
from fewbits.vectors.bebr import BEBR
from fewbits.vectors.bt2 import BT2, class_numbers, leading_scores, train_bct

QUICK = {"steps": 40, "batch": 64, "device": "cpu", "learning_rate": 3e-3}


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def spaces(
    count: int, old: int, new: int, seed: int = 0, noise: float = 0.3
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items of ten classes in an old embedding, which sees them dimly, and in a new one."""
    fixed, rng = np.random.default_rng(99), np.random.default_rng(seed)
    labels = rng.integers(10, size=count)
    meaning = fixed.standard_normal((10, 12))[labels] + 0.5 * rng.standard_normal((count, 12))
    blur = noise * rng.standard_normal((count, old))
    old_rows = meaning @ fixed.standard_normal((12, old)) / 3 + blur
    new_rows = meaning @ fixed.standard_normal((12, new)) + 0.1 * rng.standard_normal((count, new))
    return unit(old_rows), unit(new_rows), labels


def fitted(old: int = 16, new: int = 24, *, labelled: bool = True, **options: Any) -> BT2:
    y, x, labels = spaces(300, old, new)
    return BT2(**(QUICK | options)).fit_upgrade(y, x, labels if labelled else None)


def parts(codec: BT2, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """o and n by their definition."""
    h = unit(x) @ codec.head_ + codec.head_offset_
    n = unit(h[:, : len(codec.new_basis_)])
    return unit(np.maximum(h, 0) @ codec.branch_ + codec.branch_offset_), n


# -- exact invariants ----------------------------------------------------------------------


@pytest.mark.parametrize("start", ["aligned", "random"])
@pytest.mark.parametrize("steps", [0, 30])
@pytest.mark.parametrize(("old", "new", "extra"), [(16, 24, 8), (16, 16, 4), (24, 16, 12)])
def test_every_row_has_the_same_length_and_bases_stay_orthogonal(
    start: str, steps: int, old: int, new: int, extra: int
) -> None:
    codec = fitted(old, new, extra=extra, start=start, steps=steps, scale=3.0)
    z = codec.transform(spaces(50, old, new, seed=1)[1])
    assert z.shape == (50, new + extra)
    assert z.dtype == np.float32
    np.testing.assert_allclose(np.square(z).sum(axis=1), 1 + 3.0**2, atol=1e-4)
    for basis in (codec.new_basis_, codec.old_basis_):
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-5)


def test_new_scores_do_not_depend_on_the_bases() -> None:
    codec, x = fitted(), spaces(40, 16, 24, seed=1)[1]
    o, n = parts(codec, x)
    gram = o @ o.T + codec.scale**2 * n @ n.T
    z = codec.transform(x)
    np.testing.assert_allclose(z @ z.T, gram, atol=1e-5)
    codec.new_basis_, codec.old_basis_ = random_rotation(24, 1), random_rotation(16, 2)
    turned = codec.transform(x)
    np.testing.assert_allclose(turned @ turned.T, gram, atol=1e-5)
    assert np.abs(turned - z).max() > 0.1


def test_without_extra_coordinates_z_is_a_rotation_of_the_new_embedding() -> None:
    codec, x = fitted(20, 20, extra=0), spaces(60, 20, 20, seed=1)[1]
    n, z = parts(codec, x)[1], codec.transform(x)
    assert z.shape == n.shape
    np.testing.assert_allclose(z @ z.T, codec.scale**2 * n @ n.T, atol=1e-5)
    rotation = codec.old_basis_ @ codec.new_basis_
    np.testing.assert_allclose(z, codec.scale * n @ rotation.T, atol=1e-5)
    ranks = [search_array(rows, rows, 10, "ip")[1] for rows in (n, z)]
    assert (ranks[0] == ranks[1]).mean() > 0.99


def test_compatibility_reaches_the_backbone_through_what_is_shared_alone() -> None:
    y, x, labels = spaces(64, 16, 24)
    items, codec = Items(y, x, class_numbers(labels, 64)), BT2(extra=6)
    model = made(codec, items, None)
    loss = objective(codec, model, items, lambda rows: torch.from_numpy(x)[rows], CPU)
    terms = loss(torch.arange(64))
    (terms["old"] + terms["old classes"]).backward()
    assert model.classifier is not None
    assert model.classifier.weight.grad is None
    assert_only_shared(model, x, y)
    model.zero_grad()
    terms = loss(torch.arange(64))
    (terms["new"] + terms["classes"]).backward()
    transformation = model.transformation
    layers = (transformation.new_basis, transformation.old_basis, transformation.branch)
    assert all(p.grad is None for layer in layers for p in layer.parameters())  # type: ignore[union-attr]
    assert model.classifier.weight.grad is not None


CPU = torch.device("cpu")


def assert_only_shared(model: Model, x: np.ndarray, y: np.ndarray) -> None:
    """The gradient of the old cosine in h is that through o[:a] and the first coordinates of
    Q_p C n, and nothing else."""
    t, wanted = model.transformation, torch.from_numpy(y[:1])
    start = model.backbone(torch.from_numpy(x[:1])).detach()

    def shared(h: torch.Tensor) -> torch.Tensor:
        assert t.branch is not None
        n = functional.normalize(h[:, :24], dim=1)
        o = functional.normalize(t.branch(functional.relu(h)), dim=1)
        return torch.cat([o, t.new_basis(t.scale * n)], dim=1)[:, :16]

    def compatibility(v: torch.Tensor) -> torch.Tensor:
        return (functional.normalize(t.old_basis(v), dim=1) * wanted).sum()

    h = start.clone().requires_grad_()
    (functional.normalize(t(h)[1][:, :16], dim=1) * wanted).sum().backward()
    v = shared(start).detach().requires_grad_()
    compatibility(v).backward()
    jacobian = torch.autograd.functional.jacobian(shared, start)[0, :, 0]
    assert h.grad is not None
    assert v.grad is not None
    assert h.grad.abs().max() > 1e-3
    np.testing.assert_allclose(h.grad[0], v.grad[0] @ jacobian, atol=1e-6)


def test_class_means_are_plain_means() -> None:
    y, _, labels = spaces(60, 16, 24)
    means = class_means(y, labels).numpy()
    for label in range(10):
        np.testing.assert_allclose(means[label], y[labels == label].mean(axis=0), atol=1e-6)
    assert np.linalg.norm(means, axis=1).max() < 1


@pytest.mark.parametrize("backbone", [False, True])
def test_numpy_computes_what_was_trained(backbone: bool) -> None:
    y, x, labels = spaces(200, 16, 24)
    codec, models = BT2(**QUICK), []
    keep = codec._keep
    codec._keep = lambda model, *rest: (models.append(model), keep(model, *rest))  # type: ignore[method-assign,misc]
    module = nn.Linear(24, 40)
    if backbone:
        codec.fit_backbone(module, x, y, x, labels)
    else:
        codec.fit_upgrade(y, x, labels)
    with torch.no_grad():
        h = models[0].backbone(torch.from_numpy(x))
        expected = models[0].transformation(h)[1].numpy()
    rows = h.numpy() if backbone else x
    z = codec.transform(rows)
    np.testing.assert_allclose(z, expected, atol=1e-5)
    assert (codec.transform(rows[7:8]) == z[7]).all()  # alone as among others


def test_an_exact_rotation_is_found_without_training() -> None:
    x = spaces(200, 16, 20)[1]
    codec = BT2(extra=0, steps=0).fit_upgrade(x @ random_rotation(20, 3), x)
    np.testing.assert_allclose(codec.compatible(x), x @ random_rotation(20, 3), atol=1e-4)
    bases = aligned_bases(Items(x[:, :16], x), 6)
    for basis, width in zip(bases, (20, 16), strict=True):
        np.testing.assert_allclose(basis.T @ basis, np.eye(width), atol=1e-5)


# -- what the paper promises ---------------------------------------------------------------


def test_new_queries_search_the_old_gallery_better_than_old_ones() -> None:
    codec = fitted(extra=4)
    y, x, labels = spaces(400, 16, 24, seed=5)
    asked, old_asked, own = x[:100], y[:100], labels[:100]

    def precision(found: np.ndarray) -> float:
        return float((labels[100:][found] == own[:, None]).mean())

    before = precision(search_array(old_asked, y[100:], 20, "ip")[1])
    after = precision(codec.search_old(y[100:], asked, 20)[1])
    apart = precision(search_array(asked[:, :16], y[100:], 20, "ip")[1])
    assert after > before > 2 * apart
    code = codec.encode(x[100:])
    on_new = precision(codec.search(code, asked, 20)[1])
    assert on_new > precision(search_array(asked, x[100:], 20, "ip")[1]) - 0.02
    assert on_new > after


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_a_gallery_that_is_new_in_part_needs_rows_of_one_length(share: float) -> None:
    codec = fitted(extra=4)
    y, x, labels = spaces(500, 16, 24, seed=5)
    asked, own, held = x[:100], labels[:100], labels[100:]
    fresh = np.random.default_rng(0).random(400) < share

    rows = np.where(fresh[:, None], codec.compatible(x[100:]), y[100:])
    found = codec.search_old(rows, asked, 20)[1]
    assert (held[found] == own[:, None]).mean() > 0.8
    assert abs(fresh[found].mean() - share) < 0.15
    z, z_rows = codec.transform(asked), codec.transform(x[100:])
    raw = np.where(fresh, leading_scores(z, z_rows), leading_scores(z, y[100:]))
    first = np.argsort(-raw, axis=1)[:, :20]
    assert (
        fresh[first].mean() > share + 0.2
    )  # as z has them, new rows are longer and push out the old


def test_rows_for_the_old_index_have_its_length_and_are_the_start_of_z() -> None:
    y, x, labels = spaces(300, 16, 24)
    codec = BT2(**QUICK).fit_upgrade(7 * y, 3 * x, labels)
    rows = codec.compatible(x[:20])
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 7, rtol=1e-5)
    np.testing.assert_allclose(unit(rows), unit(codec.transform(x[:20])[:, :16]), atol=1e-6)
    scores, found = codec.search_old(7 * y, x[:20], 5)
    expected, truth = search_array(unit(rows), y, 5, "ip")
    np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert (found == truth).mean() > 0.99
    raw = leading_scores(codec.transform(x[:20]), y)
    assert (np.argsort(-raw, axis=1)[:, 0] == found[:, 0]).mean() > 0.99


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_searching_new_with_new(metric: str) -> None:
    codec, x = fitted(), spaces(100, 16, 24, seed=2)[1]
    z = codec.transform(x)
    cosines = unit(z) @ unit(z).T
    expected = {"cosine": cosines, "ip": 5 * cosines, "l2": 10 * cosines - 10}[metric]
    scores, found = codec.search(codec.encode(x), x, 10, metric)
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :10], atol=1e-4)
    assert (found[:, 0] == np.arange(100)).all()


def test_a_series_of_updates_searches_every_generation() -> None:
    first, second, labels = spaces(300, 16, 24)
    third, fourth = spaces(300, 20, 20)[1], spaces(300, 18, 24)[1]
    one = BT2(**QUICK).fit_upgrade(first, second, labels)
    z = one.transform(second)
    two = BT2(**QUICK).fit_upgrade(z, third, labels, previous=one)
    zz = two.transform(third)
    three = BT2(**QUICK).fit_upgrade(zz, fourth, labels, previous=two)
    widths = [24 + 8, 32 + 16, 48 + 24]  # by half of what was, as 32 would be more
    assert [one.width, two.width, three.width] == widths
    assert three.spaces_.tolist() == [16, 32, 48]
    np.testing.assert_allclose(three.lengths_, [1, 5**0.5, 5**0.5], rtol=1e-4)
    asked = fourth[:100]
    for gallery in (first, z, zz):
        found = three.search_old(gallery, asked, 10)[1]
        assert (labels[found] == labels[:100, None]).mean() > 0.8
    assert three.compatible(asked, space=32).shape == (100, 32)
    with pytest.raises(FewbitsError, match="16 or 32 or 48 dimensions, not 20"):
        three.search_old(third, asked, 10)
    with pytest.raises(FewbitsError, match="previous makes 32"):
        BT2(**QUICK).fit_upgrade(zz, fourth, labels, previous=one)


def test_by_default_z_grows_by_32_in_every_update() -> None:
    assert BT2().extra_of(128, 128) == 32
    assert BT2().extra_of(128, 160) == 64  # z of 128 + 64: 32 more than 160
    assert BT2().extra_of(384, 20) == 10
    assert BT2().extra_of(4, 20) == 20


def test_labels_add_the_terms_of_classes() -> None:
    assert set(fitted().losses) == {"new", "old", "classes", "old classes"}
    bare = fitted(labelled=False)
    assert set(bare.losses) == {"new", "old"}
    assert fitted(steps=0).losses == {}
    assert bare.losses["old"] < fitted(labelled=False, start="random").losses["old"]
    y, x, labels = spaces(300, 16, 24)
    for same in (np.array([f"class {n}" for n in labels], dtype=object), labels.tolist()):
        codec = BT2(**QUICK).fit_upgrade(y, x, same)
        assert codec.digest == fitted().digest


def test_the_same_seed_gives_the_same_bits() -> None:
    assert fitted().digest == fitted().digest
    assert fitted(seed=1).digest != fitted().digest


# -- backbones and the baseline ------------------------------------------------------------


def convolution() -> nn.Module:
    with seeded(3):
        return nn.Sequential(
            nn.Unflatten(1, (1, 24)),
            nn.Conv1d(1, 8, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(176, 40),
        )


def test_a_backbone_of_another_architecture_is_trained(tmp_path: Path) -> None:
    y, x, labels = spaces(300, 16, 24)
    module, checkpoint = convolution(), tmp_path / "run.safetensors"
    codec = BT2(**(QUICK | {"steps": 120}))
    codec.fit_backbone(module, x, y, x, labels, checkpoint=checkpoint)
    assert not checkpoint.exists()
    assert not module.training
    with torch.no_grad():
        h = module(torch.from_numpy(x)).numpy()
    assert codec.dims_ == 40
    z = codec.transform(h)
    np.testing.assert_allclose(np.square(z).sum(axis=1), 5, atol=1e-4)
    found = codec.search_old(y, h[:100], 10)[1]
    assert (labels[found] == labels[:100, None]).mean() > 0.8
    again = convolution()
    table = torch.from_numpy(x)
    other = BT2(**(QUICK | {"steps": 120}))
    other.fit_backbone(again, lambda rows: table[rows], y, x, labels)
    assert other.digest == codec.digest
    with pytest.raises(FewbitsError, match="40 dimensions"):
        codec.transform(x)


def test_a_backbone_of_the_wrong_width_is_refused() -> None:
    y, x, _ = spaces(50, 16, 24)
    with pytest.raises(FewbitsError, match=r"must give \(rows, 40\)"):
        BT2(**QUICK).fit_backbone(nn.Linear(24, 24), x, y, x)
    with pytest.raises(FewbitsError, match="49 inputs and 50"):
        BT2(**QUICK).fit_backbone(nn.Linear(24, 40), x[:-1], y, x)


@pytest.mark.parametrize("width", [16, 24])
def test_bct_brings_the_first_coordinates_to_the_old_space(width: int) -> None:
    y, x, labels = spaces(400, 16, 24)
    precision = []
    for old in (None, y):
        with seeded(1):
            module = nn.Linear(24, width)
        history = train_bct(module, x, labels, old, steps=100, learning_rate=1e-2, device="cpu")
        assert set(history.terms) == ({"classes"} if old is None else {"classes", "old classes"})
        with torch.no_grad():
            z = module(torch.from_numpy(x[:100])).numpy()
        found = search_array(z[:, :16], y, 10, "ip")[1]
        precision.append((labels[found] == labels[:100, None]).mean())
    assert precision[1] > precision[0] + 0.2


def test_bad_input_for_bct() -> None:
    y, x, labels = spaces(50, 16, 24)
    for options, complaint in (
        ({"old_vectors": y[:-1]}, "do not pair up"),
        ({"labels": labels[:-1]}, "do not pair up"),
        ({"labels": np.zeros(50)}, "whole numbers or names"),
        ({"labels": np.zeros(50, dtype=int)}, "all labels are the same"),
        ({"module": nn.Linear(24, 8)}, "make it as wide"),
        ({"old_vectors": np.full_like(y, np.nan)}, "NaN"),
    ):
        given = {"module": nn.Linear(24, 16), "inputs": x, "labels": labels, "old_vectors": y}
        with pytest.raises(FewbitsError, match=complaint):
            train_bct(**(given | options), steps=1, device="cpu")  # type: ignore[arg-type]


# -- files and bad input -------------------------------------------------------------------


def test_a_file_is_used_without_torch(tmp_path: Path) -> None:
    codec, x = fitted(), spaces(30, 16, 24, seed=1)[1]
    codec.save(tmp_path / "codec.fewbits")
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "z.npy", codec.transform(x))
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from fewbits.vectors.bt2 import BT2\n"
        f"codec = BT2.load(r'{tmp_path}/codec.fewbits'); x = np.load(r'{tmp_path}/x.npy')\n"
        f"assert (codec.transform(x) == np.load(r'{tmp_path}/z.npy')).all()\n"
        "assert (codec.search(codec.encode(x), x, 1)[1][:, 0] == np.arange(30)).all()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    codec = fitted(labelled=False, extra=5, scale=1.5)
    loaded = BT2.load(codec.save(tmp_path / "codec.fewbits"))
    assert loaded == codec
    assert loaded.digest == codec.digest
    assert (loaded.losses, loaded.width, loaded.old_width) == (codec.losses, 29, 16)
    again = loaded.save(tmp_path / "again.fewbits")
    assert again.read_bytes() == (tmp_path / "codec.fewbits").read_bytes()
    other = BEBR(steps=0).fit(spaces(50, 16, 24)[1]).save(tmp_path / "bebr.fewbits")
    with pytest.raises(FewbitsError, match="not a"):
        BT2.load(other)


def test_files_with_arrays_that_do_not_fit_are_refused() -> None:
    codec = fitted()
    for name in codec.state():
        with pytest.raises((ValueError, IndexError)):
            BT2(**QUICK)._restore(24, codec.state() | {name: codec.state()[name][:-1]})
    for name, value in {
        "old_basis": np.ones((16, 16), dtype=np.float32),
        "spaces": np.array([20], dtype=np.int64),
        "lengths": np.array([-1], dtype=np.float32),
        "losses": np.zeros(3, dtype=np.float32),
        "head": codec.head_.astype(np.float64),
    }.items():
        with pytest.raises(ValueError, match="bt2"):
            BT2(**QUICK)._restore(24, codec.state() | {name: value})
    with pytest.raises(ValueError, match="24 dimensions"):
        BT2(**QUICK)._restore(25, codec.state())


Y, X, LABELS = spaces(20, 16, 24)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"old_vectors": np.full((20, 16), np.nan)}, "old vectors has NaN"),
        ({"new_vectors": np.full((20, 24), np.inf)}, "new vectors has NaN, infinity"),
        ({"new_vectors": np.zeros((20, 24))}, "row 0 of the new vectors is all zeros"),
        ({"old_vectors": np.empty((0, 16))}, "old vectors is empty"),
        ({"old_vectors": Y[:1], "new_vectors": X[:1], "labels": None}, "at least 2 items"),
        ({"old_vectors": Y[:-1]}, "19 old and 20 new vectors"),
        ({"old_vectors": Y[:, 0]}, "2 axes"),
        ({"old_vectors": np.ones((20, 16))}, "old vectors are all the same"),
        ({"new_vectors": np.ones((20, 24))}, "new vectors are all the same"),
        ({"labels": LABELS[:-1]}, r"one per row \(20\)"),
        ({"labels": np.zeros(20, dtype=int)}, "all labels are the same"),
        ({"labels": LABELS / 2}, "whole numbers or names"),
        ({"labels": [[1], [2, 3]]}, "labels"),
    ],
)
def test_bad_input(options: dict[str, Any], complaint: str) -> None:
    given = {"old_vectors": Y, "new_vectors": X, "labels": LABELS} | options
    codec = BT2(**QUICK)
    with pytest.raises(FewbitsError, match=complaint) as raised:
        codec.fit_upgrade(**given)
    assert "\n" not in str(raised.value)
    with pytest.raises(FewbitsError, match="not fitted"):
        codec.transform(X)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"extra": 17}, "take extra=16 or less"),
        ({"extra": -1}, "extra=-1"),
        ({"scale": 0.0}, "scale"),
        ({"scale": float("nan")}, "scale"),
        ({"temperature": -1.0}, "temperature"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"steps": -1}, "steps=-1"),
        ({"batch": 1}, "batch=1"),
        ({"old_weight": -1.0}, "old_weight"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"seed": -1}, "seed"),
        ({"start": "anywhere"}, "aligned or random"),
        ({"device": "abacus"}, "cannot be used here"),
    ],
)
def test_bad_options(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(FewbitsError, match=complaint):
        BT2(**(QUICK | options)).fit_upgrade(Y, X)


def test_widths_that_do_not_fit() -> None:
    with pytest.raises(FewbitsError, match="take extra=8 or more"):
        BT2(**QUICK, extra=7).fit_upgrade(X, Y)
    assert BT2(**QUICK, extra=8).fit_upgrade(X, Y).width == 24


def test_what_it_cannot_do() -> None:
    with pytest.raises(FewbitsError, match=r"call fit_upgrade\(old_vectors, new_vectors\)"):
        BT2().fit(X)
    codec = fitted()
    with pytest.raises(FewbitsError, match="cannot be decoded"):
        codec.decode(codec.encode(X))
    with pytest.raises(FewbitsError, match="24 dimensions"):
        codec.transform(Y)
    with pytest.raises(FewbitsError, match="16 dimensions, not 24"):
        codec.search_old(X, X, 1)
    with pytest.raises(FewbitsError, match="ask for fewer"):
        codec.search_old(Y, X, 21)
    with pytest.raises(FewbitsError, match="row 3 of the old rows"):
        codec.search_old(np.where(np.arange(20)[:, None] == 3, np.nan, Y), X, 1)


def test_tables_of_one_item_each_are_found_again() -> None:
    """Labels may name items: every row a class of its own."""
    y, x, _ = spaces(200, 16, 24, noise=0.1)
    codec = BT2(**(QUICK | {"temperature": 0.1})).fit_upgrade(y, x, np.arange(200))
    found, own = codec.search_old(y, x, 50)[1], np.arange(200)
    assert hit_rate(found, own, 10) > 0.9
    assert mean_reciprocal_rank(found, own) > 0.6
