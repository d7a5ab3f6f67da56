from __future__ import annotations

import numpy as np
import torch

from mmformer.objectives import Classes, Number
from mmformer.report import read_predictions, write_predictions
from mmformer.report.collect import Collector
from mmformer.training.evaluation import Evaluation
from tests.helpers import random_batch, small_model

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
