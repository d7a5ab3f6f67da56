"""A model that writes texts, as two programs: what they write is what the model writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmformer.datasets.dataset import collate
from mmformer.export import export
from mmformer.export.describe import describe
from mmformer.export.program import example
from mmformer.export.writing import Reading, Step, flatten, grows
from mmformer.runtime import Runtime
from mmformer.runtime.writing import step_of
from mmformer.writing import Writing
from tests.report.runs import picture_file
from tests.test_writing import predictor, words


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return predictor(tmp_path_factory.mktemp("writing"), words())


def test_steps_are_those_of_the_memory(trained):
    writing = Writing.of(trained.model, trained.objectives, trained.features, None)
    described = describe(trained.model, {"text": trained.features["text"]}, None, batch=1)
    reading = Reading(writing.writer, described)
    batch = writing.prompted(collate([{"text": "wh"}], trained.features))
    ids = next(item for _, item in batch.inputs["text"].items())
    with torch.inference_mode():
        draft = writing.writer.read(batch)
        memory, scores = reading.read((ids[None], torch.tensor([[len(ids)]])))
        torch.testing.assert_close(scores, draft.scores, rtol=1e-4, atol=1e-4)
        past = flatten(memory)
        step = Step(reading, reading.kept(memory), list(past))
        for place in range(len(ids), len(ids) + 4):
            draft = draft.extend(draft.scores.argmax(1))
            scores, *grown = step(draft.ids[:, -1:], torch.tensor([place]), *past.values())
            torch.testing.assert_close(scores, draft.scores, rtol=1e-4, atol=1e-4)
            past |= dict(zip(filter(grows, past), grown, strict=True))
    assert len(example(described)) == 2


@pytest.mark.traced
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_runner_writes_what_the_model_writes(trained, tmp_path: Path):
    pytest.importorskip("onnxscript", reason="ONNX files are an extra")
    pytest.importorskip("onnxruntime", reason="ONNX files are an extra")
    path = tmp_path / "say.onnx"
    (tmp_path / "a.png").write_bytes(picture_file(1, (12, 16)))
    samples = [{"text": "what is it?"}, {"image": tmp_path / "a.png"}, {"image": tmp_path / "a.png", "text": "so"}]
    done = export(trained, path, samples)
    assert [(compared.output, compared.agreement) for compared in done.compared] == [("texts", 1.0)]
    assert done.size == path.stat().st_size + step_of(path).stat().st_size
    runtime = Runtime(path, threads=1)
    assert runtime.generate(samples, 12) == trained.generate(samples, 12)
    assert runtime.generate(samples[0], 3) == trained.generate(samples[0], 3)
    with pytest.raises(ValueError, match="has no labels: use embed"):
        runtime.predict(samples)


def test_other_kinds_of_files_are_refused(trained, tmp_path):
    with pytest.raises(ValueError, match=r"a model that writes texts is exported as \.onnx"):
        export(trained, tmp_path / "say.pt2", [{"text": "what?"}])
