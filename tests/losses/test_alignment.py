import torch
from torch import nn

from mmformer.losses.alignment import ctc_losses, greedy

WORDS = 12


def test_a_text_too_long_for_its_sound_counts_as_nothing():
    logits = torch.randn(2, 3, WORDS, requires_grad=True)
    losses = ctc_losses(logits, [3, 2], torch.tensor([1, 2, 4, 5, 6]), [2, 3], 0)
    losses.sum().backward()
    assert losses[1] == 0
    assert losses[0] > 0
    assert logits.grad is not None
    assert logits.grad[1].abs().sum() == 0


def test_greedy_joins_runs_and_leaves_out_blanks():
    said = torch.tensor([0, 3, 3, 0, 3, 5, 5, 0])
    assert greedy(nn.functional.one_hot(said, WORDS).float(), 0) == [3, 3, 5]
    assert greedy(torch.empty(0, WORDS), 0) == []
