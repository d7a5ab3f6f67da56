"""A decoder language model that reads the tokens of any modality in place of its own word embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.encoders.wrap.transformers import create
from mmformer.encoders.wrap.wrapper import set_mode, time_features, to_tokens
from mmformer.tokens import Tokens
from mmformer.visibility import Visibility


class LanguageModel(nn.Module):
    """A causal language model of transformers as a stage, or as the Transformer of a fusion (LLaVA, BLIP-2).

    Each segment is a sequence of its own, padded on the right inside and packed again behind; its tokens are numbered
    in their order. Tokens have the model's own width: put `Projection` behind other encoders, and let `WordEmbedding`
    be that of the text. `config` and `weights` are those of `Transformers`. A frozen one lets the gradient through.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(self, config: Mapping[str, Any], *, weights: str | None):
        super().__init__()
        self.backbone, described = create(dict(config), weights, "AutoModelForCausalLM")
        self.described: dict[str, Any] = {"config": described}
        self.width: int = self.backbone.get_input_embeddings().embedding_dim

    def forward(self, tokens: Tokens, context: Tokens | None = None, visibility: Visibility | None = None) -> Tokens:
        """The last hidden state of each token.

        Raises:
            ValueError: a context, a rule other than causality, or tokens of another width.
        """
        if context is not None:
            raise ValueError("a decoder language model has no cross-attention: put the context into the stream")
        if visibility not in (None, Visibility(), Visibility(causal=True)):
            raise ValueError(f"{visibility}: a decoder language model is causal and honours no further rule")
        body = self.backbone.base_model
        return tokens.with_x(self._run(body, tokens, lambda output: output.last_hidden_state))

    def logits(self, tokens: Tokens) -> Float[Tensor, "B T V"]:
        """For each token, the logits of the word that follows it; zeros at padding."""
        return self._run(self.backbone, tokens, lambda output: output.logits)

    def _run(self, model: Any, tokens: Tokens, result: Any) -> Float[Tensor, "B T E"]:
        if tokens.x.shape[-1] != self.width:
            raise ValueError(
                f"tokens of {tokens.x.shape[-1]} channels, and the language model reads {self.width}: "
                "put mmformer.encoders.Projection in front"
            )
        set_mode(self.backbone, self.training)
        if tokens.layout is None:
            out = result(_call(model, tokens.x, tokens.valid))
            return torch.where(tokens.valid[..., None], out, 0)
        lengths = np.asarray(tokens.layout.lengths)
        mask = torch.from_numpy(np.arange(lengths.max(initial=1)) < lengths[:, None])
        index = mask.flatten().nonzero()[:, 0].to(tokens.x.device, non_blocking=True)
        valid = mask.to(tokens.x.device, non_blocking=True)
        x = tokens.x[0, : tokens.layout.total]
        rows = x.new_zeros(mask.numel(), self.width).index_copy(0, index, x).view(*mask.shape, -1)
        out = result(_call(model, rows, valid)).flatten(0, 1).index_select(0, index)
        return nn.functional.pad(out, (0, 0, 0, tokens.x.shape[1] - len(out)))[None]


class WordEmbedding(nn.Module):
    """Token ids through a language model's own table of words, to stand beside other tokens in its stream.

    `config` and `weights` are those of the `LanguageModel`. A `VocabularyHead` may be tied to it.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(self, config: Mapping[str, Any], *, weights: str | None, modality: str = "text"):
        super().__init__()
        model, described = create(dict(config), weights, "AutoModelForCausalLM")
        self.table, self.modality = model.get_input_embeddings(), modality
        self.described: dict[str, Any] = {"config": described}

    def forward(self, items: Ragged, num_samples: int) -> Tokens:
        features = [time_features(self.table(group)) for group in items.groups()]
        return to_tokens(features, items, num_samples, self.modality)

    def vectors(self, ids: Int[Tensor, "*B"], position: Int[Tensor, "*B 3"]) -> Float[Tensor, "*B D"]:
        """The vectors of ids, which may come one at a time."""
        return self.table(ids)


def _call(model: Any, x: Float[Tensor, "n t D"], valid: Bool[Tensor, "n t"]) -> Any:
    """Run a model on vectors, each row numbered over its valid tokens."""
    options: dict[str, Any] = {"attention_mask": valid.long(), "use_cache": False}
    if "position_ids" in inspect.signature(model.forward).parameters:  # models with ALiBi count for themselves
        options["position_ids"] = (valid.long().cumsum(1) - 1).clamp(min=0)
    return model(inputs_embeds=x, **options)
