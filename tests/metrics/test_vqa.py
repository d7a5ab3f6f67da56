"""The accuracy of VQA v2, against the original's rules applied by hand and a plain form of leave-one-out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmformer.metrics.vqa import normalise_answer, vqa_accuracy

# Each was made with the original `vqaEval.py`.
NORMALISED = {
    "The Dog.": "dog",
    "a red, blue": "red blue",
    "1,000 people": "1000 people",
    "3.5 m.": "3.5 m",
    "x-ray": "x ray",
    "- dash": "dash",
    "none": "0",
    "Ten": "10",
    "eleven": "eleven",
    "dont": "don't",
    "couldntve": "couldntve",
    "couldnt've": "couldn't've",
    "somebody'd": "somebodyd",
    "hell": "hell",
    "U.S.A.": "usa",
    "yes/no": "yes no",
    "an": "",
}


@pytest.mark.parametrize(("answer", "wanted"), NORMALISED.items())
def test_normalises_as_the_original(answer: str, wanted: str) -> None:
    assert normalise_answer(answer) == wanted


def test_keeps_periods_beyond_the_originals_limit() -> None:
    assert normalise_answer("." * 40) == "." * 8


@pytest.mark.parametrize(("agree", "wanted"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_leave_one_out(agree: int, wanted: float) -> None:
    assert vqa_accuracy("yes", ["yes"] * agree + ["no"] * (10 - agree)) == pytest.approx(wanted)


@given(st.lists(st.sampled_from(["yes", "no", "two"]), min_size=1, max_size=10), st.sampled_from(["yes", "2"]))
def test_equals_the_plain_form(people: list[str], answer: str) -> None:
    same = len(set(people)) == 1
    said = people if same else [normalise_answer(other) for other in people]
    others = [said[:i] + said[i + 1 :] for i in range(len(said))]
    wanted = sum(min(1, rest.count(answer) / 3) for rest in others) / len(others)
    assert vqa_accuracy(answer, people) == pytest.approx(wanted)


def test_normalises_only_where_people_disagree() -> None:
    assert vqa_accuracy("two", ["2"] * 10) == 0
    assert vqa_accuracy("two", ["2"] * 9 + ["3"]) == 1
    with pytest.raises(ValueError, match="there is none"):
        vqa_accuracy("yes", [])
