from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmformer.checkpoints.load import load
from tests.checkpoints.families.languages import VOCABULARY, Pair, goes_back, gradients_flow, pair, random_texts

transformers = pytest.importorskip("transformers", reason="T5 is compared with the transformers package")

SIZES = {
    "d_model": 24, "d_kv": 10, "d_ff": 52, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
    "vocab_size": VOCABULARY, "relative_attention_num_buckets": 14, "relative_attention_max_distance": 11,
}  # fmt: skip
LENGTHS = (1, 7, 4, 7, 40)
"""The longest reaches past the greatest distance."""


def made(kind: str, folder: Path, config: str = "T5Config", **changes) -> Pair:
    reference = getattr(transformers, kind)(getattr(transformers, config)(**SIZES | changes))
    return pair(reference, folder, random_texts(LENGTHS))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("T5", {}),
        ("T5", {"feed_forward_proj": "gated-gelu", "layer_norm_epsilon": 1e-3}),
        ("T5", {"feed_forward_proj": "gated-silu", "relative_attention_num_buckets": 32}),
        ("MT5", {}),
    ],
)
def test_encoder(kind: str, changes: dict, tmp_path: Path) -> None:
    both = made(f"{kind}EncoderModel", tmp_path, f"{kind}Config", **{"relative_attention_max_distance": 23} | changes)
    both.close(both.ours(), both.theirs("last_hidden_state"))
    goes_back(both)
    gradients_flow(both)


def test_layers_share_one_table(tmp_path: Path) -> None:
    both = made("T5EncoderModel", tmp_path)
    layers = both.part("encoders.text.stages.0.layers")
    assert len({id(layer.attention.kernel.table.weight) for layer in layers}) == 1
    tied = [line.targets[0].name for line in both.loaded.report.of("tied")]
    assert tied == [f"encoders.text.stages.0.layers.{i}.attention.kernel.table.weight" for i in (1, 2)]


def test_the_decoder_is_left_and_listed(tmp_path: Path) -> None:
    reference = transformers.T5ForConditionalGeneration(transformers.T5Config(**SIZES)).eval()
    reference.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["encoder.embed_tokens.weight"] = stored["shared.weight"].clone()  # as files of transformers before 5
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path)
    ignored = {line.sources[0].name: line.note for line in loaded.report.of("ignored")}
    assert set(ignored) == {n for n in stored if n.startswith("decoder.")} | {"encoder.embed_tokens.weight"}
    both = Pair(reference.encoder, loaded, tmp_path, random_texts(LENGTHS))
    with torch.inference_mode():
        both.close(both.ours(), both.theirs("last_hidden_state"))
