"""Whether a text and a picture, or any two modalities, belong together: as a trained model's matching head says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mmformer.batch import Batch
from mmformer.model import Encoded, Model
from mmformer.objectives import Matching, StartingWith
from mmformer.objectives.rerank import match_logits
from mmformer.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How a model judges pairs, as it was trained to; `starting` is what its texts begin with for that, if anything."""

    model: Model
    matching: Matching
    starting: StartingWith | None

    @classmethod
    def of(cls, model: Model, objectives: Mapping[str, nn.Module]) -> Judging:
        """By the first objective that matches pairs.

        Raises:
            ValueError: there is none.
        """
        for whole in objectives.values():
            inner = whole.objective if isinstance(whole, StartingWith) else whole
            if isinstance(inner, Matching):
                return cls(model=model, matching=inner, starting=whole if isinstance(whole, StartingWith) else None)
        raise ValueError(
            f"this model was trained for {', '.join(objectives) or 'nothing'}, which judges no pairs: "
            "take a run with the objective `matching`, such as experiment=albef or experiment=blip"
        )

    def partners(self, modality: str) -> list[str]:
        """The modalities that one of a sample can be judged with.

        Raises:
            ValueError: there are none.
        """
        found = [name for pair in self.matching.pairs if modality in pair for name in pair if name != modality]
        if not found:
            pairs = ", ".join(" and ".join(pair) for pair in self.matching.pairs)
            raise ValueError(f"this model does not judge {modality}: it was trained to match {pairs}")
        return found

    def read(self, batch: Batch) -> Encoded:
        """The tokens of samples, which pairs are then made of."""
        with torch.inference_mode():
            encoded = self.model.encode(batch)
            return encoded if self.starting is None else self.starting.reread(self.model, encoded, batch)[0]

    def logits(self, tokens: Mapping[str, Tokens], samples: Mapping[str, Sequence[int]]) -> Float[Tensor, "n 2"]:
        """Of pairs that do not match, and that do; pair i is made of sample `samples[name][i]` of each modality."""
        return match_logits(self.model, self.matching.head, tokens, samples)

    def probabilities(self, batch: Batch, pair: tuple[str, str]) -> Float[Tensor, " B"]:
        """How likely two modalities of each sample belong together; NaN for a sample that lacks one of them."""
        rows = [row for row, have in enumerate(batch.present()) if have.issuperset(pair)]
        out = torch.full((len(batch),), torch.nan)
        if rows:
            tokens = self.read(batch.only(pair))
            out[rows] = self.logits(tokens, dict.fromkeys(pair, rows)).softmax(-1)[:, 1].cpu()
        return out
