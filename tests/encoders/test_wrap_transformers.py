"""Backbones of transformers and torchaudio; tiny, random weights, unequal dimensions."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torchaudio

from mmformer.batch import Ragged
from mmformer.encoders import CodeEmbedder
from mmformer.encoders.wrap import (
    AudioCodec,
    MelInput,
    PictureInput,
    TextInput,
    Torchaudio,
    Transformers,
    WaveformInput,
)
from tests.encoders.wrapping import clock, equals_own_call, gradients_flow_and_stop, grid, of_row, shaken

transformers = pytest.importorskip("transformers", reason="needs the extra [transformers]")

MEAN, STD = [0.48, 0.45, 0.4], [0.26, 0.25, 0.27]
SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40}

TEXT = {
    "bert": {"model_type": "bert", **SMALL, "vocab_size": 61, "max_position_embeddings": 30},
    "roberta": {"model_type": "roberta", **SMALL, "vocab_size": 61, "max_position_embeddings": 30},
    "gpt2": {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": 61, "n_positions": 30},
    "llama": {"model_type": "llama", **SMALL, "vocab_size": 61, "num_key_value_heads": 1, "head_dim": 8},
    "t5": {"model_type": "t5", "d_model": 24, "d_kv": 8, "d_ff": 40, "num_layers": 2, "num_heads": 3, "vocab_size": 61},
}


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("name", TEXT)
def test_texts(name, pad):
    part = "encoder" if name == "t5" else ""
    encoder = shaken(Transformers(10, TEXT[name], TextInput(pad=pad), weights=None, part=part))
    items = [torch.randint(2, 61, (length,)) for length in (5, 9, 1, 5)]

    def own(ids):
        return encoder.backbone(input_ids=ids[None]).last_hidden_state[0], clock(len(ids))

    equals_own_call(encoder, items, 0, own)
    gradients_flow_and_stop(encoder, Ragged.stack(items, range(4)), 4)


PATCHES = {**SMALL, "image_size": 16, "patch_size": 8}
DINO = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 28, "patch_size": 14}
ANY_SIZE = {"interpolate_pos_encoding": True}
PICTURES = {  # config, pixels of a token's side, tokens in front, arguments of the call
    "vit": ({"model_type": "vit", **PATCHES}, 8, 1, ANY_SIZE),
    "deit": ({"model_type": "deit", **PATCHES}, 8, 2, ANY_SIZE),
    "clip": ({"model_type": "clip_vision_model", **PATCHES}, 8, 1, ANY_SIZE),
    "siglip": ({"model_type": "siglip_vision_model", **PATCHES}, 8, 0, ANY_SIZE),
    "dinov2": ({"model_type": "dinov2", **DINO}, 14, 1, {}),
    "dinov2_registers": ({"model_type": "dinov2_with_registers", **DINO, "num_register_tokens": 4}, 14, 5, {}),
    "dinov3": ({"model_type": "dinov3_vit", **PATCHES, "num_register_tokens": 3}, 8, 4, {}),
    "swin": (
        {"model_type": "swin", "image_size": 32, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 3],
         "window_size": 2}, 8, 0, ANY_SIZE,
    ),
    "convnext": (
        {"model_type": "convnext", "num_stages": 2, "hidden_sizes": [12, 20], "depths": [1, 1]}, 8, 0, {},
    ),
    "resnet": ({"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [12, 20], "depths": [1, 1]}, 8, 0, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures(name):
    config, unit, prefix, arguments = PICTURES[name]
    encoder = shaken(Transformers(10, config, PictureInput(MEAN, STD, arguments=arguments), weights=None))
    items = [
        torch.randint(0, 256, (unit * r, unit * c, 3), dtype=torch.uint8) for r, c in ((2, 4), (2, 2), (4, 2), (2, 4))
    ]

    def own(picture):
        pixels = ((picture.float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(2, 0, 1)[None]
        x = encoder.backbone(pixel_values=pixels, **arguments).last_hidden_state
        x = x if x.ndim == 3 else x.flatten(2).transpose(1, 2)
        return x[0], grid(picture.shape[0] // unit, picture.shape[1] // unit, prefix)

    tokens = equals_own_call(encoder, items, 1, own)
    assert len(set(tokens.layout.lengths)) == 2
    gradients_flow_and_stop(encoder, Ragged.stack(items, range(4), 1), 4)


WAVE = {
    "conv_dim": [12, 12, 12], "conv_kernel": [10, 3, 2], "conv_stride": [5, 2, 2], "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


@pytest.mark.parametrize("config", [
    {"model_type": "wav2vec2", **SMALL, **WAVE},
    {"model_type": "wav2vec2", **SMALL, **WAVE, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
    {"model_type": "hubert", **SMALL, **WAVE},
], ids=["wav2vec2", "wav2vec2-large", "hubert"])  # fmt: skip
def test_waveforms(config):
    encoder = shaken(Transformers(10, config, WaveformInput(normalize=True), weights=None))
    items = [torch.randn(samples) * 3 + 1 for samples in (400, 250, 251, 400)]
    extract = transformers.Wav2Vec2FeatureExtractor(do_normalize=True)

    def own(waveform):
        values = extract(waveform.numpy(), sampling_rate=16000, return_tensors="pt").input_values
        x = encoder.backbone(values).last_hidden_state[0]
        return x, clock(len(x))

    equals_own_call(encoder, items, 0, own)
    assert encoder.backbone.config.apply_spec_augment is False
    gradients_flow_and_stop(encoder, Ragged.stack(items, range(4)), 4)


def test_whisper_reads_clips_of_its_length_and_keeps_the_tokens_of_sound():
    config = {"model_type": "whisper", "d_model": 24, "encoder_layers": 2, "encoder_attention_heads": 3,
              "encoder_ffn_dim": 40, "decoder_layers": 1, "decoder_attention_heads": 3, "decoder_ffn_dim": 40,
              "num_mel_bins": 9, "max_source_positions": 20, "vocab_size": 61, "pad_token_id": 0,
              "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
    sound = MelInput(mels_first=True, pad_to=40)
    encoder = shaken(Transformers(10, config, sound, weights=None, part="encoder"))
    items = [torch.randn(frames, 9) for frames in (40, 17, 40, 22)]

    def own(mel):
        whole = torch.full((40, 9), float(mel.min()))
        whole[: len(mel)] = mel
        x = encoder.backbone(whole.T[None]).last_hidden_state[0]
        kept = -(-len(mel) // 2)
        return x[:kept], clock(kept)

    equals_own_call(encoder, items, 1, own)
    gradients_flow_and_stop(encoder, Ragged.stack(items, range(4), 1), 4)
    with pytest.raises(ValueError, match="a clip of 41 frames, more than pad_to 40"):
        encoder(Ragged.stack([torch.randn(41, 9)], [0], 1), 1)


def test_ast_comes_out_in_the_order_of_time():
    config = {"model_type": "audio-spectrogram-transformer", **SMALL, "patch_size": 4, "frequency_stride": 4,
              "time_stride": 2, "max_length": 14, "num_mel_bins": 12}  # fmt: skip
    encoder = shaken(Transformers(10, config, MelInput(bands=3, pad_to=14, pad_value=0.4), weights=None))
    items = [torch.randn(frames, 12) for frames in (14, 7, 14)]

    def own(mel):
        whole = torch.full((14, 12), 0.4)
        whole[: len(mel)] = mel
        x = encoder.backbone(whole[None]).last_hidden_state[0]
        times = 6 if len(mel) == 14 else 3
        order = [2 + band * 6 + time for time in range(times) for band in range(3)]
        places = [[time, 0, band] for time in range(times) for band in range(3)]
        return x[[0, 1, *order]], [[0, 0, 0]] * 2 + places

    equals_own_call(encoder, items, 1, own)


def test_clap_gives_a_grid_of_times_and_frequencies():
    config = {"model_type": "clap_audio_model", "spec_size": 32, "num_mel_bins": 8, "patch_size": 2,
              "patch_stride": [2, 2], "patch_embeds_hidden_size": 12, "depths": [1, 1], "num_attention_heads": [2, 3],
              "window_size": 4, "hidden_size": 24, "num_classes": 5}  # fmt: skip
    encoder = shaken(Transformers(10, config, MelInput(channel=True), weights=None, architecture="ClapAudioModel"))
    items = [torch.randn(frames, 8) for frames in (128, 90, 128)]

    def own(mel):
        x = encoder.backbone(mel[None, None]).last_hidden_state[0]  # D, bands, times
        bands, times = x.shape[1:]
        assert times > bands > 1
        places = [[time, 0, band] for time in range(times) for band in range(bands)]
        return x.permute(2, 1, 0).flatten(0, 1), places

    equals_own_call(encoder, items, 1, own)
    gradients_flow_and_stop(encoder, Ragged.stack(items, range(3), 1), 3)


def test_a_part_of_a_larger_model_is_read_from_its_folder(tmp_path):
    sound = {"spec_size": 32, "num_mel_bins": 8, "patch_size": 2, "patch_stride": [2, 2], "depths": [1, 1],
             "patch_embeds_hidden_size": 12, "num_attention_heads": [2, 3], "window_size": 4,
             "hidden_size": 24}  # fmt: skip
    config = transformers.ClapConfig(audio_config=sound, text_config=SMALL | {"vocab_size": 61})
    clap = shaken(transformers.ClapModel(config))
    clap.save_pretrained(tmp_path / "clap")
    mel = torch.randn(128, 8)
    wanted = clap.audio_model(mel[None, None]).last_hidden_state[0].permute(2, 1, 0).flatten(0, 1)
    whole = Transformers(24, {}, MelInput(channel=True), weights=str(tmp_path / "clap"), part="audio_model").eval()
    assert torch.equal(whole(Ragged.stack([mel], [0], 1), 1).x[0], wanted)
    # The library's class alone would look for other names, find none and start at random.
    with pytest.raises(ValueError, match=r"do not fill the model: missing audio_encoder\."):
        Transformers(24, {}, MelInput(channel=True), weights=str(tmp_path / "clap"), architecture="ClapAudioModel")


CODECS = {
    "encodec": (
        {"model_type": "encodec", "num_filters": 4, "hidden_size": 8, "codebook_size": 16, "upsampling_ratios": [4, 2],
         "target_bandwidths": [12.0, 24.0], "sampling_rate": 8000, "audio_channels": 1, "normalize": False},
        {"bandwidth": 12.0},
    ),
    "dac": (
        {"model_type": "dac", "encoder_hidden_size": 4, "downsampling_ratios": [4, 2], "decoder_hidden_size": 16,
         "upsampling_ratios": [2, 4], "n_codebooks": 3, "codebook_size": 16, "codebook_dim": 5, "hidden_size": 16},
        {"n_quantizers": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CODECS)
def test_codes_of_a_frozen_codec_are_embedded(name):
    config, arguments = CODECS[name]
    codec = AudioCodec(config, 2, weights=None, arguments=arguments)
    encoder = CodeEmbedder(10, [16, 16], codec=codec, modality="audio", axes=("time", "column"))
    items = [0.3 * torch.randn(samples) for samples in (96, 160, 96, 100)]
    tokens = encoder.train()(Ragged.stack(items, range(4)), 5)
    assert not codec.training
    for row, waveform in enumerate(items):
        found = codec.backbone.encode(waveform[None, None], **arguments).audio_codes
        codes = (found[0] if found.ndim == 4 else found)[0, :2]
        x, position = of_row(tokens, row)
        wanted = sum(table(ids) for table, ids in zip(encoder.tables, codes, strict=True))
        torch.testing.assert_close(x, wanted)
        assert position.tolist() == clock(codes.shape[1])
    tokens.x.square().mean().backward()
    assert all(p.grad is None for p in codec.parameters())
    with pytest.raises(ValueError, match=r"fewer than 9"):
        AudioCodec(config, 9, weights=None, arguments=arguments).codes_of(Ragged.stack(items, range(4)))


TORCHAUDIO = {
    "wav2vec2": ("wav2vec2_model", {
        "extractor_mode": "group_norm", "extractor_conv_layer_config": [[12, 10, 5], [12, 3, 2]],
        "extractor_conv_bias": False, "encoder_embed_dim": 24, "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": 8, "encoder_pos_conv_groups": 2, "encoder_num_layers": 2, "encoder_num_heads": 3,
        "encoder_attention_dropout": 0.1, "encoder_ff_interm_features": 40, "encoder_ff_interm_dropout": 0.1,
        "encoder_dropout": 0.1, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0, "aux_num_out": None,
    }),
    "conformer": ("Conformer", {"input_dim": 24, "num_heads": 3, "ffn_dim": 40, "num_layers": 1,
                                "depthwise_conv_kernel_size": 5}),
}  # fmt: skip


@pytest.mark.parametrize("case", TORCHAUDIO)
def test_torchaudio(case, tmp_path):
    name, options = TORCHAUDIO[case]
    encoder = shaken(Torchaudio(10, name, options, weights=None))
    shape = () if case == "wav2vec2" else (24,)
    items = [torch.randn(length, *shape) for length in (300, 170, 300, 171)]

    def own(item):
        lengths = (torch.tensor([len(item)]),) if case == "conformer" else ()
        x = encoder.backbone(item[None], *lengths)[0][0]
        return x, clock(len(x))

    equals_own_call(encoder, items, len(shape), own)
    gradients_flow_and_stop(encoder, Ragged.stack(items, range(4), len(shape)), 4)
    encoder.eval()
    torch.save(encoder.backbone.state_dict(), tmp_path / "weights.pt")
    again = Torchaudio(24, name, options, weights=str(tmp_path / "weights.pt")).eval()
    ragged = Ragged.stack(items, range(4), len(shape))
    assert torch.equal(encoder.projection(again(ragged, 4).x), encoder(ragged, 4).x)


def test_what_torchaudio_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"torchaudio\.models has no 'wav2vec3'"):
        Torchaudio(24, "wav2vec3", {}, weights=None)
    assert "wav2vec2_base" in torchaudio.models.__all__


@pytest.fixture
def saved_bert(tmp_path):
    """A BERT with a head, on the disk as its library saves it."""
    values = {name: value for name, value in TEXT["bert"].items() if name != "model_type"}
    model = shaken(transformers.BertForMaskedLM(transformers.BertConfig(**values)))
    model.save_pretrained(tmp_path / "bert")
    return model, tmp_path / "bert"


def test_a_folder_brings_its_config_and_a_file_needs_one(saved_bert):
    original, folder = saved_bert
    ids = torch.randint(2, 61, (7,))
    wanted = original.bert(ids[None]).last_hidden_state
    items = Ragged.stack([ids], [0])
    whole = Transformers(24, {}, TextInput(), weights=str(folder)).eval()
    assert torch.equal(whole(items, 1).x, wanted)
    assert whole.described["config"]["hidden_size"] == 24
    assert str(folder) not in json.dumps(whole.described)
    changed = Transformers(24, {"hidden_dropout_prob": 0.0}, TextInput(), weights=str(folder))
    assert changed.described["config"]["hidden_dropout_prob"] == 0.0
    file = Transformers(24, TEXT["bert"], TextInput(), weights=str(folder / "model.safetensors")).eval()
    assert torch.equal(file(items, 1).x, wanted)
    torch.save(original.state_dict(), folder / "weights.pth")
    pickled = Transformers(24, TEXT["bert"], TextInput(), weights=str(folder / "weights.pth")).eval()
    assert torch.equal(pickled(items, 1).x, wanted)


def test_weights_that_do_not_fill_the_model_are_refused(saved_bert):
    _, folder = saved_bert
    deeper = TEXT["bert"] | {"num_hidden_layers": 3}
    with pytest.raises(ValueError, match=r"missing encoder\.layer\.2\.attention"):
        Transformers(24, deeper, TextInput(), weights=str(folder))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        Transformers(24, {}, TextInput(), weights=str(folder / "absent" / "folder"))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "bert", "attn_implementation": "someone/kernel"}, "would fetch code"),
        ({"model_type": "bert", "_attn_implementation": "someone/kernel"}, "would fetch code"),
        ({"model_type": "bert", "quantization_config": {"quant_method": "awq"}}, "quantized weights are not read"),
        ({"model_type": "nothing"}, "config.model_type is 'nothing'"),
        ({}, "config.model_type is None"),
    ],
)
def test_a_config_that_names_no_model_or_fetches_code_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        Transformers(24, config, TextInput(), weights=None)


def test_code_that_a_folder_asks_for_is_not_run(saved_bert):
    _, folder = saved_bert
    values = json.loads((folder / "config.json").read_text())
    (folder / "code.py").write_text("raise SystemExit('the code of the folder was run')")
    (folder / "config.json").write_text(json.dumps(values | {"auto_map": {"AutoModel": "code.Model"}}))
    found = Transformers(24, {}, TextInput(), weights=str(folder))
    assert type(found.backbone) is transformers.BertModel
    assert "auto_map" not in found.described["config"]
    for name in ("attn_implementation", "_attn_implementation"):
        (folder / "config.json").write_text(json.dumps(values | {name: "someone/kernel"}))
        with pytest.raises(ValueError, match="would fetch code: choose of eager"):
            Transformers(24, {}, TextInput(), weights=str(folder))


def test_a_number_of_tokens_that_is_no_grid_is_named():
    config = PICTURES["dinov3"][0]
    encoder = Transformers(24, config, PictureInput(MEAN, STD, num_prefix=2), weights=None)
    with pytest.raises(
        ValueError, match=r"6 tokens are no grid of square patches of a picture of 16 x 16: .*num_prefix"
    ):
        encoder(Ragged.stack([torch.zeros(16, 16, 3, dtype=torch.uint8)], [0], 1), 1)


def test_a_width_that_the_config_does_not_say_is_asked_for():
    pictures = Ragged.stack([torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8)], [0], 1)
    wrong = Transformers(20, PICTURES["convnext"][0], PictureInput(MEAN, STD), weights=None, width=12)
    with pytest.raises(
        ValueError, match="ConvNextModel gives 20 channels and not 12: give the right number as `width`"
    ):
        wrong(pictures, 1)
    with pytest.raises(ValueError, match="MobileNetV1Model does not say how many channels it has"):
        Transformers(9, {"model_type": "mobilenet_v1"}, PictureInput(MEAN, STD), weights=None)


def test_an_id_is_found_in_the_cache_of_the_hub_without_a_network(saved_bert, tmp_path, monkeypatch):
    original, folder = saved_bert
    home = tmp_path / "cache" / "models--someone--bert"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    shutil.copytree(folder, home / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    encoder = Transformers(24, {}, TextInput(), weights="someone/bert").eval()
    ids = torch.randint(2, 61, (7,))
    assert torch.equal(encoder(Ragged.stack([ids], [0]), 1).x, original.bert(ids[None]).last_hidden_state)
    with pytest.raises(OSError, match="someone/other"):
        Transformers(24, {}, TextInput(), weights="someone/other")
