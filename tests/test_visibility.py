import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmformer.tokens import merge, modality_id
from mmformer.visibility import Sight, Visibility, plan_groups
from tests.helpers import packed_tokens

RULES = [
    Visibility(),
    Visibility(causal=True),
    Visibility(window=1),
    Visibility(causal=True, window=2),
    Visibility(sees={"text": ["text"], "image": []}),
    Visibility(causal=True, sees={"image": ["image"]}),
]


def stream():
    image = packed_tokens({0: 4, 2: 3, 3: 1}, 4, 4, "image", 1)
    object.__setattr__(image, "position", image.position * 0)
    return merge([image, packed_tokens({2: 2, 0: 5, 1: 3}, 4, 4, "text", 2)], sequential=True, multiple=4)


def slow(rule, q, qs, k, ks, query, key):
    """The rule in plain words, one pair at a time."""
    if qs < 0 or qs != ks:
        return False
    mine, theirs = query.position[0, q].tolist(), key.position[0, k].tolist()
    if rule.causal and theirs[0] > mine[0]:
        return False
    same = query.modality[0, q] == key.modality[0, k]
    if rule.window is not None and same and max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) > rule.window:
        return False
    for name, seen in rule.sees:
        if query.modality[0, q] == modality_id(name) and key.modality[0, k] not in [modality_id(s) for s in seen]:
            return False
    return True


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_dense_mask_is_the_rule_said_slowly(rule, cross):
    query = stream()
    key = merge([packed_tokens({3: 2, 0: 3}, 4, 4, "text", 5)]) if cross else query
    mask = Sight(rule, query, key).dense[0, 0]
    owner_q = (query.sample() if cross else query.segment)[0].tolist()
    owner_k = (key.sample() if cross else key.segment)[0].tolist()
    for q, k in itertools.product(range(mask.shape[0]), range(mask.shape[1])):
        assert bool(mask[q, k]) == slow(rule, q, owner_q[q], k, owner_k[k], query, key)


def test_a_picture_before_a_text_makes_prefix_attention():
    """PaliGemma's mask: the picture sees itself whole, the text sees the picture and its own past."""
    image = packed_tokens({0: 3}, 1, 4, "image")
    object.__setattr__(image, "position", image.position * 0)
    tokens = merge([image, packed_tokens({0: 2}, 1, 4, "text")], sequential=True)
    mask = Sight(Visibility(causal=True), tokens, tokens).dense[0, 0]
    expected = torch.tensor([[1, 1, 1, 0, 0]] * 3 + [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(mask, expected)


@given(st.lists(st.tuples(st.integers(1, 300), st.integers(0, 300)), min_size=1, max_size=40))
def test_groups_cover_every_segment_once_and_never_mix_seeing_with_blind(pairs):
    queries, keys = (np.array(side) for side in zip(*pairs, strict=True))
    runs = plan_groups(queries, keys)
    assert [i for start, stop in runs for i in range(start, stop)] == list(range(len(queries)))
    for start, stop in runs:
        assert len({bool(k) for k in keys[start:stop]}) == 1


@given(st.sampled_from(RULES), st.sampled_from(RULES))
def test_both_rules_allow_what_each_allows(one, other):
    tokens = stream()
    both, mine, theirs = (Sight(rule, tokens, tokens).dense for rule in (one & other, one, other))
    assert torch.equal(both, mine & theirs)


def test_a_negative_window_is_refused():
    with pytest.raises(ValueError, match="window is -1"):
        Visibility(window=-1)
