from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmformer.datasets.labels import Target, read_target
from mmformer.datasets.tables import ManifestError


def target(cells: list, **options) -> Target:
    return read_target("label", cells, [f"r{i}" for i in range(len(cells))], **options)


@pytest.mark.parametrize(
    ("cells", "kind", "names"),
    [
        (["cat", "dog", "cat", None], "Classes", ("cat", "dog")),
        (["10", "9", "9", "10"], "Classes", ("9", "10")),
        ([10, 9, 9, 10], "Classes", ("9", "10")),
        (["1.0", "0.0", "1.0", None], "Classes", ("0", "1")),
        (["2", "yes", "10"], "Classes", ("2", "10", "yes")),
        ([True, False], "Classes", ("False", "True")),
        (["cat|dog", "dog", None], "Labels", ("cat", "dog")),
        ([["cat", "dog"], [], ["dog"]], "Labels", ("cat", "dog")),
        (["0.5", "1", "2"], "Number", ()),
        ([0.5, 1.5], "Number", ()),
        ([str(n) for n in range(500, 600)], "Number", ()),
        ([str(n) for n in range(100)] * 2, "Classes", tuple(str(n) for n in range(100))),
    ],
)
def test_the_kind_is_inferred(cells, kind, names) -> None:
    found = target(cells)
    assert (found.kind, found.names) == (kind, names)


def test_the_kind_can_be_set() -> None:
    assert target(["1", "2", "3"], kind="Number").kind == "Number"
    assert target(["0.5", "1.5"], kind="Classes").names == ("0.5", "1.5")
    assert target(["a|b", "c"], kind="Classes").names == ("a|b", "c")


def test_rows_and_missing_values() -> None:
    rows = np.array([2, 0, 1])
    assert target(["b", "a", None]).rows(rows).tolist() == [-100, 1, 0]
    number = target([0.5, 1.5, None])
    assert number.rows(rows).tolist()[1:] == [0.5, 1.5]
    assert math.isnan(number.rows(rows)[0])
    several = target([["a", "b"], [], None, ["b"]])
    expected = torch.tensor([[math.nan, math.nan], [1, 1], [0, 0]])
    torch.testing.assert_close(several.rows(rows), expected, equal_nan=True)
    assert several.present.tolist() == [True, True, False, True]


def test_numbers_are_measured_on_the_rows_that_train() -> None:
    found = target([1.5, 3.5, 100.5, None], train=np.array([True, True, False, True]))
    assert (found.mean, found.std) == (2.5, 1.0)


@pytest.mark.parametrize(
    ("cells", "options", "message"),
    [
        (["1.5", "nan", "inf"], {}, "row 'r1' has 'nan'; row 'r2' has 'inf': not a finite number"),
        (["1", "2", "nan", "1"], {}, "row 'r2' has 'nan': not a finite number"),
        (["1", "many"], {"kind": "Number"}, "row 'r1' has 'many': not a finite number"),
        (["0", "7"], {"names": ["0", "1"], "kind": "Classes"}, "row 'r1' has '7': none of the 2 classes '0', '1'"),
        ([["a", "b"], ["a"]], {"kind": "Classes"}, "row 'r0' has .'a', 'b'.: several classes, and the kind is Classes"),
        ([None, " "], {}, "no label in any of 2 rows"),
    ],
)
def test_a_wrong_label_names_its_rows(cells, options, message) -> None:
    with pytest.raises(ManifestError, match=message):
        target(cells, **options)
