from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmformer.checkpoints.build import build
from mmformer.checkpoints.families import vit, vit_timm
from mmformer.checkpoints.load import load, load_into
from mmformer.checkpoints.report import MisfitError
from mmformer.checkpoints.source import open_source
from tests.checkpoints.families.visions import (
    IMAGENET,
    OPENAI,
    Shown,
    complete,
    epsilons,
    goes_back,
    gradients_flow,
    loaded_from,
    png,
)
from tests.checkpoints.oracles import batch, close, saved, scramble

transformers = pytest.importorskip("transformers", reason="the oracle: pip install mmformer[transformers]")
timm = pytest.importorskip("timm", reason="the oracle: pip install mmformer[timm]")
torchvision = pytest.importorskip("torchvision", reason="the oracle: pip install torchvision")

# Heads, layers, width, hidden channels, rows, columns, patch and classes are all different.
SHAPE = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 44,
    "image_size": [16, 28], "patch_size": 4,
}  # fmt: skip


def vit_config(**options):
    return transformers.ViTConfig(**{**SHAPE, **options})


def deit_config(**options):
    return transformers.DeiTConfig(**{**SHAPE, **options})


REFERENCES = {
    "ViTModel": lambda: transformers.ViTModel(vit_config(pooler_output_size=10)),
    "ViTModel, no qkv bias": lambda: transformers.ViTModel(vit_config(qkv_bias=False, hidden_act="quick_gelu")),
    "ViTModel, no pooler": lambda: transformers.ViTModel(vit_config(), add_pooling_layer=False),
    "ViTForImageClassification": lambda: transformers.ViTForImageClassification(vit_config(num_labels=7)),
    "DeiTModel": lambda: transformers.DeiTModel(deit_config()),
    "DeiTForImageClassification": lambda: transformers.DeiTForImageClassification(deit_config(num_labels=7)),
    "DeiT with teacher": lambda: transformers.DeiTForImageClassificationWithTeacher(deit_config(num_labels=7)),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_transformers_vit_and_deit_give_what_the_reference_gives(name, tmp_path):
    reference = REFERENCES[name]()
    loaded = loaded_from(reference, tmp_path)
    shown = Shown(16, 28)
    with torch.inference_mode():
        theirs = reference(pixel_values=shown.pixels, output_hidden_states=True)
    if "logits" in theirs:
        close(shown.output(loaded, "label"), theirs.logits)
    else:
        close(shown.tokens(loaded), theirs.last_hidden_state)
        if theirs.pooler_output is not None:
            close(shown.output(loaded, "pooler"), theirs.pooler_output)
    assert epsilons(loaded.model) == epsilons(reference) == {1e-12}
    gradients_flow(loaded, shown.batch)

    made = goes_back(loaded, load_file(tmp_path / "model.safetensors"))
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    save_file(made, tmp_path / "again" / "model.safetensors", {"format": "pt"})
    options = {"add_pooling_layer": False} if "no pooler" in name else {}
    again, account = type(reference).from_pretrained(tmp_path / "again", output_loading_info=True, **options)
    assert not any(account.values()), account
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in reference.state_dict().items())


def test_the_bar_sees_errors_that_default_weights_hide(tmp_path):
    loaded = loaded_from(REFERENCES["ViTForImageClassification"](), tmp_path)
    shown = Shown(16, 28)
    right = shown.output(loaded, "label")
    for layer in loaded.model.encoders["image"].stages[0].layers:
        layer.attention_norm, layer.feedforward_norm = layer.feedforward_norm, layer.attention_norm
    with pytest.raises(AssertionError, match="differs by"):
        close(shown.output(loaded, "label"), right)


def test_activations_of_small_variance_tell_epsilons_apart(tmp_path):
    reference = scramble(transformers.ViTModel(vit_config(layer_norm_eps=1e-5), add_pooling_layer=False))
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if ("norm" not in name and "embeddings" in name) or name.endswith(
                ("o_proj.weight", "fc2.weight", "o_proj.bias", "fc2.bias")
            ):
                parameter.mul_(1e-3)
    loaded = load(saved(reference, tmp_path))
    shown = Shown(16, 28)
    with torch.inference_mode():
        theirs = reference(pixel_values=shown.pixels).last_hidden_state
    close(shown.tokens(loaded), theirs)
    for part in loaded.model.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-6
    with pytest.raises(AssertionError, match="differs by"):
        close(shown.tokens(loaded), theirs)


def test_pictures_of_another_size_interpolate_positions_as_the_reference_does(tmp_path):
    reference = scramble(transformers.ViTModel(vit_config(image_size=16), add_pooling_layer=False))
    loaded = load(saved(reference, tmp_path), options={"image_size": [24, 32]})
    (line,) = loaded.report.of("resized")
    assert line.note == "4x4x24 to 6x8x24"
    shown = Shown(24, 32)
    with torch.inference_mode():
        theirs = reference(pixel_values=shown.pixels, interpolate_pos_encoding=True).last_hidden_state
    close(shown.tokens(loaded), theirs)


def test_other_classes_are_a_new_head(tmp_path):
    reference = REFERENCES["DeiT with teacher"]()
    loaded = load(saved(scramble(reference), tmp_path), options={"num_classes": 5})
    assert loaded.report.ok
    assert {item.name for line in loaded.report.of("new") for item in line.targets} == {
        f"heads.label.parts.{place}.{kind}" for place in (0, 1) for kind in ("weight", "bias")
    }
    assert {line.note for line in loaded.report.of("ignored")} == {"num_classes asks for other classes"}
    assert Shown(16, 28).output(loaded, "label").shape == (3, 5)
    with pytest.raises(MisfitError, match=r"heads\.label\.parts\.0\.weight"):  # never by accident of shape
        load_into(loaded.model, tmp_path)


def test_colours_and_steps_come_from_the_preprocessor_and_options_go_first(tmp_path):
    mean, std = IMAGENET
    reference = REFERENCES["ViTForImageClassification"]()
    saved(scramble(reference), tmp_path)
    shown = Shown(16, 28, IMAGENET)
    with torch.inference_mode():
        theirs = reference(pixel_values=shown.pixels).logits
    size = {"height": 16, "width": 28}
    processor = transformers.ViTImageProcessor(image_mean=mean, image_std=std, size=size)
    processor.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    close(shown.output(loaded, "label"), theirs)
    picture = build(loaded.described.features["image"])
    assert picture(png(40, 30)).shape == (16, 28, 3)
    transformers.ViTImageProcessor(image_mean=[0.1] * 3, image_std=[0.9] * 3, size=size).save_pretrained(tmp_path)
    close(shown.output(load(tmp_path, options={"mean": mean, "std": std}), "label"), theirs)
    with pytest.raises(ValueError, match=r"2 numbers for the mean of 3 channels: give options=\{'mean'"):
        load(tmp_path, options={"mean": [0.1, 0.2]})


@pytest.mark.parametrize("options", [{}, {"image_size": [24, 32]}])
def test_without_a_preprocessor_pictures_are_read_at_the_models_size(options, tmp_path):
    loaded = load(saved(scramble(REFERENCES["DeiT with teacher"]()), tmp_path), options=options)
    picture = build(loaded.described.features["image"])(png(50, 41))
    assert list(picture.shape) == [*options.get("image_size", [16, 28]), 3]
    assert (
        loaded.model.encode(batch(1, image=[picture]))["image"].x.shape[1]
        == 2 + picture.shape[0] * picture.shape[1] // 16
    )


def test_grey_pictures_take_colours_that_are_all_equal(tmp_path):
    reference = scramble(transformers.ViTModel(vit_config(num_channels=1), add_pooling_layer=False))
    loaded = load(saved(reference, tmp_path))
    assert loaded.model.encoders["image"].embedder.normalize.mean.tolist() == [127.5]


def test_tensors_that_masked_modelling_alone_needs_are_left_out_with_the_reason(tmp_path):
    config = vit_config(image_size=16, encoder_stride=4)
    loaded = load(saved(scramble(transformers.ViTForMaskedImageModeling(config)), tmp_path))
    assert loaded.report.ok
    assert {item.name for line in loaded.report.of("ignored") for item in line.sources} == {
        "vit.embeddings.mask_token", "decoder.0.weight", "decoder.0.bias",
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "classifier.weight", "vit.layernorm.bias",
     "vit.encoder.layer.1.attention.attention.key.weight", "vit.embeddings.patch_embeddings.projection.weight"],
)  # fmt: skip
def test_a_missing_tensor_is_named(name, tmp_path):
    saved(scramble(REFERENCES["ViTForImageClassification"]()), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held[name]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MisfitError, match=name.replace(".", r"\.")):
        load(tmp_path)


def test_a_file_without_its_config_says_so(tmp_path):
    saved(scramble(REFERENCES["ViTModel"]()), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"does not say its config\.json"):
        load(tmp_path)


def bare(reference: nn.Module, folder):
    """The file of a state dict, without any config."""
    torch.save(reference.state_dict(), folder / "weights.pth")
    return folder / "weights.pth"


def torchvision_vit(**options):
    shape = dict(image_size=20, patch_size=4, num_layers=2, num_heads=3, hidden_dim=24, mlp_dim=44, num_classes=7)
    return scramble(torchvision.models.VisionTransformer(**{**shape, **options}))


@pytest.mark.parametrize("representation", [None, 10])
def test_torchvision_gives_what_the_reference_gives(representation, tmp_path):
    reference = torchvision_vit(representation_size=representation)
    loaded = load(bare(reference, tmp_path), options={"num_heads": 3})
    complete(loaded.report)
    shown = Shown(20, 20, IMAGENET)
    with torch.inference_mode():
        close(shown.output(loaded, "label"), reference(shown.pixels))
    assert epsilons(loaded.model) == epsilons(reference) == {1e-6}
    gradients_flow(loaded, shown.batch)
    torchvision_vit(representation_size=representation).load_state_dict(goes_back(loaded, reference.state_dict()))


def test_torchvision_files_of_the_first_version_name_their_maps_otherwise(tmp_path):
    reference = torchvision_vit()
    old = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for name, tensor in reference.state_dict().items()
    }
    torch.save(old, tmp_path / "weights.pth")
    loaded = load(tmp_path / "weights.pth", options={"num_heads": 3})
    complete(loaded.report)
    shown = Shown(20, 20, IMAGENET)
    with torch.inference_mode():
        close(shown.output(loaded, "label"), reference(shown.pixels))
    goes_back(loaded, old)


def test_a_bare_file_needs_its_heads(tmp_path):
    with pytest.raises(ValueError, match=r"does not say num_heads: give options=\{'num_heads': \.\.\.\}"):
        load(bare(torchvision_vit(), tmp_path))
    with pytest.raises(ValueError, match="options depth: torchvision/vit takes image_size"):
        load(bare(torchvision_vit(), tmp_path), options={"depth": 3})


TIMM = {
    "vit_tiny_patch16_224": {"img_size": (32, 80)},
    "vit_base_patch32_clip_quickgelu_224": {"img_size": 96},
    "vit_base_patch16_siglip_224": {"img_size": 48},
    "vit_base_patch32_siglip_256": {"img_size": 96},
    "vit_base_patch16_siglip_gap_224": {"img_size": 48},
    "deit_tiny_distilled_patch16_224": {"img_size": 48},
    "deit3_small_patch16_224": {"img_size": 48},
}
COLOURS = {"vit_base_patch32_clip_quickgelu_224": OPENAI}


def timm_vit(name: str, **options):
    shape = dict(embed_dim=24, num_heads=3, depth=2, num_classes=7, mlp_ratio=2.5)
    return scramble(timm.create_model(name, **{**shape, **TIMM[name], **options}))


@pytest.mark.parametrize("name", TIMM)
def test_timm_gives_what_the_reference_gives(name, tmp_path):
    reference = timm_vit(name)
    timm.models.save_for_hf(reference, tmp_path, safe_serialization=True)
    loaded = load(tmp_path)
    complete(loaded.report)
    colours = tuple(reference.pretrained_cfg[key] for key in ("mean", "std"))
    shown = Shown(*reference.patch_embed.img_size, colours)
    with torch.inference_mode():
        close(shown.tokens(loaded), reference.forward_features(shown.pixels))
        close(shown.output(loaded, "label"), reference(shown.pixels))
    assert epsilons(loaded.model) == epsilons(reference)
    gradients_flow(loaded, shown.batch)
    timm_vit(name).load_state_dict(goes_back(loaded, reference.state_dict()))


def test_a_bare_file_of_timm_takes_the_name_of_its_architecture_or_the_numbers(tmp_path):
    reference = timm_vit("vit_tiny_patch16_224", img_size=48)
    path = bare(reference, tmp_path)
    shown = Shown(48, 48)
    with torch.inference_mode():
        theirs = reference(shown.pixels)
    close(shown.output(load(path, options={"num_heads": 3}), "label"), theirs)
    with pytest.raises(ValueError, match="does not say num_heads"):
        load(path)
    clip = bare(timm_vit("vit_base_patch32_clip_quickgelu_224"), tmp_path)
    with pytest.raises(ValueError, match="does not say architecture"):
        load(clip, options={"num_heads": 3})
    named = load(clip, options={"num_heads": 3, "architecture": "vit_base_patch32_clip_quickgelu_224"})
    assert epsilons(named.model) == {1e-5}


@pytest.mark.parametrize("name", ["patch_embed.proj.bias", "cls_token", "norm.weight", "blocks.1.attn.qkv.bias"])
def test_a_missing_tensor_of_timm_is_not_taken_for_another_architecture(name, tmp_path):
    reference = timm_vit("vit_tiny_patch16_224")
    timm.models.save_for_hf(reference, tmp_path, safe_serialization=True)
    save_file({key: t for key, t in reference.state_dict().items() if key != name}, tmp_path / "model.safetensors")
    with pytest.raises(MisfitError, match="missing: "):
        load(tmp_path)


NAMES = ["vit_tiny_patch16_384", "vit_small_patch32_224", "vit_base_patch16_224", "vit_large_patch14_clip_336",
         "vit_base_patch16_plus_240", "vit_huge_patch14_clip_quickgelu_224", "vit_so400m_patch14_siglip_384",
         "vit_so400m_patch16_siglip_256", "vit_large_patch16_siglip_512.v2_webli", "vit_large_patch16_siglip_gap_384",
         "vit_giantopt_patch16_siglip_256", "vit_betwixt_patch32_clip_224", "deit_base_distilled_patch16_384",
         "deit3_medium_patch16_224", "vit_base_patch8_224"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_an_architectures_name_says_is_what_timm_builds(name):
    with torch.device("meta"):
        reference = timm.create_model(name, depth=1)
    source = _as_source(reference, name)
    layers = vit_timm._layers(source, {})
    assert layers.heads == reference.blocks[0].attn.num_heads
    assert layers.eps == reference.blocks[0].norm1.eps
    act = {"gelu": "GELU", "quick_gelu": "QuickGELU", "gelu_pytorch_tanh": "GELUTanh"}[layers.act]
    assert type(reference.blocks[0].mlp.act).__name__ == act


def _as_source(reference, name):
    from mmformer.checkpoints.source import source_of

    return source_of(reference.state_dict(), {"architecture": name})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_base_patch16_rpn_224", "pools by 'avg' over patches and normalises behind"),
        ("vit_base_patch16_gap_224", "does not say num_heads"),
        ("vit_small_patch14_reg4_dinov2", "does not say num_heads"),
    ],
)
def test_an_architecture_that_is_not_ours_is_refused_by_what_it_has(name, message):
    with torch.device("meta"):
        reference = timm.create_model(name, depth=1)
    with pytest.raises(ValueError, match=message):
        vit_timm.describe(_as_source(reference, name), {})


def test_arguments_of_timm_that_tensors_do_not_show_are_refused(tmp_path):
    reference = timm_vit("vit_tiny_patch16_224", qk_norm=True)
    timm.models.save_for_hf(reference, tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match="was made with qk_norm, which mmformer's ViT does not have: wrap"):
        load(tmp_path)


def test_positions_of_a_file_that_is_not_square_are_not_taken_for_a_square(tmp_path):
    saved(scramble(transformers.ViTModel(vit_config(image_size=[8, 32]), add_pooling_layer=False)), tmp_path)
    described = vit.describe(open_source(tmp_path), {})
    assert described.layout["grid"] == (2, 8)  # 16 places, a square of 4 too
    assert load(tmp_path).model.encoders["image"].embedder.position.table.shape == (2, 8, 24)
