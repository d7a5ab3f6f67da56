from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from mmformer.datasets.tokenizers import ByteTokenizer
from mmformer.heads import UnitHead
from mmformer.model import Model
from mmformer.objectives import CTC, Classes, Contrastive, Generates, Number, info_nce
from mmformer.report import read_predictions, write_predictions
from mmformer.report.collect import Collector
from mmformer.report.predictions import read_retrieval
from mmformer.training.evaluation import Evaluation
from tests.helpers import random_batch, small_model
from tests.objectives import test_generate as writing

LABELS = ["a", "b", "c", "d", "e", "f", "g"]


def test_what_is_collected_gives_the_metrics_of_the_meters(tmp_path):
    model = small_model()
    objectives = {"answer": Classes(head="answer", target="label"), "other": Number(head="answer", target="none")}
    evaluation = Evaluation({"answer": objectives["answer"]}, list(model.encoders), by_subset=True)
    collector = Collector(objectives)
    for seed in range(3):
        batch = random_batch(seed=seed)
        batch = type(batch)(ids=tuple(f"{seed}-{id}" for id in batch.ids), inputs=batch.inputs, targets=batch.targets)
        with torch.inference_mode():
            judged = list(evaluation.judge({"answer": objectives["answer"]}, model, model.encode(batch), batch))
        evaluation.update(judged)
        for part in judged:
            collector.update(*part)
    metrics = evaluation.compute()
    write_predictions(tmp_path, collector.answers(), LABELS)
    said = read_predictions(tmp_path)
    assert said is not None
    assert set(said.subsets) == {"t", "i", "a", "ti", "ta", "ia", "tia"}
    for subset in ["", *said.subsets]:
        name = f"acc_{subset}" if subset else "acc"
        assert np.nanmean(said.scores(subset)) == metrics[name], name


def test_repeated_samples_count_once():
    batch = random_batch(size=4)
    collector = Collector({"answer": Classes(head="answer", target="label")})
    logits = torch.arange(28.0).view(4, 7)
    for turn in range(2):
        collector.update("answer", "", {"logits": logits + turn, "present": torch.ones(4).bool()}, batch)
        collector.update("else", "", {"logits": logits - 1, "present": torch.ones(4).bool()}, batch)
    answers = collector.answers()[""]
    assert answers.ids == batch.ids
    np.testing.assert_array_equal(answers.outputs, logits.numpy())


def test_an_objective_without_a_target_leaves_nothing():
    collector = Collector({})
    collector.update("match", "", {"image": torch.ones(4, 3)}, random_batch(size=4))
    assert collector.answers() == {}
    assert collector.retrieved() == {}


def test_what_is_retrieved_gives_the_metrics_of_the_meter(tmp_path):
    objective = Contrastive(["text", "image", "audio"], info_nce, scale=10.0)
    model = Model(dict(small_model().encoders), None, {name: UnitHead(24, 4) for name in objective.modalities})
    evaluation = Evaluation({"match": objective}, list(model.encoders), by_subset=True)
    collector = Collector({"match": objective})
    for seed in range(3):
        batch = random_batch(seed=seed, size=21)
        batch = replace(batch, ids=tuple(f"{seed}-{id}" for id in batch.ids))
        with torch.inference_mode():
            judged = list(evaluation.judge({"match": objective}, model, model.encode(batch), batch))
        assert [subset for _, subset, _, _ in judged] == [""], "no embedding depends on the sample's other modalities"
        evaluation.update(judged)
        for part in judged:
            collector.update(*part)
    metrics = evaluation.compute()
    write_predictions(tmp_path, collector.answers(), retrieved=collector.retrieved())
    said = read_retrieval(tmp_path)
    assert said is not None
    assert read_predictions(tmp_path) is None
    assert dict(said.directions) == {
        "t2i": ("text", "image"), "t2a": ("text", "audio"), "i2t": ("image", "text"),
        "i2a": ("image", "audio"), "a2t": ("audio", "text"), "a2i": ("audio", "image"),
    }  # fmt: skip
    for direction in said.directions:
        ranks = said.ranks(direction)
        assert np.isnan(ranks).any()
        assert np.nanmean(ranks[~np.isnan(ranks)] <= 5) == metrics[f"{direction}_r@5"]
        for row, rank in zip(said.rows(range(len(said))), ranks, strict=True):
            found = row[f"found_{direction}"]
            assert (found is None) == np.isnan(rank)
            if found:
                assert (row["id"] == found[0]["id"]) == (rank == 1)
                assert [hit["score"] for hit in found] == sorted((hit["score"] for hit in found), reverse=True)


def test_what_is_written_gives_the_metrics_of_the_meter_and_is_read_again(tmp_path):
    """Of two talks, one of them of two turns; each number is an id of the bytes' tokenizer."""
    writes, decode = writing.model(), ByteTokenizer().decode
    objective = Generates("vocabulary", writing.LIMITS, start=writing.START)
    given = writing.batch([[5, 3, 9, 2, 8, 3, 7, 2], [8, 3, 4, 2], [9, 9], None])
    evaluation = Evaluation({"say": objective}, list(writes.encoders), by_subset=True)
    collector = Collector({"say": objective})
    with torch.inference_mode():
        judged = list(evaluation.judge({"say": objective}, writes, writes.encode(given), given))
    evaluation.update(judged)
    for part in [*judged, judged[0]]:  # once more, as in the last batch of several processes
        collector.update(*part)
    texts = collector.texts(decode)
    assert collector.answers() == {}
    assert texts[""].ids == ("row-0", "row-1")
    assert texts[""].wanted == ([decode([9]), decode([7])], [decode([4])])
    write_predictions(tmp_path, texts)
    said = read_predictions(tmp_path)
    assert (said.kind, said.labels, set(said.subsets)) == ("Texts", (), {"t", "ti"})
    assert said.column("prediction") == list(texts[""].written)
    right, turns = said.counts("exact").sum(0)
    assert evaluation.compute()["exact"] == right / turns
    assert turns == 3


def test_what_is_heard_is_a_text_too():
    collector = Collector({"hear": CTC("letters", blank=0)})
    batch = random_batch(size=3)
    ids, wanted = torch.tensor([[5, 6, -1], [7, -1, -1], [-1] * 3]), torch.tensor([[5, 6], [8, -1], [-2, -1]])
    collector.update("hear", "", {"ids": ids, "wanted": wanted}, batch)
    texts = collector.texts(lambda ids: "".join(map(str, ids)))[""]
    assert (texts.ids, texts.written, texts.wanted) == (batch.ids[:2], (["56"], ["7"]), (["56"], ["8"]))
