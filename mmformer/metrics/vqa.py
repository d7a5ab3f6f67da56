"""The accuracy of VQA v2: an answer is as right as three of ten people find it.

As in the official evaluation (github.com/GT-Vision-Lab/VQA, `vqaEval.py`), to the letter of its string handling.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32
"""The original passes a flag where `sub` takes the number of replacements; the flag's value is 32."""
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_NUMBERS = {word: str(i) for i, word in enumerate(_DIGITS)} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})

_ONE_APOSTROPHE = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't it'd
it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd they'll
they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd who'll
who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
_MORE_APOSTROPHES = """
couldn't've hadn't've he'd've it'd've mightn't've 'ow's'at she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've
"""


@lru_cache(maxsize=1)
def _contractions() -> dict[str, str]:
    """Contractions by how they are written when one apostrophe is forgotten."""
    table = {word.replace("'", ""): word for word in _ONE_APOSTROPHE.split()}
    for word in _MORE_APOSTROPHES.split():
        table |= {word[:i] + word[i + 1 :]: word for i, letter in enumerate(word) if letter == "'"}
    return table | {"somebody'd": "somebodyd"}  # the wrong way round in the original


def normalise_answer(answer: str) -> str:
    """An answer in lower case, without punctuation and articles, its numbers in figures, its contractions mended."""
    text = answer
    number = _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _MARKS:
        at_an_edge = f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if number or at_an_edge else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_contractions().get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """The mean, over the people each left out once, of min(1, others who gave this answer / 3).

    With ten people and n of them for the answer: 0.3, 0.6, 0.9 and 1 for n of 1, 2, 3 and more. Answers are normalised
    only where people disagree.

    Raises:
        ValueError: no people.
    """
    if not people:
        raise ValueError("an answer is judged by people's answers, and there is none: leave the question out")
    given, said = _clean(answer), [_clean(other) for other in people]
    if len(set(said)) > 1:
        given, said = normalise_answer(given), [normalise_answer(other) for other in said]
    agree = sum(other == given for other in said)
    without = [agree - (other == given) for other in said]
    return sum(min(1.0, count / 3) for count in without) / len(said)


def _clean(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
