from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmformer.checkpoints import families
from mmformer.checkpoints.build import build
from mmformer.checkpoints.changes import Copied, Rows, Transposed
from mmformer.checkpoints.load import fill, load, load_into, named_tensors
from mmformer.checkpoints.plan import Terms, original, plan
from mmformer.checkpoints.report import MisfitError
from mmformer.checkpoints.source import Source, source_of
from mmformer.checkpoints.store import Entry, TensorStore
from mmformer.checkpoints.table import ZERO, Rule, join, rename
from tests.checkpoints import toy
from tests.checkpoints.oracles import scramble

QUERY = "vit.encoder.layer.1.attention.attention.query.weight"
UP = "vit.encoder.layer.0.intermediate.dense.weight"


@pytest.fixture(autouse=True)
def _one_family(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (toy.FAMILY,))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "vit", toy.tensors())


def write(folder: Path, tensors: dict[str, Tensor], config: dict = toy.CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load_tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


# The account.


def test_every_tensor_is_on_exactly_one_line(folder):
    loaded = load(folder)
    report = loaded.report
    sources = [item.name for line in report for item in line.sources]
    targets = [item.name for line in report for item in line.targets]
    assert sorted(sources) == sorted(load_tensors(folder))
    assert sorted(targets) == sorted(loaded.model.state_dict())
    assert {line.status for line in report} == {"renamed", "joined", "reshaped", "split", "configured"}


def test_the_table_counts_and_folds_layers(folder):
    text = str(load(folder).report)
    assert "100.0% of" in text
    assert f"in {folder}" in text
    row = next(line for line in text.splitlines() if line.startswith("joined  "))
    assert row.split()[1:3] == ["12", "4"]
    folded = "2 x vit.encoder.layer.*.attention.attention.{query,key,value}.weight (24x24 each)"
    assert folded in text
    assert max(map(len, text.splitlines()[1:])) <= 120


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floats_convert_and_are_listed(folder, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_tensors(folder).items()}
    report = load(write(folder, tensors)).report
    targets = sum(len(line.targets) for line in report if line.sources)
    assert f"converted: {targets} tensors from {str(dtype)[6:]} to float32" in str(report)
    assert report.ok


# Damage: one tensor at a time, named with its shapes, and the target as it was.

DAMAGE = {
    "missing": (lambda t: t.pop(UP), rf"missing: .*up\.weight \(40x24\): comes from {re.escape(UP)}"),
    "one of three missing": (
        lambda t: t.pop(QUERY),
        rf"missing: encoders\.image\.stages\.0\.layers\.1\.attention\.qkv\.weight \(72x24\): needs {re.escape(QUERY)}",
    ),
    "extra": (
        lambda t: t.update({"vit.encoder.layer.0.gamma": torch.zeros(3)}),
        r"unexpected: vit\.encoder\.layer\.0\.gamma \(3\)",
    ),
    "extra layer": (
        lambda t: t.update({n.replace("layer.1", "layer.2"): v.clone() for n, v in t.items() if "layer.1" in n}),
        r"unexpected: vit\.encoder\.layer\.2\.attention\.output\.dense\.bias \(24\): goes to .*layers\.2.*model lacks",
    ),
    "transposed": (
        lambda t: t.update({UP: t[UP].t()}),
        rf"mismatched: {re.escape(UP)} \(24x40\)\n? .*\(40x24\): 24x40 to 40x24: stored transposed",
    ),
    "wrong shape": (
        lambda t: t.update({UP: torch.zeros(40, 25)}),
        rf"mismatched: {re.escape(UP)} \(40x25\)\n? .*\(40x24\): 40x25 to 40x24",
    ),
    "wrong shape of one of three": (
        lambda t: t.update({QUERY: torch.zeros(25, 24)}),
        r"mismatched: .*query.*\(25x24\), .*key.*\(24x24\)(.|\n)*beside",
    ),
    "wrong type": (
        lambda t: t.update({UP: t[UP].to(torch.int32)}),
        rf"mismatched: {re.escape(UP)} (.|\n)*int32 in the file, float32 in the model",
    ),
    "eight-bit floats": (
        lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}),
        "float8_e4m3fn in the file, float32 in the model",
    ),
    "position table of another length": (
        lambda t: t.update({"vit.embeddings.position_embeddings": torch.zeros(1, 28, 24)}),
        r"mismatched: vit\.embeddings\.position_embeddings \(1x28x24\)(.|\n)*28 positions, not 1 and a grid",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_and_nothing_is_loaded(folder, damage):
    change, message = DAMAGE[damage]
    tensors = load_tensors(folder)
    change(tensors)
    write(folder, tensors)
    with pytest.raises(MisfitError, match=message) as caught:
        load(folder)
    assert "Nothing was loaded" in str(caught.value)
    module = scramble(build(toy.described(toy.CONFIG).model), seed=3)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(MisfitError):
        load_into(module, folder)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} was changed by a load that failed"


def test_without_strict_what_fits_is_loaded_and_the_rest_is_listed(folder):
    tensors = load_tensors(folder)
    tensors[UP] = tensors[UP].t()
    del tensors[QUERY]
    report = load(write(folder, tensors), strict=False).report
    assert not report.ok
    assert [line.sources[0].name for line in report.of("mismatched")] == [UP]
    assert 0.5 < report.share < 1
    rules, terms = [Rule((UP,), ("weight",))], Terms(ignored={"*": "x"})
    with pytest.raises(MisfitError, match="no tensor of it fits"):
        fill(nn.Linear(2, 2, bias=False), source_of(tensors), rules, terms, strict=False)


def test_a_wrong_family_is_named(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no family 'resnet': there are .*tests/toy"):
        load(folder, family="resnet")
    other = {"layer1.0.conv1.weight": torch.zeros(3, 3), "fc.bias": torch.zeros(3)}
    save_file(other, tmp_path / "resnet.safetensors")
    with pytest.raises(ValueError, match=r"of no family that mmformer knows \(.*tests/toy.*fc\.bias \(3,\)"):
        load(tmp_path / "resnet.safetensors")
    write(tmp_path / "liar", {f"vit.{n}": t for n, t in other.items()})
    with pytest.raises(MisfitError, match=r"unexpected: vit\.layer1\.0\.conv1\.weight \(3x3\)"):
        load(tmp_path / "liar", family="toy")


def test_several_families_ask_for_one(folder, monkeypatch):
    twin = replace(toy.FAMILY, library="other")
    monkeypatch.setattr(families, "FAMILIES", (toy.FAMILY, twin))
    with pytest.raises(ValueError, match=r"could be tests/toy, other/toy: choose with family="):
        load(folder)
    assert load(folder, family="other/toy").family is twin


def test_what_neither_the_file_nor_the_options_say_is_asked_for(tmp_path):
    save_file(toy.tensors(), tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"alone\.safetensors does not say num_attention_heads"):
        load(tmp_path / "alone.safetensors")


def test_unknown_options_name_the_known(folder):
    with pytest.raises(ValueError, match=r"options imgsize: tests/toy takes image_size"):
        load(folder, options={"imgsize": 3})


# Wrappers, parts, other sizes.


@pytest.mark.parametrize("prefix", ["model.", "module.", "_orig_mod.", "module._orig_mod.", "model._orig_mod."])
def test_prefixes_around_the_whole_file_come_off(folder, prefix):
    plain = load(folder).model.state_dict()
    wrapped = load(write(folder, {prefix + name: t for name, t in load_tensors(folder).items()})).model.state_dict()
    assert all(torch.equal(wrapped[name], plain[name]) for name in plain)


def test_a_part_comes_alone_and_the_rest_is_listed(folder):
    whole, part = load(folder), load(folder, part="encoders.image")
    state = part.model.state_dict()
    assert state
    assert all(torch.equal(state[name], whole.model.state_dict()[f"encoders.image.{name}"]) for name in state)
    assert part.config == whole.described.model["encoders"]["image"]
    assert [(line.sources[0].name, line.note) for line in part.report.of("ignored")] == [
        ("classifier.bias", "belongs to another part"),
        ("classifier.weight", "belongs to another part"),
    ]
    with pytest.raises(ValueError, match=r"no part 'encoders\.text': it has encoders\.image, heads\.label"):
        load(folder, part="encoders.text")


def other_size(size: int, patch: int = 4, classes: int = 7) -> nn.Module:
    config = toy.CONFIG | {"image_size": size, "patch_size": patch, "num_labels": classes}
    return scramble(build(toy.described(config).model), seed=5)


def test_another_grid_patch_and_number_of_classes_are_resized_and_listed(folder):
    module = other_size(48, patch=8, classes=9)
    before = module.get_parameter("heads.label.weight").clone()
    report = load_into(module, folder)
    assert sorted(item.name for line in report.of("resized") for item in line.targets) == [
        "encoders.image.embedder.class_tokens.positions",
        "encoders.image.embedder.position.table",
        "encoders.image.embedder.stem.linear.weight",
        "heads.label.bias",
        "heads.label.weight",
    ]
    assert "5x5x24 to 6x6x24" in str(report)
    weight = module.get_parameter("heads.label.weight")
    assert torch.equal(weight[:7], load_tensors(folder)["classifier.weight"])
    assert torch.equal(weight[7:], before[7:])


def test_resizing_can_be_forbidden(folder):
    with pytest.raises(MisfitError, match=r"mismatched: vit\.embeddings\.position_embeddings (.|\n)*resize is off"):
        load_into(other_size(24), folder, resize=False)


def test_new_parts_stay_new_even_where_the_shape_fits(folder):
    module = other_size(20)
    before = module.get_parameter("heads.label.weight").clone()
    report = load_into(module, folder, new=["heads.*"])
    assert torch.equal(module.get_parameter("heads.label.weight"), before)
    assert [item.name for line in report.of("new") for item in line.targets] == [
        "heads.label.weight",
        "heads.label.bias",
    ]
    assert {line.note for line in report.of("ignored")} == {
        "heads.label.weight stays new",
        "heads.label.bias stays new",
    }


def test_an_encoder_of_ones_own_is_filled(folder):
    module = other_size(20).get_submodule("encoders.image")
    report = load_into(module, folder, part="encoders.image")
    assert report.ok
    wanted = load(folder).model.get_submodule("encoders.image").state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in module.state_dict().items())


def test_tensors_can_be_left_out_by_name(folder):
    tensors = load_tensors(folder) | {"vit.extra.weight": torch.zeros(2)}
    module = other_size(20)
    report = load_into(module, write(folder, tensors), ignore=["vit.extra.*"])
    assert [(line.sources[0].name, line.note) for line in report.of("ignored")] == [
        ("vit.extra.weight", "left out as asked")
    ]


# Tables on small modules.


class Tied(nn.Module):
    """Two names for one tensor, as a decoder tied to its embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(4, 3)
        self.out = nn.Linear(3, 4)
        self.out.weight = self.table.weight


TIED_RULES = [Rule(("wte",), ("table.weight",)), Rule(("lm_head",), ("out.weight",)), Rule(("b",), ("out.bias",))]


def test_tied_weights_may_be_stored_once_or_twice():
    value, bias = torch.randn(4, 3), torch.randn(4)
    for tensors in ({"wte": value, "b": bias}, {"wte": value, "lm_head": value.clone(), "b": bias}):
        module = Tied()
        report = fill(module, source_of(tensors), TIED_RULES, Terms(ignored={}))
        assert torch.equal(module.table.weight, value)
        assert [item.name for line in report.of("tied") for item in line.targets] == ["out.weight"]
        assert report.share == 1


@pytest.mark.parametrize("strict", [True, False])
def test_tied_weights_that_differ_are_refused(strict):
    value = torch.randn(4, 3)
    tensors = {"wte": value, "lm_head": torch.randn(4, 3), "b": torch.randn(4)}
    module = Tied()
    before = module.table.weight.clone()
    if strict:
        with pytest.raises(MisfitError, match=r"mismatched: lm_head .*ties this to table\.weight, but .* differ"):
            fill(module, source_of(tensors), TIED_RULES, Terms(ignored={}))
        assert torch.equal(module.table.weight, before)
    else:
        fill(module, source_of(tensors), TIED_RULES, Terms(ignored={}), strict=False)
        assert torch.equal(module.table.weight, value)


def test_one_tensor_of_the_file_for_two_of_the_model():
    module = nn.ModuleDict({"a": nn.Linear(3, 2, bias=False), "b": nn.Linear(3, 2, bias=False)})
    value = torch.randn(2, 3)
    report = fill(
        module, source_of({"x": value}), [Rule(("x",), ("a.weight", "b.weight"), Copied())], Terms(ignored={})
    )
    assert torch.equal(module.get_parameter("a.weight"), value)
    assert torch.equal(module.get_parameter("b.weight"), value)
    assert [line.status for line in report] == ["copied"]


def test_ignoring_takes_nothing_that_a_rule_wants():
    # Dropping "*attn.bias", an old buffer, must not drop GPT-2's "c_attn.bias" (a trap that was met).
    tensors = {"h.0.attn.c_attn.bias": torch.randn(6), "h.0.attn.bias": torch.ones(1, 1, 4, 4)}
    rules = [Rule(("h.{i}.attn.c_attn.bias",), ("{i}.bias",))]
    module = nn.ModuleList([nn.Linear(2, 6)])
    report = fill(module, source_of(tensors), rules, Terms(ignored={"*attn.bias": "a mask"}, new=["0.weight"]))
    assert torch.equal(module.get_parameter("0.bias"), tensors["h.0.attn.c_attn.bias"])
    assert [item.name for line in report.of("ignored") for item in line.sources] == ["h.0.attn.bias"]


def test_a_bias_that_the_original_lacks_is_zero_in_ours_and_absent_on_the_way_back():
    rules = [*join(["q", ZERO, "v"], "qkv"), *rename("o", "out", Transposed())]
    rules[0] = join(["q", "k", "v"], "qkv", bias=False)[0]
    tensors = {f"{n}.{kind}": torch.randn(2, 2)[: 2, : 2 if kind == "weight" else 0].squeeze(-1) if kind == "weight"
               else torch.randn(2) for n in "qvo" for kind in ("weight", "bias")}  # fmt: skip
    tensors["k.weight"] = torch.randn(2, 2)
    module = nn.ModuleDict({"qkv": nn.Linear(2, 6), "out": nn.Linear(2, 2)})
    fill(module, source_of(tensors), rules, Terms(ignored={}))
    assert module.get_parameter("qkv.bias")[2:4].tolist() == [0, 0]
    assert torch.equal(module.get_parameter("out.weight"), tensors["o.weight"].t())
    back = original(module.state_dict(), rules)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in back)
    with torch.no_grad():
        module.get_parameter("qkv.bias")[2] = 1
    with pytest.raises(ValueError, match=r"qkv\.bias was trained where .* has nothing"):
        original(module.state_dict(), rules)


def test_zeros_and_configured_targets_are_listed():
    module = nn.Linear(2, 3)
    report = fill(module, source_of({"w": torch.randn(3, 2)}), [Rule(("w",), ("weight",))],
                  Terms(ignored={}, zeros=["bias"]))  # fmt: skip
    assert module.bias.tolist() == [0, 0, 0]
    assert [item.name for line in report.of("zero-filled") for item in line.targets] == ["bias"]


def test_the_first_rule_that_claims_a_name_has_it():
    rules = [Rule(("new",), ("weight",)), Rule(("old",), ("weight",), Rows())]
    for name in ("new", "old"):  # two layouts side by side in one table
        module = nn.Linear(2, 3, bias=False)
        value = torch.randn(3, 2)
        assert fill(module, source_of({name: value}), rules, Terms(ignored={})).ok
        assert torch.equal(module.weight, value)
    with pytest.raises(MisfitError, match="unexpected: old"):
        fill(nn.Linear(2, 3, bias=False), source_of({"new": value, "old": value}), rules, Terms(ignored={}))


def test_integers_widen_and_never_narrow():
    module = nn.Module()
    module.register_buffer("index", torch.zeros(3, dtype=torch.int64))
    rules = [Rule(("i",), ("index",))]
    fill(module, source_of({"i": torch.arange(3, dtype=torch.int32)}), rules, Terms(ignored={}))
    assert module.get_buffer("index").tolist() == [0, 1, 2]
    module.register_buffer("index", torch.zeros(3, dtype=torch.int32))
    for wrong in (torch.arange(3), torch.ones(3)):
        with pytest.raises(MisfitError, match="mismatched: i "):
            fill(module, source_of({"i": wrong}), rules, Terms(ignored={}))


def test_a_plan_reads_no_numbers():
    def read() -> Tensor:
        raise AssertionError("read before all was checked")

    store = TensorStore({"w": Entry((3, 2), torch.float32, read), "x": Entry((1,), torch.float32, read)})
    module = nn.Linear(2, 3)
    planned = plan("here", store, named_tensors(module), [Rule(("w",), ("weight",))], Terms(ignored={}))
    assert {line.status for line in planned.report} == {"renamed", "missing", "unexpected"}
    with pytest.raises(MisfitError, match="here does not fit the model"):
        fill(module, Source(origin="here", tensors=store), [Rule(("w",), ("weight",))], Terms(ignored={}))


def test_long_lists_are_cut():
    tensors = {f"{chr(97 + i)}x": torch.zeros(1) for i in range(20)}
    with pytest.raises(MisfitError) as caught:
        fill(nn.Linear(1, 1), source_of(tensors), [], Terms(ignored={}))
    assert str(caught.value).count("unexpected: ") == 13
    assert "unexpected: and 8 more" in str(caught.value)


# Memory.


def peak(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{field}:\s+(\d+)", status)[1])  # pyright: ignore[reportOptionalSubscript]


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_loading_takes_little_more_memory_than_the_file(tmp_path, ending):
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("peak memory is read from /proc, which this system lacks")
    large = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8}
    folder = write(tmp_path, toy.tensors(**large), toy.CONFIG | large)
    if ending == "bin":
        torch.save(load_tensors(folder), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    size = max(path.stat().st_size for path in folder.iterdir())
    load(folder)  # what the first load imports does not count
    before = peak("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    loaded = load(folder)
    model = sum(tensor.nbytes for tensor in loaded.model.state_dict().values())
    above = peak("VmHWM") - before - model
    assert above <= 1.3 * size, f"{above / 1e6:.0f} MB above the model for a file of {size / 1e6:.0f} MB"
