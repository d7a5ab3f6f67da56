"""Weights from elsewhere fit, or what does not fit is listed."""

import pytest
import torch

from mmformer.run.launch import UserError
from mmformer.run.pretrained import load_pretrained
from tests.training.toy import toy_model


def test_weights_from_elsewhere_fit_or_are_listed(tmp_path):
    from safetensors.torch import save_file

    source, target = toy_model(), toy_model()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert "100% of the weights" in load_pretrained(target, tmp_path, True)[-1]
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    state = source.state_dict()
    del state["fusion.latents"]
    state["extra"] = torch.zeros(1)
    state["heads.answer.out.bias"] = torch.zeros(9)
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(
        UserError, match=r"1 missing: fusion.latents; 1 unexpected: extra; 1 of another shape: .*bias 9, here 3"
    ):
        load_pretrained(target, tmp_path, True)
    assert len(load_pretrained(target, tmp_path, False)) == 4
    with pytest.raises(UserError, match="no checkpoint"):
        load_pretrained(target, tmp_path / "nowhere", True)
