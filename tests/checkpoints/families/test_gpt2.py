from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmformer.checkpoints.load import load
from mmformer.checkpoints.report import MisfitError
from tests.checkpoints.families.languages import VOCABULARY, Pair, goes_back, gradients_flow, pair
from tests.checkpoints.oracles import batch, close

transformers = pytest.importorskip("transformers", reason="GPT-2 is compared with the transformers package")

SIZES = {
    "n_embd": 24, "n_layer": 3, "n_head": 4, "n_inner": 52, "vocab_size": VOCABULARY, "n_positions": 19,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def made(kind: str, folder: Path, **changes) -> Pair:
    return pair(getattr(transformers, kind)(transformers.GPT2Config(**SIZES | changes)), folder)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made("GPT2LMHeadModel", tmp_path_factory.mktemp("gpt2"))


def test_next_words(decoder: Pair) -> None:
    decoder.close(decoder.scores(), decoder.theirs("logits"))
    goes_back(decoder)
    gradients_flow(decoder)


def test_body(tmp_path: Path) -> None:
    both = made("GPT2Model", tmp_path)
    both.close(both.ours(), both.theirs("last_hidden_state"))
    goes_back(both)
    last = torch.stack([states[-1] for states in both.theirs("last_hidden_state")])
    close(both.pooled(), last)


def test_untied(tmp_path: Path) -> None:
    both = made("GPT2LMHeadModel", tmp_path, tie_word_embeddings=False, n_inner=None, activation_function="relu")
    assert both.part("encoders.text.stages.0.layers.0.feedforward.up").weight.shape == (96, 24)
    both.close(both.scores(), both.theirs("logits"))
    goes_back(both)


def test_buffers_of_the_mask_are_ignored_and_the_bias_beside_them_is_not(decoder: Pair, tmp_path: Path) -> None:
    """Dropping all names that end in `attn.bias` would drop `attn.c_attn.bias` too."""
    stored = {n.removeprefix("transformer."): t for n, t in load_file(decoder.folder / "model.safetensors").items()}
    for layer in range(3):
        stored[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 19, 19, dtype=torch.uint8).tril()
        stored[f"h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((decoder.folder / "config.json").read_bytes())
    loaded = load(tmp_path)
    assert len(loaded.report.of("ignored")) == 6
    state = decoder.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())
    del stored["h.1.attn.c_attn.bias"]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MisfitError, match=r"missing: encoders.text.stages.0.layers.1.attention.qkv.bias"):
        load(tmp_path)


def test_a_matrix_that_is_stored_the_other_way_is_named(decoder: Pair, tmp_path: Path) -> None:
    stored = load_file(decoder.folder / "model.safetensors")
    stored["transformer.h.1.mlp.c_fc.weight"] = stored["transformer.h.1.mlp.c_fc.weight"].t().contiguous()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_bytes((decoder.folder / "config.json").read_bytes())
    with pytest.raises(MisfitError, match=r"(?s)transformer.h.1.mlp.c_fc.weight.*stored transposed"):
        load(tmp_path)


@pytest.mark.parametrize("setting", [{"scale_attn_weights": False}, {"scale_attn_by_inverse_layer_idx": True}])
def test_other_scales_are_refused(setting: dict[str, bool], tmp_path: Path) -> None:
    transformers.GPT2Model(transformers.GPT2Config(**SIZES | setting)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"has {next(iter(setting))}: {next(iter(setting.values()))}"):
        load(tmp_path)


def test_the_future_is_not_seen(decoder: Pair) -> None:
    text = decoder.texts[-1].clone()
    states = [decoder.model.encode(batch(1, text=[text]))["text"].x[0]]
    text[-1] = (text[-1] + 1) % VOCABULARY
    states.append(decoder.model.encode(batch(1, text=[text]))["text"].x[0])
    assert torch.equal(states[0][:-1], states[1][:-1])
    assert not torch.equal(states[0][-1], states[1][-1])
