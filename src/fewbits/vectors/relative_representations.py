"""Relative representations: a vector told by its similarities to a fixed list of anchors.

Moschella, Maiorca, Fumero, Norelli, Locatello, Rodolà 2022, *Relative representations enable
zero-shot latent space communication* (arXiv 2209.15430, ICLR 2023).

Encoders that were trained apart place the same items differently, but about at the same angles.
So r_j = cos(x, a_j), the similarity to an item a_j that every encoder can embed, means the same
to all of them: what one encoded can be searched, classified or decoded by what was made for
another (`RelativeRepresentations.search_across`, `latent_similarity`, `stitch`). Rotating the
space and changing its scale leave r as it is. Encoders are alike only about so far, and so is r.

Ours beside the paper: r in a few bits on one scale for all; the least squares way back to the
vectors, by which an encoder's own queries search (``scoring="reconstruction"``).
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from fewbits.core.checks import check_k, check_seed, check_vectors
from fewbits.core.code import Code
from fewbits.core.codec import Codec, DecodingSearcher, State, Transform, learned, rows_per_block
from fewbits.core.errors import FewbitsError, require
from fewbits.core.search import Matches, Searcher, check_metric, exact_search
from fewbits.primitives.alignment import counterpart_mrr, mean_cosine, neighbour_jaccard
from fewbits.primitives.anchors import (
    LEAST_VALUE,
    POLICIES,
    SIMILARITIES,
    AnchorSimilarities,
    StableMap,
    choose_anchors,
    lengths_of,
    over,
)
from fewbits.primitives.bits import pack, unpack

if TYPE_CHECKING:
    from fewbits.vectors._relative_network import RelativeLayer as RelativeLayer
    from fewbits.vectors._relative_network import RelativeModel as RelativeModel
    from fewbits.vectors._relative_network import stitch as stitch
    from fewbits.vectors._relative_network import train_model as train_model

SAMPLE_ROWS = 16_384
"""Rows that the scale and the medians are learned from at most."""


@dataclass
class RelativeRepresentations(Transform):
    """Similarities to K anchors: (n, d) float32 to (n, K) numbers of `bits` bits.

    `fit` chooses the anchors among the rows. For another encoder, embed the *same* items, named
    by `anchor_ids`, and give them to `fit_anchors`: only codes with equal anchors in equal order
    can be compared (`comparable_with`).

    Parameters
    ----------
    anchors : K; None for one per dimension, as the paper has it, or as many as there are. More
        than d tell nothing new of a vector, but make r more robust.
    policy : how to choose: ``uniform``; ``farthest`` from all chosen so far, by cosine;
        ``kmeans``, the row nearest to each centre; ``stratified`` by class; most ``frequent``.
        The last two need what only `fit_items` is told.
    similarity : ``cosine``; ``euclidean``, the negative distance; ``inner``, the inner product
        over √d; ``basis``, the least squares coefficients of x on the anchors, exact for K = d
        but unstable.
    center : take the mean of the anchors off first. It helps where all vectors point the same
        way, as those of text encoders tend to.
    pool : average the similarities to the anchors of each class; needs labels, too.
    bits : of a number, on one scale for all: even steps over [−1, 1] for the cosine, over the
        largest size met in `fit` for others. 1 is the sign around each number's median; None
        is float32. Where another codec follows, it only says how exact r is taken to be when
        it is inverted.
    normalize : scale each r, so that a codec that follows can compare by cosine; only for
        ``similarity="cosine"``.
    scoring : ``reconstruction`` compares queries with the least squares reconstructions, as the
        encoder itself would; ``relative`` compares r with r, as the paper does and as
        `search_across` always does.
    encoder : name of the encoder, for people; letters, digits and ``._/-``.
    seed : of the choice of anchors.

    Notes
    -----
    A code takes K·bits/8 bytes per row. Encoding costs O(n·d·K), the inverse once
    O(d·K·min(d, K)), searching O(q·n·K) in bounded memory. The code of a row is the same, bit
    for bit, alone or among others. A row of zeros has similarity 0 to everything.
    """

    anchors: int | None = None
    policy: Literal["uniform", "farthest", "kmeans", "stratified", "frequent"] = "uniform"
    similarity: Literal["cosine", "euclidean", "inner", "basis"] = "cosine"
    center: bool = False
    pool: bool = False
    bits: int | None = 8
    normalize: bool = False
    scoring: Literal["reconstruction", "relative"] = "reconstruction"
    encoder: str = ""
    seed: int = 0

    name: ClassVar[str] = "relative-representations"

    anchors_: np.ndarray = learned()
    """(K, d) float32."""
    rows_: np.ndarray = learned()
    """(K,) int64: where the anchors were among the rows given."""
    ids_: np.ndarray = learned()
    """uint8: the identifiers of the anchors, as a JSON list."""
    classes_: np.ndarray = learned()
    """(K,) int32: class of each anchor; (0,) without `pool`."""
    length_: np.ndarray = learned()
    """(1,) float32: mean length of the rows, around the anchors' mean with `center`."""
    scale_: np.ndarray = learned()
    """(1,) float32: the largest number that has a code."""
    noise_: np.ndarray = learned()
    """(1,) float32: root mean square of what `bits` lose of the numbers that are inverted."""
    signs_: np.ndarray = learned()
    """(2, k) float32: median and mean distance from it of each number; (2, 0) unless bits=1."""

    # -- fitting --------------------------------------------------------------------------

    def _fit(self, x: np.ndarray) -> None:
        self._choose(x)

    def fit_items(
        self,
        x: Any,
        *,
        ids: Sequence[str | int] | None = None,
        labels: Any = None,
        counts: Any = None,
    ) -> Self:
        """`fit`, and what is known of the rows besides their vectors; returns self.

        Parameters
        ----------
        x : (n, d) rows.
        ids : n names of the items, which may be the texts themselves. By default a row's number
            is its name: give names where anchors of two collections might be confused.
        labels : (n,) class of each row, for ``policy="stratified"`` and `pool`.
        counts : (n,) how often each item occurs, for ``policy="frequent"``.

        Raises
        ------
        FewbitsError
            As `fit`, or not one name, label or count per row.
        """
        x = check_vectors(x)
        return self._fit_by(lambda: self._choose(x, ids, labels, counts), x.shape[1])

    def fit_anchors(
        self, anchors: Any, ids: Sequence[str | int], *, labels: Any = None, sample: Any = None
    ) -> Self:
        """Take these anchors in this order: the items of another codec's, embedded anew.

        Parameters
        ----------
        anchors : (K, d) vectors of the anchors.
        ids : their K names; ``other.anchor_ids`` makes the two comparable.
        labels : (K,) class of each anchor, for `pool`.
        sample : (n, d) rows to learn lengths, scale and medians from; the anchors by default.

        Raises
        ------
        FewbitsError
            Unusable input, names that are not one per anchor or that repeat, or `anchors` asks
            for another number.
        """
        vectors = check_vectors(anchors, what="the anchors")
        if sample is not None:
            sample = check_vectors(sample, what="the sample")
            if sample.shape[1] != vectors.shape[1]:
                raise FewbitsError(
                    f"{self.name}: the sample has {sample.shape[1]} dimensions, the anchors have "
                    f"{vectors.shape[1]}; embed both by one encoder"
                )
        self._check_parameters()
        if self.anchors not in (None, len(vectors)):
            raise FewbitsError(
                f"{self.name}: anchors={self.anchors}, but {len(vectors)} were given; "
                f"set anchors={len(vectors)} or leave it out"
            )
        labels = self._one_each(labels, len(vectors), "labels")
        names = self._one_each(ids, len(vectors), "ids")
        if not vectors.any(axis=1).all():
            row = int(np.argmin(vectors.any(axis=1)))
            raise FewbitsError(f"{self.name}: anchor {row} is all zeros; leave that item out")
        rows, sample = np.arange(len(vectors)), vectors if sample is None else sample
        return self._fit_by(
            lambda: self._keep(vectors, rows, names, labels, sample), vectors.shape[1]
        )

    def _fit_by(self, learn: Callable[[], None], dims: int) -> Self:
        """Learn from vectors of that width; what was learned by half counts as not fitted."""
        self.dims_ = dims
        try:
            learn()
        except BaseException:
            del self.dims_
            raise
        return self

    def _choose(
        self, x: np.ndarray, ids: Any = None, labels: Any = None, counts: Any = None
    ) -> None:
        self._check_parameters()
        ids = self._one_each(ids, len(x), "ids")
        labels = self._one_each(labels, len(x), "labels")
        counts = self._one_each(counts, len(x), "counts")
        if counts is not None and not (counts.dtype.kind in "iuf" and np.isfinite(counts).all()):
            raise FewbitsError(f"{self.name}: counts must be finite numbers")
        needed = {"stratified": ("labels", labels), "frequent": ("counts", counts)}
        what, given = needed.get(self.policy, ("", x))
        if given is None:
            raise FewbitsError(
                f"{self.name}: policy={self.policy} needs {what}; call fit_items(x, {what}=…)"
            )
        # A row of zeros has no direction, and so no similarities.
        usable = np.flatnonzero(x.any(axis=1))
        count = self._settle_count(len(usable))
        some = [t if t is None or len(usable) == len(x) else t[usable] for t in (x, labels, counts)]
        found = choose_anchors(
            some[0], count, self.policy, seed=self.seed, labels=some[1], counts=some[2]
        )
        rows = usable[found]
        names = rows if ids is None else ids[rows]
        self._keep(x[rows], rows, names, None if labels is None else labels[rows], x)

    def _settle_count(self, rows: int) -> int:
        """How many anchors to choose among that many rows."""
        if rows == 0:
            raise FewbitsError(f"{self.name}: all rows are zeros; fit on rows with a direction")
        if self.anchors is None:
            return min(self.dims_, rows)
        if self.anchors > rows:
            raise FewbitsError(
                f"{self.name}: anchors={self.anchors} is more than the {rows} rows to choose "
                f"among; take anchors={rows} or less, or fit on more rows"
            )
        return self.anchors

    def _one_each(self, values: Any, count: int, what: str) -> np.ndarray | None:
        """`values` as an array with one entry for each of `count` rows."""
        if values is None:
            return None
        # Names are kept as they are: an array of texts would be as wide as the longest.
        array = np.asarray(values, dtype=object if what == "ids" else None)
        if array.shape != (count,):
            raise FewbitsError(
                f"{self.name}: {what} must be one for each of the {count} rows, not of shape "
                f"{array.shape}"
            )
        return array

    def _keep(
        self,
        anchors: np.ndarray,
        rows: np.ndarray,
        ids: Any,
        labels: np.ndarray | None,
        sample: np.ndarray,
    ) -> None:
        if self.pool and labels is None:
            raise FewbitsError(
                f"{self.name}: pool=yes needs the classes of the anchors; give labels=…"
            )
        names = [str(name) for name in ids]
        if len(set(names)) < len(names):
            raise FewbitsError(f"{self.name}: two anchors have one name; give them different ids")
        self.anchors_ = np.ascontiguousarray(anchors, dtype=np.float32)
        self.rows_ = rows.astype(np.int64)
        self.ids_ = np.frombuffer(json.dumps(names).encode(), dtype=np.uint8)
        given: Any = labels if self.pool else []
        self.classes_ = np.unique(given, return_inverse=True)[1].astype(np.int32)
        self._forget()
        told = self._projection
        differing = told.anchor_directions if self.similarity == "cosine" else told.anchors
        if not differing.any() or (len(names) > 1 and not np.ptp(differing, axis=0).any()):
            raise FewbitsError(
                f"{self.name}: all anchors are alike; take others, or fit on rows that differ"
            )
        self._calibrate(sample)

    def _calibrate(self, x: np.ndarray) -> None:
        """Learn lengths and the scale of the code from rows."""
        if len(x) > SAMPLE_ROWS:
            x = x[np.random.default_rng(self.seed).choice(len(x), SAMPLE_ROWS, replace=False)]
        centred = x - self._projection.mean
        self.length_ = lengths_of(centred).mean(keepdims=True)[0].astype(np.float32)
        self.signs_ = np.empty((2, 0), dtype=np.float32)
        self.scale_ = self.noise_ = np.zeros(1, dtype=np.float32)
        self._scale_to(self._similarities(x))
        if self.normalize:  # which needs the inverse, which needs the noise
            noise = self.noise_
            self._scale_to(self.transform(x))
            self.noise_ = noise
        self._forget()

    def _scale_to(self, r: np.ndarray) -> None:
        """Learn scale, medians and noise for numbers like `r`."""
        bounded = self.similarity == "cosine" and not self.normalize
        largest = 1.0 if bounded else max(float(np.abs(r).max()), 1e-30)
        self.scale_ = np.array([largest], dtype=np.float32)
        if self.bits == 1:
            median = np.median(r, axis=0).astype(np.float32)
            self.signs_ = np.stack([median, np.abs(r - median).mean(axis=0)]).astype(np.float32)
        lost = 0.0
        if self.bits is not None:
            kept = self._read(self._numbers(r, self.bits), self.bits)
            lost = float(np.square(self._linear(kept) - self._linear(r)).mean())
        self.noise_ = np.sqrt([lost]).astype(np.float32)

    def _check_parameters(self) -> None:
        """Refuse hyper-parameters that no rows can meet."""
        if self.anchors is not None and self.anchors < 1:
            raise FewbitsError(f"{self.name}: anchors={self.anchors} must be at least 1")
        if self.bits is not None and not 1 <= self.bits <= 8:
            raise FewbitsError(f"{self.name}: bits={self.bits} must be from 1 to 8, or none")
        for what, value, known in (
            ("policy", self.policy, POLICIES),
            ("similarity", self.similarity, SIMILARITIES),
            ("scoring", self.scoring, ("reconstruction", "relative")),
        ):
            if value not in known:
                raise FewbitsError(f"{self.name}: {what}={value!r} must be {' or '.join(known)}")
        if self.normalize and self.similarity != "cosine":
            raise FewbitsError(
                f"{self.name}: normalize=yes keeps directions only; take similarity=cosine"
            )
        if not re.fullmatch(r"[A-Za-z0-9._/-]*", self.encoder):
            raise FewbitsError(
                f"{self.name}: encoder={self.encoder!r}; use letters, digits and ._/- only"
            )
        check_seed(self.seed)

    def _restore(self, dims: int, state: State) -> None:
        super()._restore(dims, state)
        self._forget()

    def _check_state(self) -> None:
        self._check_parameters()
        count = len(self.anchors_)
        if self.anchors_.ndim != 2 or count < 1 or self.anchors not in (None, count):
            raise ValueError("anchors must be (K, d)")
        pooled = int(self.classes_.max()) + 1 if self.pool and len(self.classes_) else count
        shapes = {
            "anchors": (self.anchors_, np.float32, (count, self.dims_)),
            "rows": (self.rows_, np.int64, (count,)),
            "classes": (self.classes_, np.int32, (count if self.pool else 0,)),
            "length": (self.length_, np.float32, (1,)),
            "scale": (self.scale_, np.float32, (1,)),
            "noise": (self.noise_, np.float32, (1,)),
            "signs": (self.signs_, np.float32, (2, pooled if self.bits == 1 else 0)),
        }
        for name, (array, dtype, shape) in shapes.items():
            if array.dtype != dtype or array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"{name} must be {np.dtype(dtype).name} {shape}")
        if self.pool and not np.array_equal(np.unique(self.classes_), np.arange(count)[:pooled]):
            raise ValueError("every class needs an anchor")
        if not (self.scale_[0] > 0 and self.noise_[0] >= 0 and self.length_[0] >= 0):
            raise ValueError("scale must be positive, noise and length not negative")
        names = json.loads(self.ids_.tobytes())
        if not isinstance(names, list) or len(set(map(str, names))) != count:
            raise ValueError("every anchor needs a name of its own")

    # -- whose anchors --------------------------------------------------------------------

    @property
    def anchor_ids(self) -> list[str]:
        """Names of the anchors, in order."""
        self.require_fitted()
        return [str(name) for name in json.loads(self.ids_.tobytes())]

    @property
    def anchor_checksum(self) -> str:
        """SHA-256 (hexadecimal) of the names of the anchors, in order."""
        return hashlib.sha256(json.dumps(self.anchor_ids).encode()).hexdigest()

    def comparable_with(self, other: RelativeRepresentations) -> bool:
        """Whether codes of both mean the same: equal anchors, and similarities made alike.

        The anchors are known by their names: that the vectors are those of the items named is
        up to who gave them.
        """
        return not self._difference(other)

    def _difference(self, other: RelativeRepresentations) -> str:
        """Why codes of `other` cannot be compared with those of this, or ""."""
        if self.anchor_checksum != other.anchor_checksum:
            return "their anchors differ; embed the same items and call fit_anchors(…, anchor_ids)"
        for what in ("similarity", "center", "pool", "normalize"):
            if getattr(self, what) != getattr(other, what):
                return f"{what} is {getattr(self, what)} here and {getattr(other, what)} there"
        if not np.array_equal(self.classes_, other.classes_):
            return "the classes of their anchors differ"
        if (self.bits == 1) != (other.bits == 1):
            return "one has bits=1, which is read around medians that the other does not have"
        return ""

    def require_comparable(self, other: RelativeRepresentations) -> None:
        """Raise FewbitsError unless codes of both can be compared."""
        if why := self._difference(other):
            raise FewbitsError(
                f"codes of {self.encoder or 'one encoder'} and {other.encoder or 'another'} cannot "
                f"be compared: {why}"
            )

    # -- encoding -------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Numbers per row: K, or the number of classes."""
        return int(self.classes_.max()) + 1 if self.pool else len(self.anchors_)

    def transform(self, x: np.ndarray) -> np.ndarray:
        """(n, width) float32: r itself."""
        r = self._similarities(x)
        if not self.normalize:
            return r
        return over(r, lengths_of(r if self.scoring == "relative" else self._solve(r)))

    def _similarities(self, x: np.ndarray) -> np.ndarray:
        r = self._by_block(self._projection, x)
        if not np.isfinite(r).all():
            raise FewbitsError(
                f"{self.name}: {self.similarity} similarities are beyond float32; scale the vectors"
            )
        return r

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """(n, d) float32: the least squares solution for what has these similarities.

        From cosines only a direction is known: all rows get the mean length of the fitted ones.
        With K < d it is the part that the anchors tell of.

        Raises
        ------
        FewbitsError
            Negative distances averaged by class, which have no least squares solution.
        """
        self._require_inverse()

        def back(part: np.ndarray) -> np.ndarray:
            z = self._back(self._linear(part))
            if self.similarity == "cosine":
                z *= self.length_ * self._factors(z)
            return self._projection.origin + z

        return self._by_block(back, y)

    def _by_block(self, function: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> np.ndarray:
        """float32 of `function` over blocks of rows, whose float64 copies are large."""
        step = max(1, rows_per_block(max(self.dims_, len(self.anchors_))) // 4)
        parts = (function(x[start : start + step]) for start in range(0, len(x), step))
        with np.errstate(over="ignore"):  # infinity is looked for afterwards
            return np.concatenate([part.astype(np.float32) for part in parts])

    def _encode(self, x: np.ndarray) -> State:
        r = self.transform(x)
        if self.bits is None:
            return {"vectors": r}
        return {"packed": pack(self._numbers(r, self.bits), self.bits)}

    def _decode(self, code: Code) -> np.ndarray:
        return self.inverse(self.relative(code))

    def relative(self, code: Code) -> np.ndarray:
        """(n, width) float32: r as `code` remembers it."""
        if self.bits is None:
            return code["vectors"].astype(np.float32, copy=False)
        return self._read(unpack(code["packed"], self.width, self.bits), self.bits)

    def _numbers(self, r: np.ndarray, bits: int) -> np.ndarray:
        """(n, width) uint8 below 2^bits."""
        if bits == 1:
            return (r > self.signs_[0]).astype(np.uint8)
        top = 2**bits - 1
        steps = np.rint((r / self.scale_ + 1) * np.float32(top / 2))
        return np.clip(steps, 0, top).astype(np.uint8)

    def _read(self, numbers: np.ndarray, bits: int) -> np.ndarray:
        """The values that `_numbers` stands for."""
        if bits == 1:
            median, spread = self.signs_
            return np.asarray(median + np.where(numbers == 1, spread, -spread))
        levels = np.linspace(-1, 1, 2**bits, dtype=np.float32) * self.scale_
        return levels[numbers]

    # -- the linear map and its inverse ---------------------------------------------------

    def _forget(self) -> None:
        """Drop what was derived from learned arrays that have changed."""
        for name in ("_projection", "_back"):
            self.__dict__.pop(name, None)

    @cached_property
    def _projection(self) -> AnchorSimilarities:
        mean = self.anchors_.mean(axis=0, dtype=np.float64) if self.center else np.zeros(self.dims_)
        return AnchorSimilarities(self.similarity, self.anchors_ - mean, mean, self.classes_)

    @cached_property
    def _back(self) -> StableMap:
        """From similarities back to (centred) rows, or to their directions: ridge regression
        whose penalty is the noise of the code over the variance of a coordinate."""
        left, values, right = np.linalg.svd(self._projection.linear, full_matrices=False)
        length = 1.0 if self.similarity == "cosine" else max(float(self.length_[0]), 1e-30)
        penalty = self.dims_ * (float(self.noise_[0]) / length) ** 2
        told = values > LEAST_VALUE * values[0]
        inverted = np.where(told, values / np.where(told, values**2 + penalty, 1), 0)
        return StableMap((right.T * inverted) @ left.T)

    def _linear(self, r: np.ndarray) -> np.ndarray:
        """What is inverted: r, unless it has to be made linear first."""
        return r if self.pool else self._projection.to_linear(r)

    def _require_inverse(self) -> None:
        if self.similarity == "euclidean" and self.pool:
            raise FewbitsError(
                f"{self.name}: distances averaged by class cannot be inverted; "
                "take scoring=relative to search, similarity=cosine to decode"
            )

    def _factors(self, z: np.ndarray) -> np.ndarray:
        """(n, 1) float32: what makes least squares solutions from cosines unit vectors.

        Where r was scaled so that they are, nothing: a search through another codec, which
        changes lengths a little, can then rank as the decoded rows do.
        """
        if self.normalize and self.scoring == "reconstruction":
            return np.ones((len(z), 1), dtype=np.float32)
        return over(np.ones((len(z), 1), dtype=np.float32), lengths_of(z))

    def _solve(self, r: np.ndarray) -> np.ndarray:
        """(n, d) float32 least squares solutions."""
        return self._by_block(self._back, r)

    # -- searching ------------------------------------------------------------------------

    def transform_queries(self, queries: np.ndarray, metric: str) -> np.ndarray:
        """(q, width) float32 to compare with the rows by `search_metric`.

        With ``scoring="reconstruction"``, scores lack a number that is the same for all rows.
        """
        if self.scoring == "relative":
            return self._asked(queries, metric)
        if metric == "l2":
            queries = queries - self._projection.mean
        length = self.length_ if self.similarity == "cosine" else 1
        return np.asarray(queries @ self._back.matrix * length, dtype=np.float32)

    def search_metric(self, metric: str) -> str:
        """The metric by which a codec that follows must compare to find what was asked for.

        Raises
        ------
        FewbitsError
            The rows would have to be changed first, which a codec that follows cannot do.
        """
        way_out = ""
        if self.scoring == "reconstruction" and self.similarity == "euclidean":
            way_out = "scoring=relative"
        elif self.scoring == "reconstruction" and self.similarity != "cosine":
            way_out = "scoring=relative" if metric == "l2" else ""
        elif (metric == "cosine" or self.scoring == "reconstruction") and not self.normalize:
            way_out = "normalize=yes with similarity=cosine"
        if way_out:
            raise FewbitsError(
                f"{self.spec} cannot be searched by {metric} through another codec; take {way_out}"
            )
        return metric if self.scoring == "relative" else "ip"

    def _compared(self, r: np.ndarray, metric: str) -> np.ndarray:
        """What r becomes before it is compared with r: around medians of single bits, and of
        unit length for the cosine."""
        r = r - self.signs_[0] if self.bits == 1 else r
        return over(r, lengths_of(r)) if metric == "cosine" else r

    def _searcher(self, code: Code, metric: str) -> Searcher:
        if self.scoring == "relative":
            return RelativeSearcher(self, self, code, metric)
        self._require_inverse()
        of_one_length = self.similarity == "cosine" and not self.normalize
        if self.similarity == "euclidean" or (metric == "l2" and not of_one_length):
            return DecodingSearcher(self, code, metric)
        return ReconstructionSearcher(self, code, metric)

    def search_across(
        self, other: Codec, code: Code, queries: Any, k: int, metric: str = "cosine"
    ) -> Matches:
        """Search the `code` that `other` made with queries embedded by *this* codec's encoder.

        Nothing is fitted: r is compared with r. Both return values are those of `search`.

        Parameters
        ----------
        other : relative representations, or these (with ``scoring="relative"``) and one codec
            that follows.
        queries : (q, d) float.

        Raises
        ------
        FewbitsError
            The two are not comparable, or `other` did not make the code.
        """
        check_metric(metric)
        other.check_code(code)
        maker, *rest = other.stages
        if not isinstance(maker, RelativeRepresentations) or len(rest) > 1:
            raise FewbitsError(
                f"{other.spec} is not {self.name}, alone or with one codec that follows"
            )
        self.require_comparable(maker)
        queries, k = self._checked(queries), check_k(k, len(code))
        if not rest:
            return RelativeSearcher(maker, self, code, metric).search(queries, k)
        if maker.scoring != "relative":
            raise FewbitsError(
                f"{other.spec} cannot be searched across encoders; take scoring=relative"
            )
        searcher = rest[0]._searcher(code, maker.search_metric(metric))
        return searcher.search(self._asked(queries, metric), k)

    def _asked(self, queries: np.ndarray, metric: str) -> np.ndarray:
        """r of queries, to compare with r itself."""
        r = self.transform(queries)
        return over(r, lengths_of(r)) if metric == "cosine" else r

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        """What kept most at its size on text embeddings of 384 dimensions: single bits, then
        rotated 4 bits around the mean, then 8 bits each."""
        eighth, quarter, half = dims // 8, dims // 4, dims // 2
        candidates = [
            *((count, "bits=1,center=yes") for count in (quarter, half)),
            (eighth, "bits=8"),
            (quarter, "center=yes,normalize=yes+turboquant:bits=4"),
            (quarter, "bits=8"),
            (half, "center=yes,normalize=yes+turboquant:bits=4"),
            *((count, "bits=8") for count in (half, dims)),
        ]
        kept = [(count, rest) for count, rest in candidates if 2 <= count <= rows]
        return [f"{cls.name}:anchors={count},{rest}" for count, rest in dict.fromkeys(kept)]


# -- what searches -------------------------------------------------------------------------


class RelativeSearcher:
    """Compares r of queries, as `asker` embeds them, with r of the items of `maker`."""

    def __init__(
        self,
        maker: RelativeRepresentations,
        asker: RelativeRepresentations,
        code: Code,
        metric: str,
    ) -> None:
        self.maker, self.asker, self.code, self.metric = maker, asker, code, metric

    def search(self, queries: np.ndarray, k: int) -> Matches:
        asked = self.asker._compared(self.asker.transform(queries), self.metric)
        rows = (self.maker._compared(r, self.metric) for _, r in blocks(self.maker, self.code))
        return exact_search(asked, rows, k, self.metric)


class ReconstructionSearcher:
    """Compares queries with the reconstructions of the items, without making them.

    Preparing costs one decoding of all rows, for the lengths that cosines do not tell.
    """

    def __init__(self, codec: RelativeRepresentations, code: Code, metric: str) -> None:
        self.codec, self.code, self.metric = codec, code, metric
        self.factors = np.ones((len(code), 1), dtype=np.float32)
        if codec.similarity == "cosine":
            parts = [codec._factors(codec._solve(r)) for _, r in blocks(codec, code)]
            self.factors = np.concatenate(parts)

    def search(self, queries: np.ndarray, k: int) -> Matches:
        asked = self.codec.transform_queries(queries, self.metric)
        rows = (r * self.factors[s : s + len(r)] for s, r in blocks(self.codec, self.code))
        scores, found = exact_search(asked, rows, k, "ip")
        mean = self.codec._projection.mean
        if self.metric == "l2":
            squares = np.square(queries - mean).sum(axis=1, keepdims=True) + self.codec.length_**2
            return (2 * scores - squares).astype(np.float32), found
        return (scores + queries @ mean[:, None]).astype(np.float32), found


def blocks(codec: RelativeRepresentations, code: Code) -> Iterable[tuple[int, np.ndarray]]:
    """First row and r of bounded numbers of rows."""
    step = rows_per_block(codec.width)
    for start in range(0, len(code), step):
        yield start, codec.relative(code.take(slice(start, start + step)))


# -- two spaces ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SpaceSimilarity:
    """How alike two encoders place the same items.

    Attributes
    ----------
    cosine : mean cosine of r of an item in one space with r of it in the other.
    jaccard : mean Jaccard index of the nearest items of the two, among the second space.
    mrr : mean reciprocal rank of the item itself in the second space, asked by the first.
    """

    cosine: float
    jaccard: float
    mrr: float


def latent_similarity(
    one: RelativeRepresentations,
    x: Any,
    other: RelativeRepresentations,
    y: Any,
    *,
    neighbours: int = 10,
) -> SpaceSimilarity:
    """Compare two spaces by the relative representations of the same items; no labels needed.

    Parameters
    ----------
    one, other : fitted and comparable.
    x : (n, d) items as the encoder of `one` embeds them.
    y : (n, d') the same items in the same order, by that of `other`.
    neighbours : how many make a neighbourhood for the Jaccard index; at most n.

    Raises
    ------
    FewbitsError
        Codecs that are not comparable, or rows that do not pair up.

    Notes
    -----
    O(n·K·(d + d') + n²·K). Two nets are only about isometric: expect less than 1 even for the
    same architecture, trained on the same data from another seed.
    """
    one.require_fitted()
    other.require_fitted()
    one.require_comparable(other)
    x, y = one._checked(x), other._checked(y)
    if len(x) != len(y):
        raise FewbitsError(f"{len(x)} and {len(y)} rows do not pair up; give the same items twice")
    check_k(neighbours, len(x))
    r, s = one.transform(x), other.transform(y)
    return SpaceSimilarity(
        mean_cosine(r, s), neighbour_jaccard(r, s, neighbours), counterpart_mrr(r, s)
    )


def __getattr__(name: str) -> Any:
    # Needs torch, which the codec does not.
    if name in ("RelativeLayer", "RelativeModel", "stitch", "train_model"):
        require("torch", "torch")
        return getattr(importlib.import_module("fewbits.vectors._relative_network"), name)
    raise AttributeError(f"{__name__} has no {name!r}")
