"""Backbones of timm and torchvision; random weights, tiny where the library allows."""

from __future__ import annotations

import json
import sys

import pytest
import torch
import torchvision

from mmformer.batch import Ragged
from mmformer.encoders.wrap import Timm, Torchvision
from tests.encoders.wrapping import equals_own_call, gradients_flow_and_stop, grid, shaken

SWIN = ("swin_tiny_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": [1, 1], "num_heads": [2, 3],
         "strict_img_size": False})  # fmt: skip
CONVNEXT = ("convnext_atto", {"depths": [1, 1, 1, 1], "dims": [8, 12, 16, 20]})
VIT = ("vit_tiny_patch16_224",
       {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3, "dynamic_img_size": True})  # fmt: skip
DINOV2 = ("vit_small_patch14_reg4_dinov2",
          {"img_size": 28, "embed_dim": 24, "depth": 1, "num_heads": 3, "dynamic_img_size": True})  # fmt: skip
DINOV3 = ("vit_small_patch16_dinov3",
          {"img_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3, "dynamic_img_size": True})  # fmt: skip


def pictures(*shapes: tuple[int, int], channels: int = 3) -> list[torch.Tensor]:
    return [torch.randint(0, 256, (*shape, channels), dtype=torch.uint8) for shape in shapes]


@pytest.fixture(scope="module")
def timm():
    return pytest.importorskip("timm", reason="needs the extra [timm]")


def timm_input(timm, model, picture):
    known = timm.data.resolve_model_data_config(model)
    x = (picture.float() / 255 - torch.tensor(known["mean"])) / torch.tensor(known["std"])
    return x.permute(2, 0, 1)[None]


@pytest.mark.parametrize(
    ("name", "options", "unit", "prefix"),
    [(*SWIN, 8, 0), (*CONVNEXT, 32, 0), (*VIT, 16, 1), (*DINOV2, 14, 5), (*DINOV3, 16, 5)],
    ids=["swin", "convnext", "vit", "dinov2", "dinov3"],
)
def test_timm_gives_what_its_own_call_gives(timm, name, options, unit, prefix):
    encoder = shaken(Timm(10, name, options, weights=None))
    sizes = [(2, 3), (2, 2), (3, 2), (2, 3)] if name != SWIN[0] else [(4, 8), (4, 4), (8, 4), (4, 8)]
    items = pictures(*((unit * rows, unit * columns) for rows, columns in sizes))

    def own(picture):
        x = encoder.backbone.forward_features(timm_input(timm, encoder.backbone, picture))
        rows, columns = picture.shape[0] // unit, picture.shape[1] // unit
        if x.ndim == 4:
            x = x.flatten(1, 2) if name == SWIN[0] else x.flatten(2).transpose(1, 2)
        return x[0], grid(rows, columns, prefix)

    tokens = equals_own_call(encoder, items, 1, own)
    assert len(set(tokens.layout.lengths)) == 2
    gradients_flow_and_stop(encoder, Ragged.stack(items, range(4), 1), 4)


def test_timm_reads_its_own_files_and_says_what_it_read(timm, tmp_path):
    name, options = CONVNEXT
    original = shaken(timm.create_model(name, num_classes=7, **options))
    timm.models.save_for_hf(original, tmp_path / "folder", model_args=options | {"num_classes": 7})
    torch.save(original.state_dict(), tmp_path / "alone.pth")
    picture = pictures((64, 32))[0]
    wanted = original.forward_features(timm_input(timm, original, picture)).flatten(2).transpose(1, 2)
    for arguments in (
        {"name": None, "options": {}, "weights": str(tmp_path / "folder")},
        {"name": name, "options": options | {"num_classes": 7}, "weights": str(tmp_path / "alone.pth")},
    ):
        encoder = Timm(20, **arguments).eval()
        found = encoder(Ragged.stack([picture], [0], 1), 1)
        torch.testing.assert_close(found.x, wanted)
        again = Timm(20, **encoder.described, weights=None)
        again.load_state_dict(encoder.state_dict())
        assert torch.equal(again.eval()(Ragged.stack([picture], [0], 1), 1).x, found.x)
        json.dumps(encoder.described)
    with pytest.raises(ValueError, match=r"weights .* are of timm's convnext_atto, not of resnet18"):
        Timm(20, "resnet18", {}, weights=str(tmp_path / "folder"))


def test_an_id_is_found_in_the_cache_of_the_hub_without_a_network(timm, tmp_path, monkeypatch):
    name, options = CONVNEXT
    original = shaken(timm.create_model(name, num_classes=7, **options))
    home = tmp_path / "cache" / "models--someone--convnext"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    timm.models.save_for_hf(original, home / "snapshots" / ("0" * 40), model_args=options)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    encoder = Timm(20, None, {}, weights="someone/convnext")
    assert torch.equal(encoder.backbone.stem[0].weight, original.stem[0].weight)
    assert encoder.described["name"] == name
    assert encoder.described["options"].items() >= options.items()


def test_timm_refuses_weights_that_do_not_fill_it(timm, tmp_path):
    name, options = CONVNEXT
    state = timm.create_model(name, **options).state_dict()
    del state["stages.1.blocks.0.norm.weight"]
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(RuntimeError, match=r"Missing key.*stages\.1\.blocks\.0\.norm\.weight"):
        Timm(20, name, options, weights=str(tmp_path / "damaged.pth"))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        Timm(20, name, options, weights=str(tmp_path / "absent.pth"))
    with pytest.raises(ValueError, match="name those by `weights`"):
        Timm(20, name, {"checkpoint_path": "x.pth"}, weights=None)
    with pytest.raises(ValueError, match="what a hub holds is named by `weights`"):
        Timm(20, "hf-hub:someone/something", {}, weights=None)


def test_grey_pictures_are_normalised_by_the_mean_of_the_colours(timm):
    name, options = CONVNEXT
    encoder = Timm(20, name, options | {"in_chans": 1}, weights=None)
    known = timm.data.resolve_model_data_config(encoder.backbone)
    assert encoder.normalize.mean.tolist() == pytest.approx([255 * sum(known["mean"]) / len(known["mean"])])
    assert encoder(Ragged.stack(pictures((32, 32), channels=1), [0], 1), 1).x.shape == (1, 1, 20)


def test_an_error_of_the_backbone_says_of_which_items(timm):
    name, options = VIT
    encoder = Timm(24, name, options | {"dynamic_img_size": False}, weights=None)
    with pytest.raises(AssertionError) as caught:
        encoder(Ragged.stack(pictures((32, 48)), [0], 1), 1)
    assert caught.value.__notes__ == ["while VisionTransformer read 1 image items, (32, 48) to (32, 48)"]


def test_a_library_that_is_absent_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"timm is not installed: pip install 'mmformer\[timm\]'"):
        Timm(24, "convnext_atto", {}, weights=None)


TORCHVISION = {
    "resnet": ("resnet18", "layer4", {}, 32, 0),
    "convnext": ("convnext_tiny", "features", {}, 32, 0),
    "swin": ("swin_t", "permute", {}, 32, 0),
    "vit": ("vit_b_16", "encoder.ln", {"image_size": 32}, 16, 1),
}


@pytest.mark.parametrize("case", TORCHVISION)
def test_torchvision_gives_what_its_own_call_gives(case):
    name, node, options, unit, prefix = TORCHVISION[case]
    encoder = shaken(Torchvision(10, name, node, options, weights=None))
    sizes = [(2, 2), (2, 2)] if case == "vit" else [(2, 3), (1, 2), (2, 3)]
    items = pictures(*((unit * rows, unit * columns) for rows, columns in sizes))
    original = torchvision.models.get_model(name, **options).eval()
    missing, unexpected = original.load_state_dict(encoder.backbone.state_dict(), strict=False)
    assert not unexpected
    assert {key.partition(".")[0] for key in missing} <= {"fc", "classifier", "head", "heads"}
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    seen = {}
    original.get_submodule(node).register_forward_hook(lambda module, inputs, output: seen.update(x=output))

    def own(picture):
        original(((picture.float() / 255 - mean) / std).permute(2, 0, 1)[None])
        x = seen["x"] if seen["x"].ndim == 3 else seen["x"].flatten(2).transpose(1, 2)
        return x[0], grid(picture.shape[0] // unit, picture.shape[1] // unit, prefix)

    equals_own_call(encoder, items, 1, own)
    if case == "resnet":  # its batch norm has running statistics, which must stand still where it is frozen
        gradients_flow_and_stop(encoder, Ragged.stack(items, range(len(items)), 1), len(items))


def test_torchvision_reads_its_own_files(tmp_path):
    original = shaken(torchvision.models.resnet18(num_classes=7))
    torch.save(original.state_dict(), tmp_path / "resnet.pth")
    arguments = {"name": "resnet18", "node": "layer4", "options": {"num_classes": 7}}
    encoder = Torchvision(512, **arguments, weights=str(tmp_path / "resnet.pth"))
    assert encoder.described == arguments
    for key, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, original.state_dict()[key]), key
    with pytest.raises(ValueError, match=r"fc.weight is \(7, 512\), here \(1000, 512\)"):
        Torchvision(512, "resnet18", "layer4", {}, weights=str(tmp_path / "resnet.pth"))
    with pytest.raises(ValueError, match="no classifier 'fasterrcnn_resnet50_fpn'"):
        Torchvision(512, "fasterrcnn_resnet50_fpn", "layer4", {}, weights=None)
    with pytest.raises(ValueError, match=r"options \['weights'\] of torchvision download"):
        Torchvision(512, "resnet18", "layer4", {"weights": "DEFAULT"}, weights=None)
