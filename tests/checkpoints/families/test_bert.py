from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmformer.checkpoints.build import build
from mmformer.checkpoints.load import load
from mmformer.checkpoints.report import MisfitError
from mmformer.datasets.pretrained import read_tokenizer
from tests.checkpoints.families.languages import VOCABULARY, Pair, goes_back, gradients_flow, pair
from tests.checkpoints.oracles import close

transformers = pytest.importorskip("transformers", reason="BERT is compared with the transformers package")

SIZES = {
    "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 52,
    "vocab_size": VOCABULARY, "max_position_embeddings": 19, "type_vocab_size": 5,
}  # fmt: skip


def made(kind: str, folder: Path, **changes) -> Pair:
    return pair(getattr(transformers, kind)(transformers.BertConfig(**SIZES | changes)), folder)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return made("BertForMaskedLM", tmp_path_factory.mktemp("bert"))


def test_body(tmp_path: Path) -> None:
    both = made("BertModel", tmp_path)
    both.close(both.ours(), both.theirs("last_hidden_state"))
    close(both.pooled(), torch.stack(both.theirs("pooler_output")))
    goes_back(both)
    gradients_flow(both)


def test_masked_words(masked: Pair) -> None:
    masked.close(masked.scores(), masked.theirs("logits"))
    table = masked.part("encoders.text.embedder.table").weight
    assert masked.part("heads.vocabulary.out").weight is table
    goes_back(masked)
    gradients_flow(masked)


def test_pretraining(tmp_path: Path) -> None:
    both = made("BertForPreTraining", tmp_path)
    both.close(both.scores(), both.theirs("prediction_logits"))
    ours = both.model.heads["next_sentence"](both.pooled())
    close(ours.detach(), torch.stack(both.theirs("seq_relationship_logits")))
    goes_back(both)
    gradients_flow(both)


def test_classes(tmp_path: Path) -> None:
    both = made("BertForSequenceClassification", tmp_path, num_labels=7)
    close(both.model.heads["label"](both.pooled()).detach(), torch.stack(both.theirs("logits")))
    goes_back(both)


def test_causal(tmp_path: Path) -> None:
    both = made("BertLMHeadModel", tmp_path, is_decoder=True)
    both.close(both.scores(), both.theirs("logits"))


def test_a_padded_batch_of_the_reference_says_the_same(masked: Pair) -> None:
    ids = torch.nn.utils.rnn.pad_sequence(masked.texts, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(text) for text in masked.texts], batch_first=True)
    with torch.inference_mode():
        out = masked.reference(input_ids=ids, attention_mask=mask).logits
    masked.close(masked.scores(), [row[keep.bool()] for row, keep in zip(out, mask, strict=True)])


@pytest.mark.parametrize("act", ["gelu_new", "relu"])
def test_the_config_chooses_the_activation(act: str, tmp_path: Path) -> None:
    both = made("BertForMaskedLM", tmp_path, hidden_act=act)
    both.close(both.scores(), both.theirs("logits"))


def test_the_config_chooses_the_epsilon(masked: Pair, tmp_path: Path) -> None:
    norms = [m for m in masked.model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert {norm.eps for norm in norms} == {1e-12}
    assert len(norms) == 2 * 3 + 2
    # Inputs of the usual size do not tell one epsilon from another, tiny ones do.
    other = made("BertModel", tmp_path, layer_norm_eps=1e-3)
    embedder = other.part("encoders.text.embedder")
    with torch.no_grad():
        for name, parameter in [*other.reference.embeddings.named_parameters(), *embedder.named_parameters()]:
            if "LayerNorm" not in name:
                parameter.mul_(1e-3)
    other.close(other.ours(), other.theirs("last_hidden_state"))


def test_untied(tmp_path: Path) -> None:
    reference = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, tie_word_embeddings=False))
    reference.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in ("cls.predictions.decoder.weight", "cls.predictions.decoder.bias", "cls.predictions.bias"):
        stored[name] = torch.randn(stored[name].shape, generator=generator)
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = load(tmp_path)
    assert [line.sources[0].name for line in loaded.report.of("ignored")] == ["cls.predictions.bias"]
    again = Pair(transformers.BertForMaskedLM.from_pretrained(tmp_path).eval(), loaded, tmp_path, masked_texts())
    again.close(again.scores(), again.theirs("logits"))


def masked_texts() -> list[torch.Tensor]:
    return [torch.arange(5, 12), torch.arange(20, 31)]


def old(masked: Pair, folder: Path, change=lambda tensors: None) -> Path:
    """The same weights as the first published files have them: gamma and beta, the tied weight, a buffer."""
    stored = load_file(masked.folder / "model.safetensors")
    names = {
        n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta") for n in stored
    }
    tensors = {names[name]: tensor for name, tensor in stored.items()}
    tensors["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
    tensors["bert.embeddings.position_ids"] = torch.arange(19)[None]
    change(tensors)
    torch.save(tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_bytes((masked.folder / "config.json").read_bytes())
    return folder


def test_old_names(masked: Pair, tmp_path: Path) -> None:
    loaded = load(old(masked, tmp_path))
    for name, tensor in masked.model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], tensor)
    assert [line.targets[0].name for line in loaded.report.of("tied")] == ["heads.vocabulary.out.weight"]
    assert [line.sources[0].name for line in loaded.report.of("ignored")] == ["bert.embeddings.position_ids"]


def test_a_tied_weight_that_differs_is_refused(masked: Pair, tmp_path: Path) -> None:
    with pytest.raises(MisfitError, match="the file holds two that differ"):
        load(old(masked, tmp_path, lambda tensors: tensors["cls.predictions.decoder.weight"].add_(1)))


def test_without_a_config_the_error_says_what_to_give(masked: Pair, tmp_path: Path) -> None:
    save_file(load_file(masked.folder / "model.safetensors"), tmp_path / "bert.safetensors")
    with pytest.raises(ValueError, match=r"does not say hidden_size: give options=\{'hidden_size'"):
        load(tmp_path / "bert.safetensors")
    loaded = load(tmp_path / "bert.safetensors", options=SIZES)
    alone = Pair(masked.reference, loaded, tmp_path, masked.texts)
    alone.close(alone.scores(), masked.theirs("logits"))


def test_cross_attention_is_refused(tmp_path: Path) -> None:
    config = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    transformers.BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="add_cross_attention: True"):
        load(tmp_path)


def test_the_encoder_alone(masked: Pair) -> None:
    loaded = load(masked.folder, part="encoders.text")
    ours = masked.part("encoders.text").state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in loaded.model.state_dict().items())
    assert {line.note for line in loaded.report.of("ignored")} == {"belongs to another part"}


def test_a_longer_vocabulary_keeps_its_first_rows(masked: Pair) -> None:
    loaded = load(masked.folder, options={"vocab_size": VOCABULARY + 4})
    table = loaded.model.get_parameter("encoders.text.embedder.table.weight")
    assert torch.equal(table[:VOCABULARY], masked.reference.bert.embeddings.word_embeddings.weight)
    assert len(loaded.report.of("resized")) == 2  # the table, which the scores share, and their bias


def test_texts_are_read_as_the_original_reads_them(masked: Pair, tmp_path: Path) -> None:
    folder = shutil.copytree(masked.folder, tmp_path / "with_vocabulary")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "pho", "##to", "of"]
    (folder / "vocab.txt").write_text("\n".join(words))
    described = load(folder).described
    assert described.tokenizer is not None
    assert described.tokenizer == folder / "vocab.txt"
    feature = build(described.features["text"])(tokenizer=read_tokenizer(described.tokenizer))
    wanted = transformers.BertTokenizer(str(folder / "vocab.txt"))("a photo of")["input_ids"]
    assert feature("A photo of").tolist() == wanted == [2, 5, 6, 7, 8, 3]
    assert len(feature("a " * 40)) == 19
