"""A text that is written token by token has the logits of one that is read at once, whatever it is written about."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from mmformer.batch import Batch, Ragged
from mmformer.encoders import Encoder, Projection, TextEmbedder, image_patches, mel_patches
from mmformer.fusion import Cascade, Fusion, InOrder, Mapped, View
from mmformer.generation import Draft, Greedy, Limits, Writer, generate, rank
from mmformer.heads import VocabularyHead
from mmformer.model import Model
from mmformer.nn import Attention, Block, CrossAttention, Learned, LearnedGrid, Rotary, Sinusoid, Transformer
from mmformer.pooling import LastPool, MeanPool
from mmformer.tokens import LATENT
from mmformer.visibility import Visibility
from tests.helpers import random_batch, scramble

DIM, WORDS = 24, 50
CAUSAL = Visibility(causal=True)
SELF = partial(Attention, num_heads=3, num_kv_heads=1, rotary=Rotary)
WIDE = partial(Block, attention=SELF)
CROSS = partial(Block, attention=SELF, cross=partial(CrossAttention, num_heads=2))
TEXTED = [("text",), ("text", "image"), ("text", "audio"), ("text", "image", "audio")]


def stack(layer=WIDE, depth: int = 2, **options) -> Transformer:
    return Transformer(DIM, depth, [layer], **options)


def encoders(*stages: nn.Module) -> dict[str, nn.Module]:
    return {
        "text": Encoder(TextEmbedder(DIM, WORDS, Sinusoid), stages),
        "image": Encoder(image_patches(DIM, 4, 3, partial(LearnedGrid, num_positions=8)), [stack(depth=1)]),
        "audio": Encoder(mel_patches(DIM, 5, 4, Sinusoid)),
    }


def model(kind: str) -> Model:
    """A model that writes texts about pictures and sounds, all parameters random."""
    head = {"vocabulary": VocabularyHead(DIM, WORDS, tied="text")}
    pool, causal = MeanPool(), stack(visibility=CAUSAL)
    stages: list[nn.Module] = []
    views = None
    if kind == "prefix":
        fusion = Fusion(DIM, [LATENT, "image", "audio", "text"], causal, pool, num_latents=2, sequential=True)
    elif kind == "cross":
        fusion = Fusion(DIM, ["text"], stack(CROSS, visibility=CAUSAL), pool, context=["image", "audio"])
    elif kind == "tower and cross":  # CoCa: the text alone first
        stages = [stack(depth=1, visibility=CAUSAL), Projection(DIM, DIM)]
        fusion = Fusion(DIM, ["text"], stack(CROSS, visibility=CAUSAL), pool, context=["image", "audio"])
    elif kind == "soft prompt":  # BLIP-2: queries look at the picture, a language model counts its places over all
        queries = Fusion(DIM, [LATENT], stack(CROSS), pool, context=["image"], num_latents=3)
        entrance = nn.Sequential(Mapped(nn.Linear(DIM, DIM)), InOrder())
        placed = stack(visibility=CAUSAL, position=partial(Learned, num_positions=40))
        entrances = {"image": entrance, "text": nn.Identity()}
        fusion = Cascade(
            {"image": queries}, Fusion(DIM, ["image", "text"], placed, pool, entrances=entrances, sequential=True)
        )
    else:
        assert kind == "view"  # BLIP-2's first stage, whose own rule is not causal
        fusion = Fusion(DIM, [LATENT, "text"], stack(CROSS), pool, context=["image"], num_latents=3, sequential=True)
        views = {"caption": View(["text", "image"], LastPool(), CAUSAL)}
    return scramble(Model(encoders(*stages), fusion, head, views)).eval()


KINDS = {name: None for name in ("prefix", "cross", "tower and cross", "soft prompt")} | {"view": "caption"}


def samples(seed: int = 0, subsets=tuple(TEXTED)) -> Batch:
    return random_batch(9, seed, subsets)


def longer(batch: Batch, texts: list[list[int]]) -> Batch:
    """The same samples with more behind their last texts."""
    items, rows = [], []
    for row, more in enumerate(texts):
        own = [ids for at, ids in batch.inputs["text"].items() if at == row] if "text" in batch.inputs else []
        assert len(own) < 2
        if ids := [*(own[0].tolist() if own else []), *more]:
            items.append(torch.tensor(ids))
            rows.append(row)
    inputs = batch.inputs | {"text": Ragged.stack(items, rows)}
    return Batch(ids=batch.ids, inputs=inputs, indices=batch.indices)


def anew(model: Model, batch: Batch, source: str | None = None) -> torch.Tensor:
    """The logits behind each sample, by one pass over all of it."""
    encoded = model.encode(batch)
    if source is None:
        tokens = model.fuse(encoded)
    else:
        view = model.views[source]
        tokens = model.fuse(encoded.only(view.modalities), view.visibility)
    return model.heads["vocabulary"](LastPool()(tokens))


def agree(draft: Draft, model: Model, batch: Batch, source: str | None, steps: int = 4) -> None:
    written: list[list[int]] = [[] for _ in draft.names]
    torch.testing.assert_close(draft.scores, anew(model, batch, source), rtol=1e-5, atol=1e-5)
    for step in range(steps):
        ids = torch.randint(0, WORDS, (len(draft),), generator=torch.Generator().manual_seed(step))
        written = [[*text, id] for text, id in zip(written, ids.tolist(), strict=True)]
        draft = draft.extend(ids)
        torch.testing.assert_close(draft.scores, anew(model, longer(batch, written), source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_is_reading(kind):
    writes, batch = model(kind), samples()
    with torch.inference_mode():
        agree(Writer(model=writes, source=KINDS[kind]).read(batch), writes, batch, KINDS[kind])


@pytest.mark.parametrize("kind", ["prefix", "soft prompt"])
def test_a_text_can_begin_with_a_picture_or_a_sound_alone(kind):
    writes, batch = model(kind), samples(subsets=[("image",), ("text", "image"), ("image", "audio")])
    with torch.inference_mode():
        agree(Writer(model=writes).read(batch), writes, batch, None)
        no_text = batch.only(["image", "audio"])
        agree(Writer(model=writes).read(no_text), writes, no_text, None)


def test_a_language_model_without_a_fusion():
    writes = scramble(Model(encoders(stack(visibility=CAUSAL)), heads={"vocabulary": VocabularyHead(DIM, WORDS)}))
    batch = samples()
    draft = Writer(model=writes).read(batch)
    ids = torch.arange(9)
    tokens = writes.encode(longer(batch, [[id] for id in ids.tolist()]))["text"]
    torch.testing.assert_close(draft.extend(ids).scores, writes.heads["vocabulary"](LastPool()(tokens)))
    with pytest.raises(ValueError, match="no sample has a text to go on from"):
        Writer(model=writes).read(batch.only(["image"]))


def test_tokens_of_the_context_are_not_made_again():
    writes, batch = model("prefix"), samples()
    encoded = writes.encode(batch)
    expected = Writer(model=writes).read(batch).scores
    writes.encoders["image"].forward = None
    torch.testing.assert_close(Writer(model=writes).read(batch, encoded).scores, expected)


def dialogues(more: list[list[int]]) -> Batch:
    """Texts between pictures; sample 1 ends in a picture, and sample 2 has one text alone."""
    generator = torch.Generator().manual_seed(0)
    texts = [(0, 0, [4, 5, 6, 7]), (0, 2, [8, 9]), (1, 0, [3, 3, 3]), (2, 0, [7])]
    images = [(0, 1, 8), (1, 1, 4), (1, 2, 8)]
    texts = [(row, place, ids + (more[row] if (row, place) in {(0, 2), (2, 0)} else [])) for row, place, ids in texts]
    texts += [(1, 3, more[1])] if more[1] else []
    pictures = [torch.randint(0, 256, (side, 4, 3), generator=generator, dtype=torch.uint8) for _, _, side in images]
    rows, places, ids = zip(*texts, strict=True)
    inputs = {
        "text": Ragged.stack([torch.tensor(own) for own in ids], rows, places=places),
        "image": Ragged.stack(pictures, [row for row, *_ in images], 1, [place for _, place, _ in images]),
    }
    return Batch(ids=("a", "b", "c"), inputs=inputs)


LATEST = partial(CrossAttention, num_heads=2, visibility=Visibility(current=True))
JOINED = {
    "text last": (WIDE, {"stream": [LATENT, "image", "text"], "num_latents": 1}),
    "pictures last": (WIDE, {"stream": [LATENT, "text", "image"], "num_latents": 1}),
    "latest picture": (partial(Block, attention=SELF, cross=LATEST), {"stream": ["text"], "context": ["image"]}),
}


@pytest.mark.parametrize("joined", JOINED)
def test_texts_between_pictures_go_on_where_they_end(joined):
    tower = stack(depth=1, visibility=CAUSAL)
    layer, options = JOINED[joined]
    reader = stack(layer, visibility=CAUSAL)
    fusion = Fusion(DIM, transformer=reader, pool=MeanPool(), sequential=True, **options)
    writes = scramble(Model(encoders(tower), fusion, {"vocabulary": VocabularyHead(DIM, WORDS)}))
    written: list[list[int]] = [[], [], []]
    draft = Writer(model=writes).read(dialogues(written))
    assert draft.ids[0].tolist() == [4, 5, 6, 7, 8, 9]
    for ids in ([1, 2, 3], [11, 12, 13], [7, 7, 7]):
        written = [[*text, id] for text, id in zip(written, ids, strict=True)]
        draft = draft.extend(torch.tensor(ids))
        torch.testing.assert_close(draft.scores, anew(writes, dialogues(written)), rtol=1e-5, atol=1e-5)


def test_ranked_texts_have_the_log_likelihood_of_texts_that_are_read():
    writes, batch = model("cross"), samples()
    answers = [[1, 2], [3], [4, 5, 6, 7], [3, 9], [8]]
    draft = Writer(model=writes).read(batch)
    found = rank(draft, answers, at_once=7)
    for c, answer in enumerate(answers):
        expected, written = torch.zeros(9), [[] for _ in range(9)]
        for id in answer:
            expected = expected + anew(writes, longer(batch, written)).log_softmax(-1)[:, id]
            written = [[*text, id] for text in written]
        torch.testing.assert_close(found[:, c], expected, rtol=1e-5, atol=1e-4)
    few = rank(draft, answers, first=2)
    first = draft.scores[:, [answer[0] for answer in answers]]
    for row in range(9):
        kept = few[row] > -torch.inf
        assert set(kept.nonzero()[:, 0].tolist()) == set(first[row].topk(2).indices.tolist())
        torch.testing.assert_close(few[row][kept], found[row][kept])


def test_a_batch_of_samples_writes_what_each_writes_alone():
    writes, batch = model("prefix"), samples()
    limits = Limits(max_length=6, stop=(1, 2, 3))
    every = generate(writes, batch, limits, Greedy())
    for row in range(9):
        assert generate(writes, batch.select([row]), limits)[0][0].ids == every[row][0].ids


def test_errors_say_what_cannot_be_written():
    batch = samples()
    with pytest.raises(KeyError, match=r"no head 'words' to write with: this model has \['vocabulary'\]"):
        Writer(model=model("cross"), head="words")
    with pytest.raises(KeyError, match="no encoder of 'answer'"):
        Writer(model=model("cross"), modality="answer")
    with pytest.raises(ValueError, match="source 'image': name a view"):
        Writer(model=model("cross"), source="image")
    with pytest.raises(ValueError, match=r"not causal"):
        Writer(model=model("view")).read(batch)
    ahead = scramble(Model(encoders(stack()), model("cross").fusion, {"vocabulary": VocabularyHead(DIM, WORDS)}))
    with pytest.raises(ValueError, match=r"not causal"):
        Writer(model=ahead).read(batch)
    last = Fusion(DIM, ["text", "image"], stack(visibility=CAUSAL), MeanPool(), sequential=True)
    with pytest.raises(ValueError, match=r"the stream is \['text', 'image'\]: 'text' can be continued where it is the"):
        Writer(model=Model(encoders(), last, {"vocabulary": VocabularyHead(DIM, WORDS)})).read(batch)
    bare = samples(subsets=[("text",), ("image",)])
    with pytest.raises(ValueError, match="sample 'row-1' has no token for the first text token to follow"):
        Writer(model=model("cross")).read(bare)
    asks = Fusion(DIM, ["text"], stack(CROSS), MeanPool(), context=["image"])
    two = Cascade(
        {"image": asks}, Fusion(DIM, ["image", "text"], stack(visibility=CAUSAL), MeanPool(), sequential=True)
    )
    with pytest.raises(ValueError, match="the fusion that makes 'image' reads 'text', which is to be continued"):
        Writer(model=Model(encoders(), two, {"vocabulary": VocabularyHead(DIM, WORDS)})).read(batch)
    timeless = Fusion(DIM, ["image", "text"], stack(visibility=CAUSAL), MeanPool())
    draft = Writer(model=Model(encoders(), timeless, {"vocabulary": VocabularyHead(DIM, WORDS)})).read(
        samples(subsets=[("image",)])
    )
    with pytest.raises(ValueError, match=r"fusion.sequential: true"):
        draft.extend(torch.zeros(9, dtype=torch.long))
