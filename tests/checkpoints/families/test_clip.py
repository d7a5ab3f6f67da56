from __future__ import annotations

import json
import math
import warnings
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmformer.checkpoints.load import load, load_into
from mmformer.checkpoints.report import MisfitError
from mmformer.nn import QuickGELU
from tests.checkpoints.families.visions import (
    OPENAI,
    Shown,
    complete,
    epsilons,
    goes_back,
    gradients_flow,
    loaded_from,
)
from tests.checkpoints.oracles import batch, close, hidden, saved, scramble

transformers = pytest.importorskip("transformers", reason="the oracle: pip install mmformer[transformers]")
open_clip = pytest.importorskip("open_clip", reason="the oracle: pip install mmformer[open_clip]")

BEGIN, END, WORDS, LENGTH = 57, 58, 61, 11
# Every size differs from every other, in one tower and between the two.
TEXT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 40, "vocab_size": WORDS,
    "max_position_embeddings": LENGTH, "bos_token_id": BEGIN, "eos_token_id": END,
}  # fmt: skip
VISION = {
    "hidden_size": 20, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 44, "image_size": 16,
    "patch_size": 4,
}  # fmt: skip
SCALE = 2.1


def clip_config(text=(), vision=(), **options):
    return transformers.CLIPConfig(
        text_config={**TEXT, **dict(text)}, vision_config={**VISION, **dict(vision)}, projection_dim=14, **options
    )


def clip_model(**options):
    model = transformers.CLIPModel(clip_config(**options))
    nn.init.constant_(model.logit_scale, SCALE)
    return model


def texts(end: int = END, lengths=(4, 9, LENGTH)) -> list[Tensor]:
    """Ids of several lengths, each with its one end behind, as a tokenizer gives them."""
    generator = torch.Generator().manual_seed(3)
    bodies = [torch.randint(3, BEGIN, (length - 1,), generator=generator) for length in lengths]
    return [torch.cat([body, torch.tensor([end])]) for body in bodies]


def padded(items: list[Tensor], pad: int = 0) -> Tensor:
    """The same ids as rows of one length, as references want them."""
    return torch.stack([nn.functional.pad(item, (0, LENGTH - len(item)), value=pad) for item in items])


def both(items: list[Tensor], side: int = 16):
    """Pictures for a reference, and a batch with them and the texts."""
    shown = Shown(side, side, OPENAI, len(items))
    return shown.pixels, batch(len(items), image=shown.images, text=items)


def logits(loaded, inputs) -> Tensor:
    """Scores of each picture (row) with each text, as the objective computes them."""
    with torch.inference_mode():
        encoded = loaded.model.encode(inputs)
        image, text = (loaded.model.output(encoded, name, name)[0] for name in ("image", "text"))
        objective = loaded.objectives["contrastive"]
        return objective.log_scale.exp() * image @ text.T + objective.bias


def loss(loaded, inputs) -> Tensor:
    with torch.inference_mode():
        (value,) = loaded.objectives["contrastive"](loaded.model, loaded.model.encode(inputs), inputs).values()
        return value


def test_transformers_clip_gives_what_the_reference_gives(tmp_path):
    reference = clip_model()
    loaded = loaded_from(reference, tmp_path)
    items = texts()
    images, inputs = both(items)
    mask = torch.stack([torch.arange(LENGTH) < len(item) for item in items]).long()
    with torch.inference_mode():
        theirs = reference(padded(items), images, mask, return_loss=True)
        close(logits(loaded, inputs), theirs.logits_per_image)
        close(loss(loaded, inputs), theirs.loss)
        tokens = torch.cat(hidden(loaded.model, inputs, "text"))
        alone = [reference.text_model(item[None]).last_hidden_state[0] for item in items]
        close(tokens, torch.cat(alone))
        close(tokens, theirs.text_model_output.last_hidden_state[mask.bool()])
        states = reference.vision_model.post_layernorm(theirs.vision_model_output.last_hidden_state)
        close(torch.stack(hidden(loaded.model, inputs, "image")), states)
        pooled = loaded.model.summary(loaded.model.encode(inputs), "image")[0]
        close(pooled, reference.vision_model(images).pooler_output)
    assert loaded.objectives["contrastive"].log_scale.item() == pytest.approx(SCALE)
    assert epsilons(loaded.model) == {1e-5}
    gradients_flow(loaded, inputs)
    again = transformers.CLIPModel(reference.config)
    again.load_state_dict(goes_back(loaded, load_file(tmp_path / "model.safetensors")))


@pytest.mark.parametrize("end", [2, END])
def test_both_ways_of_finding_the_end_of_a_text_give_our_last_token(end, tmp_path):
    """Configs before 2023 say that it is 2, and the reference then takes the largest id for it."""
    reference = clip_model(text={"eos_token_id": end})
    loaded = loaded_from(reference, tmp_path)
    items = texts()
    images, inputs = both(items)
    with torch.inference_mode():
        theirs = reference(padded(items, pad=END if end == END else 0), images)
    close(logits(loaded, inputs), theirs.logits_per_image)


@pytest.mark.parametrize("act", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_the_activation_is_the_configs_and_the_bar_tells_them_apart(act, tmp_path):
    reference = clip_model(text={"hidden_act": act}, vision={"hidden_act": act})
    loaded = loaded_from(reference, tmp_path)
    items = texts()
    images, inputs = both(items)
    with torch.inference_mode():
        theirs = reference(padded(items), images).logits_per_image
    close(logits(loaded, inputs), theirs)
    other = nn.GELU() if act != "gelu" else QuickGELU()
    for encoder in loaded.model.encoders.values():
        for layer in encoder.stages[0].layers:
            layer.feedforward.activation = other
    with pytest.raises(AssertionError, match="differs by"):
        close(logits(loaded, inputs), theirs)


@pytest.mark.parametrize(
    ("kind", "config", "head"),
    [
        ("CLIPVisionModel", "vision_config", None),
        ("CLIPVisionModelWithProjection", "vision_config", "image_embeds"),
        ("CLIPTextModel", "text_config", None),
        ("CLIPTextModelWithProjection", "text_config", "text_embeds"),
    ],
)
def test_one_tower_alone_loads(kind, config, head, tmp_path):
    reference = getattr(transformers, kind)(getattr(clip_config(), config))
    loaded = loaded_from(reference, tmp_path)
    name = "image" if "Vision" in kind else "text"
    items = texts()
    images, inputs = both(items)
    with torch.inference_mode():
        theirs = reference(images) if name == "image" else reference(padded(items))
        encoded = loaded.model.encode(inputs.only([name]))
        if head is None:
            close(loaded.model.summary(encoded, name)[0], theirs.pooler_output)
        else:
            close(loaded.model.output(encoded, name, name)[0], nn.functional.normalize(theirs[head], dim=-1))
    assert loaded.objectives == {}
    goes_back(loaded, load_file(tmp_path / "model.safetensors"))


def test_old_files_hold_buffers_and_leave_out_what_goes_without_saying(tmp_path):
    reference = clip_model(text={"hidden_size": 512, "num_attention_heads": 8}, vision={"layer_norm_eps": 1e-5})
    saved(scramble(reference), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    held["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("hidden_act", "layer_norm_eps", "num_attention_heads", "hidden_size"):
        config["text_config"].pop(name)
    # A *_config_dict beside it, as in files of 2022, is what counts.
    config |= {"vision_config_dict": config["vision_config"], "vision_config": {"hidden_size": 99}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load(tmp_path)
    assert loaded.report.ok
    reasons = {item.name: line.note for line in loaded.report.of("ignored") for item in line.sources}
    assert set(reasons) == {name for name in held if name.endswith("position_ids")}
    assert set(reasons.values()) == {"counts places, which needs no tensor"}
    items = texts()
    images, inputs = both(items)
    with torch.inference_mode():
        close(logits(loaded, inputs), reference(padded(items), images).logits_per_image)


def test_pictures_of_another_size_interpolate_positions_as_the_reference_does(tmp_path):
    reference = scramble(clip_model())
    loaded = load(saved(reference, tmp_path), options={"image_size": 24})
    items = texts()
    images, inputs = both(items, side=24)
    with torch.inference_mode():
        theirs = reference(padded(items), images, interpolate_pos_encoding=True)
    close(logits(loaded, inputs), theirs.logits_per_image)


def test_the_temperature_is_named_as_left_out_where_no_objective_is_given(tmp_path):
    loaded = loaded_from(clip_model(), tmp_path)
    report = load_into(loaded.model, tmp_path)
    (line,) = report.of("ignored")
    assert line.sources[0].name == "logit_scale"
    assert "objective" in line.note
    nn.init.zeros_(loaded.objectives["contrastive"].log_scale)
    load_into(loaded.model, tmp_path, objectives=loaded.objectives)
    assert loaded.objectives["contrastive"].log_scale.item() == pytest.approx(SCALE)


def test_a_whole_model_without_its_temperature_or_a_projection_is_damaged(tmp_path):
    saved(scramble(clip_model()), tmp_path)
    for name in ("logit_scale", "visual_projection.weight", "vision_model.pre_layrnorm.bias"):
        held = load_file(tmp_path / "model.safetensors")
        del held[name]
        (tmp_path / name).mkdir()
        save_file(held, tmp_path / name / "model.safetensors", {"format": "pt"})
        (tmp_path / name / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
        with pytest.raises(MisfitError, match=f"missing: .*needs {name}|missing: .*comes from {name}"):
            load(tmp_path / name)


def test_one_encoder_of_a_file_loads_as_a_part(tmp_path):
    whole = loaded_from(clip_model(), tmp_path)
    tower = load(tmp_path, part="encoders.image")
    assert tower.report.ok
    assert {line.note for line in tower.report.of("ignored")} == {"belongs to another part"}
    wanted = whole.model.encoders["image"].state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tower.model.state_dict().items())


OPEN_VISION = {"layers": 3, "width": 20, "head_width": 10, "mlp_ratio": 2.2, "patch_size": 4, "image_size": 16}
OPEN_TEXT = {"layers": 2, "width": 24, "heads": 3, "mlp_ratio": 2.5, "context_length": LENGTH, "vocab_size": WORDS}


def open_model(vision=(), text=(), embed_dim: int = 14, custom: bool = False, **options):
    """A model of open_clip, and the config that open_clip writes beside its weights."""
    config = {
        "embed_dim": embed_dim, "vision_cfg": {**OPEN_VISION, **dict(vision)}, "text_cfg": {**OPEN_TEXT, **dict(text)},
        **options,
    }  # fmt: skip
    model = scramble((open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**config))
    nn.init.constant_(model.logit_scale, SCALE)
    return model, config


def open_saved(model, config, folder, mean=OPENAI[0], std=OPENAI[1]):
    """The folder that open_clip would push."""
    save_file(model.state_dict(), folder / "open_clip_model.safetensors", {"format": "pt"})
    said = {"model_cfg": config, "preprocess_cfg": {"mean": list(mean), "std": list(std)}}
    (folder / "open_clip_config.json").write_text(json.dumps(said))
    return folder


VARIANTS = {
    "gelu": {},
    "quick_gelu": {"quick_gelu": True},
    "custom text": {"custom": True, "quick_gelu": True},
    "as wide as the embedding": {"embed_dim": 24, "vision": {"width": 24, "head_width": 8}},  # square projections
    "another epsilon": {"vision": {"norm_kwargs": {"eps": 1e-3}}, "text": {"norm_kwargs": {"eps": 1e-4}}},
    "tanh": {"text": {"act_kwargs": {"approximate": "tanh"}}, "vision": {"no_ln_pre": True}},
    "a bias of each pair": {"init_logit_bias": -3.0, "nonscalar_logit_scale": True, "text": {"proj_bias": True}},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_open_clip_gives_what_the_reference_gives(name, tmp_path):
    model, config = open_model(**VARIANTS[name])
    loaded = load(open_saved(model, config, tmp_path))
    complete(loaded.report)
    assert (loaded.family.library, loaded.family.name) == ("open_clip", "clip")
    items = texts()
    images, inputs = both(items)
    with torch.inference_mode():
        close(logits(loaded, inputs), model.get_logits(images, padded(items))[0])
        encoded = loaded.model.encode(inputs)
        for head, theirs in (("image", model.encode_image(images)), ("text", model.encode_text(padded(items)))):
            pooled = loaded.model.summary(encoded, head)[0]
            close(loaded.model.heads[head].out(pooled), theirs)
    assert epsilons(loaded.model) == epsilons(model)
    gradients_flow(loaded, inputs)
    open_model(**VARIANTS[name])[0].load_state_dict(goes_back(loaded, model.state_dict()))


def test_open_clips_siglip_has_a_tower_of_timm(tmp_path):
    timm = pytest.importorskip("timm", reason="open_clip builds this tower with it")
    # open_clip leaves the tower's sizes to timm's name: fewer and thinner layers keep the test short
    small = partial(timm.create_model, embed_dim=192, num_heads=3, depth=2, mlp_ratio=1.5, img_size=48)
    vision = {"timm_model_name": "vit_base_patch16_siglip_224", "timm_pool": "map", "timm_proj": "none"}
    text = {"no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("open_clip.timm_model.timm.create_model", small)
        model, config = open_model(embed_dim=192, custom=True, init_logit_bias=-3.0, text=text, vision=vision)
    loaded = load(open_saved(model, config, tmp_path, mean=(0.5,) * 3, std=(0.5,) * 3))
    complete(loaded.report)
    items = texts(lengths=(LENGTH, LENGTH))
    shown = Shown(48, 48, count=2)
    inputs = batch(2, image=shown.images, text=items)
    with torch.inference_mode():
        close(logits(loaded, inputs), model.get_logits(shown.pixels, padded(items))[0])
    goes_back(loaded, model.state_dict())


def test_a_bare_file_of_open_clip_needs_its_config(tmp_path):
    model, config = open_model(quick_gelu=True)
    torch.save(model.state_dict(), tmp_path / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"does not say model_cfg: give options=\{'model_cfg'"):
        load(tmp_path)
    loaded = load(tmp_path, options={"model_cfg": config})
    complete(loaded.report)


@pytest.mark.parametrize(
    "setting", [{"text": {"embed_cls": True}}, {"vision": {"attentional_pool": True}}, {"vision": {"qk_norm": True}}]
)
def test_settings_of_open_clip_that_we_do_not_compute_are_refused(setting, tmp_path):
    model, config = open_model()
    side, changed = next(iter(setting.items()))
    config[f"{side}_cfg"] |= changed
    with pytest.raises(ValueError, match=next(iter(changed))):
        load(open_saved(model, config, tmp_path))


class Frozen(nn.Module):
    """The tensors of a state dict at their places, and nothing that computes."""

    def __init__(self, tensors):
        super().__init__()
        below: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            head, _, rest = name.partition(".")
            if rest:
                below.setdefault(head, {})[rest] = tensor
            else:
                self.register_buffer(head, tensor)
        for name, inside in below.items():
            self.add_module(name, Frozen(inside))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_openais_torchscript_file_gives_what_the_reference_gives(tmp_path):
    vision = {"width": 128, "head_width": 64, "mlp_ratio": 4.0}
    model, _ = open_model(vision, {"width": 192, "mlp_ratio": 4.0}, embed_dim=14, quick_gelu=True)
    held = {name: t.half() if t.ndim else t for name, t in model.state_dict().items()}
    sizes = {"input_resolution": 16, "context_length": LENGTH, "vocab_size": WORDS}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # torch prefers its own exports to TorchScript, which OpenAI used
        script = torch.jit.script(Frozen(held | {name: torch.tensor(size) for name, size in sizes.items()}))
    script.save(str(tmp_path / "ViT-tiny.pt"))
    model.load_state_dict({name: tensor.float() for name, tensor in held.items()})

    loaded = load(tmp_path / "ViT-tiny.pt")
    assert (loaded.family.library, loaded.family.name) == ("openai", "clip")
    assert loaded.report.ok
    assert {item.name for line in loaded.report.of("ignored") for item in line.sources} == set(sizes)
    assert all(parameter.dtype == torch.float32 for parameter in loaded.model.parameters())
    items = texts()
    images, inputs = both(items)
    with torch.inference_mode():
        close(logits(loaded, inputs), model.get_logits(images, padded(items))[0])
    goes_back(loaded, model.state_dict())


def test_the_scale_of_a_trained_file_is_that_of_the_loss(tmp_path):
    reference = clip_model()
    nn.init.constant_(reference.logit_scale, math.log(100))  # where OpenAI's training stopped it
    loaded = loaded_from(reference, tmp_path)
    items = texts()
    images, inputs = both(items)
    with torch.inference_mode():
        close(loss(loaded, inputs), reference(padded(items), images, return_loss=True).loss)
