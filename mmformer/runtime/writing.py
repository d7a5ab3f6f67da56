"""Texts written token by token, by two programs: one reads a sample, the other adds a token to what is remembered.

The likeliest token is taken each time. What a model goes by is in `Description.writes`: the `modality` that it writes,
ids that `begin` and `end` a text, `first` in the place of a prompt's first and `start` behind it, those that `stop` a
text and those that are `banned` from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SCORES, TOKEN, PLACE, NEW = "scores", "token", "place", "new_"


def step_of(path: Path) -> Path:
    """The file of the second program, beside the first."""
    return path.with_name(f"{path.stem}.step.onnx")


def prompt(ids: Sequence[int] | None, rules: Mapping[str, Any]) -> list[int]:
    """The ids of a text as a prompt; those that begin one where there is none."""
    found = list(rules["begin"] if ids is None else ids)
    if rules["end"] and found[-len(rules["end"]) :] == list(rules["end"]):
        found = found[: -len(rules["end"])]
    if rules["first"] is not None:
        found = [rules["first"], *found[1:]]
    return found if rules["start"] is None or rules["start"] in found else [*found, rules["start"]]


def write(
    read: Mapping[str, np.ndarray], step: Any, length: int, rules: Mapping[str, Any], max_length: int
) -> list[int]:
    """The ids behind a prompt of `length`, given what the first program said of it and a session of the second."""
    past = {name: values for name, values in read.items() if name != SCORES}
    names = [output.name for output in step.get_outputs()]
    scores, written = read[SCORES], []
    for place in range(length, length + max_length):
        allowed = scores[0].copy()
        allowed[list(rules["banned"])] = -np.inf
        written.append(int(allowed.argmax()))
        if written[-1] in rules["stop"] or len(written) == max_length:
            break
        given = {TOKEN: np.array([written[-1:]]), PLACE: np.array([place])}
        found = dict(zip(names, step.run(None, given | past), strict=True))
        scores = found.pop(SCORES)
        past |= {name.removeprefix(NEW): values for name, values in found.items()}
    return written
