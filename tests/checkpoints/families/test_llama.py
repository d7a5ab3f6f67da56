from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmformer.checkpoints.load import load
from tests.checkpoints.families.languages import VOCABULARY, Pair, goes_back, gradients_flow, pair, random_texts

transformers = pytest.importorskip("transformers", reason="these decoders are compared with the transformers package")

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 52, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 7.0, "low_freq_factor": 1.5, "high_freq_factor": 5.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def made(kind: str, folder: Path, head: str = "ForCausalLM", texts=None, **changes) -> Pair:
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    return pair(getattr(transformers, f"{kind}{head}")(config), folder, texts)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made("Llama", tmp_path_factory.mktemp("llama"))


def rewrite(folder: Path, source: Path, **changes) -> None:
    """The same weights beside another config; None leaves a setting out."""
    config = {**json.loads((source / "config.json").read_text()), **changes}
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if value is not None})
    )
    (folder / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Llama", {}),
        ("Llama", {"head_dim": 10, "attention_bias": True, "mlp_bias": True}),
        ("Llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3, "hidden_act": "gelu"}),
        ("Mistral", {"sliding_window": 5, "head_dim": 10}),
        ("Mistral", {"sliding_window": None}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
        ("Qwen3", {"head_dim": 10}),
        ("Qwen3", {"head_dim": 4, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 2}),
        ("Llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 123.0, "factor": 3.0}}),
        ("Llama", {"rope_parameters": LLAMA3}),
    ],
)
def test_next_words(kind: str, changes: dict, tmp_path: Path) -> None:
    both = made(kind, tmp_path, **changes)
    both.close(both.scores(), both.theirs("logits"))
    goes_back(both)
    gradients_flow(both)


def test_body(tmp_path: Path) -> None:
    both = made("Llama", tmp_path, "Model")
    assert not both.model.heads
    both.close(both.ours(), both.theirs("last_hidden_state"))
    goes_back(both)


def test_scaled_rates_of_long_texts(tmp_path: Path) -> None:
    """All three bands of Llama 3.1: fast rates that stay, slow ones that shrink, and the ramp between."""
    both = made("Llama", tmp_path, head_dim=16, rope_parameters=LLAMA3, texts=random_texts((60, 33)))
    ours = both.part("encoders.text.stages.0.layers.0.attention.rotary").rates
    theirs = both.reference.model.rotary_emb.inv_freq
    assert float((ours / theirs - 1).abs().max()) < 1e-6
    plain = 1 / 500.0 ** (torch.arange(0, 16, 2) / 16)
    share = plain / ours
    assert share[0] == 1
    assert share[-1] == pytest.approx(7)
    assert ((share > 1.01) & (share < 6.9)).any()
    both.close(both.scores(), both.theirs("logits"))


def test_settings_of_older_files(llama: Pair, tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 3.0}
    rewrite(tmp_path, llama.folder, rope_parameters=None, rope_theta=123.0, rope_scaling=scaling, head_dim=None)
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    both = Pair(reference, load(tmp_path), tmp_path, llama.texts)
    both.close(both.scores(), both.theirs("logits"))
    assert not torch.allclose(torch.cat(both.scores()), torch.cat(llama.scores()))


def test_layers_of_older_qwen_files(tmp_path: Path) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    first.mkdir()
    other.mkdir()
    both = made("Qwen2", first, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    rewrite(other, first, layer_types=None)
    assert load(other).config == both.loaded.config
    rewrite(other, first, layer_types=None, use_sliding_window=False)
    assert load(other).config != both.loaded.config


def test_an_unknown_rotation_is_refused(llama: Pair, tmp_path: Path) -> None:
    rewrite(tmp_path, llama.folder, rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0})
    with pytest.raises(ValueError, match="has rope_type 'yarn': mmformer has default, linear and llama3"):
        load(tmp_path)
    rewrite(tmp_path, llama.folder, rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5})
    with pytest.raises(ValueError, match=r"rotates 0\.5 of the channels"):
        load(tmp_path)


def test_old_buffers_are_ignored(llama: Pair, tmp_path: Path) -> None:
    rewrite(tmp_path, llama.folder)
    stored = load_file(tmp_path / "model.safetensors")
    stored["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path)
    assert [line.note for line in loaded.report.of("ignored")] == ["a buffer that rope_theta gives"]


def test_half_precision_is_converted_and_said(llama: Pair, tmp_path: Path) -> None:
    rewrite(tmp_path, llama.folder)
    stored = {name: tensor.bfloat16() for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path)
    assert "from bfloat16 to float32" in str(loaded.report)
    reference = transformers.LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    both = Pair(reference, loaded, tmp_path, llama.texts)
    both.close(both.scores(), both.theirs("logits"))


def test_relatives_of_other_arithmetic_are_refused(llama: Pair, tmp_path: Path) -> None:
    rewrite(tmp_path, llama.folder, model_type="gemma")
    with pytest.raises(ValueError, match="no family that mmformer knows"):
        load(tmp_path)


def test_a_window_forgets(tmp_path: Path) -> None:
    """With one layer and a window of 4, a word is not seen 4 places on."""
    both = made("Mistral", tmp_path, num_hidden_layers=1, sliding_window=4, texts=random_texts((9, 9)))
    both.texts[1][:] = both.texts[0]
    both.texts[1][0] = (both.texts[0][0] + 1) % VOCABULARY
    one, other = both.ours()
    same = (one == other).all(1).tolist()
    assert same == [False] * 4 + [True] * 5
