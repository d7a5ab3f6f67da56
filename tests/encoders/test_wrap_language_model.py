"""Decoder language models that read tokens of any modality; tiny, random weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mmformer.batch import Ragged
from mmformer.encoders import Encoder, Projection, image_patches
from mmformer.encoders.wrap import LanguageModel, WordEmbedding
from mmformer.fusion import Fusion
from mmformer.heads import VocabularyHead
from mmformer.model import Model
from mmformer.pooling import MeanPool
from mmformer.tokens import merge, to_padded
from mmformer.visibility import Visibility
from tests.encoders.wrapping import of_row, shaken
from tests.helpers import packed_tokens, random_batch

pytest.importorskip("transformers", reason="needs the extra [transformers]")

CONFIGS = {
    "llama": {"model_type": "llama", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 8,
              "num_key_value_heads": 1, "intermediate_size": 40, "vocab_size": 61},
    "qwen3": {"model_type": "qwen3", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "head_dim": 8,
              "num_key_value_heads": 1, "intermediate_size": 40, "vocab_size": 61},
    "gpt2": {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 3, "vocab_size": 61, "n_positions": 40},
    "opt": {"model_type": "opt", "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "ffn_dim": 40,
            "vocab_size": 61, "max_position_embeddings": 40, "word_embed_proj_dim": 24},
    "bloom": {"model_type": "bloom", "hidden_size": 24, "n_layer": 2, "n_head": 3, "vocab_size": 61},
}  # fmt: skip


@pytest.fixture(params=CONFIGS)
def language_model(request) -> LanguageModel:
    return shaken(LanguageModel(CONFIGS[request.param], weights=None))


def streams():
    """Sound in front of text, of unequal lengths; sample 1 has no sound, sample 3 nothing."""
    sound = packed_tokens({2: 3, 0: 5}, 4, 24, "audio")
    text = packed_tokens({1: 4, 0: 2, 2: 6}, 4, 24, "text", seed=1)
    return [sound, text]


def test_each_sample_is_what_the_library_gives_of_it_alone(language_model):
    tokens = merge(streams(), sequential=True, multiple=16)
    with torch.no_grad():
        out, logits = language_model(tokens), language_model.logits(tokens)
        assert out.layout is tokens.layout
        for row, length in enumerate((7, 4, 9, 0)):
            mine = tokens.sample()[0] == row
            assert mine.sum() == length
            if length:
                own = language_model.backbone(inputs_embeds=tokens.x[:, mine], output_hidden_states=True)
                torch.testing.assert_close(out.x[0][mine], own.hidden_states[-1][0], rtol=1e-5, atol=1e-5)
                torch.testing.assert_close(logits[0][mine], own.logits[0], rtol=1e-5, atol=1e-5)
    assert not logits[0, 20:].any()


def test_packed_equals_padded_with_padding_in_the_middle(language_model):
    with torch.no_grad():
        packed = language_model(merge(streams(), sequential=True))
        padded = language_model(merge([to_padded(stream) for stream in streams()], sequential=True))
    for row in range(4):
        torch.testing.assert_close(of_row(packed, row)[0], padded.x[row][padded.valid[row]], rtol=1e-5, atol=1e-5)
    assert not padded.x[~padded.valid].any()


def test_a_frozen_one_lets_the_gradient_through_and_only_backwards(language_model):
    language_model.train().requires_grad_(False)
    tokens = merge(streams(), sequential=True)
    x = tokens.x.clone().requires_grad_()
    where = (tokens.sample()[0] == 0).nonzero()[:, 0]
    language_model(tokens.with_x(x)).x[0, where[3]].sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    assert reached.nonzero()[:, 0].tolist() == where[:4].tolist()
    assert all(p.grad is None for p in language_model.parameters())
    assert not language_model.backbone.training


def test_word_embedding_makes_it_the_language_model_it_was(language_model):
    config = language_model.described["config"]
    words = WordEmbedding(config, weights=None)
    words.table.load_state_dict(language_model.backbone.get_input_embeddings().state_dict())
    items = [torch.randint(2, 61, (length,)) for length in (5, 3, 5)]
    with torch.no_grad():
        tokens = words(Ragged.stack(items, range(3)), 3)
        logits = language_model.logits(tokens)
        for row, ids in enumerate(items):
            own = language_model.backbone(ids[None]).logits[0]
            torch.testing.assert_close(logits[0][tokens.sample()[0] == row], own, rtol=1e-5, atol=1e-5)


def test_it_is_the_transformer_of_a_fusion():
    encoders = {
        "image": Encoder(image_patches(16, 4, 3)),
        "text": Encoder(WordEmbedding(CONFIGS["llama"], weights=None)),
    }
    language_model = LanguageModel(CONFIGS["llama"], weights=None)
    entrances = {"image": Projection(16, 24), "text": nn.Identity()}
    fusion = Fusion(24, ["image", "text"], language_model, MeanPool(), entrances=entrances, sequential=True)
    model = Model(encoders, fusion, {"words": VocabularyHead(24, 61, bias=False, tied="text")})
    assert model.heads["words"].out.weight is encoders["text"].embedder.table.weight
    model.freeze(["fusion.transformer.*", "encoders.text.*"])
    batch = random_batch(6, subsets=[("text", "image"), ("text",), ("image", "text")])
    fused = model.fuse(model.encode(batch))
    model.heads["words"](fused.x).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in model.named_parameters() if "image" in name}


def test_what_it_cannot_honour_is_refused():
    language_model = LanguageModel(CONFIGS["llama"], weights=None)
    tokens = packed_tokens({0: 3}, 1, 24)
    language_model(tokens, None, Visibility(causal=True))
    with pytest.raises(ValueError, match="honours no further rule"):
        language_model(tokens, None, Visibility(window=2))
    with pytest.raises(ValueError, match="put the context into the stream"):
        language_model(tokens, tokens)
    with pytest.raises(ValueError, match="tokens of 16 channels, and the language model reads 24"):
        language_model(packed_tokens({0: 3}, 1, 16))
