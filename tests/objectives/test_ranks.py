"""Two processes compute what one does of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from mmformer.objectives import ranks
from tests.processes import both

ROWS, DIM = 7, 3
CUT = (5, 2)


def everything() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, DIM, generator=draw), torch.randn(ROWS, DIM, generator=draw)


def loss_of(own: torch.Tensor, weight: torch.Tensor, everyone: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (torch.tanh(own @ weight @ everyone.T).square().sum(), len(own))


def weighted(weight: torch.Tensor, cut: tuple[int, int]) -> dict[str, Any]:
    """The loss of this process's rows against all, twice gathered, and its gradients."""
    first, second = (x.split(cut)[dist.get_rank()] for x in everything())
    weight = weight.clone().requires_grad_()
    own = first.clone().requires_grad_()
    if not len(own):
        own = torch.zeros(0, 1)  # a process without rows does not know how wide they are
    one = ranks.gather_rows(own)
    two = ranks.gather_rows(second * weight.sum())
    total, count = loss_of(first, weight, one + two)
    loss = ranks.shared_mean(total, count)
    loss.backward()
    return {"loss": loss.detach(), "weight": weight.grad, "own": own.grad}


def in_a_process() -> dict[str, Any]:
    weight, rank = torch.eye(DIM) * 0.3, dist.get_rank()
    with torch.no_grad():
        assert not ranks.active()
        assert ranks.start(4) == 0
        assert len(ranks.gather_rows(torch.zeros(2 + rank, 1))) == 2 + rank
    assert ranks.active()
    return {
        "uneven": weighted(weight, CUT),
        "empty": weighted(weight, (ROWS, 0)),
        "start": ranks.start(CUT[rank]),
        "ids": ranks.gather_ids(torch.arange(CUT[rank]) + 10 * rank),
        "nothing": ranks.shared_mean(torch.tensor(0.0), 0),
        "counted": ranks.shared_mean(torch.tensor(2.0 + rank), torch.tensor(3 * rank)),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return both(in_a_process, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", ["uneven", "empty"])
def test_the_mean_over_processes_is_the_loss_of_all_rows_and_so_are_its_gradients(found: Any, case: str) -> None:
    first, second = everything()
    weight = (torch.eye(DIM) * 0.3).requires_grad_()
    leaf = first.clone().requires_grad_()
    total, count = loss_of(first, weight, leaf + second * weight.sum())
    loss = total / count
    loss.backward()
    torch.testing.assert_close(sum(part[case]["loss"] for part in found) / 2, loss.detach())
    torch.testing.assert_close(sum(part[case]["weight"] for part in found) / 2, weight.grad)
    own = torch.cat([part[case]["own"] for part in found if part[case]["own"] is not None])
    torch.testing.assert_close(own / 2, leaf.grad)  # what the parameters behind the rows get, averaged over processes


def test_rows_stand_in_the_order_of_the_processes(found: Any) -> None:
    assert [part["start"] for part in found] == [0, CUT[0]]
    assert found[0]["ids"].tolist() == found[1]["ids"].tolist() == [0, 1, 2, 3, 4, 10, 11]


def test_a_mean_over_nothing_is_zero_and_counts_are_added(found: Any) -> None:
    assert [float(part["nothing"]) for part in found] == [0.0, 0.0]
    assert sum(float(part["counted"]) for part in found) / 2 == pytest.approx(5 / 3)


def test_one_process_keeps_what_it_has() -> None:
    rows = torch.randn(3, 2)
    assert ranks.gather_rows(rows) is rows
    assert ranks.start(3) == 0
    assert ranks.shares(3) == (3,)
    assert float(ranks.shared_mean(torch.tensor(6.0), 3)) == 2.0
    assert float(ranks.shared_mean(torch.tensor(0.0), torch.tensor(0))) == 0.0
