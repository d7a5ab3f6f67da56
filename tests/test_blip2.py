"""BLIP-2 from its first run to its last, by the experiments' own configs: what is frozen keeps every bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmformer.report import read_predictions
from tests.test_train import train

SMALL = [
    "data.tokenizer.vocab_size=280", "dim=24", "num_heads=3", "depth.image=1", "depth.fusion=2", "depth.decoder=1",
    "data.loader.batch_size=8", "data.loader.num_workers=0", "trainer.max_steps=4", "trainer.check_val_every_n_epoch=1",
    "trainer.log_every_n_steps=1", "logger=csv",
]  # fmt: skip
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    """What the four runs of docs/systems/blip2.md leave, of pictures that are named by their brightness."""
    folder = tmp_path_factory.mktemp("blip2")
    draw, lines = random.Random(0), ["id,split,image,text"]
    for i in range(40):
        Image.new("L", (16, 16), 6 * i).save(folder / f"{i}.png")
        name = "".join(draw.choices("abcdefgh", k=4))
        lines.append(f"r{i},{['train', 'train', 'train', 'val', 'test'][i % 5]},{i}.png,{name}")
    (folder / "rows.csv").write_text("\n".join(lines) + "\n")
    clip = run(folder, "clip")
    first = run(folder, "blip2_stage1", f"module.model.encoders.image.pretrained={clip}")
    language = run(folder, "blip2_language", "depth.fusion=1")
    second = run(folder, "blip2_stage2", f"first={first}", f"language={language}")
    return [clip, first, language, second]


@pytest.fixture(scope="module")
def runs(folders) -> dict[str, Weights]:
    """The weights of each run."""
    return {path.parent.name: weights(path) for path in folders}


def run(folder: Path, name: str, *options: str) -> Path:
    code, said = train(folder, f"experiment={name}", *SMALL, *options)
    assert code == 0, said
    (found,) = (folder / "runs" / name).iterdir()
    return found


def weights(run: Path) -> Weights:
    return part(load_file(run / "model" / "model.safetensors"), "model.")


def part(weights: Weights, name: str) -> Weights:
    found = {key.removeprefix(name): tensor for key, tensor in weights.items() if key.startswith(name)}
    assert found, name
    return found


def same(one: Weights, other: Weights) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_the_first_stage_leaves_the_picture_encoder_as_it_is(runs):
    first = runs["blip2_stage1"]
    assert same(part(first, "encoders.image."), part(runs["clip"], "encoders.image."))


def test_the_second_stage_leaves_the_picture_encoder_and_the_language_model_as_they_are(runs):
    first, language, second = (runs[name] for name in ("blip2_stage1", "blip2_language", "blip2_stage2"))
    assert same(part(second, "encoders.image."), part(first, "encoders.image."))
    for name in ("encoders.text.", "heads.vocabulary."):
        assert same(part(second, name), part(language, name)), name
    for name in ("transformer.", "entrances.text."):
        assert same(part(second, f"fusion.last.{name}"), part(language, f"fusion.{name}")), name


def test_the_second_stage_trains_the_queries_and_their_way_to_the_language_model(runs):
    first, second = part(runs["blip2_stage1"], "fusion."), part(runs["blip2_stage2"], "fusion.earlier.image.")
    moved = {name for name, tensor in second.items() if not torch.equal(tensor, first[name])}
    assert {"latents", "transformer.layers.0.cross.query.weight"} <= moved
    assert part(runs["blip2_stage2"], "fusion.last.entrances.image.")


def test_a_run_that_writes_leaves_what_it_wrote_beside_its_pictures(folders):
    second = folders[-1]
    said = read_predictions(second)
    assert said is not None
    assert (said.kind, len(said)) == ("Texts", 8)
    assert said.column("target") == [[text] for text in said.column("text")]
    page = (second / "report.html").read_text()
    for wanted in ("texts written exactly, test", "What was written", "The worst", "<img"):
        assert wanted in page
