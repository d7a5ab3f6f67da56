"""Weights from elsewhere: what the checkpoint decides is in the config, and every tensor is accounted for."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf, open_dict

from mmformer.checkpoints import build, save_model
from mmformer.datasets.tokenizers import WordTokenizer
from mmformer.run.launch import UserError
from mmformer.run.pretrained import adopt
from tests.helpers import scramble
from tests.test_configs import FACTS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def config(*overrides):
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        found = compose("train", ["paths.run=runs/x", "paths.root=.", "depth.text=1", *overrides])
    found.facts = FACTS
    return found


def model_of(found):
    return instantiate(found.module.model, _convert_="all")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that a run saved, all its parameters scrambled."""
    found = config()
    adopt(found)
    plain = OmegaConf.to_container(OmegaConf.create({"model": found.module.model, "facts": FACTS}), resolve=False)
    root = OmegaConf.to_container(found, resolve=True)
    plain = {"model": root["module"]["model"], "features": root["data"]["features"]}
    model = scramble(build(plain["model"]))
    folder = tmp_path_factory.mktemp("run") / "model"
    save_model(folder, model, plain, WordTokenizer(("what", "is", "this")))
    return folder, model


def test_weights_of_another_run_fill_the_model_and_bring_their_words(trained):
    folder, source = trained
    found = config(f"pretrained={folder}")
    (checkpoint,) = adopt(found)
    target = model_of(found)
    assert "100.0% of" in checkpoint.load(target)[0]
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    assert found.data.tokenizer.path == str(folder / "tokenizer.json")


def test_one_encoder_is_taken_and_the_rest_stays(trained):
    folder, source = trained
    found = config(f"module.model.encoders.image.pretrained={folder}", "dim=96")
    (checkpoint,) = adopt(found)
    target = model_of(found)
    before = {name: p.clone() for name, p in target.named_parameters()}
    checkpoint.load(target)
    for name, parameter in target.named_parameters():
        other = source.get_parameter(name) if name.startswith("encoders.image.") else before[name]
        assert torch.equal(parameter, other), name


def test_items_are_read_as_the_encoder_was_trained_unless_the_command_line_says_otherwise(trained):
    folder, _ = trained
    size = config().data.features.image.longest
    other = f"data.features.image.longest={size + 20}"
    given = [f"module.model.encoders.image.pretrained={folder}", "+data.features.image.colour=x"]
    found = config(*given, other)
    (checkpoint,) = adopt(found)
    assert found.data.features.image.longest == size
    said = checkpoint.load(model_of(found))
    assert f"data.features.image.longest: {size}, as it was trained, where the config has {size + 20}" in said
    assert "data.features.image.colour: nothing, as it was trained, where the config has x" in said
    found = config(*given, other)
    (checkpoint,) = adopt(found, named=["data.features.image.longest", "dim"])
    assert found.data.features.image.longest == size + 20
    assert f"data.features.image.longest: {size + 20} stands, trained with {size}" in checkpoint.load(model_of(found))


def test_a_whole_model_of_another_run_says_which_items_it_read_otherwise(trained):
    folder, _ = trained
    found = config(f"pretrained={folder}", "data.features.image.longest=77")
    (checkpoint,) = adopt(found)
    assert found.data.features.image.longest == 77
    assert any(
        "data.features.image.longest: 77 stands, trained with" in line for line in checkpoint.load(model_of(found))
    )


def test_an_encoder_of_another_width_gets_a_projection(trained):
    folder, source = trained
    found = config(f"module.model.encoders.audio.pretrained={folder}", "dim=48")
    (checkpoint,) = adopt(found)
    target = model_of(found)
    lines = checkpoint.load(target)
    assert any("new" in line for line in lines)
    assert type(target.encoders["audio"].stages[-1]).__name__ == "Projection"
    assert torch.equal(target.encoders["audio"].embedder.stem.linear.weight,
                       source.encoders["audio"].embedder.stem.linear.weight)  # fmt: skip


def test_what_does_not_fit_is_named_and_nothing_is_loaded(trained):
    folder, _ = trained
    found = config(f"pretrained={folder}", "depth.fusion=1")
    (checkpoint,) = adopt(found)
    target = model_of(found)
    before = {name: p.clone() for name, p in target.named_parameters()}
    with pytest.raises(UserError, match=r"(?s)fusion.transformer.layers.1.*pretrained_strict=false"):
        checkpoint.load(target)
    assert all(torch.equal(p, before[name]) for name, p in target.named_parameters())
    found = config(f"pretrained={folder}", "depth.fusion=1", "pretrained_strict=false")
    (checkpoint,) = adopt(found)
    assert "unexpected" in " ".join(checkpoint.load(target))


def test_errors_name_the_key(tmp_path, trained):
    with pytest.raises(UserError, match=r"pretrained=.*nowhere"):
        adopt(config(f"pretrained={tmp_path / 'nowhere'}"))
    folder, _ = trained
    found = config(f"module.model.encoders.image.pretrained={folder}")
    with open_dict(found):
        found.module.model.encoders.video = found.module.model.encoders.image
    with pytest.raises(UserError, match=r"has encoders of text, image, audio, and none of video"):
        adopt(found)


def test_a_published_text_encoder_brings_its_words_or_says_that_they_lack(tmp_path):
    transformers = pytest.importorskip("transformers", reason="writes the checkpoint")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}
    reference = transformers.BertModel(transformers.BertConfig(vocab_size=9, **sizes))
    reference.save_pretrained(tmp_path / "bert")
    key = f"module.model.encoders.text.pretrained={tmp_path / 'bert'}"
    with pytest.raises(UserError, match="no tokenizer lies beside these weights"):
        adopt(config(key))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "what", "digit", "is", "this"]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    found = config(key)
    (checkpoint,) = adopt(found)
    target = model_of(found)
    checkpoint.load(target)
    assert torch.equal(target.encoders["text"].embedder.table.weight, reference.embeddings.word_embeddings.weight)
    tokenizer = instantiate(found.data.tokenizer, _convert_="all")(["other words"])
    feature = instantiate(found.data.features.text, _convert_="all")(tokenizer)
    assert feature("what digit").tolist() == [2, 5, 6, 3]


def test_a_published_model_is_the_run_s_model(tmp_path):
    transformers = pytest.importorskip("transformers", reason="writes the checkpoint")
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 3, "intermediate_size": 40}
    vision = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    reference = transformers.ViTModel(vision)
    reference.save_pretrained(tmp_path / "vit")
    found = config(f"pretrained={tmp_path / 'vit'}", "dim=24", "num_heads=3")
    (checkpoint,) = adopt(found)
    target = model_of(found)
    lines = checkpoint.load(target)
    assert any(line.startswith("new:") for line in lines)
    assert torch.equal(target.encoders["image"].embedder.class_tokens.tokens, reference.embeddings.cls_token[0])
