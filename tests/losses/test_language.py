import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmformer.losses.language import answer_mask, next_token_loss


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
