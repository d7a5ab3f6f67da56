import math

import pytest
import torch
import torch.nn.functional as F

from mmformer.losses.distill import (
    affinity,
    angles,
    attention_transfer,
    distances,
    distilled_contrastive,
    distilled_tokens,
    relations,
    soft_cross_entropy,
    softened,
    softened_labels,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def softmax(row: list[float]) -> list[float]:
    total = sum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def test_soft_targets_that_are_sure_are_hard_ones():
    logits, ids = draw(5, 7), torch.tensor([0, 6, 3, 3, 1])
    wanted = F.cross_entropy(logits, ids, reduction="sum")
    torch.testing.assert_close(soft_cross_entropy(logits, F.one_hot(ids, 7).float()), wanted)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_contrastive_is_the_loop_of_the_paper(weight):
    said, told = draw(3, 5).double().requires_grad_(), draw(3, 5, seed=1).double().requires_grad_()
    positive = torch.tensor([[1, 0, 0, 0, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0]]).bool()
    total = 0.0
    for i in range(3):
        teacher, student = softmax(told[i].tolist()), softmax(said[i].tolist())
        share = [float(p) / int(positive[i].sum()) for p in positive[i]]
        total -= sum(
            (weight * t + (1 - weight) * s) * math.log(p) for t, s, p in zip(teacher, share, student, strict=True)
        )
    loss = distilled_contrastive(said, told, positive, weight)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-6)
    loss.backward()
    assert told.grad is None
    target = weight * told.detach().softmax(1) + (1 - weight) * positive / positive.sum(1, keepdim=True)
    torch.testing.assert_close(said.grad, said.detach().softmax(1) - target, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weight", [0.0, 0.4, torch.tensor(0.4), 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masked_words_are_the_loop_of_the_paper(weight, dtype):
    said, told, ids = draw(4, 6).to(dtype).requires_grad_(), draw(4, 6, seed=1).to(dtype), torch.tensor([5, 0, 2, 2])
    hard = soft = 0.0
    for i in range(4):
        student, teacher = softmax(said[i].tolist()), softmax(told[i].tolist())
        hard -= math.log(student[ids[i]])
        soft -= sum(t * math.log(p) for t, p in zip(teacher, student, strict=True))
    loss = distilled_tokens(said, ids, told, weight)
    assert float(loss.detach()) == pytest.approx((1 - float(weight)) * hard + float(weight) * soft, rel=1e-6)
    loss.backward()
    mixed = float(weight) * told.float().softmax(1) + (1 - float(weight)) * F.one_hot(ids, 6)
    wanted = (said.detach().float().softmax(1) - mixed).to(dtype)
    torch.testing.assert_close(said.grad, wanted, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_softened_classes_are_the_sum_of_the_paper(temperature, dtype):
    said, told = draw(5, 7).to(dtype).requires_grad_(), draw(5, 7, seed=1).to(dtype).requires_grad_()
    total = 0.0
    for i in range(5):
        student, teacher = (softmax([x / temperature for x in row[i].tolist()]) for row in (said, told))
        total += temperature**2 * sum(t * math.log(t / p) for t, p in zip(teacher, student, strict=True))
    loss = softened(said, told, temperature)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    loss.backward()
    assert told.grad is None
    wanted = temperature * ((said.detach().float() / temperature).softmax(1) - (told / temperature).float().softmax(1))
    torch.testing.assert_close(
        said.grad.float(), wanted.detach(), rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=2e-3
    )


def test_the_size_of_a_softened_gradient_hardly_depends_on_the_temperature():
    said, told = draw(6, 5).requires_grad_(), draw(6, 5, seed=1)
    norms = []
    for temperature in (8.0, 64.0):
        (slope,) = torch.autograd.grad(softened(said, told, temperature), said)
        norms.append(float(slope.norm()))
    assert norms[0] == pytest.approx(norms[1], rel=0.15)


def test_softened_labels_are_two_classes_each():
    said, told = draw(4, 3).requires_grad_(), draw(4, 3, seed=1)
    pairs = [torch.stack([x.flatten(), torch.zeros(12)], 1) for x in (said, told)]
    torch.testing.assert_close(softened_labels(said, told, 3.0), softened(*pairs, 3.0))
    assert float(softened_labels(told, told, 3.0)) == pytest.approx(0, abs=1e-6)


def test_distances_and_angles_are_those_of_all_pairs_and_triples():
    x, taught = draw(5, 3).requires_grad_(), draw(5, 4, seed=1)

    def huber(a, b):
        return 0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5

    def apart(rows):
        found = {(i, j): float((rows[i] - rows[j]).norm()) for i in range(5) for j in range(i)}
        mean = sum(found.values()) / len(found)
        return {key: value / mean for key, value in found.items()}

    one, other = apart(x.detach()), apart(taught)
    wanted = sum(huber(one[key], other[key]) for key in one) / len(one)
    assert float(distances(x, taught).detach()) == pytest.approx(wanted, rel=1e-5)

    def cosine(rows, i, j, k):
        a, b = rows[i] - rows[j], rows[k] - rows[j]
        return float(a @ b / (a.norm() * b.norm()).clamp(min=1e-12))

    triples = [(i, j, k) for i in range(5) for j in range(5) for k in range(5)]
    wanted = sum(huber(cosine(x.detach(), *t), cosine(taught, *t)) for t in triples) / len(triples)
    assert float(angles(x, taught).detach()) == pytest.approx(wanted, rel=1e-5)
    for loss in (distances, angles):
        torch.testing.assert_close(loss(3 * taught, taught), torch.zeros(()), atol=1e-6, rtol=0)  # scale means nothing
        (slope,) = torch.autograd.grad(loss(torch.cat([x[:4], x[:1]]), taught), x)  # two samples in one place
        assert slope.isfinite().all()


def test_affinity_is_nothing_where_the_teacher_finds_the_same_alike():
    told = draw(4, 6)
    assert float(affinity(told + 3, told)) == pytest.approx(0, abs=1e-5)
    assert float(affinity(draw(4, 6, seed=1), told)) > 0.1


def test_energy_is_compared_by_place_and_padding_is_left_out():
    x, taught = draw(2, 4, 3).requires_grad_(), draw(2, 4, 5, seed=1)
    valid = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    total = 0.0
    for i, length in enumerate((4, 2)):
        one, other = (rows[i, :length].detach().square().sum(-1) for rows in (x, taught))
        total += float((one / one.norm() - other / other.norm()).square().sum())
    loss = attention_transfer(x, taught, valid)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    loss.backward()
    assert not x.grad[1, 2:].any()
    assert x.grad[0].any()


@pytest.mark.parametrize("heads", [1, 3])
def test_relations_are_the_loop_over_heads_and_queries(heads):
    q, k, taught_q, taught_k = (draw(2, 3, width, seed=i) for i, width in enumerate((6, 6, 12, 12)))
    q.requires_grad_()
    valid = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    total = 0.0
    for i, length in enumerate((3, 2)):
        for h in range(heads):
            rows = []
            for a, b in ((q, k), (taught_q, taught_k)):
                size = a.shape[2] // heads
                part = slice(h * size, (h + 1) * size)
                scores = a[i, :length, part].detach() @ b[i, :length, part].T / size**0.5
                rows.append([softmax(row) for row in scores.tolist()])
            for said, told in zip(*rows, strict=True):
                total += sum(t * math.log(t / p) for t, p in zip(told, said, strict=True)) / heads
    loss = relations((q, k), (taught_q, taught_k), valid, heads)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    loss.backward()
    assert q.grad.isfinite().all()
    assert not q.grad[1, 2].any()
