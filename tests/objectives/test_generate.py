"""What is written is judged by the true text, of which the model has not seen more than the prompt."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from mmformer.batch import Batch, Ragged
from mmformer.encoders import Encoder, TextEmbedder, image_patches
from mmformer.fusion import Fusion
from mmformer.generation import Beam, Greedy, Limits, Writer
from mmformer.heads import VocabularyHead
from mmformer.model import Model
from mmformer.nn import Attention, Block, LearnedGrid, Rotary, Transformer
from mmformer.objectives import Generates
from mmformer.pooling import MeanPool
from mmformer.training.evaluation import Evaluation
from mmformer.visibility import Visibility
from tests.helpers import scramble

DIM, WORDS, START, STOP = 12, 20, 3, 2
LIMITS = Limits(max_length=5, stop=(STOP,))


def model() -> Model:
    layer = partial(Block, attention=partial(Attention, num_heads=2, rotary=Rotary))
    fusion = Fusion(
        DIM, ["image", "text"], Transformer(DIM, 2, [layer], visibility=Visibility(causal=True)), MeanPool(),
        sequential=True,
    )  # fmt: skip
    encoders = {
        "image": Encoder(image_patches(DIM, 4, 3, partial(LearnedGrid, num_positions=4))),
        "text": Encoder(TextEmbedder(DIM, WORDS)),
    }
    return scramble(Model(encoders, fusion, {"vocabulary": VocabularyHead(DIM, WORDS, tied="text")})).eval()


def batch(texts: list[list[int] | None], places=(), **more) -> Batch:
    generator = torch.Generator().manual_seed(0)
    rows = [row for row, ids in enumerate(texts) if ids is not None]
    images = torch.randint(0, 256, (2, 4, 8, 3), generator=generator, dtype=torch.uint8)
    return Batch(
        ids=tuple(f"row-{row}" for row in range(len(texts))),
        inputs={
            "text": Ragged.stack([torch.tensor(texts[row]) for row in rows], rows),
            "image": Ragged.stack(list(images), [0, 2], 1),
        },
        **more,
    )


def written(model: Model, given: Batch, prompts: list[list[int]]) -> list[list[int]]:
    """What the model writes behind each prompt, by reading all anew for each token."""
    texts = [list(prompt) for prompt in prompts]
    for row, prompt in enumerate(prompts):
        for _ in range(LIMITS.max_length):
            one = given.select([row])
            one.inputs["text"] = Ragged.stack([torch.tensor(texts[row])], [0])
            scores = Writer(model=model).read(one).scores
            texts[row].append(int(scores.argmax()))
            if texts[row][-1] == STOP:
                break
        texts[row] = [id for id in texts[row][len(prompt) :] if id != STOP]
    return texts


def rows(ids: torch.Tensor) -> list[list[int]]:
    """The ids of each sample's only turn."""
    assert ids.shape[1] == 1
    return [[id for id in row if id >= 0] for (row,) in ids.tolist()]


@torch.no_grad()
def test_each_turn_is_written_behind_the_true_ones_before_it():
    writes = model()
    prompts = [[5, START], [8, 8, START], [4, START]]
    wanted = written(writes, batch([*prompts]), prompts)
    second = [*prompts[0], *wanted[0], STOP, 7, START]
    wanted += written(writes, batch([second, None, [1]]), [second])
    wanted[1] = [*wanted[1][:1], 19]  # one answer is another
    texts = [[*second, *wanted[3], STOP], *([*prompts[i], *wanted[i], STOP] for i in (1, 2))]
    given = batch([*texts, [5, 6, 7], None])  # nothing to answer, and nothing at all
    objective = Generates("vocabulary", LIMITS, start=START)
    encoded = writes.encode(given)
    assert objective(writes, encoded, given) == {}
    found = objective.predict(writes, encoded, given)
    assert found["present"].tolist() == [[True, True], [True, False], [True, False], [False] * 2, [False] * 2]
    at = [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert [rows(found["wanted"][row, turn][None, None])[0] for row, turn in at] == wanted
    said = [rows(found["ids"][row, turn][None, None])[0] for row, turn in at]
    assert said == written(writes, batch([*prompts]), prompts) + wanted[3:]
    assert said[1] != wanted[1]
    meter = objective.meter()
    meter.update(found, given)
    meter.update(objective.predict(writes, encoded.only(["image"]), given.only(["image"])), given)
    assert meter.compute() == {"exact": 3 / 4}
    assert objective.meter().compute() == {}


@torch.no_grad()
def test_a_turn_does_not_see_pictures_that_come_later():
    writes = model()
    images = list(torch.randint(0, 256, (2, 4, 8, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8))
    texts = [[6, START, 9, STOP], [5, START, 4, STOP]]

    def talk(count: int) -> Batch:
        """A picture and a turn about it, so many times."""
        held = {
            "text": Ragged.stack([torch.tensor(ids) for ids in texts[:count]], [0] * count, places=[1, 3][:count]),
            "image": Ragged.stack(images[:count], [0] * count, 1, places=[0, 2][:count]),
        }
        return Batch(ids=("talk",), inputs=held)

    objective = Generates("vocabulary", LIMITS, start=START)
    whole, first = (objective.predict(writes, writes.encode(talk(n)), talk(n)) for n in (2, 1))
    assert whole["present"].tolist() == [[True, True]]
    assert rows(whole["ids"][:, :1]) == rows(first["ids"])
    last = talk(2)
    last.inputs["text"] = Ragged.stack([torch.tensor(texts[0]), torch.tensor([5, START])], [0, 0], places=[1, 3])
    draft = Writer(model=writes).read(last)
    (found,) = Greedy()(draft, LIMITS)
    assert rows(whole["ids"][:, 1:]) == [list(found[0].ids)]


@torch.no_grad()
def test_captions_follow_the_first_token():
    writes, given = model(), batch([[1, 5, 6, STOP], [1, 4], [9, 8]])
    found = Generates("vocabulary", LIMITS).predict(writes, writes.encode(given), given)
    assert rows(found["wanted"]) == [[5, 6], [4], [8]]
    assert rows(found["ids"]) == written(writes, given, [[1], [1], [9]])


@pytest.mark.parametrize("where", ["inputs", "targets"])
@torch.no_grad()
def test_the_wanted_text_may_be_another_input_or_a_target(where):
    writes, given = model(), batch([[5, 6, STOP], [7], [8]])
    answers = [[9, 4, STOP], [6, STOP], []]
    if where == "inputs":
        given.inputs["answer"] = Ragged.stack([torch.tensor(ids) for ids in answers[:2]], [0, 1])
    else:
        given.targets["answer"] = torch.tensor([[9, 4, STOP], [6, STOP, -100], [-100] * 3])
    objective = Generates("vocabulary", LIMITS, answer="answer", search=Beam(width=2))
    found = objective.predict(writes, writes.encode(given), given)
    assert rows(found["wanted"]) == [[9, 4], [6], []]
    assert found["present"].tolist() == [[True], [True], [False]]
    with pytest.raises(KeyError, match="no input or target 'caption'"):
        Generates("vocabulary", LIMITS, answer="caption").predict(writes, writes.encode(given), given)


@torch.no_grad()
def test_an_evaluation_judges_the_subsets_that_have_a_text():
    writes = model()
    given = batch([[5, START, 9], [8, START, 4], [4, START, 1]])
    objectives = {"answer": Generates("vocabulary", LIMITS, start=START)}
    evaluation = Evaluation(objectives, list(writes.encoders), by_subset=True)
    evaluation.update(list(evaluation.judge(objectives, writes, writes.encode(given), given)))
    assert set(evaluation.compute()) == {"exact", "exact_t", "exact_ti"}


def test_it_has_no_state():
    assert not nn.ModuleList([Generates("vocabulary", LIMITS)]).state_dict()
