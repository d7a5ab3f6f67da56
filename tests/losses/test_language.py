import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmformer.losses import language
from mmformer.losses.language import answer_mask, linear_token_loss, next_token_loss, token_loss


@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=9), min_size=1, max_size=4))
def test_answer_mask_is_that_of_the_slow_form(texts):
    ids = torch.tensor([i for text in texts for i in text])
    first = torch.tensor([sum(map(len, texts[:k])) for k, text in enumerate(texts) for _ in text])
    wanted = []
    for text in texts:
        on = False
        for i in text:
            wanted.append(on)
            on = (on or i == 0) and i != 1
    assert answer_mask(ids, first, 0, 1).tolist() == wanted


def test_no_text_at_all_has_no_mask():
    assert answer_mask(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long), 0, 1).shape == (0,)


def test_the_plain_form_is_the_shifted_cross_entropy_of_language_models():
    logits, ids = torch.randn(3, 7, 11, requires_grad=True), torch.randint(0, 11, (3, 7))
    trained = torch.rand(3, 7) > 0.4
    labels = torch.where(trained, ids, -100)  # as transformers' decoders shift them
    expected = F.cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), label_smoothing=0.1)
    torch.testing.assert_close(next_token_loss(logits, ids, trained, 0.1), expected)
    assert next_token_loss(logits, ids, torch.zeros_like(trained)) == 0


def test_the_loss_of_gpt2_is_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason="the oracle of next tokens")
    config = transformers.GPT2Config(vocab_size=31, n_positions=12, n_embd=16, n_layer=1, n_head=2, use_cache=False)
    theirs = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(0, 31, (4, 9))
    output = theirs(input_ids=ids, labels=ids)
    torch.testing.assert_close(next_token_loss(output.logits, ids, torch.ones_like(ids).bool()), output.loss)


def test_the_two_marks_must_differ():
    with pytest.raises(ValueError, match="start and end are both id 7"):
        answer_mask(torch.zeros(2, dtype=torch.long), torch.zeros(2, dtype=torch.long), 7, 7)


def linear_case(rows: int, words: int, dtype: torch.dtype = torch.float32, bias: bool = True):
    x, weight = torch.randn(rows, 12, dtype=dtype), torch.randn(words, 12, dtype=dtype) * 0.5
    ids = torch.randint(0, words, (rows,))
    ids[torch.rand(rows) < 0.2] = -100
    given = [x, weight, torch.randn(words, dtype=dtype)] if bias else [x, weight]
    return [t.requires_grad_() for t in given], ids


def both(leaves, ids, smoothing):
    """Loss and gradients, part by part and with all scores."""
    x, weight, bias = leaves if len(leaves) == 3 else (*leaves, None)
    found = []
    for loss in (
        linear_token_loss(x, weight, bias, ids, smoothing),
        token_loss(F.linear(x, weight, bias), ids, smoothing),
    ):
        found.append([loss, *torch.autograd.grad(loss * 0.37, leaves)])
    return zip(*found, strict=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "parts"), [(0, 8), (1, 8), (37, 8), (40, 8), (40, 1000)])
def test_scores_in_parts_give_the_loss_of_all(monkeypatch, rows, parts, smoothing, bias):
    monkeypatch.setattr(language, "_ROWS", parts)
    monkeypatch.setattr(language, "_SCORES", 1)
    for found, expected in both(*linear_case(rows, 50, bias=bias), smoothing):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_scores_in_parts_in_64_bits_and_far_from_zero(monkeypatch):
    monkeypatch.setattr(language, "_ROWS", 7)
    monkeypatch.setattr(language, "_SCORES", 1)
    leaves, ids = linear_case(30, 50, torch.float64)
    with torch.no_grad():
        leaves[1].mul_(100)
    x, weight, bias = leaves
    loss = linear_token_loss(x, weight, bias, ids, 0.2)
    expected = F.cross_entropy(F.linear(x, weight, bias), ids, label_smoothing=0.2, reduction="sum")
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for found, wanted in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("autocast", [False, True])
def test_scores_in_parts_in_bf16(monkeypatch, autocast):
    monkeypatch.setattr(language, "_ROWS", 16)
    monkeypatch.setattr(language, "_SCORES", 1)
    leaves, ids = linear_case(60, 50, torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        pairs = list(both(leaves, ids, 0.1))
    for found, expected in pairs:
        assert found.dtype == expected.dtype
        error = (found.double() - expected.double()).norm() / expected.double().norm()
        assert error < 1e-2


def test_scores_in_parts_make_only_the_gradients_that_are_wanted():
    (x, weight, bias), ids = linear_case(20, 50)
    weight.requires_grad_(False)
    loss = linear_token_loss(x, weight, bias, ids)
    assert len(loss.grad_fn.saved_tensors) == 2
    loss.backward()
    assert weight.grad is None
    with torch.no_grad():
        assert linear_token_loss(x, weight, bias, ids) == loss
    with pytest.raises(RuntimeError, match=r"second time|inplace"):
        loss.backward()
