import pytest
import torch

from mmformer.losses.matching import excluded
from mmformer.model import Encoded
from mmformer.objectives import Matching
from mmformer.objectives.objective import Objective
from mmformer.objectives.rerank import PairMeter, match_scores, rerank
from mmformer.tokens import take
from tests.helpers import random_batch
from tests.objectives.alignment import cross_model

PAIR = ["text", "image"]
BOTH = (("text", "image"),)


def table(values):
    """A judge that looks its scores up."""
    return lambda rows, columns: torch.stack([values[row, column] for row, column in zip(rows, columns, strict=True)])


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("top", [1, 3, 5, 9])
def test_the_best_keys_stand_in_front_in_the_order_of_the_judge(top, share):
    scores, judged = torch.randn(4, 5), torch.randn(4, 5)
    out = rerank(scores, table(judged), top, share)
    for i in range(4):
        order = sorted(range(5), key=lambda j: -float(scores[i, j]))
        front = sorted(order[:top], key=lambda j: -float(judged[i, j] + share * scores[i, j]))
        assert out[i].argsort(descending=True).tolist() == front + order[top:]


def test_nothing_is_ranked_anew_without_a_key():
    scores = torch.randn(3, 2)
    assert torch.equal(rerank(scores, table(scores), 0), scores)
    assert rerank(scores[:0], table(scores), 2).shape == (0, 2)


def test_pairs_are_scored_one_by_one_whatever_the_chunk():
    model, batch = cross_model(), random_batch(6, subsets=BOTH)
    encoded = model.encode(batch)
    samples = {"text": [0, 3, 3, 5, 1], "image": [2, 2, 0, 5, 4]}
    wanted = [
        model.output(Encoded({name: take(encoded[name], [samples[name][i]]) for name in PAIR}, 1), "match")[0][0, 1]
        for i in range(5)
    ]
    for chunk in (2, 100):
        torch.testing.assert_close(match_scores(model, "match", encoded, samples, chunk), torch.stack(wanted))
    assert len(match_scores(model, "match", encoded, {"text": [], "image": []})) == 0


def slow_recall(similar, judged, top, cut):
    """ALBEF's evaluation: of each query the nearest `top` keys, sorted by the judge."""
    hits = 0
    for i in range(len(similar)):
        order = similar[i].argsort(descending=True).tolist()
        order = sorted(order[:top], key=lambda j: -float(judged[i, j])) + order[top:]
        hits += i in order[:cut]
    return hits / len(similar)


@torch.no_grad()
def test_the_meter_ranks_a_split_of_several_batches_anew():
    model, objective = cross_model(), Matching(PAIR, "match", excluded, top=4)
    objective.eval()
    batches = [random_batch(9, seed) for seed in (1, 2)]  # some samples lack one of the two, or both
    predictions = [objective.predict(model, model.encode(batch), batch) for batch in batches]
    meter = objective.meter()
    for prediction, batch in zip(predictions, batches, strict=True):
        meter.update(prediction, batch)
    found = meter.compute()

    parts = [batch.select([i for i, has in enumerate(batch.present()) if has >= set(PAIR)]) for batch in batches]
    encoded = [model.encode(part) for part in parts]
    places = [(b, i) for b, part in enumerate(parts) for i in range(len(part))]
    rows = {name: torch.cat([model.output(e, name, name)[0] for e in encoded]) for name in PAIR}
    judged = torch.zeros(len(places), len(places))
    for t, (one, i) in enumerate(places):
        for m, (other, j) in enumerate(places):
            pair = {"text": take(encoded[one]["text"], [i]), "image": take(encoded[other]["image"], [j])}
            judged[t, m] = model.output(Encoded(pair, 1), "match")[0][0, 1]
    similar = rows["text"] @ rows["image"].T
    for cut in (1, 5):
        assert found[f"rerank_t2i_r@{cut}"] == slow_recall(similar, judged, 4, cut)
        assert found[f"rerank_i2t_r@{cut}"] == slow_recall(similar.T, judged.T, 4, cut)
    assert found["rerank_r@1"] == pytest.approx((found["rerank_t2i_r@1"] + found["rerank_i2t_r@1"]) / 2)

    plain = PairMeter([("text", "image")])
    for prediction, batch in zip(predictions, batches, strict=True):
        plain.update(prediction, batch)
    assert plain.compute()["t2i_r@1"] == slow_recall(similar, judged, 0, 1)


def test_nothing_is_kept_for_a_ranking_that_is_not_wanted():
    model, batch = cross_model(), random_batch(4, subsets=BOTH)
    objective: Objective = Matching(PAIR, "match", excluded, top=0)
    assert objective.predict(model, model.encode(batch), batch) == {}
    assert objective.meter() is None
    assert PairMeter([("text", "image")]).compute() == {}


def test_a_model_that_is_gone_is_an_error():
    model, batch = cross_model(), random_batch(4, subsets=BOTH)
    objective = Matching(PAIR, "match", excluded, top=2)
    prediction = objective.predict(model, model.encode(batch), batch)
    meter = objective.meter()
    meter.update(prediction, batch)
    del model
    with pytest.raises(ValueError, match="the model that made the predictions is gone"):
        meter.compute()
