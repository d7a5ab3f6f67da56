from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmformer.checkpoints.build import build
from mmformer.checkpoints.load import load
from mmformer.checkpoints.report import MisfitError
from tests.checkpoints.families.fused import WORDS, into_its_class, loaded_from, moves, rows, texts
from tests.checkpoints.families.visions import HALF, complete, epsilons, png
from tests.checkpoints.oracles import batch, close, pictures, pixels, saved, scramble

transformers = pytest.importorskip("transformers", reason="the oracle: pip install mmformer[transformers]")

SIZES = ((16, 16), (24, 32), (12, 20), (24, 32), (4, 8))
"""Heights and widths of pictures; the positions of the file are those of the first."""


def config(**options):
    return transformers.ViltConfig(
        **{
            "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 44,
            "image_size": 16, "patch_size": 4, "vocab_size": WORDS, "max_position_embeddings": 15,
            "type_vocab_size": 5, "num_labels": 7, **options,
        }
    )  # fmt: skip


class Pairs:
    """A picture and a text for each sample, of as many sizes."""

    def __init__(self, sizes=SIZES):
        self.texts = texts()[: len(sizes)]
        images = [pictures(1, *size, seed=i)[0] for i, size in enumerate(sizes)]
        self.pixels = [pixels(image[None], *HALF) for image in images]
        self.batch = batch(len(sizes), image=images, text=self.texts)

    def theirs(self, reference, *names: str) -> list[list[torch.Tensor]]:
        """Outputs of the reference for each sample, one at a time, each with its patches in their order."""
        with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
            # It draws all patches in an order of its own, which nothing but the order of its states depends on.
            patch.setattr(torch, "multinomial", lambda weights, count: torch.arange(int(count)))
            found = [
                reference(input_ids=text[None], pixel_values=picture, pixel_mask=torch.ones(1, *picture.shape[2:]))
                for text, picture in zip(self.texts, self.pixels, strict=True)
            ]
        return [[output[name][0] for output in found] for name in names]


def fused(loaded, pairs: Pairs) -> list[torch.Tensor]:
    """Our states of each sample."""
    with torch.inference_mode():
        return rows(loaded.model.fuse(loaded.model.encode(pairs.batch)))


def said(loaded, pairs: Pairs, head: str) -> torch.Tensor:
    """What one of our heads says of each sample."""
    with torch.inference_mode():
        return loaded.model.output(loaded.model.encode(pairs.batch), head)[0]


def all_moves(loaded, pairs: Pairs) -> None:
    encoded = loaded.model.encode(pairs.batch)
    states, pooled = loaded.model.fuse(encoded).x, loaded.model.summary(encoded)[0]
    outs = [head(states if name == "vocabulary" else pooled) for name, head in loaded.model.heads.items()]
    moves(loaded, states, pooled, *outs)


@pytest.mark.parametrize("sizes", [((16, 16),) * 4, SIZES], ids=["squares", "any"])
def test_vilt_gives_what_the_reference_gives(sizes, tmp_path):
    reference = transformers.ViltModel(config())
    loaded, pairs = loaded_from(reference, tmp_path), Pairs(sizes)
    states, pooled = pairs.theirs(reference, "last_hidden_state", "pooler_output")
    ours = fused(loaded, pairs)
    assert [row.shape[0] for row in ours] == [
        len(text) + 1 + height * width // 16 for text, (height, width) in zip(pairs.texts, sizes, strict=True)
    ]
    close(torch.cat(ours), torch.cat(states))
    with torch.inference_mode():
        close(loaded.model.summary(loaded.model.encode(pairs.batch))[0], torch.stack(pooled))
    assert epsilons(loaded.model) == epsilons(reference) == {1e-12}
    all_moves(loaded, pairs)
    into_its_class(loaded, reference, tmp_path)


HEADS = {
    "ViltForImageAndTextRetrieval": "match",
    "ViltForQuestionAnswering": "label",
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_say_what_the_reference_says(name, tmp_path):
    reference = getattr(transformers, name)(config(qkv_bias=False, hidden_act="quick_gelu"))
    loaded, pairs = loaded_from(reference, tmp_path), Pairs()
    (logits,) = pairs.theirs(reference, "logits")
    close(said(loaded, pairs, HEADS[name]), torch.stack(logits))
    all_moves(loaded, pairs)
    into_its_class(loaded, reference, tmp_path)


@pytest.mark.parametrize(("name", "head"), [("ViltForMaskedLM", "vocabulary"), ("ViltForTokenClassification", "label")])
def test_heads_of_words_say_what_the_reference_says(name, head, tmp_path):
    reference = getattr(transformers, name)(config())
    loaded, pairs = loaded_from(reference, tmp_path), Pairs()
    (logits,) = pairs.theirs(reference, "logits")
    with torch.inference_mode():
        words = [row[: len(text)] for row, text in zip(fused(loaded, pairs), pairs.texts, strict=True)]
        ours = [loaded.model.heads[head](row) for row in words]
    close(torch.cat(ours), torch.cat(logits))
    all_moves(loaded, pairs)
    into_its_class(loaded, reference, tmp_path)


def test_padded_texts_and_pictures_of_the_reference_are_our_packed_ones(tmp_path):
    """Pad masks of both kinds: what stands behind the end of a text or a picture has no part in anything."""
    reference = transformers.ViltForImageAndTextRetrieval(config())
    loaded, pairs = loaded_from(reference, tmp_path), Pairs()
    longest, high, wide = max(map(len, pairs.texts)), 24, 32
    ids, mask = torch.zeros(5, longest, dtype=torch.long), torch.zeros(5, longest, dtype=torch.long)
    shown, where = torch.zeros(5, 3, high, wide), torch.zeros(5, high, wide, dtype=torch.long)
    for i, (text, picture) in enumerate(zip(pairs.texts, pairs.pixels, strict=True)):
        ids[i, : len(text)], mask[i, : len(text)] = text, 1
        shown[i, :, : picture.shape[2], : picture.shape[3]] = picture
        where[i, : picture.shape[2], : picture.shape[3]] = 1
    with torch.inference_mode():
        theirs = reference(input_ids=ids, attention_mask=mask, pixel_values=shown, pixel_mask=where).logits
    close(said(loaded, pairs, "match"), theirs)


def test_the_vectors_of_the_modalities_are_the_marks_of_the_fusion(tmp_path):
    reference = transformers.ViltModel(config())
    loaded, pairs = loaded_from(reference, tmp_path), Pairs()
    kinds = load_file(tmp_path / "model.safetensors")["embeddings.token_type_embeddings.weight"]
    marks = loaded.model.fusion.entrances
    assert torch.equal(marks["text"].kind, kinds[0])
    assert torch.equal(marks["image"].kind, kinds[1])
    (states,) = pairs.theirs(reference, "last_hidden_state")
    marks["text"], marks["image"] = marks["image"], marks["text"]
    with pytest.raises(AssertionError, match="differs by"):
        close(torch.cat(fused(loaded, pairs)), torch.cat(states))


def test_positions_are_stretched_corner_to_corner(tmp_path):
    """Bilinear with aligned corners, unlike ViT's: the bar tells them apart."""
    reference = transformers.ViltModel(config())
    loaded, pairs = loaded_from(reference, tmp_path), Pairs()
    (states,) = pairs.theirs(reference, "last_hidden_state")
    grid, interpolate = loaded.model.encoders["image"].embedder.position, torch.nn.functional.interpolate
    assert tuple(grid.table.shape) == (4, 4, 24)
    with pytest.MonkeyPatch.context() as patch:
        wrong = lambda planes, size, mode, align_corners: interpolate(planes, size, mode=mode, align_corners=False)  # noqa: E731
        patch.setattr(torch.nn.functional, "interpolate", wrong)
        with pytest.raises(AssertionError, match="differs by"):
            close(torch.cat(fused(loaded, pairs)), torch.cat(states))


def test_pictures_are_read_as_the_processor_reads_them(tmp_path):
    saved(scramble(transformers.ViltModel(config())), tmp_path)
    transformers.ViltImageProcessor(size={"shortest_edge": 12}, size_divisor=4).save_pretrained(tmp_path)
    picture = build(load(tmp_path).described.features["image"])(png(40, 60))
    assert picture.shape == (12, 16, 3)  # the longer side of 18 to a multiple of 4


def test_without_a_processor_pictures_have_the_size_of_the_config(tmp_path):
    saved(scramble(transformers.ViltModel(config())), tmp_path)
    for options, size in (({}, (16, 16)), ({"image_size": [24, 8]}, (24, 8))):
        loaded = load(tmp_path, options=options)
        assert build(loaded.described.features["image"])(png(40, 60)).shape == (*size, 3)
        assert tuple(loaded.model.encoders["image"].embedder.position.table.shape) == (4, 4, 24)


def test_what_the_reference_draws_at_random_is_refused(tmp_path):
    saved(scramble(transformers.ViltModel(config(max_image_length=9))), tmp_path)
    with pytest.raises(ValueError, match="draws 9 of 16 patches at random"):
        load(tmp_path)
    complete(load(tmp_path, options={"max_image_length": -1}).report)


def test_a_second_picture_is_refused(tmp_path):
    saved(
        scramble(transformers.ViltForImagesAndTextClassification(config(modality_type_vocab_size=3, num_images=2))),
        tmp_path,
    )
    with pytest.raises(ValueError, match="modality_type_vocab_size: 3"):
        load(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["vilt.embeddings.token_type_embeddings.weight", "vilt.embeddings.text_embeddings.LayerNorm.bias",
     "vilt.pooler.dense.bias", "vilt.layernorm.weight", "rank_output.weight", "vilt.embeddings.position_embeddings"],
)  # fmt: skip
def test_a_missing_tensor_is_named(name, tmp_path):
    saved(scramble(transformers.ViltForImageAndTextRetrieval(config())), tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    del held[name]
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MisfitError, match=name.replace(".", r"\.")):
        load(tmp_path)
