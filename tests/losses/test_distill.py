import math

import pytest
import torch
import torch.nn.functional as F

from mmformer.losses.distill import distilled_contrastive, distilled_tokens, soft_cross_entropy


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
