"""BEBR: vectors as whole numbers of a few bits, made by recurrent binarisation.

Gan, Ge, Zhou, Gu, Liu, Wang, Wu, Li, Xu, Shan et al. 2023, *Binary Embedding-based Retrieval at
Tencent* (arXiv 2302.08714).

A unit row x becomes b = b_0 + b_1/2 + b_2/4 + …, each b_i a vector of m signs. The first is the
sign of W(x); each further one is the sign of R_i(x − unit(B_i(b so far))): what the code so far
fails to give back. W, R_i and B_i are small networks that look at embeddings alone. A coordinate
of b is one of 2^bits evenly spaced levels and never 0, so a code is m numbers of `bits` bits,
whose most significant digits are a shorter code by themselves (`BEBR.truncate`).

Ours, where the paper leaves room or did not do well on few data: the networks start from a
random rotation with an MLP of zero effect beside it (``mode="paper"`` starts from random MLPs);
`fit` learns without labels; float queries can search the codes (``scoring="asymmetric"``). The
paper stores the length of b with each code; here it is computed from the code.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from fewbits.core.checks import check_k, check_vectors
from fewbits.core.code import Code
from fewbits.core.codec import MOST_DIMS, Codec, DecodingSearcher, State, learned, rows_per_block
from fewbits.core.errors import FewbitsError, require
from fewbits.core.search import Matches, Searcher, exact_search
from fewbits.core.stored import FaissForm, Stored, linear_step
from fewbits.primitives.bits import pack, packed_width, unpack
from fewbits.primitives.level_scan import LevelScan
from fewbits.vectors._bebr_codes import Block, block_shapes, code_values, odd_integers, unit

if TYPE_CHECKING:
    from fewbits.vectors._bebr_network import Head, Linear

FIT_ROWS = 65_536
"""Rows that `fit` learns from at most; more are sampled down."""
MOST_BITS = 8
MOST_BLOCKS, MOST_HIDDEN = 64, 2**16
"""Larger networks are not built, also where a file only claims them."""


@dataclass
class BEBR(Codec):
    """`bits` bits for each of `dims` code dimensions: dims·bits/8 bytes per vector.

    Only directions are kept: decoded rows all have the mean length of the rows given to `fit`.

    Which scoring? ``symmetric`` is the paper's: the query is quantised as well, and both codes
    can be compared in whole numbers. ``asymmetric`` keeps the query in floats, costs nothing
    more to scan here and finds more, most of all with few bits, so it is the default. The two
    start differently (asymmetric around the mean, symmetric around zero), so the choice is made
    before `fit`; trained pairs need symmetric.

    Encoding costs O((2·bits − 1)·d·m) per row, and as much again through the MLPs.

    Parameters
    ----------
    bits : bits per code dimension, 1 to 8; the paper's u is bits − 1. 1, 2 and 4 scan fastest.
    dims : code dimensions m; None for one per dimension of the vectors.
    hidden : width of the MLPs; 0 for linear maps alone, which keep float neighbours as well
        as MLPs do and encode fastest.
    blocks : hidden layers of each MLP.
    mode : ``rotation`` starts from a rotation and trains by Adam; ``paper`` starts from random
        weights and trains by SGD, as published. It needs far more data.
    scoring : what is compared in a search, and hence what is trained for.
    steps : training steps; 0 leaves the start as it is.
    batch : rows per step, all of which are each other's negatives.
    learning_rate : None for 5e-5 in `fit` and 5e-4 for pairs, or in ``mode="paper"`` the
        paper's 0.08 per 4096 rows of batch.
    temperature : what similarities are divided by in the losses.
    queue : `fit_pairs` keeps so many past documents as further negatives.
    momentum : of the slow copy of the head that encodes the queue; 0 for none.
    seed : of the start and of the batches.
    device : what to train on; None for the best there is.
    """

    name: ClassVar[str] = "bebr"
    cubic: ClassVar[bool] = True

    bits: int = 2
    dims: int | None = None
    hidden: int = 0
    blocks: int = 1
    mode: Literal["rotation", "paper"] = "rotation"
    scoring: Literal["asymmetric", "symmetric"] = "asymmetric"
    steps: int = 300
    batch: int = 512
    learning_rate: float | None = None
    temperature: float = 0.05
    queue: int = 0
    momentum: float = 0.0
    seed: int = 0
    device: str | None = None

    network_: np.ndarray = learned()
    """(p,) float32: the arrays of W, B_0, R_0, B_1, … as `block_shapes` lists them."""
    decoder_: np.ndarray = learned()
    """(m, d) float32: linear map from codes back to unit rows."""
    offset_: np.ndarray = learned()
    """(d,) float32, added to it."""
    length_: np.ndarray = learned()
    """(1,) float32: mean length of the rows."""
    partner_: np.ndarray = learned()
    """(32,) uint8: digest of the codec whose codes `search_old` searches, or (0,)."""

    @classmethod
    def spending(cls, size: int) -> list[tuple[str, int | None]]:
        return [(f"bebr:bits={bits},dims={8 * size // bits}", MOST_DIMS) for bits in (1, 2, 3, 4)]

    @classmethod
    def grid(cls, dims: int, rows: int) -> list[str]:
        if rows < 256:
            return []
        pairs = [(dims // 4, 2), (dims // 3, 3), (dims // 2, 2), (dims * 2 // 3, 3), (dims, 2)]
        return [
            f"bebr:bits={bits}" + (f",dims={m}" if m != dims else "") for m, bits in pairs if m >= 4
        ]

    @property
    def width(self) -> int:
        """Code dimensions m."""
        return self.dims or self.dims_

    @property
    def levels(self) -> np.ndarray:
        """(2^bits,) float32: the value of b that each number stands for."""
        return code_values(np.arange(2**self.bits), self.bits)

    @property
    def has_linear(self) -> bool:
        """Whether the networks have a linear path."""
        return self.mode == "rotation" or self.hidden == 0

    # -- fitting --------------------------------------------------------------------------

    def _fit(self, x: np.ndarray) -> None:
        """Learn without labels, so that codes are as similar as the rows are."""
        self._check_parameters(len(x))
        network = training()
        self._keep_length(x)
        x = unit(self._sample(x))
        head = network.made(self, x.shape[1], self._start(x))
        network.fit_decoder(head, x)
        if self.steps:
            network.distil(self, head, x)
        if self.scoring == "symmetric":  # otherwise the decoder was trained, too
            network.fit_decoder(head, x)
        self._keep(head)

    def fit_pairs(self, queries: Any, documents: Any, ids: Any = None) -> Self:
        """Learn from pairs, so that the code of a query finds the code of its document.

        The paper's objective: each side of a pair must be picked from the five hardest of its
        batch. It bends the space towards the task; neighbours in the float space are kept less.

        Parameters
        ----------
        queries, documents : (n, d); row i of one belongs to row i of the other.
        ids : (n,) whole numbers that name the item of each pair. Pairs of one item are not
            each other's negatives. By default every pair is an item of its own.

        Returns
        -------
        self, with the head for both queries and documents.

        Raises
        ------
        FewbitsError
            Unusable or unequal inputs, or ``scoring="asymmetric"``.
        """
        return self._fit_pairs(*self._checked_pairs(queries, documents, ids))

    def fit_compatible(
        self, old: BEBR, queries: Any, documents: Any, old_documents: Any, ids: Any = None
    ) -> Self:
        """Learn a head for a new embedding whose queries also search the old one's codes.

        The loss of `fit_pairs`, plus the same with the documents' old codes, which stay as they
        are. Afterwards `search_old` searches what `old` encoded, so that documents can be
        encoded anew bit by bit, or never. The start is the regression of old codes on new
        embeddings.

        Parameters
        ----------
        old : the fitted codec that made the codes in use; code dimensions must be equal, bits
            and embedding widths may differ.
        queries, documents : (n, d) pairs in the new embedding.
        old_documents : (n, d_old): the same documents in the old embedding.
        ids : as in `fit_pairs`.

        Raises
        ------
        FewbitsError
            As `fit_pairs`, or code dimensions differ.
        """
        old.require_fitted()
        pairs = self._checked_pairs(queries, documents, ids)
        width = self.dims or pairs[0].shape[1]
        if old.width != width:
            raise FewbitsError(
                f"bebr: the old codes have {old.width} dimensions, the new ones would have "
                f"{width}; set dims={old.width}"
            )
        old_code = old.encode(old_documents)
        if len(old_code) != len(pairs[0]):
            raise FewbitsError(
                f"bebr: {len(pairs[0])} pairs, but {len(old_code)} old documents; give one per pair"
            )
        return self._fit_pairs(*pairs, old_codes=old.values(old_code), old=old)

    def _fit_pairs(
        self,
        queries: np.ndarray,
        documents: np.ndarray,
        ids: np.ndarray,
        old_codes: np.ndarray | None = None,
        old: BEBR | None = None,
    ) -> Self:
        network = training()
        self.dims_ = documents.shape[1]
        self._keep_length(documents)
        queries, documents = unit(queries), unit(documents)
        some = None if old_codes is None else self._sample(old_codes)
        head = network.made(self, self.dims_, self._start(self._sample(documents), some))
        network.contrast(self, head, network.Pairs(queries, documents, ids, old_codes))
        network.fit_decoder(head, self._sample(documents))
        self._keep(head)
        if old is not None:
            self.partner_ = np.frombuffer(bytes.fromhex(old.digest), dtype=np.uint8)
        return self

    def _checked_pairs(
        self, queries: Any, documents: Any, ids: Any
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.scoring != "symmetric":
            raise FewbitsError("bebr: pairs are compared code with code; set scoring=symmetric")
        queries, documents = check_vectors(queries, what="queries"), self._checked(documents)
        if queries.shape != documents.shape:
            raise FewbitsError(
                f"bebr: queries {queries.shape} and documents {documents.shape} must be pairs; "
                "give as many rows of the same width"
            )
        self._check_parameters(len(queries))
        ids = np.arange(len(queries)) if ids is None else np.asarray(ids)
        if ids.shape != (len(queries),) or ids.dtype.kind not in "iu" or ids.min() < 0:
            raise FewbitsError("bebr: ids must be one whole number of at least 0 per pair")
        return queries, documents, ids.astype(np.int64)

    def _start(self, x: np.ndarray, old_codes: np.ndarray | None = None) -> list[Linear]:
        network = training()
        if x.std(axis=0).max() < 1e-6:
            raise FewbitsError("bebr: all rows are the same; there is nothing to learn")
        if self.mode == "paper":
            return []
        if old_codes is not None:
            started: list[Linear] = network.regression_start(x, old_codes, self.bits - 1)
            return started
        centred = self.scoring == "asymmetric"
        width, rounds = self.dims or x.shape[1], self.bits - 1
        started = network.rotation_start(x, width, rounds, centred=centred, seed=self.seed)
        return started

    def _sample(self, x: np.ndarray) -> np.ndarray:
        if len(x) <= FIT_ROWS:
            return x
        return x[np.random.default_rng(self.seed).choice(len(x), FIT_ROWS, replace=False)]

    def _keep_length(self, x: np.ndarray) -> None:
        self.length_ = np.linalg.norm(x, axis=1).mean(keepdims=True).astype(np.float32)

    def _keep(self, head: Head) -> None:
        self.network_ = np.concatenate([array.ravel() for array in head.arrays()])
        self.decoder_ = head.decoder.weight.detach().numpy().T.copy()
        self.offset_ = head.decoder.bias.detach().numpy().copy()
        self.partner_ = np.empty(0, dtype=np.uint8)

    def _check_parameters(self, rows: int) -> None:
        least = {"bits": 1, "hidden": 0, "steps": 0, "batch": 2, "queue": 0, "seed": 0, "dims": 1}
        least |= {"blocks": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise FewbitsError(f"bebr: {name}={value} must be at least {lowest}")
        for name, highest in {
            "bits": MOST_BITS,
            "blocks": MOST_BLOCKS,
            "hidden": MOST_HIDDEN,
        }.items():
            if getattr(self, name) > highest:
                raise FewbitsError(f"bebr: {name}={getattr(self, name)} must be at most {highest}")
        rate = 1 if self.learning_rate is None else self.learning_rate
        if not (self.temperature > 0 and rate > 0 and 0 <= self.momentum < 1):
            raise FewbitsError(
                "bebr: temperature and learning_rate must be positive, momentum from 0 below 1"
            )
        if rows < 2:
            raise FewbitsError("bebr needs at least 2 rows to learn from")

    # -- codes ----------------------------------------------------------------------------

    def _encode(self, x: np.ndarray) -> State:
        step = rows_per_block(max(self.dims_, self.width, self.hidden))
        parts = [self._numbers(x[start : start + step]) for start in range(0, len(x), step)]
        return {"packed": np.concatenate([pack(part, self.bits) for part in parts])}

    def _numbers(self, x: np.ndarray) -> np.ndarray:
        """(n, m) uint8: the number of each code coordinate."""
        x, networks = unit(x), self._networks()
        positive = networks[0](x) >= 0
        numbers: np.ndarray = positive.astype(np.uint8)
        code = np.where(positive, np.float32(1), np.float32(-1))
        for i in range(1, self.bits):
            back, ahead = networks[2 * i - 1], networks[2 * i]
            positive = ahead(x - unit(back(code))) >= 0
            numbers = numbers << 1 | positive
            code += np.where(positive, np.float32(0.5**i), np.float32(-(0.5**i)))
        return numbers

    def _networks(self) -> list[Block]:
        """W, B_0, R_0, B_1, …"""
        blocks, start = [], 0
        for shapes in self._shapes():
            arrays = []
            for shape in shapes:
                end = start + int(np.prod(shape))
                arrays.append(self.network_[start:end].reshape(shape))
                start = end
            blocks.append(Block(arrays, self.has_linear))
        return blocks

    def _shapes(self) -> list[list[tuple[int, ...]]]:
        d, m = self.dims_, self.width
        sizes = [(d, m), *[(m, d), (d, m)] * (self.bits - 1)]
        return [block_shapes(*size, self.hidden, self.blocks, self.has_linear) for size in sizes]

    def _check_state(self) -> None:
        self._check_parameters(2)
        count = sum(int(np.prod(shape)) for shapes in self._shapes() for shape in shapes)
        floats = {
            "network": (self.network_, (count,)),
            "decoder": (self.decoder_, (self.width, self.dims_)),
            "offset": (self.offset_, (self.dims_,)),
            "length": (self.length_, (1,)),
        }
        for name, (array, shape) in floats.items():
            if array.shape != shape or array.dtype != np.float32:
                raise ValueError(f"bebr: {name} must be float32 {shape}")
        if self.partner_.shape not in ((0,), (32,)) or self.partner_.dtype != np.uint8:
            raise ValueError("bebr: partner must be a digest or nothing")

    def numbers(self, code: Code) -> np.ndarray:
        """(n, m) uint8 below 2^bits: `code` unpacked. The first round's sign is the highest bit."""
        self.check_code(code)
        return unpack(code["packed"], self.width, self.bits)

    def integers(self, code: Code) -> np.ndarray:
        """(n, m) whole numbers 2n − (2^bits − 1), for stores that take int8 vectors.

        int8 up to 7 bits, int16 for 8. Their inner products are those of b, times 4^(bits−1).
        """
        kind = np.int8 if self.bits < MOST_BITS else np.int16
        return odd_integers(self.numbers(code), self.bits).astype(kind)

    def values(self, code: Code) -> np.ndarray:
        """(n, m) float32: b itself."""
        return self.levels[self.numbers(code)]

    def truncate(self, bits: int) -> BEBR:
        """The codec with fewer bits per dimension: its codes are the leading bits of this one's.

        Nothing is learned anew. Raises FewbitsError unless 1 ≤ bits ≤ this codec's.
        """
        self.require_fitted()
        if not 1 <= bits <= self.bits:
            raise FewbitsError(f"bebr: cannot keep {bits} of {self.bits} bits")
        shorter = dataclasses.replace(self, bits=bits)
        shorter.dims_ = self.dims_
        for name in self.learned:
            setattr(shorter, name, getattr(self, name))
        count = sum(int(np.prod(shape)) for shapes in shorter._shapes() for shape in shapes)
        shorter.network_ = self.network_[:count]
        return shorter

    def truncate_code(self, code: Code, bits: int) -> Code:
        """What ``self.truncate(bits)`` makes of the items of `code`, from the code alone."""
        shorter = self.truncate(bits)
        numbers = self.numbers(code) >> np.uint8(self.bits - bits)
        return Code({"packed": pack(numbers, bits)}, shorter.full_spec, shorter.digest)

    def _decode(self, code: Code) -> np.ndarray:
        values = self.levels[unpack(code["packed"], self.width, self.bits)]
        return unit(values @ self.decoder_ + self.offset_) * self.length_

    # -- searching ------------------------------------------------------------------------

    def _searcher(self, code: Code, metric: str) -> Searcher:
        if metric == "l2":
            return DecodingSearcher(self, code, metric)
        if self.scoring == "symmetric":
            return SymmetricSearcher(self, self, code)
        if self.bits not in (1, 2, 4):
            return DecodingSearcher(self, code, metric)
        return AsymmetricSearcher(self, code)

    def _stored(self, metric: str) -> Stored:
        if metric == "l2" or self.scoring != "symmetric" or self.bits == MOST_BITS:
            return super()._stored(metric)

        def whole(numbers: np.ndarray) -> np.ndarray:
            return odd_integers(numbers, self.bits).astype(np.int8)

        integers = Stored(
            "integers",
            self.width,
            "int8",
            "cosine",
            lambda code: whole(unpack(code["packed"], self.width, self.bits)),
            lambda queries: whole(self._numbers(queries)).astype(np.float32),
        )
        halves = dataclasses.replace(
            integers,
            kind="floats",
            dtype="float16",
            rows=lambda code: integers.rows(code).astype(np.float16),
        )
        if self.bits > 1:
            return dataclasses.replace(integers, as_floats=halves)
        return Stored(
            "bits",
            self.width,
            "uint8",
            "hamming",
            lambda code: code["packed"],
            lambda queries: pack(self._numbers(queries), 1),
            dataclasses.replace(halves, metric="ip"),
        )

    def _faiss_form(self, metric: str) -> FaissForm:
        if metric == "l2" or self.scoring != "symmetric" or self.bits > 1:
            return super()._faiss_form(metric)
        faiss: Any = importlib.import_module("faiss")  # its stubs know one constructor of several
        index = faiss.IndexLSH(self.width, self.width, False, False)
        form = FaissForm(index, lambda code: np.ascontiguousarray(code["packed"]))
        network = self._networks()[0]
        steps = None
        if self.hidden == 0:
            steps = [faiss.NormalizationTransform(self.dims_, 2.0), linear_step(*network.arrays)]
        return form.after(lambda queries: network(unit(queries)), steps)

    def search_old(self, old: BEBR, code: Code, queries: Any, k: int) -> Matches:
        """Search the `code` that `old` made with queries in this codec's embedding.

        Raises
        ------
        FewbitsError
            Unless `fit_compatible` was given this `old`, or `old` did not make the code.
        """
        old.check_code(code)
        self.require_fitted()
        if self.partner_.tobytes().hex() != old.digest:
            raise FewbitsError(
                "bebr: this head was not trained for those codes; use fit_compatible(old, …)"
            )
        queries = self._checked(queries)
        return SymmetricSearcher(self, old, code).search(queries, check_k(k, len(code)))


def training() -> Any:
    """The part that needs torch."""
    require("torch", "torch")
    return importlib.import_module("fewbits.vectors._bebr_network")


class SymmetricSearcher:
    """Compares the codes of queries, made by one head, with codes made by the same or another.

    Scores are cosines of codes, times the lengths of query and rows. Preparing costs O(n·m).
    """

    def __init__(self, asker: BEBR, maker: BEBR, code: Code) -> None:
        self.asker, self.maker, self.packed = asker, maker, code["packed"]
        self.scan: LevelScan | None = None
        if maker.bits in (1, 2, 4):
            lengths = [np.linalg.norm(block, axis=1) for block in self.blocks()]
            scale = maker.length_ / np.concatenate(lengths)
            self.scan = LevelScan(self.packed, maker.width, maker.bits, maker.levels, scale)

    def blocks(self) -> Any:
        """Codes b of bounded numbers of rows."""
        width, step = self.maker.width, rows_per_block(self.maker.width)
        for start in range(0, len(self.packed), step):
            numbers = unpack(self.packed[start : start + step], width, self.maker.bits)
            yield self.maker.levels[numbers]

    def search(self, queries: np.ndarray, k: int) -> Matches:
        lengths = np.linalg.norm(queries, axis=1, keepdims=True)
        asked = unit(self.asker.levels[self.asker._numbers(queries)]) * lengths
        if self.scan is not None:
            return self.scan.search(asked, k)
        scaled = (unit(block) * self.maker.length_ for block in self.blocks())
        return exact_search(asked, scaled, k, "ip")


class AsymmetricSearcher:
    """Scores float queries against decoded rows, by a scan of the codes.

    Preparing costs one decoding of all rows, for their lengths. The offset of the decoder is
    scored by one more byte per row, whose numbers are all the highest.
    """

    def __init__(self, codec: BEBR, code: Code) -> None:
        self.codec, packed = codec, code["packed"]
        step = rows_per_block(max(codec.width, codec.dims_))
        scales = []
        for start in range(0, len(packed), step):
            values = codec.levels[unpack(packed[start : start + step], codec.width, codec.bits)]
            lengths = np.linalg.norm(values @ codec.decoder_ + codec.offset_, axis=1)
            scales.append(codec.length_ / np.maximum(lengths, 1e-12))
        self.extra = 8 // codec.bits
        self.unused = packed_width(codec.width, codec.bits) * self.extra - codec.width
        ones = np.full((len(packed), 1), 255, dtype=np.uint8)
        dims = codec.width + self.unused + self.extra
        rows = np.concatenate([packed, ones], axis=1)
        self.scan = LevelScan(rows, dims, codec.bits, codec.levels, np.concatenate(scales))

    def search(self, queries: np.ndarray, k: int) -> Matches:
        codec = self.codec
        each = queries @ codec.offset_[:, None] / (self.extra * codec.levels[-1])
        unused = np.zeros((len(queries), self.unused), dtype=np.float32)
        parts = [queries @ codec.decoder_.T, unused, np.repeat(each, self.extra, axis=1)]
        return self.scan.search(np.concatenate(parts, axis=1), k)
