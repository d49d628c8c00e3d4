import copy
import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

import fewbits
from fewbits.core.checks import unit_rows
from fewbits.core.codec import Codec, from_spec
from fewbits.core.errors import FewbitsError
from fewbits.core.examples import python_docs
from fewbits.core.search import search_array
from fewbits.primitives.alignment import counterpart_mrr
from fewbits.primitives.anchors import SIMILARITIES
from fewbits.primitives.retrieval import overlap
from fewbits.primitives.rotation import random_rotation
from fewbits.reproductions.vectors import bebr
from fewbits.vectors.relative_representations import (
    RelativeLayer,
    RelativeModel,
    RelativeRepresentations,
    latent_similarity,
    stitch,
    train_model,
)

DIMS, ANCHORS = 20, 30


def cloud(rows=300, seed=0):
    """Rows off the origin, whose lengths differ."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, DIMS)) * np.geomspace(2, 0.3, DIMS) + np.linspace(-1, 1, DIMS)
    return (x * rng.uniform(0.5, 2, (rows, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def x():
    return cloud()


@pytest.fixture(scope="module")
def queries():
    return cloud(30, seed=1)


def made(x, **options):
    return RelativeRepresentations(**{"anchors": ANCHORS, "bits": None, **options}).fit(x)


def both(one, x, **options):
    """A codec of `x`, which embeds the same items as what `one` was fitted on."""
    kept = {"similarity": one.similarity, "center": one.center, "bits": one.bits} | options
    return RelativeRepresentations(**kept).fit_anchors(x[one.rows_], one.anchor_ids, sample=x)


# -- what r is -----------------------------------------------------------------------------


def expected(x, anchors, similarity):
    if similarity == "cosine":
        return unit_rows(x) @ unit_rows(anchors).T
    if similarity == "euclidean":
        return -np.linalg.norm(x[:, None] - anchors[None], axis=2)
    if similarity == "inner":
        return x @ anchors.T / np.sqrt(x.shape[1])
    return np.linalg.lstsq(anchors.T, x.T, rcond=None)[0].T


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_similarities_by_their_definition(x, queries, similarity, center):
    codec = made(x, similarity=similarity, center=center)
    mean = codec.anchors_.mean(axis=0) if center else 0
    wanted = expected(queries - mean, codec.anchors_ - mean, similarity)
    np.testing.assert_allclose(codec.transform(queries), wanted, atol=2e-5)
    np.testing.assert_array_equal(codec.anchors_, x[codec.rows_])
    assert codec.transform(queries).dtype == np.float32


def test_an_anchor_has_similarity_one_with_itself(x):
    for center in (False, True):
        codec = made(x, center=center)
        r = codec.transform(codec.anchors_)
        np.testing.assert_allclose(np.diag(r), 1, atol=1e-6)
        assert np.abs(codec.transform(x)).max() <= 1
        np.testing.assert_allclose(r, r.T, atol=1e-6)


def test_permuting_the_anchors_permutes_r(x):
    order = np.random.default_rng(2).permutation(ANCHORS)
    codec = made(x)
    turned = RelativeRepresentations(bits=None).fit_anchors(
        codec.anchors_[order], [codec.anchor_ids[place] for place in order]
    )
    np.testing.assert_array_equal(turned.transform(x), codec.transform(x)[:, order])
    assert not codec.comparable_with(turned)


@pytest.mark.parametrize("scale", [1e-12, 0.3, 1e12])
def test_rotating_and_scaling_the_space_leaves_r(x, scale):
    moved = scale * (x @ random_rotation(DIMS, 5))
    each = x * np.random.default_rng(0).uniform(0.1, 9, (len(x), 1)).astype(np.float32)
    codec = made(x)
    for other in (moved.astype(np.float32), each):
        np.testing.assert_allclose(
            both(codec, other).transform(other), codec.transform(x), atol=1e-5
        )


def test_shifting_the_space_changes_r_unless_it_is_centred(x):
    shifted = 2 * (x @ random_rotation(DIMS, 5)) + 3
    apart = {}
    for center in (False, True):
        codec = made(x, center=center)
        apart[center] = np.abs(both(codec, shifted).transform(shifted) - codec.transform(x)).max()
    assert apart[False] > 0.1
    assert apart[True] < 1e-5


def test_a_row_alone_is_the_row_in_a_batch():
    rng = np.random.default_rng(0)
    for dims, rows in ((1, 40), (7, 300), (129, 150), (300, 150)):
        x = rng.standard_normal((rows, dims)).astype(np.float32) + 0.5
        for similarity, bits, normalize in itertools.product(SIMILARITIES, (None, 8, 1), (0, 1)):
            if normalize and similarity != "cosine":
                continue
            codec = RelativeRepresentations(
                anchors=33, similarity=similarity, bits=bits, normalize=bool(normalize)
            ).fit(x)
            code = codec.encode(x)
            (name,) = code.arrays
            for part in (slice(0, 1), slice(5, 6), slice(8, 25), slice(3, None)):
                np.testing.assert_array_equal(codec.encode(x[part])[name], code[name][part])
                np.testing.assert_array_equal(
                    codec.decode(code.take(part)), codec.decode(code)[part]
                )


def test_a_row_of_zeros_is_similar_to_nothing(x):
    codec = made(x, bits=8)
    rows = np.concatenate([np.zeros((1, DIMS), np.float32), x[:3]])
    assert not codec.transform(rows)[0].any()
    assert np.isfinite(codec.decode(codec.encode(rows))).all()
    fitted = RelativeRepresentations(anchors=3).fit(np.concatenate([np.zeros((97, DIMS)), x[:3]]))
    assert sorted(fitted.rows_) == [97, 98, 99]


# -- the way back --------------------------------------------------------------------------


@pytest.mark.parametrize("center", [False, True])
@pytest.mark.parametrize("similarity", ["euclidean", "inner", "basis"])
def test_enough_anchors_give_everything_back(x, similarity, center):
    codec = made(x, similarity=similarity, center=center)
    decoded = codec.decode(codec.encode(x))
    assert np.linalg.norm(decoded - x) < 1e-4 * np.linalg.norm(x)


def test_cosines_give_all_directions_back(x):
    codec = made(x)
    decoded = codec.decode(codec.encode(x))
    np.testing.assert_allclose(unit_rows(decoded), unit_rows(x), atol=1e-4)
    lengths = np.linalg.norm(decoded, axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(x, axis=1).mean(), rtol=1e-5)


def test_few_anchors_give_their_span_back(x):
    codec = made(x, anchors=6, similarity="inner")
    span = np.linalg.qr(codec.anchors_.T)[0]
    np.testing.assert_allclose(codec.decode(codec.encode(x)), x @ span @ span.T, atol=1e-4)


def test_more_bits_lose_less(x):
    def lost(bits):
        codec = made(x, bits=bits, similarity="inner")
        return np.linalg.norm(codec.decode(codec.encode(x)) - x)

    losses = [lost(bits) for bits in (2, 4, 6, 8, None)]
    assert (np.diff(losses) < 0).all()
    assert lost(1) < np.linalg.norm(x - x.mean(axis=0))


def test_the_inverse_is_damped_by_what_the_bits_lose(x):
    codec = made(x, bits=4)
    code = codec.encode(x)
    bare = copy.deepcopy(codec)
    bare.noise_ = np.zeros(1, np.float32)
    bare._forget()

    def cosine(decoded):
        return float(np.sum(unit_rows(decoded) * unit_rows(x), axis=1).mean())

    assert cosine(codec.inverse(codec.relative(code))) > cosine(bare.inverse(codec.relative(code)))


# -- codes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "size"), [(None, 120), (8, 30), (4, 15), (3, 12), (1, 4)])
def test_codes_take_the_bytes_of_their_bits(x, bits, size):
    code = made(x, bits=bits).encode(x)
    assert code.bytes_per_item == size
    assert code.nbytes == size * len(x)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_even_steps_over_minus_one_to_one(x, bits):
    codec, top = made(x, bits=bits), 2**bits - 1
    r, read = codec.transform(x), codec.relative(codec.encode(x))
    assert codec.scale_[0] == 1
    assert np.abs(read - r).max() <= 1 / top + 1e-6
    np.testing.assert_allclose(np.rint((read + 1) * top / 2), (read + 1) * top / 2, atol=1e-4)
    noise = np.sqrt(np.mean((read - r) ** 2))
    assert codec.noise_[0] == pytest.approx(noise, rel=1e-4)
    unbounded = made(x, bits=bits, similarity="inner")
    assert unbounded.scale_[0] == pytest.approx(np.abs(unbounded.transform(x)).max())


def test_single_bits_are_signs_around_medians(x):
    codec = made(x, bits=1)
    r = codec.transform(x)
    signs = codec.relative(codec.encode(x)) > np.median(r, axis=0)
    np.testing.assert_array_equal(signs, r > np.median(r, axis=0))
    np.testing.assert_allclose(signs.mean(axis=0), 0.5, atol=0.01)


@pytest.mark.parametrize("policy", ["uniform", "farthest", "kmeans"])
def test_policies_choose_among_the_rows(x, policy):
    codec = made(x, policy=policy)
    assert len(set(codec.rows_.tolist())) == ANCHORS
    assert codec.digest == made(x.copy(), policy=policy).digest
    assert codec.digest != made(x, policy=policy, seed=1).digest
    assert codec.anchor_ids == [str(row) for row in codec.rows_]


def test_policies_that_need_to_be_told_more(x):
    labels = np.repeat(["b", "a", "c"], [100, 180, 20])
    chosen = RelativeRepresentations(anchors=15, policy="stratified").fit_items(x, labels=labels)
    found = np.unique(labels[chosen.rows_], return_counts=True)[1]
    np.testing.assert_allclose(found, [9, 5, 1], atol=1)
    counts = np.random.default_rng(0).integers(1000, size=len(x))
    words = [f"word {number}" for number in range(len(x))]
    frequent = RelativeRepresentations(anchors=9, policy="frequent")
    frequent.fit_items(x, ids=words, counts=counts)
    assert counts[frequent.rows_].min() >= np.sort(counts)[-9]
    assert frequent.anchor_ids == [words[row] for row in frequent.rows_]
    for policy, what in (("stratified", "labels"), ("frequent", "counts")):
        with pytest.raises(FewbitsError, match=rf"needs {what}; call fit_items\(x, {what}=…\)"):
            RelativeRepresentations(policy=policy).fit(x)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_pooling_averages_over_the_anchors_of_a_class(x, queries, similarity):
    labels = np.random.default_rng(0).integers(4, size=len(x)) * 10
    pooled = RelativeRepresentations(ANCHORS, similarity=similarity, pool=True, bits=None)
    pooled.fit_items(x, labels=labels)
    plain = RelativeRepresentations(ANCHORS, similarity=similarity, bits=None).fit(x)
    np.testing.assert_array_equal(pooled.rows_, plain.rows_)
    r = plain.transform(queries)
    groups = [labels[plain.rows_] == label for label in (0, 10, 20, 30)]
    means = np.stack([r[:, group].mean(axis=1) for group in groups], axis=1)
    np.testing.assert_allclose(pooled.transform(queries), means, atol=1e-5)
    assert pooled.encode(queries).bytes_per_item == 16
    np.testing.assert_array_equal(pooled.transform(queries[:1]), pooled.transform(queries)[:1])
    again = RelativeRepresentations(similarity=similarity, pool=True, bits=None)
    again.fit_anchors(plain.anchors_, plain.anchor_ids, labels=labels[plain.rows_])
    assert again.comparable_with(pooled)
    if similarity == "euclidean":
        with pytest.raises(FewbitsError, match="cannot be inverted"):
            pooled.decode(pooled.encode(x))
    else:
        assert np.isfinite(pooled.decode(pooled.encode(x))).all()


# -- whose anchors -------------------------------------------------------------------------


def test_only_equal_anchors_in_equal_order_are_comparable(x):
    one = made(x)
    same = both(one, x[:, :7])
    assert same.comparable_with(one)
    assert one.comparable_with(same)
    assert same.anchor_checksum == one.anchor_checksum
    names = one.anchor_ids
    for ids in (names[::-1], [*names[:-1], "another"], [f"{name} " for name in names]):
        other = RelativeRepresentations(bits=None).fit_anchors(one.anchors_, ids)
        assert not other.comparable_with(one)
        with pytest.raises(FewbitsError, match="their anchors differ"):
            other.search_across(one, one.encode(x), x, 1)
        with pytest.raises(FewbitsError, match="their anchors differ"):
            latent_similarity(one, x, other, x)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"similarity": "inner"}, "similarity is inner here and cosine there"),
        ({"center": True}, "center is True here"),
        ({"normalize": True}, "normalize is True here"),
        ({"bits": 1}, "medians that the other does not have"),
    ],
)
def test_similarities_must_be_made_alike(x, options, message):
    one, other = made(x), both(made(x), x, encoder="MiniLM", **options)
    assert not other.comparable_with(one)
    with pytest.raises(FewbitsError, match=message):
        other.search_across(one, one.encode(x), x, 1)
    with pytest.raises(FewbitsError, match="codes of MiniLM and another cannot be compared"):
        other.require_comparable(one)


@pytest.mark.parametrize("bits", [None, 8, 4, 1])
def test_a_turned_space_searches_the_codes_of_another(x, queries, bits):
    one = made(x, bits=bits)
    turn = np.eye(DIMS, 26, dtype=np.float32) @ random_rotation(26, 3)
    other = both(one, 7 * x @ turn)
    code = one.encode(x)
    scores, rows = other.search_across(one, code, 7 * queries @ turn, 10)
    itself = copy.deepcopy(one)
    itself.scoring = "relative"
    wanted = itself.search(itself.encode(x), queries, 10)
    assert overlap(rows, wanted[1], 10) > 0.99
    np.testing.assert_allclose(scores, wanted[0], atol=1e-4)
    found = other.search_across(one, code, 7 * x @ turn, 1)[1][:, 0]
    assert (found == np.arange(len(x))).mean() > (0.9 if bits != 1 else 0.5)
    with pytest.raises(FewbitsError, match="another codec"):
        other.search_across(one, other.encode(7 * x @ turn), 7 * queries @ turn, 1)


@pytest.mark.parametrize("last", ["int8", "turboquant:bits=4", "sign"])
def test_codes_of_a_chain_are_searched_across_encoders(x, queries, last):
    turn = random_rotation(DIMS, 3)
    options = "anchors=30,scoring=relative,normalize=yes,center=yes"
    chained = from_spec(f"relative-representations:{options}+{last}").fit(x)
    first = chained.stages[0]
    other = both(first, x @ turn, normalize=True, scoring="relative")
    code = chained.encode(x)
    scores, rows = other.search_across(chained, code, queries @ turn, 10)
    wanted = chained.search(code, queries, 10)
    assert overlap(rows, wanted[1], 10) > 0.99
    np.testing.assert_allclose(scores, wanted[0], atol=1e-4)
    spec = f"relative-representations:anchors=30,normalize=yes,center=yes+{last}"
    for unlike, message in (
        (from_spec(spec).fit(x), "take scoring=relative"),
        (from_spec(last).fit(x), "is not relative-representations"),
    ):
        code = unlike.encode(x)
        with pytest.raises(FewbitsError, match=message):
            other.search_across(unlike, code, queries @ turn, 10)


def test_latent_similarity_tells_spaces_apart(x):
    one = made(x)
    turned = x @ random_rotation(DIMS, 1)
    noisy = turned + np.random.default_rng(0).standard_normal(x.shape).astype(np.float32)
    unlike = cloud(seed=9)
    found = [latent_similarity(both(one, y), y, one, x) for y in (turned, noisy, unlike)]
    for what in ("cosine", "jaccard", "mrr"):
        values = [getattr(result, what) for result in found]
        assert values[0] == pytest.approx(1, abs=1e-2)
        assert values[0] > values[1] > values[2]
    assert found[2].mrr < 0.1
    with pytest.raises(FewbitsError, match="300 and 5 rows do not pair up"):
        latent_similarity(one, x, both(one, turned), turned[:5])


def test_an_artefact_keeps_its_anchors(x, tmp_path):
    words = [f"wörd, number {number}" for number in range(len(x))]
    codec = RelativeRepresentations(anchors=9, encoder="MiniLM/v2", bits=1).fit_items(x, ids=words)
    loaded = Codec.load(codec.save(tmp_path / "codec.fewbits"))
    assert loaded == codec
    assert loaded.digest == codec.digest
    assert loaded.encoder == "MiniLM/v2"
    assert loaded.anchor_ids == [words[row] for row in codec.rows_]
    assert loaded.comparable_with(codec)
    code = codec.encode(x)
    np.testing.assert_array_equal(loaded.encode(x)["packed"], code["packed"])
    np.testing.assert_array_equal(loaded.decode(code), codec.decode(code))
    np.testing.assert_array_equal(loaded.search(code, x[:9], 4)[1], codec.search(code, x[:9], 4)[1])


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("anchors", np.zeros((ANCHORS, 3), np.float32)),
        ("anchors", np.full((ANCHORS, DIMS), np.nan, np.float32)),
        ("anchors", np.zeros(DIMS, np.float32)),
        ("rows", np.zeros(2, np.int64)),
        ("classes", np.zeros(ANCHORS, np.int32)),
        ("length", np.full(1, np.inf, np.float32)),
        ("scale", np.zeros(1, np.float32)),
        ("noise", -np.ones(1, np.float32)),
        ("signs", np.zeros((2, ANCHORS), np.float32)),
        ("ids", np.frombuffer(b"[1, 2]", np.uint8)),
        ("ids", np.frombuffer(json.dumps(["same"] * ANCHORS).encode(), np.uint8)),
        ("ids", np.frombuffer(b"not json", np.uint8)),
    ],
)
def test_arrays_that_do_not_fit_are_refused(x, name, array):
    state = made(x).state() | {name: array}
    with pytest.raises(ValueError):
        RelativeRepresentations(bits=None)._restore(DIMS, state)


@pytest.mark.parametrize("classes", [[0, 2, 2], [-1, 0, 1], [0, 0, 2**31 - 1], [1, 1, 1]])
def test_classes_with_gaps_are_refused(x, classes):
    codec = RelativeRepresentations(pool=True, bits=None)
    state = codec.fit_anchors(x[:3], ["a", "b", "c"], labels=[5, 5, 7]).state()
    codec._restore(DIMS, state)
    with pytest.raises(ValueError, match="every class"):
        codec._restore(DIMS, state | {"classes": np.array(classes, np.int32)})


# -- searching -----------------------------------------------------------------------------


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
@pytest.mark.parametrize("bits", [None, 8, 1])
@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_reconstruction_scoring_orders_like_the_decoded_rows(x, queries, similarity, bits, metric):
    for center, anchors in ((False, ANCHORS), (True, ANCHORS), (True, 9)):
        options = {"normalize": bits == 8 and similarity == "cosine", "similarity": similarity}
        codec = made(x, bits=bits, center=center, anchors=anchors, **options)
        code = codec.encode(x)
        scores, rows = codec.search(code, queries, 10, metric)
        wanted = search_array(queries, codec.decode(code), 10, metric)
        if bits != 1:  # few single bits tie
            assert overlap(rows, wanted[1], 10) > 0.99
        np.testing.assert_allclose(scores, wanted[0], atol=1e-3, rtol=1e-4)


def test_reconstruction_finds_what_the_vectors_find(x, queries):
    x, queries = unit_rows(x), unit_rows(queries)
    truth = search_array(queries, x, 10, "cosine")[1]
    codec = made(x)
    code = codec.encode(x)
    assert overlap(codec.search(code, queries, 10)[1], truth, 10) > 0.99
    codec.scoring = "relative"
    assert overlap(codec.search(codec.encode(x), queries, 10)[1], truth, 10) < 0.95


@pytest.mark.parametrize("metric", ["ip", "cosine", "l2"])
def test_relative_scoring_compares_r_with_r(x, queries, metric):
    for bits, similarity in itertools.product((None, 8), SIMILARITIES):
        codec = made(x, scoring="relative", bits=bits, similarity=similarity)
        code = codec.encode(x)
        r, asked = codec.relative(code), codec.transform(queries)
        if metric == "cosine":
            r, asked = unit_rows(r), unit_rows(asked)
        scores, rows = codec.search(code, queries, 10, metric)
        wanted = search_array(asked, r, 10, metric)
        assert overlap(rows, wanted[1], 10) > 0.99
        np.testing.assert_allclose(scores, wanted[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("last", ["int8", "turboquant:bits=5", "float16"])
def test_other_codecs_may_follow(x, queries, last):
    for center, metric in itertools.product(("yes", "no"), ("ip", "cosine", "l2")):
        spec = f"relative-representations:anchors=30,normalize=yes,center={center}+{last}"
        codec = from_spec(spec).fit(x)
        code = codec.encode(x)
        wanted = search_array(queries, codec.decode(code), 10, metric)[1]
        found = codec.search(code, queries, 10, metric)[1]
        # Distances take all rows to have one length, which they have about so far as `last` is
        # exact.
        assert overlap(found, wanted, 10) > (0.7 if metric == "l2" else 0.99)


def test_relative_scoring_through_another_codec(x, queries):
    plain = made(x, scoring="relative")
    wanted = plain.search(plain.encode(x), queries, 10)[1]
    for bits in (8, 1):  # which mean nothing here
        options = f"anchors=30,scoring=relative,normalize=yes,bits={bits}"
        codec = from_spec(f"relative-representations:{options}+int8").fit(x)
        assert overlap(codec.search(codec.encode(x), queries, 10)[1], wanted, 10) > 0.9


@pytest.mark.parametrize(
    ("options", "metric", "way_out"),
    [
        ("", "cosine", "normalize=yes"),
        ("", "ip", "normalize=yes"),
        (",scoring=relative", "cosine", "normalize=yes"),
        (",similarity=euclidean", "ip", "scoring=relative"),
        (",similarity=inner", "l2", "scoring=relative"),
    ],
)
def test_a_chain_refuses_what_it_could_only_order_wrongly(x, queries, options, metric, way_out):
    codec = from_spec(f"relative-representations:anchors=30{options}+int8").fit(x)
    with pytest.raises(FewbitsError, match=way_out):
        codec.search(codec.encode(x), queries, 3, metric)


@pytest.mark.parametrize(("dims", "rows"), [(384, 5000), (20, 270), (3, 30), (1, 5)])
def test_grid_runs_and_stays_short(x, dims, rows):
    specs = RelativeRepresentations.grid(dims, rows)
    assert len(specs) == len(set(specs)) <= 16
    for spec in specs:
        assert from_spec(spec).stages[0].anchors <= min(dims, rows)
    if dims == DIMS:
        sizes = [from_spec(spec).fit(x).encode(x).bytes_per_item for spec in specs]
        assert sizes[0] == min(sizes) == 1
        assert max(sizes) == DIMS


def test_it_takes_part_in_comparisons_and_files(x, tmp_path):
    compared = fewbits.compare(x, methods="relative-representations")
    assert not compared.left_out
    assert len(compared.points) == len(RelativeRepresentations.grid(DIMS, 270))
    path = tmp_path / "codes.fewbits"
    fewbits.encode(x, path, method="relative-representations:anchors=40,bits=none")
    decoded = unit_rows(fewbits.load(path).decode())
    np.testing.assert_allclose(decoded, unit_rows(x), atol=1e-4)


def test_spec_strings_come_back(x):
    codec = from_spec("relative-representations:anchors=9,bits=none,center=yes,encoder=a/b-1.0")
    assert codec == RelativeRepresentations(anchors=9, bits=None, center=True, encoder="a/b-1.0")
    for one in (codec, RelativeRepresentations(), RelativeRepresentations(encoder="none")):
        assert from_spec(one.full_spec) == one
        assert from_spec(one.spec) == one


# -- two encoders of real texts ------------------------------------------------------------


@pytest.fixture(scope="module")
def texts():
    """MiniLM embeddings and latent semantic analysis of the same passages."""
    example = python_docs()
    words = [text.lower() for text in example.texts[::5]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bebr, "WORDS", 700)  # fewer than usual, for speed
        return unit_rows(example.vectors[::5]), bebr.word_vectors(words[:1], words, 64)[1]


def mrr(texts, count, bits=None):
    """Over several choices of anchors; one moves by more than int8 loses."""
    return float(np.mean([mrr_of(texts, count, bits, seed) for seed in range(4)]))


def mrr_of(texts, count, bits, seed):
    items, queries = texts
    one = RelativeRepresentations(anchors=count, bits=bits, center=True, seed=seed)
    one.fit_items(items[:300], ids=range(300))
    other = RelativeRepresentations(bits=bits, center=True)
    other.fit_anchors(queries[one.rows_], one.anchor_ids, sample=queries[:300])
    found = other.search_across(one, one.encode(items[300:]), queries[300:], len(items) - 300)[1]
    ranks = np.argmax(found == np.arange(len(found))[:, None], axis=1) + 1
    return float(np.mean(1 / ranks))


def test_counterparts_across_encoders_are_found_by_anchors_alone(texts):
    items, queries = texts
    padded = np.pad(queries[300:], ((0, 0), (0, 384 - 64)))
    absolute = counterpart_mrr(padded, items[300:])
    found = [mrr(texts, count) for count in (10, 30, 100, 300)]
    assert (np.diff(found) > 0).all()
    assert found[2] >= 10 * absolute
    assert mrr(texts, 100, bits=8) > 0.99 * found[2]
    assert found[2] > mrr(texts, 100, bits=4) > mrr(texts, 100, bits=1) > 3 * absolute


# -- end to end ----------------------------------------------------------------------------


def network(*widths, seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(*pair) for pair in itertools.pairwise(widths)]
    return nn.Sequential(*itertools.chain(*zip(layers, [nn.Tanh()] * len(layers), strict=True)))


def layer_of(x, seed=0, **options):
    return RelativeLayer(network(DIMS, 9, 6, seed=seed), torch.from_numpy(x[:12]), **options)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_a_layer_computes_what_the_codec_does(x, similarity):
    layer = layer_of(x, similarity=similarity).eval()
    with torch.no_grad():
        latents = layer.encoder(torch.from_numpy(x)).numpy()
        r = layer.relative(torch.from_numpy(x))
        normed = layer(torch.from_numpy(x))
    codec = RelativeRepresentations(similarity=similarity, bits=None)
    wanted = codec.fit_anchors(latents[:12], range(12)).transform(latents)
    np.testing.assert_allclose(r.numpy(), wanted, atol=1e-3, rtol=1e-3)
    np.testing.assert_allclose(normed.mean(dim=1).numpy(), 0, atol=1e-4)
    np.testing.assert_array_equal(layer_of(x, norm=False).eval()(r.new_tensor(x)).shape, r.shape)


def test_rounding_in_training_is_the_code_and_lets_gradients_pass(x):
    inputs = torch.from_numpy(x[:40])
    layer, plain = layer_of(x, bits=4), layer_of(x)
    latents = plain.encoder(inputs).detach().numpy()
    codec = RelativeRepresentations(bits=4).fit_anchors(latents[:12], range(12))
    coded = codec.relative(codec.encode(latents))
    np.testing.assert_allclose(layer.relative(inputs).detach().numpy(), coded, atol=1e-5)
    for one in (layer, plain):
        one.relative(inputs).sum().backward()
    gradients = [one.encoder[0].weight.grad.numpy() for one in (layer, plain)]
    np.testing.assert_allclose(*gradients, rtol=1e-4, atol=1e-4)


def test_no_gradient_reaches_the_anchors(x):
    layer, batch = layer_of(x), torch.from_numpy(x[50:90])
    assert not layer.anchors.requires_grad
    assert not layer.anchor_latents().requires_grad
    layer(batch).square().mean().backward()
    given = [parameter.grad.clone() for parameter in layer.encoder.parameters()]
    assert all(gradient.abs().sum() > 0 for gradient in given)
    # The same with the anchors' latents as constants gives the same gradients.
    layer.zero_grad()
    fixed = layer.encoder(layer.anchors).detach()
    cosine = nn.functional.normalize(layer.encoder(batch)) @ nn.functional.normalize(fixed).T
    layer.norm(cosine).square().mean().backward()
    for gradient, parameter in zip(given, layer.encoder.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_anchors_are_embedded_anew_after_every_step(x):
    model = RelativeModel(network(DIMS, 6), torch.from_numpy(x[:12]), nn.Linear(12, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = []
    for start in range(0, 90, 30):
        seen.append(model.layer.anchor_latents())
        model(torch.from_numpy(x[start : start + 30])).square().mean().backward()
        optimizer.step()
    assert all((one - other).abs().max() > 1e-5 for one, other in itertools.pairwise(seen))
    torch.testing.assert_close(
        model.layer.anchor_latents(), model.layer.encoder(model.layer.anchors).detach()
    )


def test_in_evaluation_anchors_are_embedded_once(x):
    layer, calls = layer_of(x), []
    layer.encoder.register_forward_hook(lambda module, given, out: calls.append(len(out)))
    batch = torch.from_numpy(x[:5])
    layer(batch)
    layer(batch)
    assert calls == [5, 12, 5, 12]
    layer.eval()
    calls.clear()
    first = layer(batch)
    layer(batch)
    assert calls == [5, 12, 5]
    # Whatever changes the weights drops what was kept.
    other = layer_of(x, seed=1).eval()
    wanted = other(batch)
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(batch), wanted)
    assert not torch.allclose(first, wanted)
    layer.double()
    assert layer.anchor_latents().dtype == torch.float64
    layer.train()
    layer.eval()
    calls.clear()
    layer(batch.double())
    assert calls == [5, 12]


def test_the_batch_does_not_see_the_anchors(x):
    encoder = nn.Sequential(nn.Linear(DIMS, 6), nn.BatchNorm1d(6))
    layer = RelativeLayer(encoder, torch.from_numpy(x[:12]) * 100)
    batch = torch.from_numpy(x[20:60])
    r = layer.relative(batch)
    latents = nn.functional.batch_norm(encoder[0](batch), None, None, training=True)
    anchors = nn.functional.batch_norm(encoder[0](layer.anchors), None, None, training=True)
    cosine = nn.functional.normalize(latents) @ nn.functional.normalize(anchors).T
    torch.testing.assert_close(r, cosine, atol=1e-4, rtol=1e-4)


def test_a_turned_encoder_is_stitched_without_loss(x):
    anchors, inputs = torch.from_numpy(x[:12]), torch.from_numpy(x)
    one = RelativeModel(network(DIMS, 9), anchors, network(12, 3, seed=1))
    turn = nn.Linear(9, 9, bias=False)
    turn.weight.data = 4 * torch.from_numpy(random_rotation(9, 2))
    turned = nn.Sequential(copy.deepcopy(one.layer.encoder), turn)
    other = RelativeModel(turned, anchors, network(12, 3, seed=5))
    stitched = stitch(other, one)
    assert not stitched.training
    torch.testing.assert_close(stitched(inputs), one.eval()(inputs), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other.eval()(inputs), one(inputs), atol=1e-3)


def test_other_anchors_are_not_stitched(x):
    def model(anchors, **options):
        return RelativeModel(
            network(DIMS, 6), torch.tensor(anchors.copy()), network(12, 2), **options
        )

    one = model(x[:12])
    for other in (model(x[12:24]), model(x[11::-1]), model(x[:12], ids=range(12))):
        with pytest.raises(FewbitsError, match="different anchors"):
            stitch(one, other)
    with pytest.raises(FewbitsError, match="similarity is cosine and inner"):
        stitch(one, model(x[:12], similarity="inner"))
    # Two languages: the inputs differ, the names say that they correspond.
    names = [f"review {number}" for number in range(12)]
    stitch(model(x[:12], ids=names), model(x[12:24], ids=names))


def test_training_is_reproducible_and_learns(x):
    inputs, targets = torch.from_numpy(x), torch.from_numpy((x[:, 0] > 0).astype(np.int64))

    def trained():
        model = RelativeModel(network(DIMS, 9, 6), inputs[:12], nn.Linear(12, 2))
        history = train_model(
            model, inputs, targets, nn.functional.cross_entropy, epochs=30, device="cpu"
        )
        return model, history

    (model, history), (twin, _) = trained(), trained()
    assert history.loss[-1] < 0.6 * history.loss[0]
    assert not model.training
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(FewbitsError, match="300 inputs and 7 targets"):
        train_model(model, inputs, targets[:7], nn.functional.cross_entropy)


def test_bad_layers(x):
    encoder = network(DIMS, 6)
    with pytest.raises(FewbitsError, match="needs anchors and a name for each: 12, 3 named"):
        RelativeLayer(encoder, torch.from_numpy(x[:12]), ids=range(3))
    with pytest.raises(FewbitsError, match="needs anchors"):
        RelativeLayer(encoder, torch.zeros(0, DIMS))
    with pytest.raises(FewbitsError, match="bits=4: take 1 to 8"):
        RelativeLayer(encoder, torch.from_numpy(x[:12]), bits=4, similarity="inner")
    with pytest.raises(FewbitsError, match="must be cosine, euclidean"):
        layer_of(x, similarity="dot")(torch.from_numpy(x))


# -- bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"anchors": 0}, "anchors=0 must be at least 1"),
        ({"anchors": -3}, "must be at least 1"),
        ({"anchors": 301}, "anchors=301 is more than the 300 rows.*take anchors=300 or less"),
        ({"bits": 0}, "from 1 to 8"),
        ({"bits": 9}, "from 1 to 8"),
        ({"policy": "best"}, "policy='best' must be uniform or"),
        ({"similarity": "dot"}, "similarity='dot' must be cosine or"),
        ({"scoring": "full"}, "scoring='full'"),
        ({"normalize": True, "similarity": "inner"}, "take similarity=cosine"),
        ({"encoder": "a,b"}, "letters, digits"),
        ({"seed": -1}, "seed=-1"),
        ({"pool": True}, "classes of the anchors"),
    ],
)
def test_bad_hyper_parameters(x, options, message):
    with pytest.raises(FewbitsError, match=message) as caught:
        RelativeRepresentations(**options).fit(x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (np.zeros((0, 4)), "empty"),
        (np.zeros((9, 4)), "all rows are zeros"),
        (np.full((9, 4), 0.3), "all anchors are alike"),
        (np.array([[1.0, 2], [np.nan, 1]]), "row 1"),
        (np.array([[1.0, 2], [3, np.inf]]), "row 1"),
        (np.ones(7), "2 axes"),
    ],
)
def test_rows_nothing_can_be_learned_from(rows, message):
    for center in (False, True):
        with pytest.raises(FewbitsError, match=message):
            RelativeRepresentations(center=center).fit(rows)


def test_one_row_is_its_own_anchor(x):
    codec = RelativeRepresentations(bits=None).fit(x[:1])
    np.testing.assert_allclose(codec.transform(x[:1]), [[1]], atol=1e-6)
    with pytest.raises(FewbitsError, match="all anchors are alike"):
        RelativeRepresentations(center=True).fit(x[:1])
    with pytest.raises(FewbitsError, match="anchors=2 is more than the 1 rows"):
        RelativeRepresentations(anchors=2).fit(x[:1])


def test_by_default_there_is_an_anchor_for_each_dimension(x):
    assert len(RelativeRepresentations().fit(x).anchors_) == DIMS
    assert len(RelativeRepresentations().fit(x[:7]).anchors_) == 7


def test_bad_anchors(x):
    codec = RelativeRepresentations()
    with pytest.raises(FewbitsError, match="two anchors have one name"):
        codec.fit_anchors(x[:3], ["a", "b", "a"])
    with pytest.raises(FewbitsError, match=r"ids must be one for each of the 3 rows"):
        codec.fit_anchors(x[:3], ["a", "b"])
    with pytest.raises(FewbitsError, match="ids must be one for each"):
        codec.fit_anchors(x[:3], "abc")
    with pytest.raises(FewbitsError, match="anchor 1 is all zeros"):
        codec.fit_anchors(x[:3] * [[1], [0], [1]], ["a", "b", "c"])
    with pytest.raises(FewbitsError, match="sample has 7 dimensions"):
        codec.fit_anchors(x[:3], ["a", "b", "c"], sample=x[:, :7])
    with pytest.raises(FewbitsError, match="anchors=5, but 3 were given"):
        RelativeRepresentations(anchors=5).fit_anchors(x[:3], ["a", "b", "c"])
    for counts in (["1"] * 300, np.full(300, np.nan)):
        with pytest.raises(FewbitsError, match="counts must be finite numbers"):
            RelativeRepresentations(policy="frequent").fit_items(x, counts=counts)
    with pytest.raises(FewbitsError, match="labels must be one for each of the 300"):
        RelativeRepresentations(pool=True).fit_items(x, labels=[1, 2])
    with pytest.raises(FewbitsError, match="row 2 of the anchors"):
        codec.fit_anchors(np.diag([1, 1, np.nan]), ["a", "b", "c"])


def test_numbers_beyond_float32(x):
    codec = made(1e-30 * x, similarity="basis")
    with pytest.raises(FewbitsError, match="beyond float32; scale the vectors"):
        codec.encode(1e13 * x)
    for similarity in SIMILARITIES:
        codec = made(1e13 * x, similarity=similarity)
        assert np.isfinite(codec.decode(codec.encode(1e13 * x))).all()


def test_one_dimension_has_distances_but_no_cosines():
    x = np.arange(1, 9, dtype=np.float32)[:, None]
    with pytest.raises(FewbitsError, match="all anchors are alike"):
        RelativeRepresentations(anchors=2).fit(x)
    codec = RelativeRepresentations(anchors=2, similarity="euclidean", bits=None).fit(x)
    np.testing.assert_allclose(codec.decode(codec.encode(x)), x, atol=1e-5)


def test_unfitted_and_wrong_width(x):
    with pytest.raises(FewbitsError, match="not fitted"):
        RelativeRepresentations().encode(x)
    with pytest.raises(FewbitsError, match="not fitted"):
        RelativeRepresentations().anchor_checksum  # noqa: B018
    failed = RelativeRepresentations()
    with pytest.raises(FewbitsError, match="two anchors have one name"):
        failed.fit_anchors(x[:2], ["a", "a"])
    with pytest.raises(FewbitsError, match="not fitted"):
        failed.encode(x)
    codec = made(x)
    with pytest.raises(FewbitsError, match="unknown metric"):
        codec.search_across(codec, codec.encode(x), x, 1, "manhattan")
    for method in (codec.encode, lambda rows: codec.search(codec.encode(x), rows, 1)):
        with pytest.raises(FewbitsError, match="20 dimensions, but this has 9"):
            method(x[:, :9])
    with pytest.raises(FewbitsError, match="another codec"):
        codec.decode(made(x, seed=1).encode(x))


def test_refitting_forgets_the_anchors_before(x):
    codec = made(x)
    before = codec.transform(x)
    codec.seed = 1
    np.testing.assert_array_equal(codec.fit(x).transform(x), made(x, seed=1).transform(x))
    assert codec.fit_items(x[:, :7]).transform(x[:, :7]).shape == (300, ANCHORS)
    codec.fit_items(x)
    assert not np.array_equal(codec.transform(x), before)
    twin = copy.deepcopy(codec)
    np.testing.assert_array_equal(twin.decode(twin.encode(x)), codec.decode(codec.encode(x)))
    assert dataclasses.replace(codec, bits=4).fit(x).encode(x).bytes_per_item == 15
