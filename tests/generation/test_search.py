"""The same texts as transformers writes with the same weights."""

from __future__ import annotations

import warnings

import pytest
import torch

from mmformer.batch import Batch, Ragged
from mmformer.checkpoints.load import load
from mmformer.generation import Beam, Greedy, Limits, Sampling, generate
from tests.checkpoints.oracles import saved, scramble

transformers = pytest.importorskip("transformers", reason="the oracle: pip install mmformer[transformers]")

WORDS, STOP = 37, 2
ENDS = (STOP, 7, 9)
GPT2 = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 40, "vocab_size": WORDS}
LLAMA = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": WORDS,
    "num_key_value_heads": 2, "max_position_embeddings": 40,
}  # fmt: skip
PROMPTS = [[5, 6, 7, 5, 6], [9], [11, 3, 4], [8, 8, 8, 8, 8, 8]]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def pair(request, tmp_path_factory):
    ids = {"bos_token_id": 1, "eos_token_id": STOP, "pad_token_id": 0}
    if request.param == "gpt2":
        reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, **ids))
    else:
        reference = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, **ids))
    reference = scramble(reference)
    return load(saved(reference, tmp_path_factory.mktemp("model"))).model, reference


def batch(prompts) -> Batch:
    items = [torch.tensor(ids) for ids in prompts]
    return Batch(ids=tuple(map(str, range(len(items)))), inputs={"text": Ragged.stack(items, range(len(items)))})


def theirs(reference, prompts, **options) -> list[list[list[int]]]:
    """For each prompt the texts that the reference writes, each prompt by itself."""
    out = []
    for ids in prompts:
        given = torch.tensor([ids])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the library, about settings that do not matter here
            found = reference.generate(
                given, attention_mask=torch.ones_like(given), pad_token_id=0, eos_token_id=STOP, **options
            )
        texts = found[:, len(ids) :].tolist()
        out.append([text[: text.index(STOP)] if STOP in text else text for text in texts])
    return out


def ours(model, prompts, limits, search) -> list[list[list[int]]]:
    return [[list(text.ids) for text in texts] for texts in generate(model, batch(prompts), limits, search)]


LIMITS = {
    "plain": ({}, {}),
    "penalty": ({"repetition_penalty": 1.7}, {"repetition_penalty": 1.7}),
    "no repeats": ({"no_repeat": 2}, {"no_repeat_ngram_size": 2}),
    "at least": ({"min_length": 7}, {"min_new_tokens": 7}),
}


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("beams", [1, 4])
def test_greedy_and_beam_search_write_what_transformers_writes(pair, name, beams):
    model, reference = pair
    mine, others = LIMITS[name]
    limits = Limits(max_length=14, stop=(STOP,), **mine)
    search = Beam(width=beams, best=min(2, beams), length_penalty=0.7) if beams > 1 else Greedy()
    options = {"length_penalty": 0.7} if beams > 1 else {}
    expected = theirs(
        reference, PROMPTS, num_beams=beams, num_return_sequences=min(2, beams), do_sample=False, max_new_tokens=14,
        **options, **others,
    )  # fmt: skip
    assert ours(model, PROMPTS, limits, search) == expected


def test_texts_end_at_different_lengths(pair):
    """Else stopping would not have been tested."""
    model, _ = pair
    found = [
        texts[0] for texts in generate(model, batch([[i] for i in range(3, 30)]), Limits(max_length=30, stop=ENDS))
    ]
    assert len({len(text.ids) for text in found}) > 2
    assert {text.stop for text in found} > {None}
    for text in found:
        assert (text.stop is None) == (len(text.ids) == 30)
        assert not set(text.ids) & set(ENDS)


def test_one_beam_is_greedy_and_writes_each_text_by_itself(pair):
    model, _ = pair
    prompts = [[i, i + 3] if i % 2 else [i] for i in range(3, 23)]
    limits = Limits(max_length=12, stop=ENDS, no_repeat=3)
    greedy = generate(model, batch(prompts), limits)
    beam = generate(model, batch(prompts), limits, Beam(width=1))
    assert [text.ids for (text,) in beam] == [text.ids for (text,) in greedy]
    for (mine,), (other,), ids in zip(greedy, beam, prompts, strict=True):
        (alone,) = generate(model, batch([ids]), limits)[0]
        assert alone.ids == mine.ids
        assert mine.log_likelihood == pytest.approx(alone.log_likelihood, abs=1e-4)
        length = len(mine.ids) + (mine.stop is not None)
        assert other.score == pytest.approx(other.log_likelihood / length, abs=1e-4)


@torch.no_grad()
def test_a_text_is_as_likely_as_the_model_says(pair):
    model, reference = pair
    limits = Limits(max_length=9, stop=ENDS)
    for search in (Greedy(), Beam(width=3, best=3), Sampling(count=3, temperature=1.5)):
        for ids, texts in zip(PROMPTS, generate(model, batch(PROMPTS), limits, search), strict=True):
            for text in texts:
                written = [*text.ids, *([] if text.stop is None else [text.stop])]
                logits = reference(torch.tensor([[*ids, *written]])).logits[0, len(ids) - 1 : -1]
                found = logits.log_softmax(-1).gather(1, torch.tensor(written)[:, None]).sum()
                assert text.log_likelihood == pytest.approx(found.item(), abs=1e-3)


WARPED = {
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7, "temperature": 1.4},
    "top_k and top_p": {"top_k": 9, "top_p": 0.5},
    "nearly nothing": {"top_p": 1e-6},
}


@pytest.mark.parametrize("name", WARPED)
def test_tokens_are_drawn_from_the_distribution_of_transformers(name):
    from transformers.generation import logits_process as theirs

    options, scores = WARPED[name], torch.randn(6, 30, generator=torch.Generator().manual_seed(1)) * 2
    expected = theirs.TemperatureLogitsWarper(options.get("temperature", 1.0))(None, scores)
    if "top_k" in options:
        expected = theirs.TopKLogitsWarper(options["top_k"])(None, expected)
    if "top_p" in options:
        expected = theirs.TopPLogitsWarper(options["top_p"])(None, expected)
    expected = expected.double().softmax(-1)
    sampling = Sampling(**options)
    torch.testing.assert_close(sampling.probabilities(scores), expected, rtol=1e-6, atol=1e-8)
    chances = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    for row, wanted in zip(scores, expected, strict=True):
        drawn = sampling.choose(row.expand(4000, -1), chances)
        share = torch.bincount(drawn, minlength=30) / 4000
        assert (share - wanted).abs().max() < 5e-4
        assert set(drawn.tolist()) <= set(wanted.nonzero()[:, 0].tolist())


def test_what_is_drawn_depends_on_the_seed_and_the_sample_alone(pair):
    model, _ = pair
    limits, sampling = Limits(max_length=10, stop=ENDS), Sampling(count=3, temperature=2.0, seed=5)
    every = generate(model, batch(PROMPTS), limits, sampling)
    assert every == generate(model, batch(PROMPTS), limits, sampling)
    assert len({text.ids for texts in every for text in texts}) == 12
    others = generate(model, batch(PROMPTS), limits, Sampling(count=3, temperature=2.0, seed=6))
    assert all(a[0].ids != b[0].ids for a, b in zip(every, others, strict=True))
    for row in (2, 0):
        alone = generate(model, batch(PROMPTS).select([row]), limits, Sampling(count=2, temperature=2.0, seed=5))[0]
        assert [text.ids for text in alone] == [text.ids for text in every[row][:2]]


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match=r"temperature 0.0: give one above 0"):
        Sampling(temperature=0.0)
    with pytest.raises(ValueError, match=r"top_p 1.2: keep at least one token"):
        Sampling(top_p=1.2)
    with pytest.raises(ValueError, match="the best 3 of 2 beams"):
        Beam(width=2, best=3)
