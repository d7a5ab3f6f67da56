import pytest
import torch
from torch import nn

from mmformer.batch import Batch, Ragged
from mmformer.encoders import Encoder, mel_patches
from mmformer.heads import VocabularyHead
from mmformer.losses.alignment import greedy
from mmformer.model import Model
from mmformer.objectives import CTC
from tests.helpers import scramble

WORDS, SPACE = 12, 5


def speech() -> tuple[Model, Batch]:
    """Sounds of unequal lengths with texts; sample 2 lacks the text, sample 3 the sound; sample 4 has two texts."""
    generator = torch.Generator().manual_seed(0)
    sounds = [torch.randn(4 * n, 5, generator=generator) for n in (9, 7, 5, 12)]
    texts = [torch.tensor(ids) for ids in ([3, 3, 5, 4], [7], [1, 2], [6, 5], [8])]
    batch = Batch(
        ids=tuple("abcde"),
        inputs={
            "audio": Ragged.stack(sounds, [0, 1, 2, 4], 1, [0, 0, 0, 0]),
            "text": Ragged.stack(texts, [0, 1, 3, 4, 4], 0, [1, 1, 0, 1, 2]),
        },
    )
    model = Model({"audio": Encoder(mel_patches(16, 5, 4))}, heads={"letters": VocabularyHead(16, WORDS)})
    scramble(model)
    return model, batch


WANTED = {0: [3, 3, 5, 4], 1: [7], 4: [6, 5, 8]}


def slow(model: Model, batch: Batch) -> torch.Tensor:
    """Each sample on its own through torch's loss, whose mean divides by the length of the text."""
    losses = []
    for row, ids in WANTED.items():
        alone = batch.select([row])
        logits = model.heads["letters"](model.encode(alone)["audio"].x[0])
        scores = logits.log_softmax(-1)[:, None]
        losses.append(nn.CTCLoss(blank=0)(scores, torch.tensor([ids]), [len(scores)], [len(ids)]))
    return torch.stack(losses).mean()


def test_the_loss_and_its_gradient_are_those_of_torch_sample_by_sample():
    model, batch = speech()
    loss = CTC("letters", blank=0)(model, model.encode(batch), batch)["loss"]
    loss.backward()
    got = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = slow(model, batch)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    assert len(got) == 4
    for name, p in model.named_parameters():
        torch.testing.assert_close(got[name], p.grad, rtol=1e-5, atol=1e-6)


def test_half_precision_gives_about_the_same_loss():
    model, batch = speech()
    with torch.autocast("cpu", torch.bfloat16):
        loss = CTC("letters", blank=0)(model, model.encode(batch), batch)["loss"]
    torch.testing.assert_close(loss, slow(model, batch), rtol=0.05, atol=0.05)


def test_predictions_and_error_rates():
    model, batch = speech()
    objective = CTC("letters", blank=0, space=SPACE)
    found = objective.predict(model, model.encode(batch), batch)
    assert found["wanted"].tolist() == [
        [3, 3, 5, 4],
        [7, -1, -1, -1],
        [-2, -1, -1, -1],
        [-2, -1, -1, -1],
        [6, 5, 8, -1],
    ]
    logits = model.heads["letters"](model.encode(batch.select([1]))["audio"].x[0])
    assert [i for i in found["ids"][1].tolist() if i >= 0] == greedy(logits, 0)
    meter = objective.meter()
    said = torch.tensor([[3, 5, 4, -1], [7, 7, -1, -1], [1, -1, -1, -1], [-1, -1, -1, -1], [6, 5, 8, -1]])
    meter.update({"ids": said, "wanted": found["wanted"]}, batch)
    assert meter.compute() == pytest.approx({"cer": 2 / 8, "wer": 2 / 5})
    assert CTC("letters", blank=0).meter().compute() == {}


def test_a_batch_without_sounds_or_texts_has_no_loss():
    model, batch = speech()
    for left in ("audio", "text"):
        part = batch.only([left])
        assert CTC("letters", blank=0)(model, model.encode(part), part) == {}


def test_a_wrong_head_is_told():
    model, batch = speech()
    with pytest.raises(KeyError, match="no head 'words'"):
        CTC("words", blank=0)(model, model.encode(batch), batch)
