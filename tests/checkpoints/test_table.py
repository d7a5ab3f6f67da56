from __future__ import annotations

import pytest

from mmformer.checkpoints.changes import Joined
from mmformer.checkpoints.table import ZERO, Rule, expand, join, rename


def names(rules: list[Rule]) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    return [(rule.sources, rule.targets) for rule in rules]


def test_layer_numbers_come_from_both_sides():
    rule = Rule(("h.{i}.w",), ("layers.{i}.weight",))
    found = expand([rule], ["h.0.w", "h.10.w", "h.2.w", "h.x.w", "xh.0.w"], ["layers.3.weight", "layers.2.weight"])
    assert names(found) == [((f"h.{i}.w",), (f"layers.{i}.weight",)) for i in (0, 2, 3, 10)]


def test_several_numbers_bind_together():
    rule = Rule(("block.{i}.{j}.w",), ("stage.{j}.layers.{i}.w",))
    found = expand([rule], ["block.1.0.w", "block.0.2.w"], [])
    assert names(found) == [
        (("block.0.2.w",), ("stage.2.layers.0.w",)),
        (("block.1.0.w",), ("stage.0.layers.1.w",)),
    ]


def test_a_repeated_number_is_one_number():
    rule = Rule(("a.{i}.b.{i}",), ("c.{i}",))
    assert names(expand([rule], ["a.1.b.1", "a.1.b.2"], [])) == [(("a.1.b.1",), ("c.1",))]


def test_dots_are_dots_and_rules_of_other_files_drop_out():
    assert expand([Rule(("a.b",), ("c",))], ["axb"], ["d"]) == []


def test_a_zero_source_has_no_number():
    (weight, bias) = join(["q.{i}", ZERO, "v.{i}"], "qkv.{i}")
    assert weight.sources == ("q.{i}.weight", ZERO, "v.{i}.weight")
    assert bias.change == Joined((1, 1, 1))
    assert names(expand([bias], ["q.4.bias"], [])) == [(("q.4.bias", ZERO, "v.4.bias"), ("qkv.4.bias",))]


def test_rename_without_bias():
    assert names(rename("a", "b", bias=False)) == [(("a.weight",), ("b.weight",))]


def test_names_of_a_rule_hold_the_same_numbers():
    with pytest.raises(ValueError, match=r"different layer numbers: h\.\{i\}, layers"):
        Rule(("h.{i}",), ("layers",))
