from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmformer.batch import Batch, Ragged
from mmformer.datasets.augment import Augment, LogMelJitter, PhotographJitter, PictureJitter, TokenDropout
from mmformer.datasets.random import Draw

TRANSFORMS = {
    "image": PictureJitter(2.0, 15.0, 0.2),
    "audio": LogMelJitter(0.2, 6, 2, 8, 5),
    "text": TokenDropout(0.3),
}
NUM_SAMPLES = 24


def sample(index: int) -> dict[str, torch.Tensor]:
    """A sample of sizes of its own, with one modality less here and there."""
    generator = torch.Generator().manual_seed(index)
    size = (8, 8) if index % 3 else (9, 7)
    items = {
        "image": torch.randint(0, 256, (*size, 1), generator=generator, dtype=torch.uint8),
        "audio": torch.randn(10 + index % 5, 12, generator=generator),
        "text": torch.randint(5, 90, (1 + index % 7,), generator=generator),
    }
    return {name: item for i, (name, item) in enumerate(items.items()) if index % 4 != i}


def batch(indices: Sequence[int], epoch: int = 0) -> Batch:
    samples = [sample(index) for index in indices]
    inputs = {}
    for name, dims in (("image", 1), ("audio", 1), ("text", 0)):
        rows = [row for row, held in enumerate(samples) if name in held]
        if rows:
            inputs[name] = Ragged.stack([samples[row][name] for row in rows], rows, dims)
    return Batch(ids=tuple(map(str, indices)), inputs=inputs, epoch=epoch, indices=tuple(indices))


def by_index(held: Batch) -> dict[tuple[int, str], torch.Tensor]:
    return {(held.indices[row], name): item for name, items in held.inputs.items() for row, item in items.items()}


@given(st.permutations(range(NUM_SAMPLES)), st.integers(1, NUM_SAMPLES), st.integers(0, 3), st.integers(0, 2))
@pytest.mark.parametrize("keep_length", [True, False])
def test_a_sample_does_not_depend_on_its_batch(keep_length, order, count, seed, epoch) -> None:
    jitter = LogMelJitter(0.2, 6, 2, 8, 5, keep_length=keep_length, multiple=4)
    augment = Augment(TRANSFORMS | {"audio": jitter}, {"image": 0.5, "audio": 0.5, "text": 0.5})
    whole = by_index(augment(batch(range(NUM_SAMPLES), epoch), seed))
    part = by_index(augment(batch(order[:count], epoch), seed))
    assert part.keys() == {key for key in whole if key[0] in order[:count]}
    for key, item in part.items():
        assert torch.equal(item, whole[key]), key


def test_seed_and_epoch_change_every_sample() -> None:
    augment = Augment(TRANSFORMS)
    start = by_index(augment(batch(range(NUM_SAMPLES)), 0))
    for held in (augment(batch(range(NUM_SAMPLES)), 1), augment(batch(range(NUM_SAMPLES), 1), 0)):
        differ = [not torch.equal(item, start[key]) for key, item in by_index(held).items() if key[1] != "text"]
        assert all(differ)


def test_without_strength_nothing_changes() -> None:
    still = Augment({"image": PictureJitter(0.0), "audio": LogMelJitter(), "text": TokenDropout(0.0)})
    before, after = by_index(batch(range(NUM_SAMPLES))), by_index(still(batch(range(NUM_SAMPLES)), 0))
    assert before.keys() == after.keys()
    for key, item in before.items():
        assert torch.equal(item, after[key])


def draw(count: int, epoch: int = 0) -> Draw:
    return Draw(0, epoch, np.arange(count))


def test_pictures_are_shifted_and_turned_within_bounds() -> None:
    dot = torch.zeros(15, 15, 1, dtype=torch.uint8)
    dot[7, 7] = 255
    moved = PictureJitter(shift=3.0)(Ragged.stack([dot] * 400, range(400), 1), draw(400))
    places = torch.stack([torch.tensor(divmod(int(item.flatten().argmax()), 15)) for _, item in moved.items()])
    assert places.min() == 4
    assert places.max() == 10
    assert (places.float().mean(0) - 7).abs().max() < 0.3

    rows = torch.zeros(15, 15, 1, dtype=torch.uint8)
    rows[:, :8] = 200
    turned = PictureJitter(0.0, rotate=20.0)(Ragged.stack([rows] * 200, range(200), 1), draw(200))
    tilt = [float((item[12, :, 0].float() - item[2, :, 0].float()).sum()) / 200 / 10 for _, item in turned.items()]
    assert max(abs(t) for t in tilt) < np.tan(np.radians(20)) + 0.06
    assert max(tilt) > 0.25
    assert min(tilt) < -0.25


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.integers(0, 3))
def test_time_and_bins_are_masked_within_bounds(lengths, epoch) -> None:
    items = Ragged.stack([torch.ones(length, 12) for length in lengths], range(len(lengths)), 1)
    masked = LogMelJitter(time_mask=8, mel_mask=5)(items, draw(len(lengths), epoch))
    for _, item in masked.items():
        assert (item == 0).all(1).sum() <= min(8, len(item) // 2)
        assert (item == 0).all(0).sum() <= 5
        assert (item == 1).any()


def test_a_stretch_keeps_the_length_or_the_content() -> None:
    ramp = torch.arange(40.0)[:, None].repeat(1, 3)
    items = Ragged.stack([ramp] * 50, range(50), 1)
    same = LogMelJitter(stretch=0.2)(items, draw(50))
    assert set(same.shapes) == {(40,)}
    free = LogMelJitter(stretch=0.2, keep_length=False, multiple=8)(items, draw(50))
    assert set(free.shapes) == {(32,), (40,), (48,)}
    for _, item in free.items():
        assert item[0, 0] < 1
        assert item[-1, 0] > 38


def test_bins_move_together() -> None:
    items = Ragged.stack([torch.arange(12.0).repeat(5, 1)] * 30, range(30), 1)
    steps = {float((item[:, 6] - 6).unique().item()) for _, item in LogMelJitter(mel_shift=2)(items, draw(30)).items()}
    assert steps == {-2.0, -1.0, 0.0, 1.0, 2.0}


def test_the_ends_of_a_text_stay() -> None:
    texts = [torch.arange(5, 5 + length) for length in (1, 2, 9, 30)]
    kept = dict(TokenDropout(0.9)(Ragged.stack(texts, range(4)), draw(4)).items())
    for row, text in enumerate(texts):
        assert (kept[row][0], kept[row][-1]) == (text[0], text[-1])
        assert len(kept[row]) <= max(2, len(text) // 2)
        assert torch.equal(kept[row], kept[row].unique()), "what is left keeps its order"


@given(st.dictionaries(st.sampled_from(["image", "audio", "text"]), st.floats(0, 1)), st.integers(0, 5))
def test_never_all_modalities_of_a_sample_are_dropped(probabilities, seed) -> None:
    before = batch(range(NUM_SAMPLES))
    after = Augment({}, probabilities)(before, seed)
    for had, has in zip(before.present(), after.present(), strict=True):
        assert has <= had
        assert has
    for name, probability in probabilities.items():
        if probability == 0 and name in before.inputs:
            assert after.inputs[name].rows == before.inputs[name].rows


def test_modalities_are_dropped_as_often_as_asked() -> None:
    ones = Ragged.stack([torch.ones(1)] * 4000, range(4000))
    many = Batch(ids=("x",) * 4000, inputs={"a": ones, "b": ones, "c": ones}, indices=tuple(range(4000)))
    after = Augment({}, {"a": 0.3, "b": 0.0, "c": 1.0})(many, 0)
    assert abs(len(after.inputs["a"]) / 4000 - 0.7) < 0.03
    assert len(after.inputs["b"]) == 4000
    assert "c" not in after.inputs
    left = Augment({}, {"a": 1.0, "b": 1.0, "c": 1.0})(many, 0)
    assert all(abs(len(items) / 4000 - 1 / 3) < 0.03 for items in left.inputs.values())


def test_photographs_change_by_their_own_counters_only() -> None:
    pictures = [torch.randint(0, 256, (20 + i % 2, 24, 3), dtype=torch.uint8) for i in range(6)]
    jitter = PhotographJitter(colour=0.3)
    state = torch.get_rng_state()
    items = Ragged.stack(pictures, range(6), 1)
    whole = dict(jitter(items, draw(6).of(items.rows)).items())
    assert torch.equal(torch.get_rng_state(), state), "the generator of the process is left as it was"
    one = Draw(0, 0, np.array([4]))
    alone = dict(jitter(Ragged.stack([pictures[4]], [0], 1), one).items())[0]
    assert torch.equal(alone, whole[4])
    assert all(whole[i].shape == picture.shape for i, picture in enumerate(pictures))
    assert not any(torch.equal(whole[i], picture) for i, picture in enumerate(pictures))
