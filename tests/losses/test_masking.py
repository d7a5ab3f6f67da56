import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmformer.losses.masking import Blocks, Scattered, code_losses, hide_words, patches, pixel_losses, standardized

SPECIAL, MASK, WORDS = (0, 1, 2), 3, 1000


def within(count: int, trials: int, share: float) -> bool:
    """Five standard deviations of a binomial."""
    return abs(count - trials * share) < 5 * (trials * share * (1 - share)) ** 0.5


def test_words_are_hidden_in_the_shares_of_bert_and_special_ids_never():
    ids = torch.randint(0, WORDS, (60_000,))
    shown, chosen = hide_words(ids, MASK, WORDS, SPECIAL)
    ordinary = ids > MASK
    masked, same = chosen & (shown == MASK), chosen & (shown == ids)
    replaced = chosen & ~masked & ~same
    hidden = int(chosen.sum())
    assert not chosen[~ordinary].any()
    assert torch.equal(shown[~chosen], ids[~chosen])
    assert (shown[replaced] > MASK).all()
    assert len(shown[replaced].unique()) > 500
    assert within(hidden, int(ordinary.sum()), 0.15)
    assert within(int(masked.sum()), hidden, 0.8)
    assert within(int(same.sum()), hidden, 0.1 + 0.1 / WORDS)


def test_half_of_the_words_can_be_hidden_and_a_seed_tells_which():
    ids = torch.full((10_000,), 7)
    assert within(int(hide_words(ids, MASK, WORDS, SPECIAL, 0.5)[1].sum()), len(ids), 0.5)
    found = [hide_words(ids, MASK, WORDS, SPECIAL, generator=torch.Generator().manual_seed(3))[0] for _ in range(2)]
    assert torch.equal(*found)


def test_a_text_of_special_ids_alone_hides_nothing():
    ids = torch.tensor([0, 1, 2, 3])
    shown, chosen = hide_words(ids, MASK, WORDS, SPECIAL, share=1.0)
    assert torch.equal(shown, ids)
    assert not chosen.any()


@pytest.mark.parametrize("choice", [Scattered(0.4), Blocks(0.4, 4), Scattered(0.99)])
@given(st.integers(1, 14), st.integers(1, 14))
def test_a_choice_hides_its_share_of_a_grid_and_leaves_some(choice, rows, columns):
    hidden = choice(rows, columns, None)
    count = rows * columns
    assert hidden.shape == (rows, columns)
    assert int(hidden.sum()) == min(max(1, round(choice.share * count)), count - 1)


def test_blocks_lie_together_and_scattered_cells_do_not():
    def neighbours(hidden):
        return int((hidden[1:] & hidden[:-1]).sum() + (hidden[:, 1:] & hidden[:, :-1]).sum())

    blocks = sum(neighbours(Blocks(0.4, 16)(14, 14, None)) for _ in range(20))
    scattered = sum(neighbours(Scattered(0.4)(14, 14, None)) for _ in range(20))
    assert blocks > 1.5 * scattered


def test_every_cell_is_hidden_about_as_often_as_any_other():
    total = torch.stack([Scattered(0.5)(4, 4, None).float() for _ in range(2000)]).sum(0)
    assert (total - 1000).abs().max() < 5 * 500**0.5


@pytest.mark.parametrize("norm", [True, False])
def test_pixels_are_those_of_vit_mae(norm):
    transformers = pytest.importorskip("transformers", reason="the oracle of masked pixels")
    config = transformers.ViTMAEConfig(
        image_size=16, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        decoder_hidden_size=8, decoder_num_hidden_layers=1, decoder_num_attention_heads=1, decoder_intermediate_size=8,
        norm_pix_loss=norm,
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config)
    pictures = torch.randn(3, 3, 16, 16)
    output = theirs(pictures)
    hidden = output.mask.bool()
    cells = patches(pictures.permute(0, 2, 3, 1), 4, 4)
    target = standardized(cells) if norm else cells
    loss = pixel_losses(output.logits[hidden], target[hidden]).mean()
    torch.testing.assert_close(loss, output.loss, rtol=1e-6, atol=0)
    mine, wanted = (torch.autograd.grad(value, output.logits, retain_graph=True)[0] for value in (loss, output.loss))
    torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-8)


def test_codes_are_cross_entropies_of_the_codebooks_side_by_side():
    logits, codes = (
        torch.randn(5, 7, requires_grad=True),
        torch.stack([torch.randint(0, 4, (5,)), torch.randint(0, 3, (5,))], 1),
    )
    expected = [
        (F.cross_entropy(a[None, :4], c[:1]) + F.cross_entropy(a[None, 4:], c[1:])) / 2
        for a, c in zip(logits, codes, strict=True)
    ]
    torch.testing.assert_close(code_losses(logits, codes, (4, 3)), torch.stack(expected))
    torch.testing.assert_close(
        code_losses(logits.bfloat16(), codes, (4, 3)), torch.stack(expected), rtol=0.05, atol=0.05
    )


def test_what_does_not_fit_is_told():
    with pytest.raises(ValueError, match=r"7 logits for codebooks of \[4, 4\] codes: give the head 8"):
        code_losses(torch.randn(2, 7), torch.zeros(2, 2, dtype=torch.long), (4, 4))
    with pytest.raises(ValueError, match="6 x 8 values do not divide into 4 x 4 cells"):
        patches(torch.randn(1, 6, 8, 3), 4, 4)
