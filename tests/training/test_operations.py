"""Counted operations are those of the formulas: of products, of attention on real tokens, and never twice."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mmformer.nn import Attention, Transformer
from mmformer.nn.kernels import dense, grouped
from mmformer.nn.recompute import Recompute
from mmformer.training.operations import Operations, matmul_rate, product_dtype
from mmformer.visibility import Sights
from tests.helpers import packed_tokens
from tests.nn.test_recompute import DIM, rows, stack, step


def counted(work) -> int:
    with Operations() as counter:
        work()
    return counter.total


def test_a_linear_map_has_two_operations_a_weight_and_row_forward_and_four_backward():
    linear, x = nn.Linear(8, 16), torch.randn(5, 8, requires_grad=True)
    assert counted(lambda: linear(x)) == 2 * 5 * 8 * 16
    assert counted(lambda: linear(x).sum().backward()) == 3 * 2 * 5 * 8 * 16
    frozen = nn.Linear(8, 16).requires_grad_(False)
    assert counted(lambda: frozen(x).sum().backward()) == 2 * 2 * 5 * 8 * 16


def test_fused_attention_counts_on_a_cpu_as_it_does_elsewhere():
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    forward = 2 * 2 * 2 * 3 * 5 * 5 * 8  # two products of two operations each
    assert counted(lambda: F.scaled_dot_product_attention(q, q, q)) == forward
    # the backward pass computes the scores again
    assert counted(lambda: F.scaled_dot_product_attention(q, q, q).sum().backward()) == forward * 7 // 2


@pytest.mark.parametrize("plain", [False, True])
def test_of_a_packed_row_only_what_a_segment_sees_of_itself_counts(monkeypatch, plain):
    from mmformer.nn import kernels

    monkeypatch.setattr(kernels, "_plain_is_faster", lambda q, keys: plain)
    tokens = packed_tokens({0: 6, 1: 6, 2: 6}, 3, DIM)
    maps = 2 * 18 * DIM * 4 * DIM
    attention = Attention(DIM, 2, kernel=grouped)
    assert counted(lambda: attention(tokens, None, Sights(tokens, tokens))) == maps + 4 * 3 * 6 * 6 * DIM
    attention.kernel = dense
    assert counted(lambda: attention(tokens, None, Sights(tokens, tokens))) == maps + 4 * 18 * 18 * DIM


@pytest.mark.parametrize("way", [Recompute(), Recompute(every=2), Recompute(keep_products=True)])
def test_what_checkpointing_computes_again_does_not_count(way):
    module: Transformer = stack()
    assert counted(lambda: step(module, way, rows())) == counted(lambda: step(module, None, rows()))


def test_counting_changes_nothing():
    plain, module = step(stack(), None, rows()), stack()
    with Operations():
        found = step(module, None, rows())
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_compiled_code_stays_compiled_and_counts():
    linear, compiled = nn.Linear(8, 16), []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    module = torch.compile(linear, backend=backend)
    x = torch.randn(5, 8)
    module(x)
    assert counted(lambda: module(x)) == 2 * 5 * 8 * 16
    assert len(compiled) == 1


def test_the_rate_of_a_product_draws_no_number_of_the_run():
    before = torch.get_rng_state()
    assert matmul_rate(torch.device("cpu"), torch.float32) > 1e8
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16), (64, torch.float64)],
)
def test_products_are_computed_in_the_precision_of_the_run(precision, dtype):
    assert product_dtype(precision) == dtype
