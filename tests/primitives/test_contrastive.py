"""Contrastive losses against the same sums written out with loops."""

from __future__ import annotations

import math

import pytest

torch = pytest.importorskip("torch")

from fewbits.primitives.contrastive import info_nce, similarity_distillation  # noqa: E402


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def written_out(anchors, positives, temperature, hardest, ids, queue=(), queue_ids=()):
    """One direction of the loss, row by row."""
    total = 0.0
    for i, anchor in enumerate(anchors):
        negatives = [
            cosine(anchor, p) for p, other in zip(positives, ids, strict=True) if other != ids[i]
        ]
        negatives += [
            cosine(anchor, q) for q, other in zip(queue, queue_ids, strict=True) if other != ids[i]
        ]
        negatives = sorted(negatives, reverse=True)[:hardest]
        positive = cosine(anchor, positives[i])
        everything = [positive, *negatives]
        total -= positive / temperature - math.log(
            sum(math.exp(s / temperature) for s in everything)
        )
    return total / len(anchors)


@pytest.mark.parametrize("hardest", [1, 3, 7, 50, None])
def test_matches_the_sum_written_out(hardest):
    a, b = draw(8, 5), draw(8, 5, seed=1)
    ids = range(8)
    forth = written_out(a, b, 0.2, hardest, ids)
    back = written_out(b, a, 0.2, hardest, ids)
    options = {"temperature": 0.2, "hardest": hardest}
    one_way = info_nce(a, b, symmetric=False, **options)
    assert one_way.item() == pytest.approx(forth, rel=1e-12)
    assert info_nce(a, b, **options).item() == pytest.approx(forth + back, rel=1e-12)


def test_rows_of_one_item_are_never_negatives():
    a, b, queue = draw(8, 5), draw(8, 5, seed=1), draw(6, 5, seed=2)
    ids, queue_ids = [0, 0, 1, 2, 2, 2, 3, 4], [0, 2, 9, 9, 4, 7]
    options = {"temperature": 0.1, "hardest": 4}
    got = info_nce(
        a,
        b,
        ids=torch.tensor(ids),
        queue=queue,
        queue_ids=torch.tensor(queue_ids),
        symmetric=False,
        **options,
    )
    expected = written_out(a, b, 0.1, 4, ids, queue, queue_ids)
    assert got.item() == pytest.approx(expected, rel=1e-12)
    both = info_nce(
        a, b, ids=torch.tensor(ids), queue=queue, queue_ids=torch.tensor(queue_ids), **options
    )
    assert both.item() == pytest.approx(expected + written_out(b, a, 0.1, 4, ids), rel=1e-12)
    unnamed = info_nce(a, b, queue=queue, symmetric=False, **options)
    expected = written_out(a, b, 0.1, 4, range(8), queue, [-1] * 6)
    assert unnamed.item() == pytest.approx(expected, rel=1e-12)


def test_only_the_hardest_negatives_feel_the_loss():
    anchors = torch.tensor([[1.0, 0.0, 0.0]]).repeat(2, 1)
    positives = torch.tensor([[1.0, 0.1, 0.1], [1.0, 0.2, 0.1]])
    queue = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.5, 0.0, 1.0]], requires_grad=True)
    ids = torch.zeros(2, dtype=torch.int64)  # leaves the queue as the only negatives
    info_nce(anchors, positives, ids=ids, queue=queue, hardest=1, symmetric=False).backward()
    felt = queue.grad.abs().sum(dim=1) > 0
    assert felt.tolist() == [False, True, False]


def test_length_of_rows_does_not_matter():
    a, b = draw(6, 4), draw(6, 4, seed=1)
    scale = torch.rand(6, 1, generator=torch.Generator().manual_seed(3)).double() + 0.1
    assert info_nce(a * scale, b / scale).item() == pytest.approx(info_nce(a, b).item())


def test_rows_without_negatives_cost_nothing_and_stay_finite():
    a = draw(3, 4).requires_grad_()
    b = draw(3, 4, seed=1).requires_grad_()
    loss = info_nce(a, b, ids=torch.zeros(3, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(a.grad, torch.zeros(3, 4))
    assert torch.equal(b.grad, torch.zeros(3, 4))
    assert info_nce(a[:1], b[:1]).item() == 0


def test_gradients_are_right():
    a, b = draw(5, 3).requires_grad_(), draw(5, 3, seed=1).requires_grad_()
    queue = draw(4, 3, seed=2).requires_grad_()
    ids = torch.tensor([0, 1, 1, 2, 3])
    assert torch.autograd.gradcheck(
        lambda a, b, q: info_nce(a, b, ids=ids, queue=q, hardest=2, temperature=0.3), (a, b, queue)
    )
    assert torch.autograd.gradcheck(
        lambda s: similarity_distillation(s, b, temperature=0.3, student_temperature=0.5), (a,)
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"positives": torch.ones(3, 2)},
        {"anchors": torch.ones(2), "positives": torch.ones(2)},
        {"anchors": torch.ones(0, 2), "positives": torch.ones(0, 2)},
        {"temperature": 0.0},
        {"hardest": 0},
        {"queue": torch.ones(4, 3)},
        {"queue_ids": torch.ones(4)},
    ],
)
def test_wrong_input_is_refused(wrong):
    right = {"anchors": torch.ones(2, 2), "positives": torch.ones(2, 2)}
    with pytest.raises(ValueError):
        info_nce(**(right | wrong))


# -- distillation --------------------------------------------------------------------------


def test_distillation_matches_the_sum_written_out():
    student, teacher = draw(6, 3), draw(6, 9, seed=1)
    total = 0.0
    for i in range(6):
        others = [j for j in range(6) if j != i]

        def softmax(x, temperature, i=i, others=others):
            powers = [math.exp(cosine(x[i], x[j]) / temperature) for j in others]
            return [power / sum(powers) for power in powers]

        p, q = softmax(teacher, 0.1), softmax(student, 0.4)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    got = similarity_distillation(student, teacher, temperature=0.1, student_temperature=0.4)
    assert got.item() == pytest.approx(total / 6, rel=1e-12)


def test_distillation_is_zero_for_the_same_similarities_only():
    teacher = draw(10, 6)
    rotation = torch.linalg.qr(draw(6, 6, seed=1)).Q
    assert similarity_distillation(teacher @ rotation * 3, teacher).item() == pytest.approx(0)
    assert similarity_distillation(draw(10, 6, seed=2), teacher).item() > 0.1


def test_no_gradient_reaches_the_teacher():
    student, teacher = draw(4, 3).requires_grad_(), draw(4, 5, seed=1).requires_grad_()
    similarity_distillation(student, teacher).backward()
    assert teacher.grad is None
    assert student.grad.abs().sum() > 0


def test_distillation_refuses_wrong_input():
    x = draw(4, 3)
    for student, teacher, options in [
        (x, x[:3], {}),
        (x[:1], x[:1], {}),
        (x[0], x[0], {}),
        (x, x, {"temperature": 0.0}),
        (x, x, {"student_temperature": -1.0}),
    ]:
        with pytest.raises(ValueError):
            similarity_distillation(student, teacher, **options)
