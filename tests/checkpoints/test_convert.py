"""A trained model goes back into the library it came from, or into its neighbour, bit for bit or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from mmformer.checkpoints import build, load_model, save_model
from mmformer.checkpoints.convert import CannotConvert, convert
from mmformer.checkpoints.folder import exported
from mmformer.checkpoints.load import Loaded, load
from mmformer.datasets.tokenizers import ByteTokenizer
from mmformer.run.pretrained import adopt
from tests.checkpoints.configs import run_config
from tests.checkpoints.families import test_clip as clips
from tests.checkpoints.families.languages import VOCABULARY, random_texts
from tests.checkpoints.families.visions import OPENAI, Shown
from tests.checkpoints.oracles import batch, close, hidden, saved, scramble
from tests.run.test_pretrained import config as composed

transformers = pytest.importorskip("transformers", reason="the oracle: pip install mmformer[transformers]")
timm = pytest.importorskip("timm", reason="the oracle: pip install mmformer[timm]")
open_clip = pytest.importorskip("open_clip", reason="the oracle: pip install mmformer[open_clip]")

VIT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 44,
    "image_size": [16, 28], "patch_size": 4, "num_labels": 7, "layer_norm_eps": 1e-6,
}  # fmt: skip
TIMM = {"img_size": (32, 80), "embed_dim": 24, "num_heads": 3, "depth": 2, "num_classes": 7, "mlp_ratio": 2.5}
WORDS = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 52,
    "vocab_size": VOCABULARY, "max_position_embeddings": 64,
}  # fmt: skip


def vit(folder: Path, **options: Any):
    """A scrambled classifier of transformers, and its folder."""
    reference = scramble(transformers.ViTForImageClassification(transformers.ViTConfig(**{**VIT, **options})))
    return reference, saved(reference, folder)


def bert(folder: Path):
    reference = scramble(transformers.BertForMaskedLM(transformers.BertConfig(**WORDS)))
    return reference, saved(reference, folder)


def kept(loaded: Loaded, folder: Path, **config: Any) -> Path:
    """What was loaded as a run would keep it."""
    objectives = loaded.described.objectives if loaded.objectives else {}
    plain = {"model": loaded.config, "objectives": objectives, "origins": [loaded.origin.plain()]} | config
    return save_model(folder, loaded.model, plain, objectives=loaded.objectives)


def step(loaded: Loaded, inputs, modality: str) -> None:
    """One step of training, which moves every tensor that counts."""
    loaded.model.train()
    optimizer = torch.optim.SGD(loaded.model.parameters(), 0.05)
    loaded.model.encode(inputs)[modality].x.pow(3).mean().backward()
    optimizer.step()
    loaded.model.eval()


def same_tensors(ours: Path, theirs: Path | dict[str, Tensor]) -> None:
    held, wanted = load_file(ours), load_file(theirs) if isinstance(theirs, Path) else theirs
    assert held.keys() == wanted.keys()
    assert all(torch.equal(held[name], wanted[name]) for name in wanted)


def opened(kind: Any, folder: Path):
    """By transformers, without a tensor that is missing or left over."""
    model, account = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(account.values()), account
    return model.eval()


def test_vit_goes_back_to_transformers_and_over_to_timm(tmp_path):
    reference, theirs = vit(tmp_path / "theirs")
    loaded, shown = load(theirs), Shown(16, 28)
    run = kept(loaded, tmp_path / "run")
    done = convert(run, "transformers", tmp_path / "back")
    assert (done.family, done.notes) == ("transformers/vit", ())
    assert done.how == f'transformers.ViTForImageClassification.from_pretrained("{tmp_path / "back"}")'
    same_tensors(tmp_path / "back" / "model.safetensors", theirs / "model.safetensors")
    again = opened(transformers.ViTForImageClassification, tmp_path / "back")
    with torch.inference_mode():
        assert torch.equal(again(shown.pixels).logits, reference(shown.pixels).logits)

    assert convert(run, "timm", tmp_path / "timm").family == "timm/vit"
    other = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    with torch.inference_mode():
        close(other(shown.pixels), reference(shown.pixels).logits)


def test_a_step_of_training_is_in_what_is_written(tmp_path):
    reference, theirs = vit(tmp_path / "theirs")
    loaded, shown = load(theirs), Shown(16, 28)
    step(loaded, shown.batch, "image")
    convert(kept(loaded, tmp_path / "run"), "transformers", tmp_path / "back")
    again = opened(transformers.ViTForImageClassification, tmp_path / "back")
    with torch.inference_mode():
        close(again(shown.pixels).logits, shown.output(loaded, "label"))
        assert (again(shown.pixels).logits - reference(shown.pixels).logits).abs().max() > 1e-3


def test_another_size_of_pictures_and_other_classes_are_in_the_config(tmp_path):
    _, theirs = vit(tmp_path / "theirs")
    loaded, shown = load(theirs, options={"image_size": [24, 32], "num_classes": 5}), Shown(24, 32)
    run = kept(loaded, tmp_path / "run")
    convert(run, "transformers", tmp_path / "back")
    again = opened(transformers.ViTForImageClassification, tmp_path / "back")
    assert (again.config.image_size, again.config.num_labels) == ([24, 32], 5)
    with torch.inference_mode():
        close(again(shown.pixels).logits, shown.output(loaded, "label"))


@pytest.mark.parametrize(
    ("name", "options", "crosses"),
    [
        ("vit_tiny_patch16_224", {}, True),
        ("vit_base_patch32_clip_quickgelu_224", {"img_size": 96}, False),
        ("vit_base_patch16_siglip_224", {"img_size": 48}, False),
        ("deit_tiny_distilled_patch16_224", {"img_size": 48}, True),
        ("deit3_small_patch16_224", {"img_size": 48}, False),
    ],
)
def test_timm_goes_back_and_over_to_transformers(name, options, crosses, tmp_path):
    reference = scramble(timm.create_model(name, **{**TIMM, **options}))
    timm.models.save_for_hf(reference, tmp_path / "theirs", safe_serialization=True)
    loaded = load(tmp_path / "theirs")
    run = kept(loaded, tmp_path / "run")
    convert(run, "timm", tmp_path / "back")
    same_tensors(tmp_path / "back" / "model.safetensors", reference.state_dict())
    again = timm.create_model(f"local-dir:{tmp_path / 'back'}", pretrained=True).eval()
    colours = tuple(reference.pretrained_cfg[key] for key in ("mean", "std"))
    shown = Shown(*reference.patch_embed.img_size, colours)
    with torch.inference_mode():
        assert torch.equal(again(shown.pixels), reference(shown.pixels))
    if not crosses:
        with pytest.raises(CannotConvert, match=r"transformers' ViT has no (norm in front|factor|picture without)"):
            convert(run, "transformers", tmp_path / "over")
        return
    written = convert(run, "transformers", tmp_path / "over")
    kind = json.loads((tmp_path / "over" / "config.json").read_text())["architectures"][0]
    assert kind in written.how
    other = opened(getattr(transformers, kind), tmp_path / "over")
    with torch.inference_mode():
        close(other(shown.pixels).logits, reference(shown.pixels))
    assert load(tmp_path / "over").described.features


def test_clip_goes_back_to_transformers_and_over_to_open_clip(tmp_path):
    reference = scramble(clips.clip_model())
    theirs = saved(reference, tmp_path / "theirs")
    run = kept(load(theirs), tmp_path / "run")
    convert(run, "transformers", tmp_path / "back")
    same_tensors(tmp_path / "back" / "model.safetensors", theirs / "model.safetensors")
    assert opened(transformers.CLIPModel, tmp_path / "back").config.text_config.eos_token_id == clips.END

    convert(run, "open_clip", tmp_path / "over")
    other = open_clip.create_model(f"local-dir:{tmp_path / 'over'}").eval()
    items = clips.texts()
    images, _ = clips.both(items)
    with torch.inference_mode():
        wanted = reference(clips.padded(items), images).logits_per_image
        close(other.get_logits(images, clips.padded(items))[0], wanted)


def test_open_clip_goes_back_and_over_to_transformers(tmp_path):
    (tmp_path / "theirs").mkdir()
    reference, config = clips.open_model(quick_gelu=True)
    run = kept(load(clips.open_saved(reference, config, tmp_path / "theirs")), tmp_path / "run")
    convert(run, "open_clip", tmp_path / "back")
    same_tensors(tmp_path / "back" / "open_clip_model.safetensors", reference.state_dict())
    again = open_clip.create_model(f"local-dir:{tmp_path / 'back'}").eval()
    convert(run, "transformers", tmp_path / "over")
    other = opened(transformers.CLIPModel, tmp_path / "over")
    items = clips.texts()
    images, _ = clips.both(items)
    with torch.inference_mode():
        wanted = reference.get_logits(images, clips.padded(items))[0]
        assert torch.equal(again.get_logits(images, clips.padded(items))[0], wanted)
        close(other(clips.padded(items), images).logits_per_image, wanted)


def test_one_tower_of_clip_is_a_model_of_its_own(tmp_path):
    reference = scramble(clips.clip_model())
    loaded, shown = load(saved(reference, tmp_path / "theirs")), Shown(16, 16, OPENAI)
    run = kept(loaded, tmp_path / "run")
    assert "CLIPVisionModel." in convert(run, "transformers", tmp_path / "tower", part="encoders.image").how
    tower = opened(transformers.CLIPVisionModel, tmp_path / "tower")
    with torch.inference_mode():
        close(tower(shown.pixels).pooler_output, reference.vision_model(shown.pixels).pooler_output)
    with pytest.raises(CannotConvert, match="open_clip has no model of one tower"):
        convert(run, "open_clip", tmp_path / "over", part="encoders.image")


def test_bert_goes_back_with_its_words(tmp_path):
    _, theirs = bert(tmp_path / "theirs")
    (theirs / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    loaded = load(theirs, options={"vocab_size": VOCABULARY + 6})
    texts = random_texts()
    step(loaded, batch(len(texts), text=texts), "text")
    plain = {"model": loaded.config, "origins": [loaded.origin.plain()]}
    run = save_model(tmp_path / "run", loaded.model, plain, ByteTokenizer())
    convert(run, "transformers", tmp_path / "back")
    again = opened(transformers.BertForMaskedLM, tmp_path / "back")
    assert again.config.vocab_size == VOCABULARY + 6
    with torch.inference_mode():
        ours = hidden(loaded.model, batch(len(texts), text=texts), "text")
        for states, text in zip(ours, texts, strict=True):
            close(loaded.model.heads["vocabulary"](states), again(text[None]).logits[0])
    assert json.loads((tmp_path / "back" / "tokenizer_config.json").read_text()) == {"do_lower_case": False}
    assert (tmp_path / "back" / "tokenizer.json").read_bytes() == (run / "tokenizer.json").read_bytes()

    done = convert(run, "transformers", tmp_path / "encoder", part="encoders.text")
    assert "transformers.BertModel." in done.how
    assert done.notes == ("not in this model, so drawn anew by transformers: pooler.dense.bias, pooler.dense.weight",)


def test_llama_in_bfloat16_goes_back_as_what_it_is_here(tmp_path):
    config = transformers.LlamaConfig(**WORDS, num_key_value_heads=2)
    reference = scramble(transformers.LlamaForCausalLM(config)).to(torch.bfloat16)
    loaded, texts = load(saved(reference, tmp_path / "theirs")), random_texts()
    convert(kept(loaded, tmp_path / "run"), "transformers", tmp_path / "back")
    again = opened(transformers.LlamaForCausalLM, tmp_path / "back")
    assert again.dtype == torch.float32
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in reference.float().state_dict().items())
    with torch.inference_mode():
        ours = hidden(loaded.model, batch(len(texts), text=texts), "text")
        close(loaded.model.heads["vocabulary"](ours[1]), again(texts[1][None]).logits[0])


@pytest.mark.parametrize("dim", [24, 48])
def test_an_encoder_of_a_run_goes_back_without_what_the_run_put_behind_it(dim, tmp_path):
    _, theirs = vit(tmp_path / "theirs", image_size=24)
    found = composed(f"module.model.encoders.image.pretrained={theirs}", f"dim={dim}")
    (checkpoint,) = adopt(found)
    plain = exported(OmegaConf.to_container(found, resolve=True))
    assert [origin["parts"] for origin in plain["origins"]] == [["encoders.image"]]
    model = scramble(build(plain["model"]))
    checkpoint.load(model)
    run = save_model(tmp_path / "run", model, plain | {"objectives": {}})
    done = convert(run, "transformers", tmp_path / "back", part="encoders.image")
    assert any("stages.1, which brings" in note for note in done.notes) == (dim == 48)
    stored = load_file(theirs / "model.safetensors")
    encoder = {name.removeprefix("vit."): t for name, t in stored.items() if name.startswith("vit.")}
    same_tensors(tmp_path / "back" / "model.safetensors", encoder)
    assert convert(run, "timm", tmp_path / "timm", part="encoders.image").family == "timm/vit"

    second = composed(f"module.model.encoders.image.pretrained={run}", f"dim={dim}")  # by way of a run of our own
    adopt(second)
    assert second.origins[0].parts == ["encoders.image"]
    assert second.origins[0].family == "transformers/vit"


def changed(loaded: Loaded, folder: Path, **activation: str) -> Path:
    """A model with the same tensors and another non-linearity."""
    text = json.dumps(loaded.config).replace('"torch.nn.GELU"', f'"{activation["to"]}"')
    config = json.loads(text)
    model = build(config)
    model.load_state_dict(loaded.model.state_dict())
    return save_model(folder, model, {"model": config, "origins": [loaded.origin.plain()]})


def test_what_a_library_has_no_place_for_is_named(tmp_path):
    _, theirs = vit(tmp_path / "vit", layer_norm_eps=1e-12)
    run = kept(load(theirs), tmp_path / "run")
    with pytest.raises(CannotConvert, match=r"norm.eps is 1e-12 here, 1e-06 there \(--near accepts that\)"):
        convert(run, "timm", tmp_path / "out")
    assert any("eps" in note for note in convert(run, "timm", tmp_path / "near", near=True).notes)

    run = changed(load(theirs), tmp_path / "relu", to="torch.nn.ReLU")
    with pytest.raises(CannotConvert, match="timm's ViT has no activation relu there"):
        convert(run, "timm", tmp_path / "out")
    run = changed(load(theirs), tmp_path / "elu", to="torch.nn.ELU")
    with pytest.raises(CannotConvert, match=r"the activation torch\.nn\.ELU has no name"):
        convert(run, "transformers", tmp_path / "out")
    _, theirs = bert(tmp_path / "bert")
    run = changed(load(theirs), tmp_path / "silu", to="torch.nn.SiLU")
    with pytest.raises(CannotConvert, match=r"feedforward\.activation\._target_ is \"torch\.nn\.SiLU\" here"):
        convert(run, "transformers", tmp_path / "out")

    pooled = scramble(transformers.ViTModel(transformers.ViTConfig(**VIT)))
    run = kept(load(saved(pooled, tmp_path / "pooled")), tmp_path / "run-pooled")
    with pytest.raises(CannotConvert, match=r"heads\.pooler\.0\.weight has no place there"):
        convert(run, "timm", tmp_path / "out")
    assert convert(run, "timm", tmp_path / "tower", part="encoders.image").family == "timm/vit"
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_what_was_trained_where_the_library_has_nothing_is_named(tmp_path):
    loaded = load(saved(scramble(clips.clip_model()), tmp_path / "theirs"))
    with torch.no_grad():
        loaded.objectives["contrastive"].bias.fill_(0.5)
    run = kept(loaded, tmp_path / "run")
    with pytest.raises(CannotConvert, match=r"objectives\.contrastive\.bias would have other numbers there"):
        convert(run, "transformers", tmp_path / "out")
    run = save_model(tmp_path / "bare", loaded.model, {"model": loaded.config, "origins": [loaded.origin.plain()]})
    with pytest.raises(CannotConvert, match="logit_scale"):
        convert(run, "transformers", tmp_path / "out")


def test_what_cannot_be_asked_for(tmp_path):
    config = run_config()
    run = save_model(tmp_path / "run", scramble(build(config["model"])), config)
    with pytest.raises(ValueError, match="no way to 'keras': there are transformers, timm, open_clip"):
        convert(run, "keras", tmp_path / "out")
    with pytest.raises(ValueError, match=r"no part 'encoders\.video' to convert: this model has encoders\.text"):
        convert(run, "timm", tmp_path / "out", part="encoders.video")
    with pytest.raises(CannotConvert, match=r"cannot become a model of timm: timm/vit: its config has no"):
        convert(run, "timm", tmp_path / "out", part="encoders.image")
    with pytest.raises(FileExistsError, match="is there already"):
        convert(run, "timm", tmp_path / "run")
    origin = {"family": "transformers/vit", "parts": ["encoders.image"]}
    twice = config | {"origins": [origin, origin | {"parts": ["encoders.text"]}]}
    run = save_model(tmp_path / "twice", load_model(run).model, twice)
    choice = r"came from 2 checkpoints: choose one encoder, part=encoders\.text, encoders\.image"
    with pytest.raises(ValueError, match=choice):
        convert(run, "transformers", tmp_path / "out")
