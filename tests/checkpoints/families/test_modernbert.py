from __future__ import annotations

import json
from pathlib import Path

import pytest

from mmformer.checkpoints.load import load
from tests.checkpoints.families.languages import VOCABULARY, Pair, goes_back, gradients_flow, pair, random_texts

transformers = pytest.importorskip("transformers", reason="ModernBERT is compared with the transformers package")

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 3, "intermediate_size": 52,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "local_attention": 6, "pad_token_id": 0,
    "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LENGTHS = (1, 7, 4, 7, 21)


def made(kind: str, folder: Path, **changes) -> Pair:
    config = transformers.ModernBertConfig(**SIZES | changes)
    return pair(getattr(transformers, kind)(config), folder, random_texts(LENGTHS))


def test_masked_words(tmp_path: Path) -> None:
    both = made("ModernBertForMaskedLM", tmp_path)
    both.close(both.scores(), both.theirs("logits"))
    goes_back(both)
    gradients_flow(both)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "norm_eps": 1e-3, "hidden_activation": "silu"},
        {"global_attn_every_n_layers": 2, "local_attention": 9},
    ],
)
def test_body(changes: dict, tmp_path: Path) -> None:
    both = made("ModernBertModel", tmp_path, **changes)
    both.close(both.ours(), both.theirs("last_hidden_state"))
    goes_back(both)
    gradients_flow(both)


def test_untied_with_other_biases(tmp_path: Path) -> None:
    both = made(
        "ModernBertForMaskedLM", tmp_path, tie_word_embeddings=False, classifier_bias=True, decoder_bias=False,
        classifier_activation="relu",
    )  # fmt: skip
    both.close(both.scores(), both.theirs("logits"))
    goes_back(both)


def test_the_first_attention_has_no_norm_of_its_own(tmp_path: Path) -> None:
    both = made("ModernBertModel", tmp_path)
    layers = both.part("encoders.text.stages.0.layers")
    assert [sum(1 for _ in layer.attention_norm.parameters()) for layer in layers] == [0, 1, 1, 1, 1]
    assert [layer.attention.visibility is None for layer in layers] == [True, False, False, True, False]


def test_settings_of_older_files(tmp_path: Path) -> None:
    both = made("ModernBertModel", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    rest = {name: value for name, value in config.items() if name not in ("layer_types", "rope_parameters")}
    old = {"global_attn_every_n_layers": 3, "global_rope_theta": 700.0, "local_rope_theta": 30.0}
    (tmp_path / "config.json").write_text(json.dumps(rest | old))
    again = Pair(transformers.ModernBertModel.from_pretrained(tmp_path).eval(), load(tmp_path), tmp_path, both.texts)
    again.close(again.ours(), again.theirs("last_hidden_state"))
