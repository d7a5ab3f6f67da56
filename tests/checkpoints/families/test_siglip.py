from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmformer.checkpoints.build import build
from mmformer.checkpoints.load import load
from mmformer.checkpoints.report import MisfitError
from tests.checkpoints.families.visions import Shown, epsilons, goes_back, gradients_flow, loaded_from, png
from tests.checkpoints.oracles import batch, close, hidden, saved, scramble

transformers = pytest.importorskip("transformers", reason="the oracle: pip install mmformer[transformers]")

PAD, BEGIN, END, WORDS, LENGTH = 1, 57, 58, 61, 11
TEXT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": WORDS,
    "max_position_embeddings": LENGTH, "bos_token_id": BEGIN, "eos_token_id": END, "projection_size": 20,
}  # fmt: skip
VISION = {
    "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 44, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip


def siglip_config(text=(), vision=(), **options):
    towers = {"text_config": {**TEXT, **dict(text)}, "vision_config": {**VISION, **dict(vision)}}
    return transformers.SiglipConfig(**towers, **options)


def siglip_model(**options):
    model = transformers.SiglipModel(siglip_config(**options))
    nn.init.constant_(model.logit_scale, 1.3)
    nn.init.constant_(model.logit_bias, -2.4)
    return model


def texts(lengths=(4, 9, LENGTH)) -> Tensor:
    """Ids of several lengths, padded to one: what is padding is read like all else."""
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(3, BEGIN, (length,), generator=generator) for length in lengths]
    return torch.stack([nn.functional.pad(row, (0, LENGTH - len(row)), value=PAD) for row in rows])


def both(side: int = 16):
    """Texts, pictures for a reference, and a batch: a convolution never sees what lies behind the last whole patch."""
    items = texts()
    shown, whole = Shown(side, side, count=len(items)), side // 4 * 4
    return items, shown.pixels, batch(len(items), image=shown.images[:, :whole, :whole], text=list(items))


def logits(loaded, inputs) -> Tensor:
    """Scores of each text (row) with each picture, as the objective computes them."""
    with torch.inference_mode():
        encoded = loaded.model.encode(inputs)
        image, text = (loaded.model.output(encoded, name, name)[0] for name in ("image", "text"))
        objective = loaded.objectives["contrastive"]
        return objective.log_scale.exp() * text @ image.T + objective.bias


@pytest.mark.parametrize("side", [16, 18])  # patches do not divide 18, as they do not 384 in the largest SigLIP
def test_transformers_siglip_gives_what_the_reference_gives(side, tmp_path):
    reference = siglip_model(vision={"image_size": side})
    loaded = loaded_from(reference, tmp_path)
    items, images, inputs = both(side)
    with torch.inference_mode():
        theirs = reference(items, images, return_loss=True)
        close(logits(loaded, inputs), theirs.logits_per_text)
        close(torch.stack(hidden(loaded.model, inputs, "text")), theirs.text_model_output.last_hidden_state)
        close(torch.stack(hidden(loaded.model, inputs, "image")), theirs.vision_model_output.last_hidden_state)
        encoded = loaded.model.encode(inputs)
        close(loaded.model.summary(encoded, "image")[0], theirs.vision_model_output.pooler_output)
        pooled = loaded.model.heads["text"].out(loaded.model.summary(encoded, "text")[0])
        close(pooled, theirs.text_model_output.pooler_output)
        (loss,) = loaded.objectives["contrastive"](loaded.model, encoded, inputs).values()
        close(loss, theirs.loss)  # a sum over all pairs, divided by the rows
    assert epsilons(loaded.model) == {1e-6}
    assert build(loaded.described.features["image"]).shape(png(30, 40)) == (16, 16)
    gradients_flow(loaded, inputs)
    again = transformers.SiglipModel(reference.config)
    again.load_state_dict(goes_back(loaded, load_file(tmp_path / "model.safetensors")))


def test_texts_of_several_lengths_in_one_batch_are_each_read_alone(tmp_path):
    reference = siglip_model()
    loaded = loaded_from(reference, tmp_path)
    items = [row[:length] for row, length in zip(texts(), (4, 9, LENGTH), strict=True)]
    inputs = batch(3, text=items)
    with torch.inference_mode():
        theirs = [reference.text_model(item[None]) for item in items]
        pooled = loaded.model.heads["text"].out(loaded.model.summary(loaded.model.encode(inputs), "text")[0])
    close(torch.cat(hidden(loaded.model, inputs, "text")).detach(), torch.cat([t.last_hidden_state[0] for t in theirs]))
    close(pooled, torch.cat([t.pooler_output for t in theirs]))


@pytest.mark.parametrize("kind", ["SiglipVisionModel", "SiglipTextModel"])
def test_one_tower_alone_loads(kind, tmp_path):
    name = "image" if "Vision" in kind else "text"
    config = siglip_config().vision_config if name == "image" else siglip_config().text_config
    reference = getattr(transformers, kind)(config)
    loaded = loaded_from(reference, tmp_path)
    items, images, inputs = both()
    with torch.inference_mode():
        theirs = reference(images if name == "image" else items).pooler_output
        ours = loaded.model.output(loaded.model.encode(inputs), name, name)[0]
    close(ours, nn.functional.normalize(theirs, dim=-1))
    goes_back(loaded, load_file(tmp_path / "model.safetensors"))


def test_a_classifier_reads_the_mean_and_not_the_pool(tmp_path):
    reference = transformers.SiglipForImageClassification(siglip_config(num_labels=7))
    loaded = load(saved(scramble(reference), tmp_path))
    assert loaded.report.ok
    assert {line.note for line in loaded.report.of("ignored")} == {
        "a classifier reads the mean of the patches, which this pool does not give"
    }
    shown = Shown(16, 16)
    with torch.inference_mode():
        close(shown.output(loaded, "label"), reference(shown.pixels).logits)
    other = load(tmp_path, options={"num_classes": 4})
    assert [item.name for line in other.report.of("new") for item in line.targets] == [
        "heads.label.weight", "heads.label.bias",
    ]  # fmt: skip
    assert shown.output(other, "label").shape == (3, 4)


def test_a_tower_without_its_pool_gives_tokens(tmp_path):
    reference = transformers.SiglipVisionModel(siglip_config(vision={"vision_use_head": False}).vision_config)
    loaded = loaded_from(reference, tmp_path)
    shown = Shown(16, 16)
    with torch.inference_mode():
        close(shown.tokens(loaded), reference(shown.pixels).last_hidden_state)
    assert not loaded.model.heads


def test_pictures_of_another_size_interpolate_positions_as_the_reference_does(tmp_path):
    reference = scramble(siglip_model())
    loaded = load(saved(reference, tmp_path), options={"image_size": 24})
    items, images, inputs = both(24)
    with torch.inference_mode():
        theirs = reference(items, images, interpolate_pos_encoding=True)
    close(logits(loaded, inputs), theirs.logits_per_text)


def test_old_files_hold_buffers(tmp_path):
    saved(scramble(siglip_model()), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["vision_model.embeddings.position_ids"] = torch.arange(16)[None]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    report = load(tmp_path).report
    assert [line.note for line in report.of("ignored")] == ["counts places, which needs no tensor"]


@pytest.mark.parametrize("name", ["logit_bias", "vision_model.head.probe", "vision_model.head.attention.in_proj_weight",
                                  "text_model.head.bias"])  # fmt: skip
def test_a_missing_tensor_is_named(name, tmp_path):
    saved(scramble(siglip_model()), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held[name]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MisfitError, match=name.replace(".", r"\.")):
        load(tmp_path)


def test_the_bar_sees_a_pool_that_is_cut_wrongly(tmp_path):
    """Its one map of queries, keys and values is two here: a key in the place of the value must not pass."""
    loaded = loaded_from(siglip_model(), tmp_path)
    shown = Shown(16, 16)
    right = shown.pooled(loaded)
    key_value = loaded.model.encoders["image"].pool.attention.key_value
    with torch.no_grad():
        key_value.weight.copy_(torch.cat(key_value.weight.chunk(2)[::-1]))
    with pytest.raises(AssertionError, match="differs by"):
        close(shown.pooled(loaded), right)
