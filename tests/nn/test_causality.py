from functools import partial

import torch

from mmformer.nn import Attention, Block, ByCausality
from mmformer.visibility import Sights, Visibility
from tests.helpers import packed_tokens, scramble


def test_the_rule_chooses_the_weights():
    layer = partial(Block, attention=partial(Attention, num_heads=2), feedforward=None)
    scramble(part := ByCausality(8, layer))
    tokens = packed_tokens({0: 3, 1: 5}, 2, 8)
    for rule, chosen in ((Visibility(), part.full), (Visibility(causal=True), part.causal)):
        sights = Sights(tokens, tokens, rule)
        out = part(tokens, None, sights, None)
        assert torch.equal(out.x, chosen(tokens, None, sights, None).x)
        part.zero_grad()
        out.x.sum().backward()
        used = set(chosen.parameters())
        assert all((p.grad is not None) == (p in used) for p in part.parameters())
