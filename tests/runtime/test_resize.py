"""Bytes are resized to the bit as torch does it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from mmformer.runtime.resize import resize

side = st.integers(1, 70)


def by_torch(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    planes = torch.from_numpy(picture).permute(2, 0, 1)[None]
    planes = F.interpolate(planes, (height, width), mode="bicubic", antialias=True, align_corners=False)
    return planes[0].permute(1, 2, 0).numpy()


@given(old=st.tuples(side, side), new=st.tuples(side, side), channels=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_as_torch(old, new, channels, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (*old, channels), dtype=np.uint8)
    np.testing.assert_array_equal(resize(picture, *new), by_torch(picture, *new))


@pytest.mark.parametrize("values", [0, 255])
def test_a_plain_picture_stays_plain(values):
    assert (resize(np.full((31, 17, 3), values, np.uint8), 9, 40) == values).all()
