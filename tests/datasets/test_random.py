from __future__ import annotations

import subprocess
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mmformer.datasets.random import Draw, uniform

COUNTER = st.integers(-(2**63), 2**63 - 1)


@given(COUNTER, COUNTER, st.lists(st.integers(0, 2**40), min_size=1, max_size=6), st.text(max_size=5))
def test_a_number_depends_on_its_own_counters_only(seed, epoch, indices, stream) -> None:
    found = uniform(seed, epoch, np.array(indices), stream, 5)
    assert ((found >= 0) & (found < 1)).all()
    for row, index in zip(found, indices, strict=True):
        assert (uniform(seed, epoch, np.array([index]), stream, 3)[0] == row[:3]).all()


def test_numbers_are_uniform_and_independent() -> None:
    base = uniform(0, 0, np.arange(50_000), "a", 3)
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in base.T])
    assert (np.abs(counts / 2_500 - 1) < 0.08).all()
    others = [uniform(1, 0, np.arange(50_000), "a", 1), uniform(0, 1, np.arange(50_000), "a", 1)]
    others += [uniform(0, 0, np.arange(50_000), "b", 1), uniform(0, 0, np.arange(1, 50_001), "a", 1)]
    correlation = np.corrcoef(np.concatenate([base, *others], 1).T)
    assert (np.abs(correlation - np.eye(7)) < 0.02).all()


def test_every_process_draws_the_same() -> None:
    code = (
        "import numpy as np; from mmformer.datasets.random import uniform;"
        "print(uniform(7, 3, np.array([5, 9]), 'x', 2).tobytes().hex())"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == uniform(7, 3, np.array([5, 9]), "x", 2).tobytes().hex()


def test_a_draw_of_rows() -> None:
    draw = Draw(1, 2, np.array([10, 20, 30]))
    assert (draw.of((2, 0, 0)).uniform("s", 4) == draw.uniform("s", 4)[[2, 0, 0]]).all()
    assert (draw.around("s", 4) == 2 * draw.uniform("s", 4) - 1).all()
    assert (draw.seeds("s") >= 0).all()
