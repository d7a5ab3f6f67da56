from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mmformer.checkpoints.load import load
from mmformer.checkpoints.plan import original
from mmformer.checkpoints.report import MisfitError
from mmformer.tokens import LATENT, modality_id
from tests.checkpoints.families.fused import WORDS, Pairs, into_its_class, moves, rows
from tests.checkpoints.families.visions import complete, epsilons, tensors
from tests.checkpoints.oracles import close, saved, scramble

transformers = pytest.importorskip("transformers", reason="the oracle: pip install mmformer[transformers]")

IMAGE = {
    "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 44, "image_size": 16,
    "patch_size": 4, "vocab_size": 37,
}  # fmt: skip
TEXT = {
    "hidden_size": 28, "num_hidden_layers": 2, "num_attention_heads": 7, "intermediate_size": 52, "vocab_size": WORDS,
    "max_position_embeddings": 15, "type_vocab_size": 3,
}  # fmt: skip
BOTH = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 34}
CODEBOOK = {"num_groups": 4, "hidden_size": 8, "num_blocks_per_group": 1, "vocab_size": 37}
HEADS = ("mim", "mlm", "mmm_image", "mmm_text")


def config(image=(), text=(), both=(), **options):
    return transformers.FlavaConfig(
        image_config={**IMAGE, **dict(image)},
        text_config={**TEXT, **dict(text)},
        multimodal_config={**BOTH, **dict(both)},
        image_codebook_config=CODEBOOK,
        hidden_size=BOTH["hidden_size"],
        **{"projection_dim": 18, **options},
    )


def pretraining(**options):
    """As wide everywhere, without which the reference cannot run its heads of fused tokens."""
    wide = {"hidden_size": BOTH["hidden_size"]}
    return transformers.FlavaForPreTraining(
        config(image=wide, text={**wide, "num_attention_heads": 4}, init_codebook=False, **options)
    )


def states_are_equal(loaded, reference, pairs: Pairs) -> None:
    """The states of all three Transformers, of the first two in front of their last norm and behind it."""
    model = loaded.model
    with torch.inference_mode():
        theirs = reference(input_ids=pairs.ids, pixel_values=pairs.pixels, attention_mask=pairs.mask)
        encoded = model.encode(pairs.batch)
        keep = pairs.mask.bool()
        image, text = (model.encoders[name] for name in ("image", "text"))
        ours = {name: torch.cat(rows(encoded[name])) for name in ("image", "text")}
        close(ours["image"], theirs.image_output.hidden_states[-1].flatten(0, 1))
        close(ours["text"], theirs.text_output.hidden_states[-1][keep])
        close(image.pool[1](ours["image"]), theirs.image_embeddings.flatten(0, 1))
        close(text.pool[1](ours["text"]), theirs.text_embeddings[keep])
        own = theirs.multimodal_embeddings.shape[1] - keep.shape[1]
        whole = torch.cat([torch.ones(len(keep), own, dtype=torch.bool), keep], 1)
        close(torch.cat(rows(model.fuse(encoded))), theirs.multimodal_embeddings[whole])
        hidden = torch.from_numpy(HIDDEN).view(5, 16)
        states = reference.image_model(pairs.pixels, bool_masked_pos=hidden, output_hidden_states=True).hidden_states
        close(torch.cat(rows(image(partly(pairs), len(pairs.batch)))), states[-1].flatten(0, 1))
        for head, source, output in (
            ("image_pooler", "image", theirs.image_output),
            ("text_pooler", "text", theirs.text_output),
            ("pooler", None, theirs.multimodal_output),
        ):
            close(model.output(encoded, head, source)[0], output.pooler_output)


def similarities(loaded, pairs: Pairs) -> torch.Tensor:
    encoded = loaded.model.encode(pairs.batch)
    image, text = (loaded.model.output(encoded, name, name)[0] for name in ("image", "text"))
    return loaded.objectives["contrastive"].log_scale.exp() * image @ text.T


HIDDEN = np.arange(5 * 16) % 3 == 0


def partly(pairs: Pairs):
    """The pictures with every third patch hidden."""
    return replace(pairs.batch.inputs["image"], hidden=HIDDEN)


def outputs(loaded, pairs: Pairs) -> list[torch.Tensor]:
    """Everything that the model says."""
    model, encoded = loaded.model, loaded.model.encode(pairs.batch)
    fused = model.fuse(encoded)
    outs = [fused.x, similarities(loaded, pairs), model.encoders["image"](partly(pairs), len(pairs.batch)).x]
    for name, source in (("image_pooler", "image"), ("text_pooler", "text"), ("pooler", None), ("match", None)):
        outs += [model.output(encoded, name, source)[0]] if name in model.heads else []
    for name, states in (
        ("mim", encoded["image"]),
        ("mlm", encoded["text"]),
        ("mmm_image", fused),
        ("mmm_text", fused),
    ):
        outs += [model.heads[name](states.x)] if name in model.heads else []
    return outs


VARIANTS = {
    "FlavaModel": {},
    "no class token of its own": {"both": {"use_cls_token": False}},
    "no qkv bias, other activations": {
        "image": {"qkv_bias": False, "hidden_act": "quick_gelu"}, "text": {"hidden_act": "gelu_new"},
        "both": {"hidden_act": "relu", "qkv_bias": False},
    },
}  # fmt: skip


@pytest.mark.parametrize("name", VARIANTS)
def test_flava_gives_what_the_reference_gives(name, tmp_path):
    reference = transformers.FlavaModel(config(**VARIANTS[name]))
    saved(scramble(reference), tmp_path)
    loaded = load(tmp_path)
    assert not loaded.report.of("ignored", "new", "copied", "resized", "missing")
    assert torch.equal(
        loaded.model.encoders["image"].embedder.mask.vector, reference.image_model.embeddings.mask_token[0, 0]
    )
    pairs = Pairs()
    states_are_equal(loaded, reference, pairs)
    assert epsilons(loaded.model) == epsilons(reference) == {1e-12}
    moves(loaded, *outputs(loaded, pairs))


def test_a_flava_without_a_token_for_hidden_patches_goes_back_bit_for_bit(tmp_path):
    reference = transformers.FlavaModel(config(image={"mask_token": False}))
    loaded = load(saved(scramble(reference), tmp_path))
    complete(loaded.report)
    into_its_class(loaded, reference, tmp_path)


def test_the_flava_inside_pre_training_gives_what_the_reference_gives(tmp_path):
    """All widths differ: the heads of fused tokens fit nothing, in transformers neither, and say so."""
    reference = transformers.FlavaForPreTraining(config())
    loaded = load(saved(scramble(reference), tmp_path))
    pairs = Pairs()
    states_are_equal(loaded, reference.flava, pairs)
    reasons = {item.name: line.note for line in loaded.report.of("ignored") for item in line.sources}
    held = load_file(tmp_path / "model.safetensors")
    assert set(reasons) == {
        name for name in held if name.startswith(("image_codebook.", "mmm_image_head.", "mmm_text_head."))
    }
    assert "makes the targets of hidden patches" in reasons["image_codebook.blocks.input.weight"]
    assert reasons["mmm_text_head.transform.dense.weight"].startswith("reads 28 channels, and the fused tokens have 24")
    poolers = {"image_pooler", "text_pooler", "pooler"}
    assert set(loaded.model.heads) == {"image", "text", *poolers, "mim", "mlm", "match"}
    moves(loaded, *outputs(loaded, pairs))


@pytest.mark.parametrize("bias", ["decoder.bias", "bias"])
def test_the_heads_of_pre_training_say_what_the_reference_says(bias, tmp_path):
    """transformers 5 saves the bias of a masked head as decoder.bias, versions before as bias."""
    reference = pretraining()
    saved(scramble(reference), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    assert {f"{name}_head.decoder.bias" for name in HEADS} <= set(held)
    if bias == "bias":
        held = {name.replace("head.decoder.bias", "head.bias"): tensor for name, tensor in held.items()}
        save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path)
    assert len(loaded.report.of("copied")) == 4  # the last norm of each tower, to its pool and its masked head
    pairs = Pairs()
    model, keep = loaded.model, pairs.mask.bool()
    ids, pixels, mask = pairs.ids, pairs.pixels, pairs.mask
    with torch.inference_mode():
        both = reference(ids, ids, pixels, attention_mask=mask, return_loss=False)
        words = reference(input_ids=ids, input_ids_masked=ids, attention_mask=mask, return_loss=False)
        patches = reference(pixel_values=pixels, return_loss=False)
        encoded = model.encode(pairs.batch)
        fused = rows(model.fuse(encoded))
        close(torch.cat([model.heads["mlm"](row) for row in rows(encoded["text"])]), words.mlm_logits[keep])
        close(torch.stack([model.heads["mim"](row) for row in rows(encoded["image"])]), patches.mim_logits)
        close(torch.cat([model.heads["mmm_text"](row[18:]) for row in fused]), both.mmm_text_logits[keep])
        close(torch.stack([model.heads["mmm_image"](row[2:18]) for row in fused]), both.mmm_image_logits)
        close(model.output(encoded, "match")[0], both.itm_logits)
        close(similarities(loaded, pairs), both.contrastive_logits_per_image)
    moves(loaded, *outputs(loaded, pairs))


def test_pre_training_goes_back_bit_for_bit(tmp_path):
    saved(scramble(pretraining()), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    loaded = load(tmp_path)
    made = original(tensors(loaded), loaded.family.rules(loaded.described))
    assert made.keys() == held.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in made.items())
    with torch.no_grad():
        loaded.model.heads["mlm"].transform[0].bias.add_(1)
    with pytest.raises(ValueError, match="these tensors are one in the original, but they differ"):
        original(tensors(loaded), loaded.family.rules(loaded.described))


def test_a_file_with_both_biases_takes_the_one_that_the_reference_computes_with(tmp_path):
    reference = pretraining()
    saved(scramble(reference), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held |= {f"{name}_head.bias": torch.zeros_like(held[f"{name}_head.decoder.bias"]) for name in HEADS}
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path)
    assert torch.equal(loaded.model.heads["mim"].out.bias, held["mim_head.decoder.bias"])
    assert {line.note for line in loaded.report.of("ignored") if line.sources[0].name.endswith("head.bias")} == {
        "decoder.bias is the one in use"
    }


def test_the_fused_tokens_do_not_read_behind_the_last_norm_of_a_tower(tmp_path):
    """The trap of FLAVA: `last_hidden_state` in the place of the last hidden state is far off, and the bar sees it."""
    reference = transformers.FlavaModel(config())
    loaded = load(saved(scramble(reference), tmp_path))
    pairs = Pairs()
    for encoder in loaded.model.encoders.values():
        encoder.stages[0].norm = encoder.pool[1]
    with torch.inference_mode():
        theirs = reference(input_ids=pairs.ids, pixel_values=pairs.pixels, attention_mask=pairs.mask)
        ours = torch.stack([row[0] for row in rows(loaded.model.fuse(loaded.model.encode(pairs.batch)))])
    with pytest.raises(AssertionError, match="differs by"):
        close(ours, theirs.multimodal_embeddings[:, 0])


def test_the_norms_of_the_texts_stand_in_front_of_the_branches(tmp_path):
    """The other trap: its embeddings are BERT's, its layers are not."""
    reference = transformers.FlavaModel(config())
    loaded = load(saved(scramble(reference), tmp_path))
    pairs = Pairs()
    stack = loaded.model.encoders["text"].stages[0]
    assert [layer.post_norm for layer in stack.layers] == [False, False]
    for layer in stack.layers:
        layer.post_norm = True
    with torch.inference_mode():
        theirs = reference(input_ids=pairs.ids, pixel_values=pairs.pixels, attention_mask=pairs.mask)
        ours = torch.cat(rows(loaded.model.encode(pairs.batch)["text"]))
    with pytest.raises(AssertionError, match="differs by"):
        close(ours, theirs.text_output.hidden_states[-1][pairs.mask.bool()])


def test_the_stream_is_a_class_token_the_picture_and_the_text_and_a_sample_may_lack_one(tmp_path):
    loaded = load(saved(scramble(transformers.FlavaModel(config())), tmp_path))
    pairs = Pairs()
    with torch.inference_mode():
        fused = loaded.model.fuse(loaded.model.encode(pairs.batch))
        alone = loaded.model.fuse(loaded.model.encode(pairs.batch.only(["text"])))
    kinds = [modality_id(name) for name in (LATENT, "image", "text")]
    row = fused.modality[0, : fused.layout.lengths[0]]
    assert row.tolist() == [kinds[0]] + [kinds[1]] * 17 + [kinds[2]]
    assert sorted(alone.layout.lengths) == sorted(len(text) + 1 for text in pairs.texts)


def test_one_tower_loads_as_a_part(tmp_path):
    whole = load(saved(scramble(pretraining()), tmp_path))
    for name in ("image", "text"):
        tower = load(tmp_path, part=f"encoders.{name}")
        assert tower.report.ok
        wanted = whole.model.encoders[name].state_dict()
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in tower.model.state_dict().items())


def test_configs_of_2022_leave_out_what_goes_without_saying(tmp_path):
    usual = {"intermediate_size": 3072, "num_attention_heads": 12, "hidden_size": 24}
    reference = transformers.FlavaModel(config(both=usual))
    saved(scramble(reference), tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    for name in ("intermediate_size", "num_attention_heads", "hidden_act", "layer_norm_eps", "qkv_bias"):
        del said["multimodal_config"][name]
    said |= {"text_config_dict": said["text_config"], "text_config": {"hidden_size": 99}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    states_are_equal(load(tmp_path), reference, Pairs())


@pytest.mark.parametrize(
    "name",
    ["flava.logit_scale", "flava.multimodal_model.cls_token", "flava.text_to_mm_projection.bias",
     "flava.text_model.layernorm.weight", "flava.image_model.encoder.layer.1.attention.attention.key.weight",
     "mlm_head.transform.dense.weight", "itm_head.pooler.dense.bias", "flava.image_model.pooler.dense.bias"],
)  # fmt: skip
def test_a_missing_tensor_is_named(name, tmp_path):
    saved(scramble(pretraining()), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held[name]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MisfitError, match=name.replace(".", r"\.")):
        load(tmp_path)
