from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmformer.checkpoints.load import load
from tests.checkpoints.families.languages import VOCABULARY, Pair, goes_back, gradients_flow, pair, random_texts
from tests.checkpoints.oracles import close

transformers = pytest.importorskip("transformers", reason="RoBERTa is compared with the transformers package")

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 52,
    "vocab_size": VOCABULARY, "max_position_embeddings": 19, "type_vocab_size": 1,
}  # fmt: skip


def made(kind: str, folder: Path, config: str = "RobertaConfig", texts=None, **changes) -> Pair:
    return pair(getattr(transformers, kind)(getattr(transformers, config)(**SIZES | changes)), folder, texts)


@pytest.mark.parametrize("kind", ["Roberta", "XLMRoberta", "Camembert"])
def test_masked_words(kind: str, tmp_path: Path) -> None:
    both = made(f"{kind}ForMaskedLM", tmp_path, f"{kind}Config")
    both.close(both.scores(), both.theirs("logits"))
    goes_back(both)
    gradients_flow(both)


def test_body(tmp_path: Path) -> None:
    both = made("RobertaModel", tmp_path)
    both.close(both.ours(), both.theirs("last_hidden_state"))
    close(both.pooled(), torch.stack(both.theirs("pooler_output")))
    goes_back(both)
    gradients_flow(both)


@pytest.mark.parametrize("pad", [1, 4])
def test_places_count_from_the_one_after_padding(pad: int, tmp_path: Path) -> None:
    longest = 19 - (pad + 1)
    both = made("RobertaModel", tmp_path, pad_token_id=pad, texts=random_texts((longest, 3)))
    assert both.loaded.described.features["text"]["max_length"] == longest
    both.close(both.ours(), both.theirs("last_hidden_state"))


def test_old_files_hold_the_scores_twice(tmp_path: Path) -> None:
    both = made("RobertaForMaskedLM", tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.decoder.weight"] = stored["roberta.embeddings.word_embeddings.weight"].clone()
    stored["lm_head.decoder.bias"] = stored["lm_head.bias"].clone()
    stored["roberta.embeddings.position_ids"] = torch.arange(19)[None]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path)
    state = both.model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.model.state_dict().items())
    ignored = sorted(line.sources[0].name for line in loaded.report.of("ignored"))
    assert ignored == ["lm_head.bias", "roberta.embeddings.position_ids"]


def test_without_a_config_the_names_fit_bert_too(tmp_path: Path) -> None:
    both = made("RobertaModel", tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="could be transformers/bert, transformers/roberta: choose with family="):
        load(tmp_path, options=SIZES)
    again = Pair(both.reference, load(tmp_path, options=SIZES, family="roberta"), tmp_path, both.texts)
    again.close(again.ours(), both.theirs("last_hidden_state"))
