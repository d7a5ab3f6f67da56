"""Predict each token of a text from what stands before it: captions, answers, dialogues."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from mmformer.batch import Batch, Ragged
from mmformer.fusion import View
from mmformer.heads import VocabularyHead
from mmformer.losses.language import answer_mask, linear_token_loss, token_loss
from mmformer.model import Encoded, Model
from mmformer.objectives import ranks
from mmformer.objectives.objective import Objective
from mmformer.tokens import Layout, Tokens, find
from mmformer.visibility import Visibility

# From this many scores on, forming them part by part takes at most a twentieth more time, for a fraction of the memory
# (benchmarks/vocabulary.py).
MANY_SCORES = 2**24


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The ids of texts in the order in which they stand in a token sequence.

    Id i is that of token `where[i]` of the flattened sequence; its text begins at id `first[i]`, which lies on the
    host. A text is all that a segment holds of it, so that the pieces of a dialogue are one.
    """

    ids: Int[Tensor, " n"]
    where: Int[Tensor, " n"]
    sample: Int[Tensor, " n"]
    first: Int[Tensor, " n"]

    def trained(self, start: int | None, end: int | None) -> Int[Tensor, " m"]:
        """Which ids train: all but the first of a text, or those of `answer_mask`.

        Only of the latter the device is asked how many there are.
        """
        device = self.ids.device
        if start is None:
            chosen = self.first < torch.arange(len(self.first))
            return chosen.nonzero()[:, 0].to(device, non_blocking=True)
        return answer_mask(self.ids, self.first.to(device, non_blocking=True), start, end).nonzero()[:, 0]


def read(tokens: Tokens, modality: str, items: Ragged) -> Reading:
    """Read the ids of the items of a modality off a sequence that their tokens stand in, without asking the device."""
    part = Layout(items.rows, tuple(shape[0] for shape in items.shapes), tokens.num_samples, items.places)
    where, token = find(tokens, modality, part)
    sample = part.sample_of_token[token]
    item = np.repeat(np.arange(len(part.samples)), part.lengths)[token]
    text = item if tokens.layout == part else sample
    opens = np.flatnonzero(np.diff(text, prepend=-1))
    first = np.repeat(opens, np.diff(opens, append=len(text)))
    token, sample = (torch.from_numpy(a).to(where.device, non_blocking=True) for a in (token, sample))
    ids = items.values.index_select(0, token)
    return Reading(ids=ids, where=where, sample=sample, first=torch.from_numpy(first))


def sequence(model: Model, encoded: Encoded, source: str | None, visibility: Visibility | None = None) -> Tokens:
    """The tokens that an objective reads: fused ones, those of a view of the fusion, or of one encoder."""
    if source is not None and source in model.views:
        view = model.views[source]
        assert isinstance(view, View)
        rule = view.visibility if visibility is None else (view.visibility or Visibility()) & visibility
        return model.fuse(encoded.only(view.modalities), rule)
    return model.fuse(encoded, visibility) if source is None else encoded[source]


class NextToken(Objective):
    """Each token of a text by cross-entropy, from the token before it in the sequence, whatever that is of.

    Without `start` every token of a text but its first trains; with it only those behind an id `start`, up to and
    including the next id `end` (of a chat, the assistant's turns; of a caption, what follows the prompt). `head` names
    the `VocabularyHead` of the model; it is applied to nothing that does not train. The sequence is the fused one under
    `visibility` on top of the model's own rule, or where `source` is named that of a view or of an encoder; it must be
    causal, or a token is predicted from itself. `smoothing` as in `token_loss`. The mean is over the trained tokens of
    the whole batch, of all processes.

    Raises:
        ValueError: an `end` without a `start`.
    """

    headline = ("perplexity", "min")

    def __init__(
        self,
        head: str,
        modality: str = "text",
        *,
        start: int | None = None,
        end: int | None = None,
        smoothing: float = 0.0,
        source: str | None = None,
        visibility: Visibility | None = None,
    ):
        super().__init__()
        if end is not None and start is None:
            raise ValueError(f"end={end} without a start: every token trains, so name where that begins")
        self.head, self.modality, self.start, self.end = head, modality, start, end
        self.smoothing, self.source, self.visibility = smoothing, source, visibility

    def forward(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        if self.modality not in encoded:
            return {"loss": ranks.shared_mean(untouched(model.heads[self.head]), 0)} if ranks.active() else {}
        before, ids, _ = self._trained(model, encoded, batch)
        total = words_loss(model.heads[self.head], before, ids, self.smoothing)
        return {"loss": ranks.shared_mean(total, len(ids))}

    def scores(
        self, model: Model, encoded: Encoded, batch: Batch
    ) -> tuple[Float[Tensor, "n V"], Int[Tensor, " n"], Int[Tensor, " n"]]:
        """The logits of each token that trains, its id, and its sample.

        Raises:
            KeyError: no head of that name.
        """
        before, ids, sample = self._trained(model, encoded, batch)
        return model.heads[self.head](before), ids, sample

    def _trained(
        self, model: Model, encoded: Encoded, batch: Batch
    ) -> tuple[Float[Tensor, "n D"], Int[Tensor, " n"], Int[Tensor, " n"]]:
        """What stands before each token that trains, its id, and its sample."""
        if self.head not in model.heads:
            raise KeyError(f"no head {self.head!r}: this model has {sorted(model.heads)}")
        tokens = sequence(model, encoded, self.source, self.visibility)
        text = read(tokens, self.modality, batch.inputs[self.modality])
        chosen = text.trained(self.start, self.end)
        before = tokens.x.flatten(0, 1).index_select(0, text.where[chosen] - 1)
        return before, text.ids[chosen], text.sample[chosen]

    def predict(self, model: Model, encoded: Encoded, batch: Batch) -> dict[str, Tensor]:
        """Of each sample's trained tokens, each after the true ones before it.

        `log_likelihood` is their mean in nats and `token_acc` the share that has the highest logit, NaN without any;
        `tokens` is their number.
        """
        if self.modality not in encoded:
            none = torch.full((len(batch),), torch.nan, device=next(model.parameters()).device)
            return {"log_likelihood": none, "token_acc": none, "tokens": torch.zeros_like(none)}
        logits, ids, sample = self.scores(model, encoded, batch)
        log_likelihood = -F.cross_entropy(logits.float(), ids, reduction="none")

        def total(values: Float[Tensor, " n"]) -> Float[Tensor, " B"]:
            return values.new_zeros(len(batch)).index_add(0, sample, values)

        count = total(torch.ones_like(log_likelihood))
        right = total((logits.argmax(-1) == ids).float())
        return {"log_likelihood": total(log_likelihood) / count, "token_acc": right / count, "tokens": count}

    def meter(self) -> LanguageMeter:
        return LanguageMeter()


def words_loss(
    head: nn.Module, x: Float[Tensor, "n D"], ids: Int[Tensor, " n"], smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """`token_loss` of what a head says of each row; of a long vocabulary and many rows without ever having all scores.

    That needs a `VocabularyHead` whose scores are a linear map of its own: one with an adapter is called as it is.
    """
    if type(head) is VocabularyHead and type(head.out) is nn.Linear and len(ids) * head.out.out_features >= MANY_SCORES:
        return linear_token_loss(head.transform(x), head.out.weight, head.out.bias, ids, smoothing)
    return token_loss(head(x), ids, smoothing)


def untouched(part: nn.Module) -> Float[Tensor, ""]:
    """A zero that reaches every parameter of a part, for a process whose samples have nothing for it."""
    return torch.stack([p.flatten()[0].float() * 0 for p in part.parameters()]).sum()


class LanguageMeter:
    """Over all trained tokens: the share that is predicted (`token_acc`) and `perplexity`, exp of the mean loss."""

    def __init__(self) -> None:
        self.tokens = self.right = self.log_likelihood = 0.0

    def update(self, prediction: dict[str, Tensor], batch: Batch) -> None:
        count = prediction["tokens"].double()
        self.tokens += float(count.sum())
        self.right += float((prediction["token_acc"].double() * count).nansum())
        self.log_likelihood += float((prediction["log_likelihood"].double() * count).nansum())

    def compute(self) -> dict[str, float]:
        if not self.tokens:
            return {}
        mean = self.log_likelihood / self.tokens
        return {"perplexity": exp(min(-mean, 700.0)), "token_acc": self.right / self.tokens}
