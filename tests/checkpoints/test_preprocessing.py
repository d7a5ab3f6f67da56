from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmformer.checkpoints import build
from mmformer.checkpoints.preprocessing import Preprocessing, preprocessing

PHOTO = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 83, 3), dtype=np.uint8))
NOISE = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) * 0.1
CLIP = {
    "image_processor_type": "CLIPImageProcessor",
    "size": {"shortest_edge": 28},
    "crop_size": {"height": 28, "width": 28},
    "do_center_crop": True,
    "resample": 3,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.25],
}


def read(folder: Path, config: dict | None = None, **held) -> Preprocessing:
    """What is read of a folder with these JSON files beside what it has."""
    for name, content in held.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return preprocessing({path.name: path for path in folder.iterdir() if path.is_file()}, config or {})


def pixels(found: Preprocessing, picture: Image.Image = PHOTO) -> torch.Tensor:
    """What the embedder computes of a picture, as (channels, height, width)."""
    assert found.image is not None
    assert found.image_statistics is not None
    mean, std = (torch.tensor(values) for values in (found.image_statistics.mean, found.image_statistics.std))
    return ((build(found.image)(picture) / 255 - mean) / std).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("clip.image_processing_pil_clip.CLIPImageProcessorPil", {"size": {"shortest_edge": 28}, "crop_size": 25}),
        ("vit.image_processing_pil_vit.ViTImageProcessorPil", {"size": {"height": 20, "width": 36}}),
        (
            "vit.image_processing_pil_vit.ViTImageProcessorPil",
            {"size": {"height": 20, "width": 36}, "do_rescale": True},
        ),
        ("deit.image_processing_pil_deit.DeiTImageProcessorPil", {}),
        ("siglip.image_processing_pil_siglip.SiglipImageProcessorPil", {"size": {"height": 30, "width": 30}}),
        ("blip.image_processing_pil_blip.BlipImageProcessorPil", {"size": {"height": 30, "width": 30}}),
        ("vilt.image_processing_pil_vilt.ViltImageProcessorPil", {"size": {"shortest_edge": 96}}),
        ("flava.image_processing_pil_flava.FlavaImageProcessorPil", {}),
    ],
)
def test_pictures_are_those_of_transformers(tmp_path, name, settings) -> None:
    pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    module, _, kind = name.rpartition(".")
    processor = getattr(__import__(f"transformers.models.{module}", fromlist=[kind]), kind)(**settings)
    processor.save_pretrained(tmp_path)
    expected = torch.from_numpy(processor(PHOTO, return_tensors="np")["pixel_values"][0])
    torch.testing.assert_close(pixels(read(tmp_path)), expected.float(), atol=1e-5, rtol=0)


def test_pictures_are_those_of_open_clip(tmp_path) -> None:
    open_clip = pytest.importorskip("open_clip", reason="the oracle open_clip is not installed")
    for settings in (
        {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "resize_mode": "squash", "interpolation": "bicubic"},
        {"size": 32, "resize_mode": "longest", "interpolation": "bilinear", "fill_color": 7},
        {"size": [24, 40], "interpolation": "bilinear"},
        {},
    ):
        found = read(tmp_path, {"preprocess_cfg": settings, "model_cfg": {"vision_cfg": {"patch_size": 8}}})
        plain = open_clip.transform.PreprocessCfg(**{**settings, "size": settings.get("size", 224)})
        expected = open_clip.transform.image_transform_v2(plain, is_train=False)(PHOTO)
        torch.testing.assert_close(pixels(found), expected, atol=1e-5, rtol=0)
        assert found.image is not None
        assert found.image["multiple"] == 8
        assert not found.notes


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
def test_pictures_are_those_of_timm(tmp_path, mode) -> None:
    data = pytest.importorskip("timm.data", reason="the oracle timm is not installed")
    settings = {"input_size": [3, 32, 32], "crop_pct": 0.9, "interpolation": "bilinear", "crop_mode": mode}
    settings |= {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    found = read(tmp_path, {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": {**settings, "url": "x"}})
    expected = data.create_transform(**{**settings, "input_size": (3, 32, 32)})(PHOTO)
    torch.testing.assert_close(pixels(found), expected, atol=1e-5, rtol=0)
    assert not found.notes


def test_pixels_that_no_patch_covers_are_cut_off(tmp_path) -> None:
    config = {"vision_config": {"patch_size": 14}}
    size = {"height": 32, "width": 44}
    found = read(tmp_path, config, preprocessor_config={**CLIP, "do_center_crop": False, "size": size})
    assert found.image is not None
    assert found.image["multiple"] == 14
    item, whole = build(found.image)(PHOTO), build({**found.image, "multiple": 1, "steps": found.image["steps"][:1]})
    assert item.shape == (28, 42, 3)
    assert torch.equal(item, whole(PHOTO)[:28, :42])


def test_old_settings_with_a_number_for_the_size(tmp_path) -> None:
    old = {**CLIP, "feature_extractor_type": "CLIPFeatureExtractor", "size": 28, "crop_size": 28}
    old.pop("image_processor_type")
    assert torch.equal(
        pixels(read(tmp_path, preprocessor_config=old)), pixels(read(tmp_path, preprocessor_config=CLIP))
    )
    square = read(tmp_path, preprocessor_config={**old, "feature_extractor_type": "ViTFeatureExtractor"})
    assert square.image is not None
    assert square.image["steps"][0] == {"_target_": "mmformer.datasets.resize.Squash", "height": 28, "width": 28}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rescale_factor": 1 / 127.5}, "rescale_factor 0.0078.*: only 1/255 has a counterpart"),
        ({"size": {"longest_edge": 40}}, r"size {'longest_edge': 40} has no counterpart"),
        ({"size": None}, "lack size: what the weights were trained with cannot be known"),
        ({"resample": None}, "lack resample"),
        ({"image_mean": None}, "lack image_mean"),
        ({"crop_pct": 0.9}, "crop_pct and pad_size have no counterpart"),
        (
            {"sampling_rate": 16000, "image_processor_type": "EncodecFeatureExtractor"},
            "is of 'EncodecFeatureExtractor'",
        ),
    ],
)
def test_a_setting_without_counterpart_is_named(tmp_path, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        read(tmp_path, preprocessor_config={**CLIP, **change})


def test_what_is_not_known_is_noted(tmp_path) -> None:
    found = read(tmp_path, preprocessor_config={**CLIP, "do_solarize": True, "do_flip": False, "processor_class": "X"})
    assert found.notes == ("preprocessor_config.json: do_solarize True is not known here and was left aside",)
    settings = {"input_size": [3, 8, 8], "mean": 0.5, "std": 0.5, "crop_mode": "corner"}
    with pytest.raises(ValueError, match="crop_mode 'corner' has no counterpart"):
        read(tmp_path, {"pretrained_cfg": settings})
    with pytest.raises(ValueError, match="resize_mode 'tile' has no counterpart"):
        read(tmp_path, {"preprocess_cfg": {"resize_mode": "tile"}})


# ------------------------------------------------------------------ sounds


def sounds(found: Preprocessing, waveform: torch.Tensor) -> torch.Tensor:
    assert found.audio is not None
    item = build(found.audio)(waveform)
    statistics = found.audio_statistics
    return item if statistics is None else (item - statistics.mean[0]) / statistics.std[0]


@pytest.mark.parametrize(
    ("name", "settings", "key"),
    [
        ("WhisperFeatureExtractor", {"feature_size": 80, "chunk_length": 2}, "input_features"),
        ("ASTFeatureExtractor", {"max_length": 150, "mean": -3.5, "std": 4.0}, "input_values"),
        ("ASTFeatureExtractor", {"max_length": 90, "do_normalize": False}, "input_values"),
        ("Wav2Vec2FeatureExtractor", {"do_normalize": True}, "input_values"),
        ("Wav2Vec2FeatureExtractor", {"do_normalize": False}, "input_values"),
        (
            "ClapFeatureExtractor",
            {"truncation": "rand_trunc", "frequency_min": 50, "max_length_s": 1},
            "input_features",
        ),
    ],
)
def test_sounds_are_those_of_transformers(tmp_path, name, settings, key) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    extractor = getattr(transformers, name)(**settings)
    extractor.save_pretrained(tmp_path)
    found = read(tmp_path)
    expected = extractor(NOISE.numpy(), sampling_rate=extractor.sampling_rate, return_tensors="pt")[key][0]
    expected = expected[0] if name.startswith("Clap") else expected.T if name.startswith("Whisper") else expected
    tolerance = 1e-3 if name.startswith("Clap") else 1e-5  # decibels
    torch.testing.assert_close(sounds(found, NOISE), expected, atol=tolerance, rtol=0)
    assert not found.notes


def test_a_waveform_reaches_as_far_as_the_first_token(tmp_path) -> None:
    config = {"conv_kernel": [10, 3, 3, 3, 3, 2, 2], "conv_stride": [5, 2, 2, 2, 2, 2, 2]}
    held = {"feature_extractor_type": "Wav2Vec2FeatureExtractor", "sampling_rate": 16000, "do_normalize": True}
    found = read(tmp_path, config, preprocessor_config=held)
    assert found.audio is not None
    assert found.audio["min_samples"] == 400
    assert build(found.audio)(NOISE[:10]).shape == (400,)


def test_a_processor_of_both_is_read_for_both(tmp_path) -> None:
    sound = {"feature_extractor_type": "WhisperFeatureExtractor", "sampling_rate": 16000, "chunk_length": 1}
    found = read(tmp_path, processor_config={"image_processor": CLIP, "feature_extractor": sound})
    assert found.image is not None
    assert found.audio is not None
    with pytest.raises(ValueError, match="hop_length 80 has no counterpart: only 160"):
        read(tmp_path, preprocessor_config={**sound, "hop_length": 80})


# ------------------------------------------------------------------ texts


def vocabulary(folder: Path, **settings) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat", "##s"]
    (folder / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", **settings}))


def test_a_text_gets_what_its_tokenizer_puts_around_it(tmp_path) -> None:
    vocabulary(tmp_path, model_max_length=512)
    found = read(tmp_path, {"model_type": "bert", "max_position_embeddings": 40})
    assert found.tokenizer == tmp_path / "vocab.txt"
    assert found.text is not None
    assert found.text["max_length"] == 40
    feature = build(found.text)(tokenizer=found.open_tokenizer())
    assert feature("a cats").tolist() == [2, 5, 6, 7, 3]
    assert not found.notes


def test_siglip_fills_texts_up_and_roberta_has_fewer_positions(tmp_path) -> None:
    vocabulary(tmp_path, model_max_length=1e30)
    found = read(tmp_path, {"model_type": "siglip", "text_config": {"max_position_embeddings": 6}})
    assert found.text is not None
    assert build(found.text)(tokenizer=found.open_tokenizer())("a cat").tolist() == [2, 5, 6, 3, 0, 0]
    found = read(tmp_path, {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 1})
    assert found.text is not None
    assert found.text["max_length"] == 512
    assert read(tmp_path, {}).notes == ("no file says how long a text may be: 512 tokens were taken",)


def test_open_clip_cleans_the_texts_of_siglip(tmp_path) -> None:
    vocabulary(tmp_path)
    text = {
        "context_length": 8,
        "hf_tokenizer_name": "timm/ViT-B-16-SigLIP",
        "tokenizer_kwargs": {"clean": "canonicalize"},
    }
    config = {"preprocess_cfg": {}, "model_cfg": {"text_cfg": text}}
    found = read(tmp_path, config)
    tokenizer = found.open_tokenizer()
    assert tokenizer is not None
    assert tokenizer.encode("A: cats!") == tokenizer.encode("a cats")
    assert found.text is not None
    assert found.text["pad"] is True
    (tmp_path / "vocab.txt").unlink()
    assert read(tmp_path, config).notes == (
        "no file of a tokenizer lies beside the weights: give that of timm/ViT-B-16-SigLIP, "
        "or bpe_simple_vocab_16e6.txt.gz for CLIP",
    )


def test_the_letters_of_a_ctc_head_are_no_tokenizer(tmp_path) -> None:
    found = read(tmp_path, vocab={"a": 0})
    assert found.tokenizer is None
    assert "vocab.json has no merges.txt beside it" in found.notes[0]


def test_a_folder_without_side_files_says_nothing(tmp_path) -> None:
    assert read(tmp_path) == Preprocessing()


def test_a_damaged_file_is_named(tmp_path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"preprocessor_config\.json is damaged"):
        read(tmp_path)
