"""A program of padded tensors gives what the model gives for packed items, whatever a sample lacks."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from mmformer.datasets.features import LogMel, Picture, Text, Waveform
from mmformer.datasets.tokenizers import ByteTokenizer
from mmformer.encoders import Encoder, TextEmbedder
from mmformer.export.describe import describe
from mmformer.export.program import Program, example
from mmformer.heads import UnitHead
from mmformer.model import Model
from mmformer.nn import Attention, Block, Sinusoid, Transformer
from mmformer.objectives import Classes, Contrastive, Labels, Number, info_nce
from mmformer.pooling import LastPool
from mmformer.runtime.description import PRESENT, SIZE, Description
from tests.helpers import random_batch, scramble, small_model

FEATURES = {
    "text": Text(ByteTokenizer(), max_length=9),
    "image": Picture(longest=12, multiple=4),
    "audio": LogMel(Waveform(1000, max_seconds=1.5), num_mels=5, window=100, hop=64, multiple=4),
}


def padded(batch, description: Description) -> list[torch.Tensor]:
    """The tensors of a batch, filled up with noise."""
    given = {}
    for part in description.inputs:
        items = dict(batch.inputs[part.name].items()) if part.name in batch.inputs else {}
        longest = max([part.least, *(len(item) for item in items.values())])
        shape = (len(batch), part.shape[0] or longest, *part.shape[1:])
        given[part.name] = torch.randint(0, 50, shape).to(getattr(torch, part.dtype))
        given[part.name + SIZE] = torch.randint(1, 5, (len(batch), part.axes))  # of what is absent, it must not count
        for row, item in items.items():
            given[part.name][(row, *map(slice, item.shape))] = item
            given[part.name + SIZE][row] = torch.tensor(item.shape[: part.axes])
    given[PRESENT] = torch.tensor([[part.name in have for part in description.inputs] for have in batch.present()])
    return [given[name] for name in description.names]


@pytest.mark.parametrize("kind", ["concatenation", "cross", "perceiver"])
def test_every_subset_of_the_modalities_in_one_batch(kind):
    model, batch = small_model(kind).eval(), random_batch(21)
    objective = Classes("answer", "label")
    description = describe(model, FEATURES, objective, list("abcdefg"))
    assert description.outputs == ("logits", "fused_embedding")
    assert description.kind == "Classes"
    assert description.names == ("text", "text_size", "image", "image_size", "audio", "audio_size", "present")
    with torch.inference_mode():
        logits, fused = Program(model, objective, description)(*padded(batch, description))
        encoded = model.encode(batch)
        torch.testing.assert_close(logits, objective.predict(model, encoded, batch)["logits"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fused, model.summary(encoded)[0], rtol=1e-4, atol=1e-4)


def test_a_program_is_a_copy_without_what_it_does_not_need():
    model = small_model()
    description = describe(model, {"text": FEATURES["text"]}, None)
    program = Program(model, None, description)
    assert description.names == ("text", "text_size")
    assert description.outputs == ("text_embedding",)
    assert {name.split(".")[1] for name, _ in program.named_parameters()} == {"encoders"}
    next(program.parameters()).data.zero_()
    assert next(model.encoders["text"].parameters()).abs().sum() > 0
    assert model.fusion is not None


def retrieval() -> Model:
    layer = partial(Block, attention=partial(Attention, num_heads=2))
    stages = [Transformer(8, 1, [layer])]
    encoders = {name: Encoder(TextEmbedder(8, 300, Sinusoid), stages, LastPool()) for name in ("text", "other")}
    return scramble(Model(encoders, heads={name: UnitHead(8, 6) for name in encoders})).eval()


def test_a_model_of_two_towers_embeds_each():
    model, feature = retrieval(), FEATURES["text"]
    description = describe(model, {"text": feature, "other": feature}, None)
    assert description.outputs == ("text_embedding", "other_embedding")
    assert description.kind is None
    batch = random_batch(3, subsets=[("text",)])
    found = Program(model, None, description)(*padded(batch, description))
    torch.testing.assert_close(found[0], model.output(model.encode(batch), "text", "text")[0], rtol=1e-4, atol=1e-5)


def test_numbers_and_several_labels_are_described():
    model = small_model()
    assert describe(model, FEATURES, Number("answer", "label")).outputs == ("value", "fused_embedding")
    described = describe(model, FEATURES, Labels("answer", "label", source="image"), list("abcdefg"))
    assert (described.kind, described.reads) == ("Labels", ("image",))


def test_what_is_taken_is_bounded_by_the_features():
    described = describe(small_model(), FEATURES, Classes("answer", "label"))
    text, image, audio = described.inputs
    assert (text.dtype, text.shape, text.largest, text.least) == ("int64", (0,), (9,), 2)
    assert (image.dtype, image.shape, image.ragged) == ("uint8", (12, 12, 3), True)
    assert (audio.shape, audio.largest, audio.least, audio.multiple) == ((0, 5), (24, 5), 8, 4)
    assert [tuple(tensor.shape) for tensor in example(described)][:2] == [(2, 3), (2, 1)]
    assert Description.from_json(described.to_json(), "it") == described


def test_pictures_without_a_largest_size_want_one():
    features = {"image": Picture(short=12, multiple=4)}
    with pytest.raises(ValueError, match="image: pictures of any length keep their aspect"):
        describe(small_model(), features, None)
    assert describe(small_model(), features, None, picture=(12, 16)).inputs[0].shape == (12, 16, 3)


class Own:
    from_file = False
    feature_dims = 0

    def __call__(self, value):
        return torch.zeros(1)

    def shape(self, value):
        return (1,)

    def tokens(self, shape):
        return 1


def test_what_has_no_form_without_torch_is_named():
    with pytest.raises(ValueError, match="text is read by Own, which has no form that runs without torch"):
        describe(small_model(), {"text": Own()}, None)
    contrastive = Contrastive(["text", "image"], info_nce, 10.0)
    with pytest.raises(ValueError, match="Contrastive gives neither label nor number"):
        describe(small_model(), FEATURES, contrastive)
    model = retrieval()
    model.encoders["text"] = nn.Identity()
    described = describe(model, {"text": FEATURES["text"]}, None)
    with pytest.raises(ValueError, match="the encoder of text is a Identity, which has no padded form"):
        Program(model, None, described)


def test_the_examples_lengths_are_none_that_is_special():
    for tensor in example(describe(small_model(), FEATURES, None)):
        assert tensor.shape[0] == 2
    assert np.prod(example(describe(small_model(), FEATURES, None, batch=1))[0].shape) == 3
