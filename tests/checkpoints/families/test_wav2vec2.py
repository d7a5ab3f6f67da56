from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmformer.checkpoints.build import build
from mmformer.checkpoints.load import load
from mmformer.checkpoints.report import MisfitError
from mmformer.checkpoints.source import source_of
from tests.checkpoints.families.recordings import (
    all_close,
    complete,
    goes_back,
    goes_back_to,
    gradients_flow,
    heard,
    loaded_from,
    noise,
)
from tests.checkpoints.families.visions import epsilons
from tests.checkpoints.oracles import batch, close, saved, scramble

transformers = pytest.importorskip("transformers", reason="the oracle: pip install mmformer[transformers]")
components = pytest.importorskip("torchaudio.models", reason="the oracle: pip install torchaudio")

# Channels, heads, layers, kernels, groups, letters and classes are all different. Without masks there is no vector
# that stands for hidden frames.
SHAPE = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44, "vocab_size": 31,
    "conv_dim": [10, 14, 18], "conv_stride": [5, 2, 2], "conv_kernel": [10, 3, 2], "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 3, "mask_time_prob": 0.0,
}  # fmt: skip
STABLE = {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True}
CLIPS = noise(400, 33, 1203, 400, 250)
"""From one token of the convolutions to many, two of them of one length."""

VARIANTS = {
    "base": {},
    "stable": STABLE,
    "odd kernel, no groups": {"num_conv_pos_embeddings": 7, "num_conv_pos_embedding_groups": 1},
    "other norms and activations": {
        "layer_norm_eps": 1e-3, "feat_extract_norm": "layer", "hidden_act": "relu", "feat_extract_activation": "silu",
    },
    "stable behind one norm over time": {"do_stable_layer_norm": True, "conv_bias": True},
}  # fmt: skip


def made(kind: str, **changes):
    config = transformers.HubertConfig if kind.startswith("Hubert") else transformers.Wav2Vec2Config
    return getattr(transformers, kind)(config(**SHAPE | changes))


def theirs(reference, name: str = "last_hidden_state", clips=CLIPS) -> list[torch.Tensor]:
    with torch.inference_mode():
        return [reference(clip[None])[name][0] for clip in clips]


def letters(loaded) -> list[torch.Tensor]:
    return [loaded.model.heads["vocabulary"](states).detach() for states in heard(loaded, batch(5, audio=CLIPS))]


@pytest.mark.parametrize("kind", ["Wav2Vec2Model", "HubertModel"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_those_of_transformers(kind, variant, tmp_path) -> None:
    reference = made(kind, **VARIANTS[variant])
    loaded = loaded_from(reference, tmp_path)
    all_close(heard(loaded, batch(5, audio=CLIPS)), theirs(reference))
    assert epsilons(loaded.model) == epsilons(reference)
    goes_back_to(reference, loaded, tmp_path)
    gradients_flow(loaded, batch(5, audio=CLIPS))


def test_a_projection_without_a_norm(tmp_path) -> None:
    reference = made("HubertModel", feat_proj_layer_norm=False)
    loaded = loaded_from(reference, tmp_path)
    all_close(heard(loaded, batch(5, audio=CLIPS)), theirs(reference))


@pytest.mark.parametrize(("kind", "variant"), [("Wav2Vec2ForCTC", "base"), ("HubertForCTC", "stable")])
def test_letters_are_those_of_transformers(kind, variant, tmp_path) -> None:
    reference = made(kind, **VARIANTS[variant])
    loaded = loaded_from(reference, tmp_path)
    all_close(letters(loaded), theirs(reference, "logits"))
    goes_back_to(reference, loaded, tmp_path)
    gradients_flow(loaded, batch(5, audio=CLIPS))


@pytest.mark.parametrize("kind", ["Wav2Vec2ForSequenceClassification", "HubertForSequenceClassification"])
def test_classes_are_those_of_transformers(kind, tmp_path) -> None:
    reference = made(kind, classifier_proj_size=11, num_labels=7)
    loaded, clips = loaded_from(reference, tmp_path), batch(5, audio=CLIPS)
    with torch.inference_mode():
        close(
            loaded.model.output(loaded.model.encode(clips), "label", "audio")[0],
            torch.stack(theirs(reference, "logits")),
        )
    goes_back_to(reference, loaded, tmp_path)
    gradients_flow(loaded, clips, "label")

    other = load(tmp_path, options={"num_classes": 5})
    assert {item.name for line in other.report.of("new") for item in line.targets} == {
        "heads.label.weight",
        "heads.label.bias",
    }
    assert {line.note for line in other.report.of("ignored")} == {"num_classes asks for other classes"}


def test_a_norm_over_time_makes_a_padded_batch_of_the_reference_wrong_and_not_ours(tmp_path) -> None:
    reference = made("Wav2Vec2Model")
    loaded = loaded_from(reference, tmp_path)
    short, long = CLIPS[0], CLIPS[2]
    padded = torch.stack([torch.nn.functional.pad(short, (0, len(long) - len(short))), long])
    (alone,) = theirs(reference, clips=[short])
    mask = torch.arange(len(long)) < torch.tensor([[len(short)], [len(long)]])
    with torch.inference_mode():
        masked = reference(padded, attention_mask=mask.long()).last_hidden_state[0, : len(alone)]
    with pytest.raises(AssertionError, match="differs by"):
        close(masked, alone)
    close(heard(loaded, batch(2, audio=[short, long]))[0], alone)


def test_weights_normed_by_older_versions_of_torch_are_read_and_written(tmp_path) -> None:
    reference = scramble(made("Wav2Vec2ForCTC"))
    stored = load_file(saved(reference, tmp_path) / "model.safetensors")
    for new, old in (
        ("parametrizations.weight.original0", "weight_g"),
        ("parametrizations.weight.original1", "weight_v"),
    ):
        name = f"wav2vec2.encoder.pos_conv_embed.conv.{new}"
        stored[name.replace(new, old)] = stored.pop(name)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path)
    complete(loaded)
    all_close(letters(loaded), theirs(reference, "logits"))
    goes_back(loaded, stored)


def test_what_serves_pre_training_alone_is_left_with_the_reason(tmp_path) -> None:
    changes = {"num_codevectors_per_group": 5, "codevector_dim": 6, "proj_codevector_dim": 9, "mask_time_prob": 0.1}
    reference = made("Wav2Vec2ForPreTraining", **changes)
    loaded = load(saved(scramble(reference), tmp_path))
    assert loaded.report.ok
    left = {line.sources[0].name: line.note for line in loaded.report.of("ignored")}
    stored = load_file(tmp_path / "model.safetensors")
    assert set(left) == {name for name in stored if not name.startswith("wav2vec2.")} | {"wav2vec2.masked_spec_embed"}
    assert "targets of wav2vec 2.0's pre-training" in left["quantizer.codevectors"]
    assert "hidden frames" in left["wav2vec2.masked_spec_embed"]
    all_close(heard(loaded, batch(5, audio=CLIPS)), theirs(reference.wav2vec2))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("Wav2Vec2Model", {"add_adapter": True}, "add_adapter: True, of which mmformer knows False alone"),
        ("HubertModel", {"conv_pos_batch_norm": True}, "conv_pos_batch_norm: True"),
        ("Wav2Vec2ForCTC", {"adapter_attn_dim": 3, **STABLE}, "adapter_attn_dim: 3"),
        ("Wav2Vec2ForSequenceClassification", {"use_weighted_layer_sum": True}, "use_weighted_layer_sum: True"),
    ],
)  # fmt: skip
def test_what_mmformer_does_not_compute_is_refused(kind, changes, message, tmp_path) -> None:
    reference = made(kind, **changes)
    with pytest.raises(ValueError, match=message):
        load(saved(reference, tmp_path))


def test_a_missing_tensor_is_named(tmp_path) -> None:
    stored = load_file(saved(made("Wav2Vec2Model"), tmp_path) / "model.safetensors")
    del stored["encoder.pos_conv_embed.conv.parametrizations.weight.original0"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MisfitError, match=r"stages\.0\.scale.*original0"):
        load(tmp_path)


@pytest.mark.parametrize("normalize", [True, False])
def test_recordings_are_read_as_the_processor_says(normalize, tmp_path) -> None:
    reference = made("Wav2Vec2Model", **STABLE)
    loaded_from(reference, tmp_path)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=normalize)
    extractor.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    feature = build(loaded.described.features["audio"])
    clips = [3 + 2 * clip for clip in CLIPS]
    values = [extractor(clip.numpy(), sampling_rate=16000, return_tensors="pt").input_values[0] for clip in clips]
    ours = [feature(clip) for clip in clips]
    all_close(heard(loaded, batch(5, audio=ours)), theirs(reference, clips=values))
    assert len(feature(torch.zeros(3))) == 30  # what one token covers: 2, 2 * 1 + 3 = 5, 5 * 4 + 10


# ------------------------------------------------------------------ torchaudio

AUDIO_SHAPE = {
    "extractor_conv_layer_config": [(10, 10, 5), (14, 3, 2), (18, 2, 2)], "encoder_embed_dim": 24,
    "encoder_projection_dropout": 0.0, "encoder_pos_conv_kernel": 8, "encoder_pos_conv_groups": 3,
    "encoder_num_layers": 2, "encoder_num_heads": 4, "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 44, "encoder_ff_interm_dropout": 0.0, "encoder_dropout": 0.0,
    "encoder_layer_drop": 0.0,
}  # fmt: skip
OPEN = {"num_attention_heads": 4, "conv_stride": [5, 2, 2]}


def of_torchaudio(stable: bool, letters: int | None):
    return components.wav2vec2_model(
        extractor_mode="layer_norm" if stable else "group_norm", extractor_conv_bias=stable,
        encoder_layer_norm_first=stable, aux_num_out=letters, **AUDIO_SHAPE,
    )  # fmt: skip


@pytest.mark.parametrize(("stable", "outputs"), [(False, None), (True, None), (False, 31), (True, 31)])
def test_tokens_and_letters_are_those_of_torchaudio(stable, outputs, tmp_path) -> None:
    reference = scramble(of_torchaudio(stable, outputs))
    torch.save(reference.state_dict(), tmp_path / "model.pth")
    loaded = load(tmp_path / "model.pth", options=OPEN | {"do_stable_layer_norm": stable})
    complete(loaded)
    with torch.inference_mode():
        expected = [reference(clip[None])[0][0] for clip in CLIPS]
    all_close(letters(loaded) if outputs else heard(loaded, batch(5, audio=CLIPS)), expected)
    gradients_flow(loaded, batch(5, audio=CLIPS))

    again = of_torchaudio(stable, outputs)
    again.load_state_dict(goes_back(loaded, reference.state_dict()))
    assert all(torch.equal(tensor, reference.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_hubert_of_torchaudio_s_pre_training(tmp_path) -> None:
    options = {
        "mask_prob": 0.8, "mask_selection": "static", "mask_other": 0.0, "mask_length": 10, "no_mask_overlap": False,
        "mask_min_space": 1, "mask_channel_prob": 0.0, "mask_channel_selection": "static", "mask_channel_other": 0.0,
        "mask_channel_length": 10, "no_mask_channel_overlap": False, "mask_channel_min_space": 1,
        "skip_masked": False, "skip_nomask": False, "num_classes": 13, "final_dim": 9, "feature_grad_mult": None,
    }  # fmt: skip
    shape = {"extractor_mode": "group_norm", "extractor_conv_bias": False, "encoder_layer_norm_first": False}
    reference = scramble(components.hubert_pretrain_model(**shape, **AUDIO_SHAPE, **options))
    torch.save(reference.state_dict(), tmp_path / "hubert.pth")
    loaded = load(tmp_path / "hubert.pth", options=OPEN | {"do_stable_layer_norm": False})
    assert loaded.report.ok
    left = {line.sources[0].name for line in loaded.report.of("ignored")}
    assert left == {name for name in reference.state_dict() if not name.startswith("wav2vec2.")}
    with torch.inference_mode():
        expected = [reference.wav2vec2(clip[None])[0][0] for clip in CLIPS]
    all_close(heard(loaded, batch(5, audio=CLIPS)), expected)


def test_what_a_bare_file_does_not_say_is_asked_for(tmp_path) -> None:
    torch.save(of_torchaudio(False, None).state_dict(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"does not say do_stable_layer_norm, conv_stride: give them as options$"):
        load(tmp_path / "model.pth", options={"num_attention_heads": 4})
    with torch.device("meta"):
        large = components.wav2vec2_large_lv60k()
    tensors = {name: torch.empty(t.shape, device="meta") for name, t in large.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"'num_attention_heads': 16, 'do_stable_layer_norm': True, 'conv_stride': \[5"
    ):
        load(source_of(tensors))
