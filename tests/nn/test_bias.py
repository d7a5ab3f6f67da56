from __future__ import annotations

import pytest
import torch

from mmformer.nn.bias import RelativeBias
from mmformer.tokens import to_padded
from mmformer.visibility import Sight, Visibility
from tests.helpers import packed_tokens


def plain(kernel: RelativeBias, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """One text by its formula: softmax(q k + bias) v, head by head."""
    out = torch.empty_like(q)
    time = torch.arange(len(q))
    for head in range(q.shape[1]):
        buckets = kernel.buckets(time[None, :] - time[:, None])
        scores = q[:, head] @ k[:, head].T + kernel.table.weight[buckets, head]
        if causal:
            scores = scores.masked_fill(time[None, :] > time[:, None], -torch.inf)
        out[:, head] = scores.softmax(-1) @ v[:, head]
    return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [{0: 5, 1: 5}, {0: 3, 2: 11, 1: 1}])
def test_packed_and_padded_follow_the_formula(lengths: dict[int, int], causal: bool) -> None:
    kernel = RelativeBias(4, num_buckets=8, max_distance=9)
    tokens = packed_tokens(lengths, 3, 3 * 24)
    parts = [part.unflatten(-1, (3, 4, 6)) for part in tokens.x[0].split(list(lengths.values()))]
    wanted = [plain(kernel, part[:, 0], part[:, 1], part[:, 2], causal) for part in parts]
    for layout in (tokens, to_padded(tokens)):
        q, k, v = layout.x.unflatten(-1, (3, 4, 6)).unbind(2)
        ours = layout.with_x(kernel(q, k, v, Sight(Visibility(causal), layout, layout)).flatten(2))
        padded = ours if layout.layout is None else to_padded(ours)
        for sample, text in zip(lengths, wanted, strict=True):
            torch.testing.assert_close(padded.x[sample, padded.valid[sample]], text.flatten(1))


def test_buckets_are_exact_near_and_shared_far() -> None:
    kernel = RelativeBias(2, num_buckets=8, max_distance=16)
    assert kernel.buckets(torch.tensor([0, -1, -2, -6, -40])).tolist() == [0, 1, 2, 3, 3]
    assert kernel.buckets(torch.tensor([1, 2, 6, 40])).tolist() == [5, 6, 7, 7]


def test_buckets_that_reach_too_far_are_refused() -> None:
    with pytest.raises(ValueError, match="8 buckets up to distance 2"):
        RelativeBias(2, num_buckets=8, max_distance=2)
