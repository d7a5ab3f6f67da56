"""A small model of three modalities whose heads embed, judge pairs and score words, for objectives that align them."""

from __future__ import annotations

from functools import partial

from torch import nn

from mmformer.fusion import Fusion, View
from mmformer.heads import Head, SharedHead, UnitHead, VocabularyHead
from mmformer.model import Model
from mmformer.nn import Attention, Block, ByModality, CrossAttention, FeedForward, Transformer
from mmformer.pooling import FirstPool, MeanPool
from mmformer.tokens import LATENT
from mmformer.visibility import Visibility
from tests.helpers import scramble, small_model

DIM, SPACE, WORDS = 24, 6, 50


def cross_model(seed: int = 0) -> Model:
    """A text that looks at pictures and sounds, and a head of each kind."""
    model = small_model("cross", DIM)
    heads: dict[str, nn.Module] = {name: UnitHead(DIM, SPACE) for name in ("text", "image", "audio")}
    heads |= {"match": Head(DIM, 2), "vocabulary": VocabularyHead(DIM, WORDS)}
    scramble(model := Model(dict(model.encoders), model.fusion, heads), seed)
    return model


def query_model(count: int = 3, seed: int = 0) -> Model:
    """A Q-Former: queries look at pictures and sounds in every other layer, and have feed-forward maps of their own."""
    apart = partial(ByModality, part=FeedForward, modalities=[LATENT])
    plain = partial(Block, attention=partial(Attention, num_heads=3), feedforward=apart, post_norm=True)
    crossing = partial(plain, cross=partial(CrossAttention, num_heads=2), cross_for=[LATENT])
    fusion = Fusion(
        DIM,
        [LATENT, "text"],
        Transformer(DIM, 4, [crossing, plain], norm=None, entry_norm=nn.LayerNorm),
        MeanPool([LATENT]),
        context=["image", "audio"],
        num_latents=count,
        sequential=True,
    )
    queries = FirstPool(count=count, joined=True)
    views = {name: View([name], queries) for name in ("image", "audio")}
    views["text"] = View(["text"], FirstPool(start=count), Visibility(sees={LATENT: [LATENT], "text": ["text"]}))
    heads: dict[str, nn.Module] = {name: SharedHead(UnitHead(DIM, SPACE), count) for name in ("image", "audio")}
    heads |= {"text": UnitHead(DIM, SPACE), "match": Head(DIM, 2), "vocabulary": VocabularyHead(DIM, WORDS)}
    encoders = dict(small_model("cross", DIM).encoders)
    scramble(model := Model(encoders, fusion, heads, views), seed)
    return model
