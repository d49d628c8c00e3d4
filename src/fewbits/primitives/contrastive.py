"""Losses over the rows of a batch: contrast with negatives, and distillation of similarities."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def info_nce(
    anchors: Tensor,
    positives: Tensor,
    *,
    temperature: float = 0.05,
    hardest: int | None = 5,
    ids: Tensor | None = None,
    queue: Tensor | None = None,
    queue_ids: Tensor | None = None,
    symmetric: bool = True,
) -> Tensor:
    """InfoNCE over cosine similarities: each anchor must pick its positive from its negatives.

    The negatives of an anchor are the other rows' positives and the rows of `queue`, without
    those that carry the anchor's own id; only its `hardest` (most similar) count. An anchor
    left without negatives contributes zero.

    Parameters
    ----------
    anchors, positives : (n, d) float; row i of one belongs to row i of the other. Rows need
        not have unit length.
    temperature : what similarities are divided by.
    hardest : negatives per anchor; None for all.
    ids : (n,) integers that name the item of each pair; rows of one item are never each
        other's negatives. Every row is an item of its own by default.
    queue : (m, d) float, more negatives for the anchors.
    queue_ids : (m,) integers on the scale of `ids`; no queue row is excluded by default.
    symmetric : add the same loss with anchors and positives exchanged (without the queue).

    Returns
    -------
    The mean over the anchors (and the sum of both directions): a scalar. O(n · (n + m) · d)
    time, O(n · (n + m)) memory.

    Raises
    ------
    ValueError
        Shapes that do not fit, a temperature that is not positive, `hardest` below 1, or
        `queue_ids` without `ids` and `queue`.
    """
    _check_pairs(anchors, positives, temperature, hardest, queue)
    if queue_ids is not None and (ids is None or queue is None):
        raise ValueError("queue_ids need ids and queue")
    if ids is None:
        ids = torch.arange(len(anchors), device=anchors.device)
    anchors = functional.normalize(anchors, dim=1)
    positives = functional.normalize(positives, dim=1)
    similarities = anchors @ positives.T
    positive = similarities.diagonal()
    same = ids[:, None] == ids[None, :]
    loss = _pick_positive(positive, similarities.T, same, temperature, hardest) if symmetric else 0
    if queue is not None:
        similarities = torch.cat([similarities, anchors @ functional.normalize(queue, dim=1).T], 1)
        unused = torch.zeros(len(ids), len(queue), dtype=torch.bool, device=ids.device)
        in_queue = unused if queue_ids is None else ids[:, None] == queue_ids[None, :]
        same = torch.cat([same, in_queue], dim=1)
    return loss + _pick_positive(positive, similarities, same, temperature, hardest)


def _pick_positive(
    positive: Tensor,
    candidates: Tensor,
    excluded: Tensor,
    temperature: float,
    hardest: int | None,
) -> Tensor:
    """Mean cross-entropy of (n,) `positive` against the rows of (n, c) `candidates`."""
    negatives = candidates.masked_fill(excluded, -torch.inf)
    if hardest is not None and hardest < negatives.shape[1]:
        negatives = negatives.topk(hardest, dim=1).values
    logits = torch.cat([positive[:, None], negatives], dim=1) / temperature
    return (logits.logsumexp(dim=1) - logits[:, 0]).mean()


def _check_pairs(
    anchors: Tensor,
    positives: Tensor,
    temperature: float,
    hardest: int | None,
    queue: Tensor | None,
) -> None:
    if anchors.ndim != 2 or anchors.shape != positives.shape or len(anchors) == 0:
        raise ValueError(
            "anchors and positives must both be (n, d), "
            f"not {tuple(anchors.shape)} and {tuple(positives.shape)}"
        )
    if queue is not None and (queue.ndim != 2 or queue.shape[1] != anchors.shape[1]):
        raise ValueError(f"queue must be (m, {anchors.shape[1]}), not {tuple(queue.shape)}")
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    if hardest is not None and hardest < 1:
        raise ValueError(f"hardest must be at least 1, not {hardest}")


def similarity_distillation(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 0.1,
    student_temperature: float | None = None,
) -> Tensor:
    """How far the student's similarities within the batch are from the teacher's.

    For each row, the softmax of its cosine similarities to all other rows is a distribution;
    the loss is KL(teacher ‖ student). It is zero exactly when, with equal temperatures, every
    row's similarities agree up to a constant. No gradient reaches the teacher.

    Parameters
    ----------
    student : (n, m) float. teacher : (n, d) float, the same items; m and d may differ. Rows
        need not have unit length.
    temperature : what the teacher's similarities are divided by.
    student_temperature : the same for the student's; `temperature` by default.

    Returns
    -------
    The mean over the rows: a scalar. O(n² · (m + d)) time, O(n²) memory.

    Raises
    ------
    ValueError
        Fewer than 2 rows, shapes that do not fit, or a temperature that is not positive.
    """
    if student.ndim != 2 or teacher.ndim != 2 or len(student) != len(teacher) or len(student) < 2:
        raise ValueError(
            "student and teacher must be (n, m) and (n, d) with n ≥ 2, "
            f"not {tuple(student.shape)} and {tuple(teacher.shape)}"
        )
    if student_temperature is None:
        student_temperature = temperature
    if temperature <= 0 or student_temperature <= 0:
        raise ValueError(f"temperatures must be positive: {temperature}, {student_temperature}")
    wanted = functional.log_softmax(_similarities(teacher.detach()) / temperature, dim=1)
    given = functional.log_softmax(_similarities(student) / student_temperature, dim=1)
    return functional.kl_div(given, wanted.to(given.dtype), reduction="batchmean", log_target=True)


def _similarities(x: Tensor) -> Tensor:
    """(n, n − 1) cosine similarities of each row of (n, d) `x` to all others."""
    unit = functional.normalize(x, dim=1)
    n = len(x)
    # Dropping the first entry shifts the diagonal of the square into one last column.
    return (unit @ unit.T).flatten()[1:].view(n - 1, n + 1)[:, :-1].reshape(n, n - 1)
