import torch

from mmformer.objectives import NextToken, StartingWith
from mmformer.objectives.space import Space
from mmformer.objectives.starting import starting_with
from mmformer.visibility import Visibility
from tests.helpers import random_batch
from tests.objectives.alignment import query_model


def test_each_text_begins_with_the_other_id_and_goes_on_as_before():
    items = random_batch(9, subsets=[("text",)]).inputs["text"]
    before, after = dict(items.items()), dict(starting_with(items, 49).items())
    assert before.keys() == after.keys()
    for row, ids in after.items():
        assert ids[0] == 49
        assert torch.equal(ids[1:], before[row][1:])
        assert len(ids) == len(before[row])


def test_an_objective_reads_the_changed_texts_and_shares_what_others_left():
    model, batch = query_model(), random_batch(6, subsets=[("text", "image")])
    inner = NextToken("vocabulary", visibility=Visibility(causal=True))
    encoded = model.encode(batch)
    encoded.shared[Space] = "left by another"
    changed = StartingWith(inner, first=7)
    items = starting_with(batch.inputs["text"], 7)
    for row, (_, ids) in zip(items.rows, items.items(), strict=True):
        assert ids[0] == 7, row
    wanted = inner(model, model.encode(type(batch)(ids=batch.ids, inputs={**batch.inputs, "text": items})), batch)
    torch.testing.assert_close(changed(model, encoded, batch)["loss"], wanted["loss"])
    again, _ = changed.reread(model, encoded, batch)
    assert again.shared is encoded.shared
    without = random_batch(4, subsets=[("image",)])
    assert changed(model, model.encode(without), without) == {}
    assert changed.exported().first == 7
