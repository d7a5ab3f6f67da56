from functools import partial

import pytest
import torch

from mmformer.checkpoints.folder import save_model
from mmformer.fusion import Cascade, Fusion
from mmformer.nn import Attention, Block, CrossAttention, Transformer
from mmformer.pooling import MeanPool
from mmformer.run.grafts import Graft, graft
from mmformer.run.launch import UserError
from tests.helpers import scramble

DIM = 8
CONFIG = {
    "_target_": "mmformer.model.Model",
    "encoders": {
        "text": {"_target_": "mmformer.encoders.TextEmbedder", "dim": DIM, "vocab_size": 5},
        "image": {"_target_": "mmformer.encoders.image_patches", "dim": DIM, "patch": 4, "channels": 3},
    },
    "fusion": {
        "_target_": "mmformer.fusion.Fusion",
        "dim": DIM,
        "stream": ["latent", "text"],
        "transformer": None,
        "pool": {"_target_": "mmformer.pooling.MeanPool"},
        "num_latents": 3,
    },
}


@pytest.fixture
def saved(tmp_path):
    from mmformer.checkpoints.build import build

    scramble(model := build(CONFIG), seed=4)
    save_model(tmp_path / "model", model, {"model": CONFIG})
    return model, str(tmp_path / "model")


def other() -> torch.nn.Module:
    """A model whose earlier fusion has the latents of the saved one's, but reads no text."""
    layer = partial(Block, attention=partial(Attention, num_heads=2), cross=partial(CrossAttention, num_heads=2))
    queries = Fusion(DIM, ["latent"], None, MeanPool(), num_latents=3)
    last = Fusion(DIM, ["image"], Transformer(DIM, 1, [layer]), MeanPool())
    return torch.nn.ModuleDict({"fusion": Cascade({"image": queries}, last)})


def test_a_part_is_filled_whole_and_what_it_lacks_is_left_out(saved):
    given, path = saved
    model = other()
    before = model.fusion.last.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    said = list(graft(model, [Graft(path=path, part="fusion", into="fusion.earlier.image")]))
    assert torch.equal(model.fusion.earlier["image"].latents, given.fusion.latents)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.fusion.last.state_dict().items())
    assert said == [f"grafts: fusion.earlier.image is fusion of {path}, 1 tensors, 1 left out"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "heads.text"}, "has no heads.text"),
        ({"part": "encoders.text"}, "this model has no encoders.text"),
        ({"part": "fusion", "into": "fusion.last"}, r"has no fusion of these shapes: .*attention"),
    ],
)
def test_what_does_not_fit_is_named(saved, options, message):
    with pytest.raises(UserError, match=message):
        list(graft(other(), [Graft(path=saved[1], **options)]))


def test_a_run_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"grafts: .*nowhere"):
        list(graft(other(), [Graft(path=str(tmp_path / "nowhere"), part="fusion")]))
