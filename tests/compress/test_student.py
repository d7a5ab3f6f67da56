import pytest
import torch

from mmformer.checkpoints import load_model, save_model
from mmformer.compress.prune import Plan, masked
from mmformer.compress.sites import Layers
from mmformer.compress.student import narrower, shallower
from mmformer.compress.vocabulary import fewer_words, occurrences
from mmformer.heads import VocabularyHead
from tests.compress.models import batch_of, saved_model
from tests.compress.test_prune import answers, sites_of


def test_a_shallower_student_is_its_teacher_without_some_layers():
    saved, batch = saved_model(), batch_of(9)
    student = shallower(saved, {"fusion.transformer": 1, "encoders.image.stages.0": 1})
    layers = tuple(site for site in sites_of(saved) if isinstance(site, Layers))
    with masked(saved.model, Plan(layers, tuple((1,) for _ in layers), 1.0, 0.5, "layers")):
        wanted = answers(saved.model, batch)
    for name, values in answers(student.model, batch).items():
        torch.testing.assert_close(values, wanted[name], rtol=1e-4, atol=1e-5)
    assert student.config["model"]["fusion"]["transformer"]["depth"] == 1


def test_a_narrower_student_has_the_largest_channels_of_its_teacher(tmp_path):
    saved, batch = saved_model(), batch_of(9)
    with torch.no_grad():  # six channels that hardly anything writes or reads
        for p in saved.model.parameters():
            for axis, size in enumerate(p.shape):
                if size == 24:
                    p.movedim(axis, 0)[[1, 5, 8, 13, 17, 22]] *= 1e-3
    student = narrower(saved, 18)
    kept = [i for i in range(24) if i not in (1, 5, 8, 13, 17, 22)]
    theirs = saved.model.state_dict()
    mine = student.model.state_dict()
    assert torch.equal(mine["fusion.latents"], theirs["fusion.latents"][:, kept])
    assert torch.equal(
        mine["fusion.transformer.layers.1.attention.qkv.weight"],
        theirs["fusion.transformer.layers.1.attention.qkv.weight"][:, kept],
    )
    assert torch.equal(mine["heads.answer.out.bias"], theirs["heads.answer.out.bias"])
    assert answers(student.model, batch)["answer"].shape == (9, 7)
    save_model(tmp_path / "model", student.model, student.config, None, student.objectives)
    again = load_model(tmp_path / "model")
    assert torch.equal(answers(again.model, batch)["answer"], answers(student.model, batch)["answer"])


def test_words_that_hardly_occur_share_a_row(tmp_path):
    saved, batch = saved_model(), batch_of(9)
    counts = occurrences([batch], "text", 50)
    assert int(counts.sum()) == len(batch.inputs["text"].values)
    fewer = fewer_words(saved, counts, 2)
    kept = (counts >= 2) | (torch.arange(50) < 2)  # 0 and 1 are special
    table = saved.model.encoders["text"].embedder.table.weight
    with torch.no_grad():
        table[~kept] = table[~kept].mean(0)
    wanted = answers(saved.model, batch)
    for name, values in answers(fewer.model, batch).items():
        torch.testing.assert_close(values, wanted[name], rtol=1e-5, atol=1e-6)
    assert fewer.model.encoders["text"].embedder.table.weight.shape == (int(kept.sum()) + 1, 24)
    save_model(tmp_path / "model", fewer.model, fewer.config, None, fewer.objectives)
    again = load_model(tmp_path / "model")
    assert torch.equal(answers(again.model, batch)["answer"], answers(fewer.model, batch)["answer"])
    answers(again.model, batch)["answer"].sum().backward()
    assert again.model.encoders["text"].embedder.table.weight.grad.any()
    with pytest.raises(ValueError, match="no TextEmbedder with a row for each word"):
        fewer_words(again, counts, 3)


def test_mistakes_are_named():
    saved = saved_model()
    with pytest.raises(ValueError, match=r"'fusion' is no Transformer of several layers: there are"):
        shallower(saved, {"fusion": 1})
    with pytest.raises(ValueError, match="has 2 layers, and 3 are to stay"):
        shallower(saved, {"fusion.transformer": 3})
    with pytest.raises(ValueError, match=r"have \[24\] channels: 24 must be below"):
        narrower(saved, 24)
    with pytest.raises(ValueError, match="occur less than 1 times: nothing to cut"):
        fewer_words(saved, torch.ones(50, dtype=torch.long), 1)
    saved.model.heads["words"] = VocabularyHead(24, 50)
    with pytest.raises(ValueError, match=r"the heads \['words'\] score all words"):
        fewer_words(saved, torch.zeros(50, dtype=torch.long), 1)
