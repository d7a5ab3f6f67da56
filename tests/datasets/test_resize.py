from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, InterpolationMode, Resize

from mmformer.datasets.features import Picture
from mmformer.datasets.resize import CentreCrop, Cover, Fit, ShortestSide, ShortestSideWithin, Squash

SIDES = st.integers(5, 70)
FILTERS = {name: InterpolationMode(name) for name in ("bilinear", "bicubic", "lanczos")}


def photo(height: int, width: int, channels: int = 3) -> Image.Image:
    noise = np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(noise if channels == 3 else noise[..., 0])


def ours(height: int, width: int, *steps) -> np.ndarray:
    return Picture(steps=steps)(photo(height, width)).numpy()


@given(SIDES, SIDES, st.sampled_from(list(FILTERS)))
def test_torchvision_gives_the_same_pixels(height, width, name) -> None:
    picture = photo(height, width)
    whole = Resize(24, FILTERS[name])(picture)
    assert np.array_equal(ours(height, width, ShortestSide(24, name)), whole)
    assert np.array_equal(ours(height, width, ShortestSide(24, name), CentreCrop(17, 24)), CenterCrop((17, 24))(whole))
    assert np.array_equal(ours(height, width, Squash(9, 24, name)), Resize((9, 24), FILTERS[name])(picture))
    assert np.array_equal(ours(height, width, CentreCrop(31, 40)), CenterCrop((31, 40))(picture))


@given(SIDES, SIDES)
def test_open_clip_and_timm_give_the_same_pixels(height, width) -> None:
    open_clip = pytest.importorskip("open_clip", reason="the oracle open_clip is not installed")
    timm_transforms = pytest.importorskip("timm.data.transforms", reason="the oracle timm is not installed")
    picture = photo(height, width)
    shortest, squashed, longest = (
        open_clip.image_transform(28, is_train=False, mean=(0.0,) * 3, std=(1.0,) * 3, resize_mode=mode, fill_color=9)
        for mode in ("shortest", "squash", "longest")
    )

    def pixels(transform) -> np.ndarray:
        return (transform(picture) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()

    assert np.array_equal(ours(height, width, ShortestSide(28), CentreCrop(28, 28)), pixels(shortest))
    assert np.array_equal(ours(height, width, Squash(28, 28)), pixels(squashed))
    assert np.array_equal(ours(height, width, Fit(28, 28), CentreCrop(28, 28, fill=9)), pixels(longest))
    cover = timm_transforms.ResizeKeepRatio((20, 33), interpolation="bilinear")
    assert np.array_equal(ours(height, width, Cover(20, 33, "bilinear")), np.asarray(cover(picture)))


@given(SIDES, SIDES)
def test_transformers_gives_the_same_pixels(height, width) -> None:
    pytest.importorskip("transformers", reason="the oracle transformers is not installed")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
    from transformers.models.vilt.image_processing_pil_vilt import ViltImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    def pixels(processor) -> np.ndarray:
        plain = {"do_rescale": False, "do_normalize": False, "return_tensors": "np"}
        return np.moveaxis(processor(photo(height, width), **plain)["pixel_values"][0], 0, -1)

    clip = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 21, "width": 26})
    assert np.array_equal(ours(height, width, ShortestSide(24), CentreCrop(21, 26, even=False)), pixels(clip))
    vit = ViTImageProcessorPil(size={"height": 20, "width": 33})
    assert np.array_equal(ours(height, width, Squash(20, 33, "bilinear")), pixels(vit))
    siglip = SiglipImageProcessorPil(size={"height": 20, "width": 20})
    assert np.array_equal(ours(height, width, Squash(20, 20)), pixels(siglip))
    vilt = ViltImageProcessorPil(size={"shortest_edge": 48}, size_divisor=8)
    if max(height, width) < 5 * min(height, width):  # thinner ones would have a side of 0 there
        assert np.array_equal(ours(height, width, ShortestSideWithin(48, 79, 8)), pixels(vilt))


def test_grey_pictures_go_through_the_steps() -> None:
    item = Picture(steps=[Fit(12, 12), CentreCrop(12, 12, fill=200)], channels=1)(photo(6, 3, 1))
    assert item.shape == (12, 12, 1)
    assert item[:, :3].unique().tolist() == [200]


def test_a_filter_that_pillow_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="filter 'cubic': give one of nearest"):
        Squash(3, 3, "cubic")
