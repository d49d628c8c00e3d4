"""BT²: new embeddings that also search what an old embedding model indexed.

Zhou, Li, Shrivastava, Zhao, Torralba, Tian, Lim 2023, *BT²: Backward-compatible Training with
Basis Transformation* (arXiv 2211.03989, ICCV 2023).

A gallery was embedded by an old model, and a new one is better, but embedding everything again is
too dear. BT² gives a vector z that is `extra` coordinates longer than the new embedding. Its
first d_o coordinates point where the old model would have pointed, so they search the old rows;
all of it is the new embedding n under an orthonormal change of basis, beside the few directions
of the old space that n cannot express:

    n = f(h[:d_n])                 f to unit length; h, of width d_n + d_o, is learned
    o = f(A·ReLU(h) + b)           of which only the first a = `extra` coordinates are used
    v = [f(o[:a]) ; Q_p (C·n)]     Q_p orthogonal: which new directions go to the old space
    z = [Q_o v[:d_o] ; v[d_o:]]    Q_o orthogonal: turns them onto the old axes

Orthogonal maps lose nothing: ⟨z, z'⟩ = ⟨o, o'⟩ + C²⟨n, n'⟩ whatever Q_p and Q_o are.

The paper trains the backbone that gives h (`BT2.fit_backbone`). With `BT2.fit_upgrade` both
models stay as they are, as where they are somebody else's: h is then a linear map of the new
embedding. Ours are the start of Q_p, Q_o and A from a singular value decomposition and a
regression (``start="random"`` is the paper's), a temperature, and training without labels.
"""

from __future__ import annotations

import importlib
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import numpy as np

from fewbits.core import container
from fewbits.core.checks import (
    as_array,
    check_k,
    check_seed,
    check_vectors,
    numbered_classes,
    unit_rows,
)
from fewbits.core.codec import UNUSABLE, Transform, check_finite, learned, parse_value
from fewbits.core.errors import FewbitsError, require
from fewbits.core.search import Matches, search_array
from fewbits.primitives.anchors import unit_directions
from fewbits.primitives.rotation import project

if TYPE_CHECKING:
    from fewbits.vectors._bt2_network import Inputs, Model
    from fewbits.vectors._bt2_network import train_bct as train_bct

TERMS = ("new", "old", "classes", "old classes")
"""The terms of the loss; without labels there are only the first two."""
EXTRA = 32


@dataclass
class BT2(Transform):
    """From new embeddings (n, d_n) to z (n, d_n + a), which searches old and new rows.

    Learn with `fit_upgrade` or `fit_backbone`. Then `transform` (or `encode`) gives z for a new
    index, `compatible` gives rows and queries for the old one, and `search_old` searches it.

    Parameters
    ----------
    extra : a, from 0 to d_o; d_o ≤ d_n + a. None for 32, at most d_o/2, and as many more as the
        old vectors are wider than the new ones: in a series of updates z grows by 32 each time.
    scale : C, the weight of n in z beside the extra coordinates.
    new_weight : λ1 of 1 − cos(n, new embedding).
    class_weight : λ2 of the cross-entropy of z's old part with the means of the old classes.
    old_weight : λ3 of 1 − cos(z's old part, old embedding).
    temperature : what the logits of the old classes are divided by. The paper has 1, which says
        little where classes are many: try 0.05 there.
    start : ``aligned`` starts where the spaces fit best; ``random`` is the paper's.
    steps : training steps; 0 leaves the start as it is.
    batch : rows per step.
    learning_rate, weight_decay : of Adam, with 5 % of the steps to warm up and a cosine after.
    seed : of the start and of the batches.
    device : what to train on; None for the best there is.

    Notes
    -----
    A step costs O(batch·(d_n + d_o)² + d_n³ + d_o³), encoding O((d_n + d_o)·(d_n + d_o + a)) per
    row. The learned arrays take about 4·(2·d_n² + 2·d_o² + 2·d_n·d_o) bytes.
    """

    name: ClassVar[str] = "bt2"

    extra: int | None = None
    scale: float = 2.0
    new_weight: float = 1.0
    class_weight: float = 10.0
    old_weight: float = 5.0
    temperature: float = 1.0
    start: Literal["aligned", "random"] = "aligned"
    steps: int = 1000
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 3e-5
    seed: int = 0
    device: str | None = None

    head_: np.ndarray = learned()
    """(d_n, d_n + d_o) float32: unit row to h; (0, 0) after `fit_backbone`, where rows are h."""
    head_offset_: np.ndarray = learned()
    """(d_n + d_o,) float32, added to it; (0,) after `fit_backbone`."""
    branch_: np.ndarray = learned()
    """(d_n + d_o, a) float32: A, transposed."""
    branch_offset_: np.ndarray = learned()
    """(a,) float32: b."""
    new_basis_: np.ndarray = learned()
    """(d_n, d_n) float32: Q_p."""
    old_basis_: np.ndarray = learned()
    """(d_o, d_o) float32: Q_o."""
    spaces_: np.ndarray = learned()
    """(s,) int64: width of each old space that z begins with, oldest first; the last is d_o."""
    lengths_: np.ndarray = learned()
    """(s,) float32: mean length of the rows in each."""
    losses_: np.ndarray = learned()
    """(4,) float32: last mean of each of `TERMS`, weighted; (2,) when there were no labels."""

    # -- fitting --------------------------------------------------------------------------

    def fit(self, x: Any) -> Self:
        """Raises FewbitsError: one table of vectors is not enough."""
        raise FewbitsError(
            "bt2 learns from two embeddings of the same items; "
            "call fit_upgrade(old_vectors, new_vectors)"
        )

    def fit_upgrade(
        self,
        old_vectors: Any,
        new_vectors: Any,
        labels: Any = None,
        *,
        previous: BT2 | None = None,
    ) -> Self:
        """Learn from both embeddings of the same items; neither model is needed; returns self.

        Without labels both cross-entropy terms are left out, and only the two cosine terms are
        trained (`losses` shows it). Labels may also name items: of texts and their summaries,
        say, or of pictures of one thing.

        Parameters
        ----------
        old_vectors : (n, d_o) rows of the index in use, n ≥ 2: a sample is enough.
        new_vectors : (n, d_n) the same items by the new model. Widths may differ.
        labels : (n,) the class of each item: numbers or names.
        previous : the BT2 that made `old_vectors`, when they are its z. Rows of its own old
            spaces can then still be searched.

        Raises
        ------
        FewbitsError
            Unusable input, rows or labels that do not pair up, all rows the same, one class, or
            an `extra` that does not fit the widths.
        """
        old, new, classes = self._checked_items(old_vectors, new_vectors, labels, previous)
        network = training()
        model, losses = network.upgrade(self, network.Items(old, new, classes))
        self._keep(model, losses, old_vectors, previous)
        head = model.backbone
        self.head_, self.head_offset_ = array_of(head.weight.T), array_of(head.bias)
        self.dims_ = new.shape[1]
        return self

    def fit_backbone(
        self,
        module: Any,
        inputs: Inputs,
        old_vectors: Any,
        new_vectors: Any,
        labels: Any = None,
        *,
        previous: BT2 | None = None,
        checkpoint: str | Path | None = None,
        progress: bool = False,
    ) -> Self:
        """The paper's training: `module` learns to give h, together with the rest; returns self.

        Afterwards rows and queries are what the module gives: ``bt2.transform(module(inputs))``.
        The module is trained in place and left on the CPU in evaluation mode; save it yourself.

        Parameters
        ----------
        module : an `nn.Module` from a batch of inputs to (b, d_n + d_o), in any architecture.
        inputs : (n, …) tensor or array, or a function from (b,) row numbers to a batch.
        old_vectors : (n, d_o) the items by the old model.
        new_vectors : (n, d_n) the items by a new model that was trained on its own, for n to
            follow.
        labels, previous : as in `fit_upgrade`.
        checkpoint, progress : as in `core.training.train`.

        Raises
        ------
        FewbitsError
            As `fit_upgrade`, or a module that gives another width.
        """
        old, new, classes = self._checked_items(old_vectors, new_vectors, labels, previous)
        network = training()
        items = network.Items(old, new, classes)
        model, losses = network.upgrade(
            self, items, module, inputs, checkpoint=checkpoint, progress=progress
        )
        self._keep(model, losses, old_vectors, previous)
        self.head_, self.head_offset_ = np.empty((0, 0), np.float32), np.empty(0, np.float32)
        self.dims_ = new.shape[1] + old.shape[1]
        return self

    def _checked_items(
        self, old_vectors: Any, new_vectors: Any, labels: Any, previous: BT2 | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Unit rows of both embeddings, and class numbers."""
        self._check_parameters()
        named = {"the old vectors": old_vectors, "the new vectors": new_vectors}
        old, new = (self._checked_kind(check_vectors(x, what=what)) for what, x in named.items())
        if len(old) != len(new):
            raise FewbitsError(
                f"bt2: {len(old)} old and {len(new)} new vectors do not pair up; "
                "give the same items in the same order"
            )
        if len(old) < 2:
            raise FewbitsError("bt2 needs at least 2 items to learn from")
        self.extra_of(new.shape[1], old.shape[1])
        if previous is not None and previous.width != old.shape[1]:
            raise FewbitsError(
                f"bt2: previous makes {previous.width} dimensions, but the old vectors have "
                f"{old.shape[1]}; give what it made"
            )
        units = []
        for what, x in zip(named, (old, new), strict=True):
            units.append(unit_rows(x, what=what))
            if units[-1].std(axis=0).max() < 1e-6:
                raise FewbitsError(f"bt2: {what} are all the same; there is nothing to learn")
        classes = None if labels is None else class_numbers(labels, len(old))
        return units[0], units[1], classes

    def extra_of(self, new: int, old: int) -> int:
        """How many coordinates z is longer than new vectors of that width.

        Raises
        ------
        FewbitsError
            Too many or too few for old vectors of the width `old`.
        """
        extra = self.extra
        if extra is None:
            extra = min(old, min(EXTRA, old // 2) + max(0, old - new))
        if extra > old:
            raise FewbitsError(
                f"bt2: extra={extra}, but the old vectors have {old} dimensions; "
                f"take extra={old} or less"
            )
        if old > new + extra:
            raise FewbitsError(
                f"bt2: the old vectors have {old} dimensions, the new ones with extra={extra} "
                f"only {new + extra}; take extra={old - new} or more"
            )
        return extra

    def _keep(
        self, model: Model, losses: dict[str, float], old_vectors: Any, previous: BT2 | None
    ) -> None:
        """Take over what was trained, but for the head."""
        made, wide = model.transformation, model.transformation.new + model.transformation.old
        self.branch_ = np.empty((wide, 0), dtype=np.float32)
        self.branch_offset_ = np.empty(0, dtype=np.float32)
        if made.branch is not None:
            self.branch_ = array_of(made.branch.weight.T)
            self.branch_offset_ = array_of(made.branch.bias)
        self.new_basis_ = array_of(made.new_basis.weight)
        self.old_basis_ = array_of(made.old_basis.weight)
        mean_length = np.linalg.norm(check_vectors(old_vectors), axis=1).mean()
        self.spaces_ = np.array([made.old], dtype=np.int64)
        self.lengths_ = np.array([mean_length], dtype=np.float32)
        if previous is not None:
            self.spaces_ = np.concatenate([previous.spaces_, self.spaces_])
            self.lengths_ = np.concatenate([previous.lengths_, self.lengths_])
        kept = [losses[name] for name in TERMS if name in losses]
        self.losses_ = np.array(kept, dtype=np.float32)

    def _check_parameters(self) -> None:
        check_seed(self.seed)
        least = {"extra": 0, "steps": 0, "batch": 2, "new_weight": 0, "class_weight": 0}
        least |= {"old_weight": 0, "weight_decay": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and not value >= lowest:
                raise FewbitsError(f"bt2: {name}={value} must be at least {lowest}")
        for name in ("scale", "temperature", "learning_rate"):
            if not 0 < getattr(self, name) < np.inf:
                raise FewbitsError(f"bt2: {name}={getattr(self, name)} must be positive")
        if self.start not in ("aligned", "random"):
            raise FewbitsError(f"bt2: start={self.start!r} must be aligned or random")

    def _check_state(self) -> None:
        self._check_parameters()
        new, old = len(self.new_basis_), len(self.old_basis_)
        extra, wide = self.extra_of(new, old), new + old
        mapped = self.head_.size > 0
        shapes = {
            "head": (new, wide) if mapped else (0, 0),
            "head_offset": (wide,) if mapped else (0,),
            "branch": (wide, extra),
            "branch_offset": (extra,),
            "new_basis": (new, new),
            "old_basis": (old, old),
            "lengths": self.spaces_.shape,
        }
        for name, shape in shapes.items():
            array = getattr(self, f"{name}_")
            if array.shape != shape or array.dtype != np.float32:
                raise ValueError(f"bt2: {name} must be float32 {shape}")
        if self.dims_ != (new if mapped else wide):
            raise ValueError(f"bt2: rows must have {new if mapped else wide} dimensions")
        for basis in (self.new_basis_, self.old_basis_):
            if np.abs(basis.T @ basis - np.eye(len(basis))).max() > 1e-3:
                raise ValueError("bt2: a basis is not orthogonal")
        spaces = self.spaces_
        if spaces.ndim != 1 or spaces.dtype != np.int64 or len(spaces) == 0 or spaces[-1] != old:
            raise ValueError("bt2: spaces must be int64 widths that end with that of the old rows")
        if spaces.min() < 1 or spaces.max() > old or not (self.lengths_ > 0).all():
            raise ValueError("bt2: an old space has a width or length that cannot be")
        if self.losses_.shape not in ((0,), (2,), (4,)) or self.losses_.dtype != np.float32:
            raise ValueError("bt2: losses must be 4 float32, or 2 without labels")

    # -- vectors --------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """d_n + a: the width of z."""
        self.require_fitted()
        return len(self.new_basis_) + self.branch_.shape[1]

    @property
    def old_width(self) -> int:
        """d_o: how many coordinates of z search the old rows."""
        self.require_fitted()
        return len(self.old_basis_)

    @property
    def losses(self) -> dict[str, float]:
        """The weighted terms of the loss at the end of training, by name.

        Only ``new`` and ``old`` when there were no labels; none when nothing was trained.
        """
        self.require_fitted()
        return dict(zip(TERMS, self.losses_.tolist(), strict=False))

    def transform(self, x: Any) -> np.ndarray:
        """(n, d_n + a) float32: z of new embeddings (n, d_n), or of h after `fit_backbone`.

        All rows have the length √(1 + C²), or C without extra coordinates. Compare new with new
        by inner product or cosine, which order alike.
        """
        self.require_fitted()
        h = self._checked(x)
        if self.head_.size:
            h = project(unit_rows(h), self.head_) + self.head_offset_
        new, old = len(self.new_basis_), len(self.old_basis_)
        n = unit_directions(h[:, :new])
        o = unit_directions(project(np.maximum(h, 0), self.branch_) + self.branch_offset_)
        v = np.concatenate([o, np.float32(self.scale) * project(n, self.new_basis_.T)], axis=1)
        return np.concatenate([project(v[:, :old], self.old_basis_.T), v[:, old:]], axis=1)

    def inverse(self, y: np.ndarray) -> np.ndarray:
        raise FewbitsError("bt2 cannot be decoded: z is made to be searched; keep the new vectors")

    def transform_queries(self, queries: Any, metric: str) -> np.ndarray:
        """z of queries; for the cosine divided by ⟨z, z⟩, which is the same for all rows."""
        z = self.transform(queries)
        squared = self.scale**2 + (self.branch_.shape[1] > 0)
        return z / np.float32(squared) if metric == "cosine" else z

    def compatible(self, x: Any, *, space: int | None = None) -> np.ndarray:
        """(n, d_o) float32: rows for the index in use, as queries or in place of old rows.

        They are the first d_o coordinates of z, at the mean length of the old rows. That makes a
        gallery that is embedded anew in part comparable throughout: as z has them, new rows would
        be longer than old ones, and by different lengths.

        Parameters
        ----------
        x : as `transform` takes it.
        space : width of an older space to search (one of `spaces_`), after a series of updates.

        Raises
        ------
        FewbitsError
            Unusable rows, or a space that z does not begin with.
        """
        z = self.transform(x)
        space = self.old_width if space is None else space
        if space not in self.spaces_:
            known = " or ".join(map(str, self.spaces_))
            raise FewbitsError(f"bt2: the old vectors have {known} dimensions, not {space}")
        (place,) = np.nonzero(self.spaces_ == space)
        return unit_directions(z[:, :space]) * self.lengths_[place[-1]]

    def search_old(self, rows: Any, queries: Any, k: int) -> Matches:
        """Search rows of the old index, some of which may be `compatible` rows of new vectors.

        Compared by cosine over the coordinates of the old space. For old rows alone that orders
        as the paper's inner product does, because these have equal lengths there.

        Parameters
        ----------
        rows : (n, d_o), or rows of an older space after a series of updates.
        queries : (q, d_n) new embeddings, or h after `fit_backbone`.
        k : how many to find.

        Returns
        -------
        Scores (q, k), best first, and rows (q, k). O(q·n·d_o).

        Raises
        ------
        FewbitsError
            Unusable rows or queries, or rows of a width that no old space has.
        """
        rows = check_vectors(rows, what="the old rows")
        asked = unit_directions(self.compatible(queries, space=rows.shape[1]))
        held = unit_rows(rows, what="the old rows")
        return search_array(asked, held, check_k(k, len(rows)), "ip")

    @classmethod
    def load(cls, path: str | Path) -> BT2:
        """Read what `save` wrote."""
        content = container.read(path)
        # Not by `from_spec`, which builds only what can be fitted on one table of vectors.
        try:
            about = content.about["codec"]
            name, _, options = about["spec"].partition(":")
            if name != cls.name:
                raise FewbitsError(f"{path} holds {name}, not a {cls.__name__}")
            kinds = typing.get_type_hints(cls)
            given = (option.split("=", 1) for option in options.split(","))
            codec = cls(**{key: parse_value(value, kinds[key]) for key, value in given})
            state = {name.removeprefix("0."): array for name, array in content.arrays.items()}
            check_finite(state)
            (dims,) = about["dims"]
            codec._restore(dims, state)
            codec.written_spec = about["spec"], codec.full_spec
            if codec.digest != about["digest"]:
                raise ValueError("the codec does not match its digest")
        except FewbitsError:
            raise
        except UNUSABLE as error:
            reason = str(error) or type(error).__name__
            raise FewbitsError(f"{path} does not hold a usable codec ({reason})") from None
        return codec


def leading_scores(queries: np.ndarray, items: np.ndarray) -> np.ndarray:
    """(q, n) inner products over the coordinates that both have: the paper's score.

    `queries` (q, d) and `items` (n, d') are z or old rows: new with new are compared on all
    coordinates, new with old on the first d_o. In a gallery of both kinds the scores are not on
    one scale, because old rows are shorter; see `BT2.compatible` for that. O(q·n·min(d, d')).
    """
    shared = min(queries.shape[1], items.shape[1])
    return np.asarray(queries[:, :shared] @ items[:, :shared].T)


def class_numbers(labels: Any, rows: int) -> np.ndarray:
    """(n,) int64 from 0 without gaps, of labels that are numbers or names.

    Raises
    ------
    FewbitsError
        Not one label per row, labels of another kind, or a single class.
    """
    labels = as_array(labels, "the labels")
    if labels.shape != (rows,):
        raise FewbitsError(f"bt2: labels must be one per row ({rows}), not {labels.shape}")
    return numbered_classes(labels, "bt2: ", "leave them out, or give the classes")


def array_of(tensor: Any) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().numpy())


def training() -> Any:
    """The part that needs torch."""
    require("torch", "torch")
    return importlib.import_module("fewbits.vectors._bt2_network")


def __getattr__(name: str) -> Any:
    # Needs torch, which a fitted BT2 does not.
    if name == "train_bct":
        return training().train_bct
    raise AttributeError(f"{__name__} has no {name!r}")
