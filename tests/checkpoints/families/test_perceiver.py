from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmformer.batch import Batch, Ragged
from mmformer.checkpoints.build import build
from mmformer.checkpoints.load import load
from mmformer.checkpoints.plan import original
from mmformer.checkpoints.report import MisfitError
from mmformer.fusion import Cascade
from mmformer.nn import Looped
from tests.checkpoints.families.fused import WORDS, into_its_class, moves, reasons, rows, texts
from tests.checkpoints.families.visions import IMAGENET, complete, epsilons, png, tensors
from tests.checkpoints.oracles import batch, close, pictures, pixels, saved, scramble

transformers = pytest.importorskip("transformers", reason="the oracle: pip install mmformer[transformers]")


def config(**options):
    return transformers.PerceiverConfig(
        **{
            "num_latents": 7, "d_latents": 24, "d_model": 20, "num_blocks": 1, "num_self_attends_per_block": 3,
            "num_self_attention_heads": 6, "num_cross_attention_heads": 4, "vocab_size": WORDS,
            "max_position_embeddings": 15, "image_size": 6, "num_labels": 5, "self_attention_widening_factor": 3,
            "cross_attention_widening_factor": 2, **options,
        }
    )  # fmt: skip


def from_file(reference, folder, **options):
    loaded = load(saved(scramble(reference), folder), options=options)
    complete(loaded.report)
    return loaded


def latents(loaded, inputs: Batch) -> torch.Tensor:
    """Our latents of each sample."""
    model = loaded.model
    with torch.inference_mode():
        encoded = model.encode(inputs)
        (first,) = model.fusion.earlier.values() if isinstance(model.fusion, Cascade) else [model.fusion]
        return torch.stack(rows(first(encoded, encoded.num_samples)))


def vectors(channels: int, lengths=(4, 9, 1, 13, 9)) -> tuple[list[torch.Tensor], Batch]:
    generator = torch.Generator().manual_seed(5)
    items = [torch.randn(length, channels, generator=generator) for length in lengths]
    inputs = {"inputs": Ragged.stack(items, list(range(len(items))), 1)}
    return items, Batch(ids=tuple(map(str, range(len(items)))), inputs=inputs, indices=tuple(range(len(items))))


def all_moves(loaded, inputs: Batch) -> None:
    encoded = loaded.model.encode(inputs)
    states, pooled = loaded.model.fuse(encoded).x, loaded.model.summary(encoded)[0]
    moves(loaded, states, *(head(pooled) for head in loaded.model.heads.values()))


VARIANTS = {
    "channels of the inputs": {},
    "channels of the latents": {"cross_attention_shape_for_attention": "q"},
    "channels of their own": {"qk_channels": 12, "v_channels": 24},
    "three blocks of shared layers": {"num_blocks": 3, "hidden_act": "quick_gelu"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_latents_are_those_of_the_reference(name, tmp_path):
    reference = transformers.PerceiverModel(config(**VARIANTS[name]))
    loaded = from_file(reference, tmp_path)
    items, inputs = vectors(20)
    with torch.inference_mode():
        theirs = torch.cat([reference(item[None]).last_hidden_state for item in items])
    close(latents(loaded, inputs), theirs)
    # All norms, those of the config's layer_norm_eps of 1e-12 not: the reference does not read it.
    assert epsilons(loaded.model) == epsilons(reference) == {1e-5}
    all_moves(loaded, inputs)
    into_its_class(loaded, reference, tmp_path)
    saved_layout = json.loads(json.dumps(loaded.described.layout))  # as it lies beside a model that was trained on
    again = replace(loaded.described, layout=saved_layout)
    assert loaded.family.rules(again) == loaded.family.rules(loaded.described)


def test_blocks_share_their_layers(tmp_path):
    loaded = from_file(transformers.PerceiverModel(config(num_blocks=3)), tmp_path)
    _, loop = loaded.model.fusion.transformer.layers
    assert isinstance(loop, Looped)
    assert (loop.times, len(loop.layers)) == (3, 3)
    _, inputs = vectors(20)
    right = latents(loaded, inputs)
    loop.times = 1
    with pytest.raises(AssertionError, match="differs by"):
        close(latents(loaded, inputs), right)


def test_inputs_have_a_norm_of_their_own(tmp_path):
    """Two norms stand in front of the cross-attention: exchanged widths would fail, a missing one the bar sees."""
    reference = transformers.PerceiverModel(config())
    loaded = from_file(reference, tmp_path)
    first = loaded.model.fusion.transformer.layers[0]
    assert first.cross.norm.normalized_shape == (20,)
    assert first.cross_norm.normalized_shape == (24,)
    items, inputs = vectors(20)
    first.cross.norm = torch.nn.Identity()
    with torch.inference_mode(), pytest.raises(AssertionError, match="differs by"):
        close(latents(loaded, inputs), torch.cat([reference(item[None]).last_hidden_state for item in items]))


def test_texts_are_classified_as_the_reference_does(tmp_path):
    reference = transformers.PerceiverForSequenceClassification(config(num_blocks=2))
    loaded = from_file(reference, tmp_path)
    items = texts()
    inputs = batch(len(items), text=items)
    with torch.inference_mode():
        theirs = [reference(item[None]) for item in items]
        hidden = torch.cat([reference.perceiver(item[None]).last_hidden_state for item in items])
        close(latents(loaded, inputs), hidden)
        logits = loaded.model.output(loaded.model.encode(inputs), "label")[0]
        close(logits, torch.cat([output.logits for output in theirs]))
        width = max(map(len, items))
        rows_, mask = torch.zeros(len(items), width, dtype=torch.long), torch.zeros(len(items), width)
        for i, item in enumerate(items):
            rows_[i, : len(item)], mask[i, : len(item)] = item, 1
        close(logits, reference(rows_, attention_mask=mask).logits)  # what is behind the end has no part in it
    all_moves(loaded, inputs)
    into_its_class(loaded, reference, tmp_path)


def test_the_encoder_of_masked_words_gives_its_latents_and_leaves_the_decoder(tmp_path):
    """The layout of deepmind/language-perceiver: queries and keys have other channels than values."""
    reference = transformers.PerceiverForMaskedLM(config(d_model=40, qk_channels=12, v_channels=24))
    loaded = load(saved(scramble(reference), tmp_path))
    left, held = reasons(loaded), load_file(tmp_path / "model.safetensors")
    assert set(left) == {name for name in held if name.startswith(("perceiver.decoder.", "embedding_decoder."))}
    assert all("the latents are what comes out" in reason for reason in left.values())
    items = texts()
    inputs = batch(len(items), text=items)
    with torch.inference_mode():
        theirs = torch.cat([reference.perceiver(item[None]).last_hidden_state for item in items])
    close(latents(loaded, inputs), theirs)
    made = original(tensors(loaded), loaded.family.rules(loaded.described))
    assert made.keys() == held.keys() - left.keys()
    assert all(torch.equal(made[name], held[name]) for name in made)


@pytest.mark.parametrize("size", [6, 9])
def test_pictures_are_classified_as_the_reference_does(size, tmp_path):
    """Learned positions stand beside the pixels; at another size they are interpolated as in the reference."""
    reference = transformers.PerceiverForImageClassificationLearned(config())
    loaded = load(saved(scramble(reference), tmp_path), options={} if size == 6 else {"image_size": size})
    if size == 6:
        complete(loaded.report)
        into_its_class(loaded, reference, tmp_path)
    images = pictures(3, size, size)
    inputs, shown = batch(3, image=images), pixels(images, *IMAGENET)
    options = {"interpolate_pos_encoding": size != 6}
    with torch.inference_mode():
        close(latents(loaded, inputs), reference.perceiver(shown, **options).last_hidden_state)
        close(loaded.model.output(loaded.model.encode(inputs), "label")[0], reference(shown, **options).logits)
    all_moves(loaded, inputs)
    assert build(loaded.described.features["image"])(png(40, 30)).shape == (size, size, 3)


READY = {
    "PerceiverForImageClassificationFourier": {},
    "PerceiverForImageClassificationConvProcessing": {},
    "PerceiverForOpticalFlow": {"train_size": [4, 6]},
    "PerceiverForMultimodalAutoencoding": {
        "num_frames": 2, "audio_samples_per_frame": 16, "samples_per_patch": 4, "output_shape": [1, 2, 8, 8],
        "image_size": 8, "num_labels": 700,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", READY)
def test_inputs_that_no_encoder_makes_are_given_ready_made(name, tmp_path):
    reference = getattr(transformers, name)(config(num_cross_attention_heads=1, **READY[name]))
    loaded = load(saved(scramble(reference), tmp_path))
    whole = reference.perceiver
    channels = whole.input_preprocessor.num_channels
    items, inputs = vectors(channels)
    whole.input_preprocessor, whole.config.d_model = None, channels
    whole.decoder = whole.output_postprocessor = None
    with torch.inference_mode():
        theirs = torch.cat([whole(item[None]).last_hidden_state for item in items])
    close(latents(loaded, inputs), theirs)
    held = load_file(tmp_path / "model.safetensors")
    left = reasons(loaded)
    unread = [f"perceiver.{part}." for part in ("input_preprocessor", "decoder", "output_postprocessor")]
    unread = unread[:1] if "Classification" in name else unread
    assert set(left) == {key for key in held if key.startswith(tuple(unread))}
    assert ("label" in loaded.model.heads) == ("Classification" in name)


def test_a_decoder_of_ones_own_is_left_out(tmp_path):
    """A query's own heads, and whether a residual goes around it, are in no config."""
    places = {"trainable_position_encoding_kwargs": {"num_channels": 18, "index_dims": 3}}
    decoder = transformers.models.perceiver.modeling_perceiver.PerceiverBasicDecoder(
        config(), output_num_channels=5, num_channels=18, num_heads=2, output_index_dims=3, **places
    )
    loaded = load(saved(scramble(transformers.PerceiverModel(config(), decoder=decoder)), tmp_path))
    held = load_file(tmp_path / "model.safetensors")
    assert set(reasons(loaded)) == {name for name in held if name.startswith("decoder.")}


def test_latents_without_their_own_residual_are_refused(tmp_path):
    saved(scramble(transformers.PerceiverModel(config(use_query_residual=False))), tmp_path)
    with pytest.raises(ValueError, match="use_query_residual: False"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["perceiver.embeddings.latents", "perceiver.encoder.self_attends.1.attention.self.value.weight",
     "perceiver.encoder.cross_attention.attention.self.key.bias", "perceiver.input_preprocessor.embeddings.weight",
     "perceiver.input_preprocessor.position_embeddings.weight", "perceiver.decoder.decoder.final_layer.weight",
     "perceiver.decoder.decoder.output_position_encodings.position_embeddings"],
)  # fmt: skip
def test_a_missing_tensor_is_named(name, tmp_path):
    saved(scramble(transformers.PerceiverForSequenceClassification(config())), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held[name]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MisfitError, match=name.replace(".", r"\.")):
        load(tmp_path)
