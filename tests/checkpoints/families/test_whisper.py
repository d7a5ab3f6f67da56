from __future__ import annotations

import copy
import itertools

import pytest
import torch

from mmformer.checkpoints.build import build
from mmformer.checkpoints.load import Loaded, load, named_tensors
from mmformer.checkpoints.plan import original
from mmformer.nn import SinusoidTable
from mmformer.tokens import to_padded
from tests.checkpoints.families.languages import random_texts
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

# Channels, layers, heads, hidden channels, mel bins, places and words are all different.
SHAPE = {
    "d_model": 24, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 3, "encoder_ffn_dim": 44, "decoder_ffn_dim": 52, "vocab_size": 97,
    "num_mel_bins": 10, "max_source_positions": 50, "max_target_positions": 20,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
TEXTS = random_texts((1, 7, 4, 20, 12))
WHOLE = (100,) * 5
EVEN = (100, 64, 32, 2, 64)
SHORT = (100, 31, 64, 31, 1)
"""Frames of recordings that are, and that are not filled up to 100; the reference takes even numbers of them alone."""


def made(kind: str = "WhisperForConditionalGeneration", **changes):
    return getattr(transformers, kind)(transformers.WhisperConfig(**SHAPE | changes))


def inputs(*lengths: int, texts=TEXTS):
    return batch(len(lengths), audio=noise(*lengths, width=10), **({"text": texts} if texts else {}))


def decoded(loaded: Loaded, both) -> list[torch.Tensor]:
    """Our states behind the decoder for each text."""
    with torch.no_grad():
        fused = to_padded(loaded.model.fuse(loaded.model.encode(both)))
    return [row[keep] for row, keep in zip(fused.x, fused.valid, strict=True)]


def theirs(reference, lengths, name: str, texts=TEXTS) -> list[torch.Tensor]:
    """What the reference gives for each recording and text, one by one; for short ones its table is cut to fit."""
    found = []
    for mel, text in zip(noise(*lengths, width=10), texts, strict=True):
        fitted = copy.deepcopy(reference)
        places = len(mel) // 2
        encoder = fitted.get_encoder()
        encoder.config.max_source_positions = places
        encoder.embed_positions = torch.nn.Embedding.from_pretrained(encoder.embed_positions.weight[:places])
        with torch.inference_mode():
            found.append(fitted(input_features=mel.T[None], decoder_input_ids=text[None])[name][0])
    return found


@pytest.mark.parametrize("changes", [{}, {"activation_function": "relu"}, {"tie_word_embeddings": False}])
def test_scores_of_the_whole_model_are_those_of_transformers(changes, tmp_path) -> None:
    reference = made(**changes)
    loaded = loaded_from(reference, tmp_path)
    scores = [loaded.model.heads["vocabulary"](states).detach() for states in decoded(loaded, inputs(*WHOLE))]
    all_close(scores, theirs(reference, WHOLE, "logits"))
    assert epsilons(loaded.model) == epsilons(reference) == {1e-5}
    goes_back_to(reference, loaded, tmp_path)
    gradients_flow(loaded, inputs(*WHOLE))


def test_short_recordings_that_are_not_filled_up(tmp_path) -> None:
    reference = made("WhisperModel")
    loaded = loaded_from(reference, tmp_path)
    assert set(loaded.model.heads) == {"vocabulary"}  # tied to the words, so that it needs no tensor of its own
    all_close(heard(loaded, inputs(*EVEN)), theirs(reference, EVEN, "encoder_last_hidden_state"))
    all_close(decoded(loaded, inputs(*EVEN)), theirs(reference, EVEN, "last_hidden_state"))
    goes_back_to(reference, loaded, tmp_path)


def test_recordings_and_texts_do_not_see_those_of_other_samples(tmp_path) -> None:
    loaded = loaded_from(made(), tmp_path)
    together = decoded(loaded, inputs(*SHORT))
    for row, (mel, text) in enumerate(zip(noise(*SHORT, width=10), TEXTS, strict=True)):
        close(together[row], decoded(loaded, batch(1, audio=[mel], text=[text]))[0])


def test_the_decoder_is_causal(tmp_path) -> None:
    loaded = loaded_from(made(), tmp_path)
    changed = [torch.cat([text[:-1], (text[-1:] + 1) % 97]) for text in TEXTS]
    for before, after in zip(*(decoded(loaded, inputs(*WHOLE, texts=t)) for t in (TEXTS, changed)), strict=True):
        assert torch.equal(before[:-1], after[:-1])
        assert not torch.equal(before[-1], after[-1])


def test_the_encoder_alone_is_a_part(tmp_path) -> None:
    reference = made()
    whole = loaded_from(reference, tmp_path)
    part = load(tmp_path, part="encoders.audio")
    mels = inputs(100, 64, texts=None)
    ours, again = part.model(mels.inputs["audio"], 2), whole.model.encode(mels)["audio"]
    assert torch.equal(ours.x, again.x)
    assert {line.note for line in part.report.of("ignored")} == {"belongs to another part"}


def test_keys_have_no_bias_and_cannot_get_one(tmp_path) -> None:
    loaded = loaded_from(made(), tmp_path)
    layer = loaded.model.fusion.transformer.layers[0]
    assert not layer.attention.qkv.bias[24:48].any()
    assert not layer.cross.key_value.bias[:24].any()
    assert layer.attention.qkv.bias[48:].all()
    with torch.no_grad():
        layer.cross.key_value.bias[3] = 1.0
    with pytest.raises(ValueError, match=r"layers\.0\.cross\.key_value\.bias was trained where"):
        original(named_tensors(loaded.model), loaded.family.rules(loaded.described))


def test_the_table_of_sines_is_that_of_the_original() -> None:
    ours, reference = SinusoidTable(24, 50).table, made().model.encoder.embed_positions.weight
    close(ours, reference.detach())
    assert "table" in SinusoidTable(24, 50).state_dict()
    with pytest.raises(IndexError):
        SinusoidTable(24, 50)(torch.full((1, 3), 50))


def test_longer_recordings_go_on_with_sines(tmp_path) -> None:
    saved(made(), tmp_path)  # with Whisper's own table
    loaded = load(tmp_path, options={"max_source_positions": 80})
    assert [line.note for line in loaded.report.of("resized")] == ["50x24 to 80x24"]
    close(loaded.model.encoders["audio"].embedder.position.table, SinusoidTable(24, 80).table)
    assert loaded.described.features["audio"]["seconds"] == 1.6


def test_classes_are_those_of_transformers(tmp_path) -> None:
    reference = made("WhisperForAudioClassification", classifier_proj_size=11, num_labels=7)
    loaded = loaded_from(reference, tmp_path)
    both = inputs(*WHOLE, texts=None)
    with torch.inference_mode():
        ours = loaded.model.output(loaded.model.encode(both), "label", "audio")[0]
        expected = [reference(mel.T[None]).logits[0] for mel in noise(*WHOLE, width=10)]
    close(ours, torch.stack(expected))
    goes_back_to(reference, loaded, tmp_path)
    gradients_flow(loaded, both, "label")


def test_from_a_recording_to_scores_as_with_the_processor(tmp_path) -> None:
    """One of exactly a second, one that is filled up and one that is cut; the floor is that of each recording."""
    reference = made()
    loaded_from(reference, tmp_path)
    extractor = transformers.WhisperFeatureExtractor(feature_size=10, chunk_length=1)
    extractor.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    feature = build(loaded.described.features["audio"])
    clips = [loud * clip for loud, clip in zip((1, 0.01, 5), noise(16_000, 9000, 20_000), strict=True)]
    mels = [extractor(clip.numpy(), sampling_rate=16000, return_tensors="pt").input_features for clip in clips]
    both = batch(3, audio=[feature(clip) for clip in clips], text=TEXTS[:3])
    with torch.inference_mode():
        expected = [
            reference.model(input_features=mel, decoder_input_ids=text[None]).last_hidden_state[0]
            for mel, text in zip(mels, TEXTS[:3], strict=True)
        ]
    all_close(decoded(loaded, both), expected)


# ------------------------------------------------------------------ OpenAI's own files


PARTS = {
    "attn": "self_attn", "cross_attn": "encoder_attn", "attn_ln": "self_attn_layer_norm", "mlp.0": "fc1",
    "cross_attn_ln": "encoder_attn_layer_norm", "mlp_ln": "final_layer_norm", "mlp.2": "fc2",
}  # fmt: skip
MAPS = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}
OUTSIDE = {
    "encoder.conv1": "encoder.conv1", "encoder.conv2": "encoder.conv2", "encoder.ln_post": "encoder.layer_norm",
    "decoder.token_embedding": "decoder.embed_tokens", "decoder.ln": "decoder.layer_norm",
}  # fmt: skip


def openai_file(reference, **beside):
    """The tensors of a reference as OpenAI's programs name and save them."""
    tensors = dict(reference.model.state_dict())
    names = {f"{kind}.positional_embedding": f"{kind}.embed_positions.weight" for kind in ("encoder", "decoder")}
    for (openai, theirs), end in itertools.product(OUTSIDE.items(), ("weight", "bias")):
        names[f"{openai}.{end}"] = f"{theirs}.{end}"
    for kind, layer, openai in itertools.product(("encoder", "decoder"), range(3), PARTS):
        inside = {f".{ours}": f".{theirs}" for ours, theirs in MAPS.items()} if openai.endswith("attn") else {"": ""}
        for (ours, theirs), end in itertools.product(inside.items(), ("weight", "bias")):
            names[f"{kind}.blocks.{layer}.{openai}{ours}.{end}"] = (
                f"{kind}.layers.{layer}.{PARTS[openai]}{theirs}.{end}"
            )
    found = {openai: tensors.pop(theirs) for openai, theirs in names.items() if theirs in tensors}
    assert not tensors
    return {"model_state_dict": found, **beside}


DIMS = {
    "n_mels": 10, "n_audio_ctx": 50, "n_audio_state": 24, "n_audio_head": 4, "n_audio_layer": 2, "n_vocab": 97,
    "n_text_ctx": 20, "n_text_state": 24, "n_text_head": 3, "n_text_layer": 3,
}  # fmt: skip


def test_openai_s_layout(tmp_path) -> None:
    reference = scramble(made())
    content = openai_file(reference, dims=DIMS)
    stored = content["model_state_dict"]
    torch.save(content, tmp_path / "tiny.pt")
    loaded = load(tmp_path / "tiny.pt")
    complete(loaded)
    assert loaded.family.library == "openai"
    scores = [loaded.model.heads["vocabulary"](states).detach() for states in decoded(loaded, inputs(*WHOLE))]
    all_close(scores, theirs(reference, WHOLE, "logits"))
    goes_back(loaded, stored)


def test_a_bare_file_must_be_told_the_heads(tmp_path) -> None:
    torch.save(openai_file(made()), tmp_path / "tiny.pt")
    with pytest.raises(ValueError, match="does not say encoder_attention_heads"):
        load(tmp_path / "tiny.pt")
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 3}
    complete(load(tmp_path / "tiny.pt", options=heads))
