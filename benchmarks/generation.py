"""Texts written token by token with a memory: ours against transformers' GPT-2 with its cache, and without any.

    python -m benchmarks.generation

Eight prompts of one length, 64 tokens each by the greedy rule, on the same random weights of 6 layers and 256 channels;
both must write the same. "anew" reads all of the text again for every token.
"""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from typing import Any

import torch

from benchmarks.timing import interleave, parse_args, show
from mmformer.batch import Batch, Ragged
from mmformer.checkpoints import load
from mmformer.generation import Limits, Writer, generate
from mmformer.model import Model

DIM, DEPTH, HEADS, WORDS, SAMPLES, PROMPT, LENGTH = 256, 6, 4, 1000, 8, 16, 64


def reference() -> Any:
    """A GPT-2 of transformers whose texts do not end, with words that differ enough to have no ties."""
    import transformers

    config = transformers.GPT2Config(
        n_embd=DIM, n_layer=DEPTH, n_head=HEADS, vocab_size=WORDS, n_positions=256, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model


def batch_of(ids: torch.Tensor) -> Batch:
    """Rows of ids as prompts."""
    return Batch(
        ids=tuple(map(str, range(len(ids)))), inputs={"text": Ragged.stack(list(ids.unbind()), range(len(ids)))}
    )


@torch.inference_mode()
def anew(model: Model, ids: torch.Tensor) -> torch.Tensor:
    """Ours without a memory."""
    for _ in range(LENGTH):
        scores = Writer(model=model).read(batch_of(ids)).scores
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], 1)
    return ids


def main() -> None:
    args = parse_args(__doc__ or "", rounds=5)
    theirs = reference().to(args.device)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the library, about its own past
        theirs.save_pretrained(folder)
        ours = load(folder).model.to(args.device)
        assert isinstance(ours, Model)
        ids = torch.randint(0, WORDS, (SAMPLES, PROMPT), device=args.device)
        batch, limits = batch_of(ids), Limits(max_length=LENGTH)
        write = partial(
            theirs.generate, ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LENGTH,
            pad_token_id=0,
        )  # fmt: skip
        found = torch.tensor([text.ids for (text,) in generate(ours, batch, limits)])
        if not torch.equal(found, write()[:, PROMPT:].cpu()):
            raise SystemExit("the two write different texts: nothing is timed")
        steps = {
            "transformers": lambda _: write(),
            "mmformer": lambda _: generate(ours, batch, limits),
            "mmformer, anew": lambda _: anew(ours, ids),
        }
        show([interleave(f"{SAMPLES} x {LENGTH} tokens", "transformers", steps, args.rounds, args.device)], args)


if __name__ == "__main__":
    main()
