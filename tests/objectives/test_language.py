from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from mmformer.batch import Batch, Ragged
from mmformer.encoders import Encoder, TextEmbedder, image_patches
from mmformer.fusion import Fusion
from mmformer.heads import VocabularyHead
from mmformer.losses.language import token_loss
from mmformer.model import Model
from mmformer.nn import Attention, Block, Rotary, Transformer
from mmformer.objectives import NextToken
from mmformer.pooling import LastPool
from mmformer.tokens import merge, modality_id, to_padded
from mmformer.visibility import Visibility
from tests.helpers import scramble

START, END, WORDS = 48, 49, 50


def dialogue(size=5, seed=0) -> Batch:
    """Text, picture, text, sometimes a second picture and text; sample 3 has a text alone, sample 4 a picture alone."""
    generator = torch.Generator().manual_seed(seed)
    texts, pictures = [], []
    for row in range(size):
        kinds = {3: "t", 4: "i"}.get(row, "titit" if row % 2 else "tit")
        for place, kind in enumerate(kinds):
            if kind == "t":
                length = int(torch.randint(2, 7, (), generator=generator))
                ids = torch.randint(0, 47, (length,), generator=generator)
                ids[torch.randint(0, length, (), generator=generator)] = START if place else END
                texts.append((ids, row, place))
            else:
                shape = (4 * int(torch.randint(1, 4, (), generator=generator)), 8, 3)
                pictures.append((torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8), row, place))

    def stack(items, dims):
        return Ragged.stack([i[0] for i in items], [i[1] for i in items], dims, [i[2] for i in items])

    return Batch(
        ids=tuple(map(str, range(size))),
        inputs={"text": stack(texts, 0), "image": stack(pictures, 1)},
        indices=tuple(range(size)),
    )


def model(dim=24) -> Model:
    layer = partial(Block, attention=partial(Attention, num_heads=3, rotary=Rotary))
    encoders = {"text": Encoder(TextEmbedder(dim, WORDS)), "image": Encoder(image_patches(dim, 4, 3))}
    stack = Transformer(dim, 2, [layer], visibility=Visibility(causal=True))
    fusion = Fusion(dim, ["image", "text"], stack, LastPool(), sequential=True)
    built = Model(encoders, fusion, {"words": VocabularyHead(dim, WORDS)})
    scramble(built)
    return built


def texts_in_order(batch: Batch) -> dict[int, torch.Tensor]:
    """The slow form: the ids of each sample, by place."""
    held = {row: [] for row in range(len(batch))}
    for (row, item), place in zip(batch.inputs["text"].items(), batch.inputs["text"].places, strict=True):
        held[row].append((place, item))
    return {row: torch.cat([i for _, i in sorted(p, key=lambda x: x[0])]) for row, p in held.items() if p}


def slow_loss(net: Model, batch: Batch, wanted, smoothing=0.0):
    """One sample after another, token after token, with plain cross-entropy."""
    losses = []
    for row, ids in texts_in_order(batch).items():
        alone = batch.select([row])
        tokens = net.fuse(net.encode(alone))
        stand = (tokens.modality[0] == modality_id("text")).nonzero()[:, 0].tolist()
        for k in wanted(ids.tolist()):
            logits = net.heads["words"](tokens.x[0, stand[k] - 1]).float()
            losses.append(F.cross_entropy(logits[None], ids[k : k + 1], label_smoothing=smoothing))
    return torch.stack(losses).mean()


def behind_start(ids: list[int]) -> list[int]:
    """The slow form of the prompt mask."""
    found, on = [], False
    for k, i in enumerate(ids):
        if on:
            found.append(k)
        on = (on or i == START) and i != END
    return found


def all_but_the_first(ids):
    return range(1, len(ids))


def all_behind_start(ids):
    return range(ids.index(START) + 1, len(ids)) if START in ids else []


@pytest.mark.parametrize(
    ("marks", "wanted"),
    [({}, all_but_the_first), ({"start": START, "end": END}, behind_start), ({"start": START}, all_behind_start)],
)
@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_that_of_the_slow_form_and_so_is_its_gradient(marks, wanted, padded, monkeypatch):
    net, batch = model(), dialogue()
    if padded:
        fuse = net.fuse
        monkeypatch.setattr(net, "fuse", lambda *given: to_padded(fuse(*given)))
    objective = NextToken("words", **marks, smoothing=0.1)
    loss = objective(net, net.encode(batch), batch)["loss"]
    loss.backward()
    got = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    monkeypatch.undo()
    expected = slow_loss(net, batch, wanted, smoothing=0.1)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for name, p in net.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(got[name], p.grad, rtol=2e-4, atol=2e-5)


def test_half_precision_gives_about_the_same_loss():
    net, batch = model(), dialogue()
    objective = NextToken("words")
    exact = objective(net, net.encode(batch), batch)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        loss = objective(net, net.encode(batch), batch)["loss"]
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.05, atol=0.05)


def test_the_vocabulary_is_scored_for_trained_tokens_alone():
    net, batch, rows = model(), dialogue(), []
    net.heads["words"].register_forward_hook(lambda part, given, out: rows.append(len(out)))
    NextToken("words", start=START, end=END)(net, net.encode(batch), batch)
    assert rows == [sum(len(behind_start(ids.tolist())) for ids in texts_in_order(batch).values())]


def test_a_token_is_not_predicted_from_what_follows_it():
    net, batch = model(), dialogue()
    objective = NextToken("words")
    logits, ids, sample = objective.scores(net, net.encode(batch), batch)
    text = batch.inputs["text"]
    last = max((place, i) for i, (row, place) in enumerate(zip(text.rows, text.places, strict=True)) if row == 1)[1]
    values, stop = text.values.clone(), sum(shape[0] for shape in text.shapes[: last + 1])
    values[stop - 1] = (values[stop - 1] + 1) % 40
    changed = Batch(ids=batch.ids, inputs=batch.inputs | {"text": replace(text, values=values)})
    again, fresh, _ = objective.scores(net, net.encode(changed), changed)
    torch.testing.assert_close(again, logits)  # the last token of a text is read off by none
    assert int((fresh != ids).sum()) == 1
    assert int(sample[(fresh != ids)]) == 1


def test_an_encoder_alone_is_a_language_model_of_each_text():
    layer = partial(Block, attention=partial(Attention, num_heads=2, rotary=Rotary))
    stack = Transformer(16, 1, [layer], visibility=Visibility(causal=True))
    net = Model({"text": Encoder(TextEmbedder(16, WORDS), [stack])}, heads={"words": VocabularyHead(16, WORDS)})
    scramble(net)
    texts = [torch.randint(0, 47, (length,)) for length in (5, 2, 1, 4)]
    batch = Batch(ids=tuple("abc"), inputs={"text": Ragged.stack(texts, [0, 2, 1, 2])})
    encoded = net.encode(batch)
    loss = NextToken("words", source="text")(net, encoded, batch)["loss"]
    total = torch.zeros(())
    for part, item in zip(encoded["text"].x[0].split([1, 2, 4, 5]), [texts[i] for i in (2, 1, 3, 0)], strict=True):
        total = total + token_loss(net.heads["words"](part[:-1]), item[1:])
    torch.testing.assert_close(loss, total / 8)


def test_a_batch_without_texts_has_no_loss_and_counts_for_nothing():
    net, batch = model(), dialogue().only(["image"])
    objective, meter = NextToken("words"), NextToken("words").meter()
    assert objective(net, net.encode(batch), batch) == {}
    meter.update(objective.predict(net, net.encode(batch), batch), batch)
    assert meter.compute() == {}


@torch.no_grad()
def test_predictions_are_means_of_a_sample_and_the_meter_weighs_them_by_tokens():
    net, batch = model(), dialogue()
    objective = NextToken("words")
    loss = objective(net, net.encode(batch), batch)["loss"]
    found = objective.predict(net, net.encode(batch), batch)
    assert found["tokens"][4] == 0
    assert found["log_likelihood"].isnan().tolist() == [False] * 4 + [True]
    meter = objective.meter()
    for rows in ([0, 1], [2, 3, 4]):
        meter.update({name: value[rows] for name, value in found.items()}, batch.select(rows))
    logits, ids, _ = objective.scores(net, net.encode(batch), batch)
    assert meter.compute() == pytest.approx(
        {"perplexity": float(loss.exp()), "token_acc": float((logits.argmax(-1) == ids).float().mean())}, rel=1e-5
    )


def test_wrong_names_and_marks_are_told():
    net, batch = model(), dialogue()
    with pytest.raises(KeyError, match="no head 'letters': this model has"):
        NextToken("letters")(net, net.encode(batch), batch)
    with pytest.raises(ValueError, match="end=3 without a start"):
        NextToken("words", end=3)
    with pytest.raises(ValueError, match="start and end are both id 7"):
        NextToken("words", start=7, end=7)(net, net.encode(batch), batch)


def test_interleaved_sequences_are_the_same_packed_and_padded():
    net, batch = model(), dialogue()
    encoded, fusion = net.encode(batch), net.fusion
    streams = [fusion.entrances[name](encoded[name]) for name in ("image", "text")]
    merged = merge(streams, sequential=True)
    packed, padded = fusion.transformer(merged), fusion.transformer(to_padded(merged))
    torch.testing.assert_close(to_padded(packed).x[padded.valid], padded.x[padded.valid], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.x, net.fuse(encoded).x)


def test_a_sample_does_not_see_its_batch_mates():
    net, batch = model(), dialogue()
    whole = to_padded(net.fuse(net.encode(batch)))
    for row in range(len(batch)):
        alone = net.fuse(net.encode(batch.select([row])))
        torch.testing.assert_close(alone.x[0], whole.x[row][whole.valid[row]], rtol=1e-5, atol=1e-5)


def test_many_scores_are_never_all_there(monkeypatch):
    from mmformer.objectives import language

    net, batch = model(), dialogue()
    objective = NextToken("words", smoothing=0.1)
    found = []
    for many in (2**24, 1):
        monkeypatch.setattr(language, "MANY_SCORES", many)
        net.zero_grad()
        loss = objective(net, net.encode(batch), batch)["loss"]
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert "LinearTokenLoss" in str(
        language.words_loss(net.heads["words"], torch.ones(2, 24), torch.ones(2).long()).grad_fn
    )
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_a_head_with_an_adapter_is_called_as_it_is(monkeypatch):
    from mmformer.objectives import language

    class Adapted(torch.nn.Linear):
        """Such as peft's."""

    monkeypatch.setattr(language, "MANY_SCORES", 1)
    head = VocabularyHead(24, WORDS)
    head.out = Adapted(24, WORDS)
    assert "LinearTokenLoss" not in str(language.words_loss(head, torch.ones(2, 24), torch.ones(2).long()).grad_fn)
