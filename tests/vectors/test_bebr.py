import subprocess
import sys

import numpy as np
import pytest
import torch

from fewbits.core.codec import from_spec
from fewbits.core.errors import FewbitsError
from fewbits.core.search import search_array
from fewbits.primitives.bits import pack, unpack
from fewbits.primitives.retrieval import hit_rate, mean_reciprocal_rank, overlap
from fewbits.vectors._bebr_codes import (
    code_values,
    integer_products,
    popcount_products,
    table_products,
    unit,
)
from fewbits.vectors._bebr_network import Head, Queue
from fewbits.vectors.bebr import BEBR


def rows(count: int, dims: int = 32, seed: int = 0) -> np.ndarray:
    """Unit rows around a few centres and away from zero, as embeddings are."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).standard_normal((12, dims)) + 0.3
    made = centres[rng.integers(12, size=count)] + 0.7 * rng.standard_normal((count, dims))
    return unit(made.astype(np.float32))


def untrained(**options: object) -> BEBR:
    return BEBR(steps=0, **options).fit(rows(400))  # type: ignore[arg-type]


# -- exact invariants ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dims", [24, 21])
def test_the_scorers_agree_exactly(bits: int, dims: int) -> None:
    rng = np.random.default_rng(bits)
    asked = rng.integers(2**bits, size=(5, dims)).astype(np.uint8)
    stored = rng.integers(2**bits, size=(9, dims)).astype(np.uint8)
    assert (unpack(pack(stored, bits), dims, bits) == stored).all()
    exact = integer_products(asked, stored, bits)
    assert (popcount_products(asked, stored, bits) == exact).all()
    if bits in (1, 2, 4):
        assert (table_products(asked, pack(stored, bits), bits) == exact).all()
    floats = code_values(asked, bits).astype(np.float64) @ code_values(stored, bits).T
    assert (floats * 4 ** (bits - 1) == exact).all()


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_codes_are_on_the_grid_and_never_zero(bits: int) -> None:
    codec = untrained(bits=bits, dims=20)
    code = codec.encode(rows(50, seed=1))
    values = codec.values(code)
    steps = (values * 2 ** (bits - 1) + 2**bits - 1) / 2
    assert (steps == np.round(steps)).all()
    assert steps.min() == 0
    assert steps.max() == 2**bits - 1
    assert (values != 0).all()
    assert len(np.unique(values)) == 2**bits
    assert code["packed"].shape == (50, -(-20 * bits // 8))
    assert (codec.integers(code) == values * 2 ** (bits - 1)).all()


@pytest.mark.parametrize("scoring", ["symmetric", "asymmetric"])
def test_a_truncated_head_gives_the_leading_bits(scoring: str) -> None:
    codec, x = untrained(bits=4, scoring=scoring), rows(60, seed=2)
    code = codec.encode(x)
    for bits in (1, 2, 3, 4):
        shorter = codec.truncate(bits)
        again = shorter.encode(x)
        assert (shorter.numbers(again) == codec.numbers(code) >> (4 - bits)).all()
        cut = codec.truncate_code(code, bits)
        assert (cut["packed"] == again["packed"]).all()
        assert (shorter.decode(cut) == shorter.decode(again)).all()
    assert codec.truncate(4).digest == codec.digest
    with pytest.raises(FewbitsError, match="cannot keep 5 of 4"):
        codec.truncate(5)


def test_no_gradient_beyond_the_clip_and_none_at_zero_is_lost() -> None:
    head = Head(BEBR(bits=1, dims=3), 3)
    with torch.no_grad():
        head.blocks[0].linear.weight.copy_(torch.eye(3))
    x = torch.tensor([[0.0, 0.9, -1.1]], requires_grad=True)
    code = head(x)
    assert code.tolist() == [[1, 1, -1]]
    code.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [[1, 1, 0]]


@pytest.mark.parametrize("options", [{}, {"hidden": 8}, {"hidden": 8, "blocks": 2}])
@pytest.mark.parametrize("mode", ["rotation", "paper"])
def test_numpy_computes_what_the_trained_head_does(mode: str, options: dict[str, int]) -> None:
    codec = BEBR(bits=3, dims=16, mode=mode, steps=3, batch=64, **options)  # type: ignore[arg-type]
    heads = []
    keep = codec._keep
    codec._keep = lambda head: (heads.append(head), keep(head))  # type: ignore[method-assign]
    x = rows(200, seed=3)
    codec.fit(x)
    with torch.no_grad():
        expected = heads[0].eval()(torch.from_numpy(x)).numpy()
    found = codec.values(codec.encode(x))
    assert (found == expected).mean() > 0.999  # a sum within rounding of zero may differ
    alone = np.concatenate([codec.encode(x[i : i + 1])["packed"] for i in range(40)])
    assert (alone == codec.encode(x)["packed"][:40]).mean() > 0.999


def test_a_random_mlp_beside_the_rotation_changes_nothing_at_the_start() -> None:
    plain, beside = untrained(bits=2), untrained(bits=2, hidden=8)
    x = rows(50, seed=1)
    same = plain.encode(x)["packed"] == beside.encode(x)["packed"]
    assert same.mean() > 0.999
    assert len(beside.network_) > len(plain.network_)


# -- searching -----------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("dims", [None, 21, 48])
def test_asymmetric_search_ranks_decoded_rows(bits: int, dims: int | None) -> None:
    codec, x, queries = untrained(bits=bits, dims=dims), rows(300, seed=1), rows(7, seed=2)
    code = codec.encode(x)
    scores, found = codec.search(code, queries, 10)
    expected, truth = search_array(queries, codec.decode(code), 10, "ip")
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)
    assert overlap(found, truth, 10) > 0.98  # equal codes tie


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_symmetric_search_ranks_by_the_cosine_of_codes(bits: int) -> None:
    codec = untrained(bits=bits, dims=24, scoring="symmetric")
    x, queries = rows(300, seed=1), rows(7, seed=2)
    code, asked = codec.encode(x), codec.encode(queries)
    cosines = unit(codec.values(asked)) @ unit(codec.values(code)).T
    scores, _ = codec.search(code, queries, 10)
    np.testing.assert_allclose(scores, -np.sort(-cosines, axis=1)[:, :10], rtol=1e-4)
    whole = integer_products(codec.numbers(asked), codec.numbers(code), bits)
    assert (np.argmax(whole[0] / np.linalg.norm(codec.integers(code), axis=1))) == np.argmax(
        cosines[0]
    )


def test_more_bits_find_more() -> None:
    x, queries = rows(500, seed=1), rows(40, seed=2)
    truth = search_array(queries, x, 10, "ip")[1]
    for scoring in ("symmetric", "asymmetric"):
        kept = []
        for bits in (1, 2, 3, 4):
            codec = untrained(bits=bits, scoring=scoring)
            kept.append(overlap(codec.search(codec.encode(x), queries, 10)[1], truth, 10))
        assert kept == sorted(kept)
        assert kept[-1] > 0.8 > kept[0] + 0.1


def test_lengths_are_those_of_the_rows_fitted() -> None:
    x = rows(300) * 5
    codec = BEBR(steps=0).fit(x)
    code = codec.encode(x)
    np.testing.assert_allclose(np.linalg.norm(codec.decode(code), axis=1), 5, rtol=1e-5)
    best = codec.search(code, x[:3], 1, "l2")
    assert (best[0] <= 0).all()
    assert (codec.search(code, x[:3], 1, "ip")[0] > 15).all()


# -- training ------------------------------------------------------------------------------


def test_distillation_brings_codes_closer_to_the_floats_and_is_reproducible() -> None:
    x, queries = rows(600), rows(60, seed=5)
    truth = search_array(queries, x, 10, "ip")[1]
    options = {"bits": 1, "dims": 16, "learning_rate": 1e-3, "batch": 200}
    kept = []
    for steps in (0, 60):
        codec = BEBR(steps=steps, **options).fit(x)  # type: ignore[arg-type]
        kept.append(overlap(codec.search(codec.encode(x), queries, 10)[1], truth, 10))
    assert kept[1] > kept[0] + 0.02
    again = BEBR(steps=60, **options).fit(x)  # type: ignore[arg-type]
    assert again.digest == codec.digest
    other = BEBR(steps=60, seed=1, **options).fit(x)  # type: ignore[arg-type]
    assert other.digest != codec.digest


def pairs(seed: int, count: int = 500) -> tuple[np.ndarray, np.ndarray]:
    """Queries that share only some coordinates with their documents; the rest is noise."""
    rng = np.random.default_rng(seed)
    meaning = rng.standard_normal((count, 12))
    noise = 1.5 * rng.standard_normal((2, count, 20))
    sides = [np.concatenate([meaning, part], axis=1) for part in noise]
    return unit(sides[0].astype(np.float32)), unit(sides[1].astype(np.float32))


def rank_of_own(codec: BEBR, queries: np.ndarray, documents: np.ndarray) -> float:
    found = codec.search(codec.encode(documents), queries, 100)[1]
    return mean_reciprocal_rank(found, np.arange(len(queries)))


def test_pairs_improve_the_rank_of_the_right_document() -> None:
    options = {"scoring": "symmetric", "batch": 250, "learning_rate": 2e-3}
    queries, documents = pairs(0)
    asked, stored = pairs(1, 200)
    before = rank_of_own(BEBR(steps=0, **options).fit(documents), asked, stored)  # type: ignore[arg-type]
    for more in ({}, {"queue": 400}, {"queue": 400, "momentum": 0.9}):
        codec = BEBR(steps=40, **options, **more)  # type: ignore[arg-type]
        assert rank_of_own(codec.fit_pairs(queries, documents), asked, stored) > before + 0.1


def test_the_queue_keeps_the_newest() -> None:
    queue = Queue(Head(BEBR(bits=1, dims=2), 4), 3, 0.0)
    assert queue.filled() is None
    queue.push(torch.ones(2, 2), torch.tensor([5, 6]))
    queue.push(-torch.ones(2, 2), torch.tensor([7, 8]))
    filled = queue.filled()
    assert filled is not None
    assert filled[1].tolist() == [7, 8, 5]
    assert filled[0][:, 0].tolist() == [-1, -1, 1]


def test_new_queries_search_old_codes_only_after_compatible_training() -> None:
    queries, documents = pairs(0)
    asked, stored = pairs(1, 200)
    turn = np.linalg.qr(np.random.default_rng(3).standard_normal((40, 32)))[0].T.astype(np.float32)
    options = {"scoring": "symmetric", "batch": 250, "learning_rate": 2e-3, "steps": 40}
    old = BEBR(dims=32, **options).fit_pairs(queries, documents)  # type: ignore[arg-type]
    new = BEBR(dims=32, bits=3, **options)  # type: ignore[arg-type]
    new.fit_compatible(old, queries @ turn, documents @ turn, documents)
    code, own = old.encode(stored), np.arange(200)
    compatible = hit_rate(new.search_old(old, code, asked @ turn, 10)[1], own, 10)
    assert compatible >= hit_rate(old.search(code, asked, 10)[1], own, 10) - 0.02

    apart = BEBR(dims=32, **options).fit_pairs(queries @ turn, documents @ turn)  # type: ignore[arg-type]
    with pytest.raises(FewbitsError, match="not trained for those codes"):
        apart.search_old(old, code, asked @ turn, 10)
    apart.partner_ = new.partner_
    assert hit_rate(apart.search_old(old, code, asked @ turn, 10)[1], own, 10) < 0.2
    with pytest.raises(FewbitsError, match="set dims=32"):
        BEBR(dims=16, **options).fit_compatible(old, queries, documents, documents)  # type: ignore[arg-type]
    with pytest.raises(FewbitsError, match="one per pair"):
        BEBR(**options).fit_compatible(old, queries, documents, documents[:-1])  # type: ignore[arg-type]


# -- files and bad input -------------------------------------------------------------------


def test_a_file_is_used_without_torch(tmp_path: object) -> None:
    codec = BEBR(bits=2, hidden=8, steps=2, batch=64).fit(rows(200))
    x = rows(30, seed=1)
    codec.save(f"{tmp_path}/codec.fewbits")
    np.save(f"{tmp_path}/x.npy", x)
    np.save(f"{tmp_path}/packed.npy", codec.encode(x)["packed"])
    script = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np\n"
        "from fewbits.vectors.bebr import BEBR\n"
        "from fewbits.core.catalogue import find\n"
        "assert find('bebr').status == 'needs fewbits[torch]'\n"
        f"codec = BEBR.load(r'{tmp_path}/codec.fewbits'); x = np.load(r'{tmp_path}/x.npy')\n"
        "code = codec.encode(x)\n"
        f"assert (code['packed'] == np.load(r'{tmp_path}/packed.npy')).mean() > 0.99\n"
        "assert (codec.search(code, x, 1)[1][:, 0] == np.arange(30)).mean() > 0.9\n"
        "assert codec.decode(code).shape == x.shape\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_files_with_arrays_that_do_not_fit_are_refused() -> None:
    codec = untrained(bits=2)
    for name in ("network", "decoder", "offset", "length"):
        state = codec.state() | {name: codec.state()[name][:-1]}
        with pytest.raises(ValueError, match=name):
            BEBR(bits=2, steps=0)._restore(32, state)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "bits=9"),
        ({"dims": 0}, "dims=0"),
        ({"steps": -1}, "steps=-1"),
        ({"batch": 1}, "batch=1"),
        ({"hidden": 4, "blocks": 0}, "blocks=0"),
        ({"temperature": 0.0}, "temperature"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"momentum": 1.0}, "momentum"),
    ],
)
def test_bad_options(options: dict[str, float], complaint: str) -> None:
    with pytest.raises(FewbitsError, match=complaint):
        BEBR(**options).fit(rows(20))  # type: ignore[arg-type]


def test_bad_input() -> None:
    x = rows(20)
    for bad in (np.full((20, 8), np.nan), np.empty((0, 8)), x[:1], np.ones((20, 8))):
        with pytest.raises(FewbitsError):
            BEBR(steps=0).fit(bad)
    with pytest.raises(FewbitsError, match="32 dimensions"):
        untrained().encode(x[:, :8])
    codec = BEBR(scoring="symmetric")
    with pytest.raises(FewbitsError, match="scoring=symmetric"):
        BEBR().fit_pairs(x, x)
    with pytest.raises(FewbitsError, match="must be pairs"):
        codec.fit_pairs(x, x[:-1])
    with pytest.raises(FewbitsError, match="ids"):
        codec.fit_pairs(x, x, ids=np.arange(19))


def test_specs_of_the_grid_can_be_built() -> None:
    sizes = []
    for spec in BEBR.grid(384, 1000):
        codec = from_spec(spec)
        assert isinstance(codec, BEBR)
        sizes.append((codec.dims or 384) * codec.bits / 8)
    assert sizes == [24, 48, 48, 96, 96]
    assert BEBR.grid(384, 100) == []
