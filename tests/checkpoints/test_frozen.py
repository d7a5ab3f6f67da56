"""Frozen weights lie once beside the checkpoints; a checkpoint is read as if it held them."""

from __future__ import annotations

import shutil

import pytest
import torch

from mmformer.checkpoints import open_source
from mmformer.checkpoints.frozen import FrozenError, describe, digest
from mmformer.training.checkpointing import AtomicCheckpointIO, load_whole, newest_whole


def saved(folder, step=1, **changes):
    """A checkpoint of one large frozen tensor, held under two names, and a small one that trains."""
    large = torch.arange(100_000, dtype=torch.float32)
    state = {"model.a": large, "average.a": large, "model.b": torch.full((2,), float(step))} | changes
    about = describe(state, ["model.a", "average.a"])
    folder.mkdir(exist_ok=True)
    AtomicCheckpointIO().save_checkpoint({"state_dict": state, "step": step, "frozen": about}, folder / "last.ckpt")
    return state


def test_a_checkpoint_is_small_and_whole_when_it_is_read(tmp_path):
    state = saved(tmp_path)
    sizes = {path.suffix: path.stat().st_size for path in tmp_path.iterdir() if path.suffix}
    assert sizes[".ckpt"] < 4000
    assert 400_000 < sizes[".pt"] < 410_000  # once, though it has two names
    read = load_whole(tmp_path / "last.ckpt")
    assert read["step"] == 1
    assert read["state_dict"].keys() == state.keys()
    assert all(torch.equal(read["state_dict"][name], state[name]) for name in state)


def test_the_frozen_file_is_written_once_and_another_one_beside_it(tmp_path):
    saved(tmp_path)
    (file,) = tmp_path.glob("frozen-*.pt")
    written = file.stat().st_mtime_ns
    saved(tmp_path, 2)
    assert file.stat().st_mtime_ns == written
    saved(tmp_path, 3, **{"model.a": torch.zeros(3), "average.a": torch.zeros(3)})
    assert len(list(tmp_path.glob("frozen-*.pt"))) == 2
    assert load_whole(tmp_path / "last.ckpt")["state_dict"]["model.a"].tolist() == [0, 0, 0]


def test_without_its_frozen_weights_a_checkpoint_says_what_to_copy(tmp_path):
    saved(tmp_path / "run")
    shutil.copy(tmp_path / "run" / "last.ckpt", tmp_path / "alone.ckpt")
    with pytest.raises(FrozenError, match=r"alone.ckpt holds only what was trained, and frozen-.*\.pt .* copy both"):
        load_whole(tmp_path / "alone.ckpt")


@pytest.mark.parametrize("damage", ["bytes", "other", "cut"])
def test_damaged_frozen_weights_are_named_and_cost_no_checkpoint(tmp_path, damage):
    saved(tmp_path)
    (file,) = tmp_path.glob("frozen-*.pt")
    if damage == "other":
        torch.save({"model.a": torch.zeros(2), "average.a": torch.zeros(2)}, file)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    else:
        content = bytearray(file.read_bytes())
        content[200_000] ^= 1
        file.write_bytes(content)
    with pytest.raises(FrozenError, match=r"frozen-.*(is damaged|cannot be read)"):
        newest_whole(tmp_path)
    assert (tmp_path / "last.ckpt").is_file()  # nothing is wrong with it: it is not set aside


def test_a_loader_of_weights_sees_the_frozen_ones_too(tmp_path):
    state = saved(tmp_path)
    found = open_source(tmp_path / "last.ckpt").tensors
    assert all(torch.equal(found[name], state[name]) for name in state)
    (file,) = tmp_path.glob("frozen-*.pt")
    file.unlink()
    with pytest.raises(FrozenError, match="copy both"):
        open_source(tmp_path / "last.ckpt")


def test_an_entry_of_another_meaning_is_left_alone(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "frozen": ["a"]}, tmp_path / "theirs.ckpt")
    assert load_whole(tmp_path / "theirs.ckpt")["frozen"] == ["a"]


def test_the_digest_sees_names_types_shapes_and_numbers():
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1, dtype=torch.bfloat16)}
    others = [
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].view(3, 2), "b": base["b"]},
        {"a": base["a"].int(), "b": base["b"]},
        {"a": base["a"] + 1e-30, "b": base["b"]},
    ]
    assert digest(base) == digest(dict(reversed(base.items())))
    assert digest(base) == digest({name: tensor.clone() for name, tensor in base.items()})
    assert len({digest(one) for one in [base, *others]}) == 5
