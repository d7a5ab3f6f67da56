from __future__ import annotations

import csv
import io
import math
import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from mmformer.batch import Batch
from mmformer.datasets.augment import Augment, LogMelJitter, PictureJitter
from mmformer.datasets.dataset import DataError, ManifestDataset, collate, scan
from mmformer.datasets.features import Feature, LogMel, Picture, Text, Waveform
from mmformer.datasets.manifest import Manifest, read_manifest
from mmformer.datasets.tables import ManifestError
from mmformer.datasets.tokenizers import ByteTokenizer

FEATURES: dict[str, Feature] = {
    "text": Text(ByteTokenizer(), 32),
    "image": Picture(channels=1),
    "audio": LogMel(Waveform(8000, 2.0), 20, 200, 80),
}
AUGMENT = Augment({"image": PictureJitter(2.0), "audio": LogMelJitter(0.1, 3)}, {"text": 0.3, "image": 0.3})
RNG = np.random.default_rng(0)


def png(height: int = 8, width: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (height, width), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def jpeg() -> bytes:
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (16, 16), dtype=np.uint8)).save(stream, "JPEG")
    return stream.getvalue()


def wav(samples: int = 1600, form: str = "WAV") -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, 0.1 * RNG.standard_normal(samples), 8000, format=form)
    return stream.getvalue()


BROKEN = {
    "missing.png": None,
    "empty.png": b"",
    "cut.png": png()[:-30],
    "text.png": b"not a picture",
    "large.png": png(9000, 6000),
    "cut.wav": wav()[:-100],
    "zero.wav": wav(0),
    "long.wav": wav(16_001),
}


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(8 + i, 8))
        (tmp_path / f"{i}.wav").write_bytes(wav(1600 + 400 * i))
    for name, data in BROKEN.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    return tmp_path


def manifest(folder: Path, rows: list[Mapping[str, str]], **options) -> Manifest:
    with (folder / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["id", "split", "text", "image", "audio", "label", "shade"], restval="")
        writer.writeheader()
        writer.writerows({"id": f"r{i}", "split": "train"} | dict(row) for i, row in enumerate(rows))
    return read_manifest(folder / "rows.csv", {"split": None} | options.pop("columns", {}), **options)


def whole(folder: Path, count: int = 12) -> Manifest:
    """Rows of every subset of the modalities, sharing files."""
    rows = []
    for i in range(count):
        cells = {"text": f"text {i}", "image": f"{i % 4}.png", "audio": f"{i % 3}.wav"}
        rows.append({k: v for j, (k, v) in enumerate(cells.items()) if (i % 7 + 1) >> j & 1} | {"label": "ab"[i % 2]})
    return manifest(folder, rows)


def items(batch: Batch) -> dict[tuple[str, str], torch.Tensor]:
    return {(batch.ids[row], name): item for name, held in batch.inputs.items() for row, item in held.items()}


def test_a_batch_holds_what_each_row_has(folder) -> None:
    rows = whole(folder)
    batch = ManifestDataset(rows, None, FEATURES).__getitems__([(3, i) for i in (5, 0, 6)])
    assert batch.ids == ("r5", "r0", "r6")
    assert (batch.epoch, batch.indices, batch.faults) == (3, (5, 0, 6), ())
    assert batch.present() == (frozenset({"image", "audio"}), frozenset({"text"}), frozenset(FEATURES))
    assert batch.targets["label"].tolist() == [1, 0, 0]
    held = items(batch)
    assert ByteTokenizer().decode(held["r6", "text"].tolist()) == "text 6"
    assert torch.equal(held["r5", "image"], FEATURES["image"](folder / "1.png"))
    assert torch.equal(held["r6", "audio"], FEATURES["audio"](folder / "0.wav"))
    assert not torch.equal(held["r5", "audio"], FEATURES["audio"](folder / "0.wav"))


def test_a_file_of_many_rows_is_read_once_and_a_full_cache_changes_nothing(folder, monkeypatch) -> None:
    rows = manifest(folder, [{"image": f"{i % 2}.png"} for i in range(8)])
    reads = []
    monkeypatch.setattr(
        Picture, "__call__", lambda self, value, read=Picture.__call__: reads.append(1) or read(self, value)
    )
    features = {"image": FEATURES["image"]}
    kept = ManifestDataset(rows, None, features)
    found = [items(kept.__getitems__([(0, i) for i in range(8)])) for _ in range(3)]
    assert len(reads) == 2
    unkept = ManifestDataset(rows, None, features, cache_bytes=0)
    again = items(unkept.__getitems__([(0, i) for i in range(8)]))
    assert len(reads) == 10
    for held in found:
        assert all(torch.equal(item, again[key]) for key, item in held.items())
    warm = ManifestDataset(rows, None, features)
    warm.warm()
    assert len(reads) == 12
    warm.__getitems__([(0, i) for i in range(8)])
    assert len(reads) == 12


REASONS = {
    "missing.png": "no such file",
    "empty.png": "empty: 0 bytes",
    "cut.png": "cut off",
    "text.png": "not a whole picture",
    "large.png": "6000 x 9000 pixels, more than the limit",
    "../out.png": "leads out",
    "cut.wav": "cut off: its header says 3,200 bytes, 3,100 are there",
    "zero.wav": "zero-length",
    "long.wav": "2.0 s, more than the limit of 2 s",
}


@pytest.mark.parametrize("path", REASONS)
def test_a_broken_file_is_left_out_and_accounted_for(folder, path) -> None:
    column = "audio" if path.endswith(".wav") else "image"
    rows = manifest(
        folder,
        [{"text": "a", column: path}, {column: path}, {"text": "b", "image": "0.png", "audio": "0.wav"}],
    )
    dataset = ManifestDataset(rows, None, FEATURES)
    for _ in range(2):  # also when the reason comes from the cache
        batch = dataset.__getitems__([(0, i) for i in (1, 0, 2)])
        assert batch.ids == ("r0", "r2"), "a row with nothing left is dropped"
        assert batch.indices == (0, 2)
        assert batch.present() == (frozenset({"text"}), frozenset(FEATURES))
        listed = [(fault.id, fault.column, fault.path) for fault in batch.faults]
        assert listed == [("r1", column, path), ("r0", column, path)]
        assert all(REASONS[path] in fault.reason for fault in batch.faults)
    with pytest.raises(
        DataError, match=rf"row 'r1', column '{column}', .*: .*{REASONS[path][:9]}.*data\.on_error=skip"
    ):
        ManifestDataset(rows, None, FEATURES, on_error="fail")[1]
    found = [(fault.id, fault.column) for fault in scan(rows, FEATURES)]
    assert found == [("r0", column), ("r1", column)]
    assert [set(dataset.size(i)) for i in range(3)] == [{"text"}, set(), set(FEATURES)]


@given(
    files=st.lists(st.sampled_from(["0.png", "1.wav", "1.jpg", "1.flac"]), min_size=1, max_size=6),
    kind=st.sampled_from(["cut", "flip", "zeros"]),
    places=st.lists(st.floats(0, 1, exclude_max=True), min_size=6, max_size=6),
)
def test_damage_is_accounted_for_by_row(tmp_path_factory, files, kind, places) -> None:
    folder = tmp_path_factory.mktemp("damage")
    media = {"0.png": png(), "1.wav": wav(), "1.jpg": jpeg(), "1.flac": wav(form="FLAC")}
    cells = []
    for i, (name, place) in enumerate(zip(files, places, strict=False)):
        data = media[name]
        at = int(place * len(data))
        flipped = bytes([data[at] ^ 16]) + data[at + 1 :]
        end = {"cut": b"", "flip": flipped, "zeros": bytes(len(data) - at)}[kind]
        (folder / f"{i}{name}").write_bytes(data[:at] + end)
        cells.append({"image" if name.endswith(("png", "jpg")) else "audio": f"{i}{name}"})
    rows = manifest(folder, cells)
    features = {name: FEATURES[name] for name in rows.modalities}
    batch = ManifestDataset(rows, None, features).__getitems__([(0, i) for i in range(len(cells))])
    broken = {fault.id: fault.path for fault in batch.faults}
    for i, cell in enumerate(cells):
        assert (f"r{i}" in broken) != (f"r{i}" in batch.ids), "each row is either in the batch or among its faults"
        assert broken.get(f"r{i}", *cell.values()) in cell.values()
        if kind == "cut":
            assert f"r{i}" in broken


def test_a_batch_of_nothing_and_a_row_of_nothing(folder) -> None:
    rows = manifest(
        folder, [{"image": "missing.png", "label": "a"}, {"label": "b", "text": " "}, {"text": "x", "label": "a"}]
    )
    features = {name: FEATURES[name] for name in ("text", "image")}
    batch = ManifestDataset(rows, None, features, augment=AUGMENT).__getitems__([(0, 0), (0, 1)])
    assert (batch.ids, batch.inputs) == ((), {})
    assert [(fault.id, fault.column) for fault in batch.faults] == [("r0", "image"), ("r1", "row")]
    with pytest.raises(DataError, match="row 'r1', column 'row', : none of its cells holds anything"):
        ManifestDataset(rows, None, features, on_error="fail")[1]
    assert batch.targets["label"].shape == (0,)
    listed = [(fault.id, fault.column) for fault in scan(rows, features)]
    assert listed == [("r0", "image"), ("r1", "row")]


def test_a_reference_to_no_row_is_a_fault_of_its_row(folder) -> None:
    (folder / "pictures.csv").write_text("id,image\np,0.png\nq,\n")
    rows = manifest(folder, [{"text": "a", "image": key} for key in "pqz"], references={"image": "pictures.csv:image"})
    batch = ManifestDataset(rows, None, {k: FEATURES[k] for k in ("text", "image")}).__getitems__(
        [(0, i) for i in range(3)]
    )
    assert batch.present() == (frozenset({"text", "image"}), frozenset({"text"}), frozenset({"text"}))
    assert [fault.reason for fault in batch.faults] == [
        "row 'q' of pictures.csv has no 'image'",
        "pictures.csv has no row 'z'",
    ]
    assert [fault.path for fault in batch.faults] == ["pictures.csv:q", "pictures.csv:z"]
    assert [fault.id for fault in scan(rows, {"image": FEATURES["image"]})] == ["r1", "r2"]


def test_targets_of_other_columns_and_missing_ones(folder) -> None:
    cells = [{"label": "1.5", "shade": "red"}, {"label": "2.5", "shade": ""}, {"label": "", "shade": "blue"}]
    rows = manifest(folder, [cell | {"text": "x"} for cell in cells], columns={"split": "split"})
    assert (rows.kind, rows.label and rows.label.mean) == ("Number", 2.0)
    dataset = ManifestDataset(rows, None, {"text": FEATURES["text"]}, targets={"shade": rows.read_target("shade")})
    targets = dataset.__getitems__([(0, i) for i in range(3)]).targets
    assert targets["shade"].tolist() == [1, -100, 0]
    assert targets["label"].tolist()[:2] == [1.5, 2.5]
    assert math.isnan(targets["label"][2])


def test_what_is_asked_for_must_be_there(folder) -> None:
    rows = manifest(folder, [{"text": "x", "label": "a"}] * 4, columns={"image": None, "split": "split"})
    with pytest.raises(ManifestError, match="no column for 'image'"):
        ManifestDataset(rows, "train", FEATURES)
    with pytest.raises(ManifestError, match="split 'test' has no row"):
        ManifestDataset(rows, "test", {"text": FEATURES["text"]})
    with pytest.raises(ValueError, match=r"a batch of the epochs \[0, 1\]"):
        ManifestDataset(rows, "train", {"text": FEATURES["text"]}).__getitems__([(0, 0), (1, 1)])


def test_a_row_does_not_depend_on_its_batch_nor_on_the_process(folder) -> None:
    rows = whole(folder)
    dataset = ManifestDataset(rows, None, FEATURES, augment=AUGMENT, seed=3)
    together = items(dataset.__getitems__([(1, i) for i in range(len(rows))]))
    for i in range(len(rows)):
        alone = items(dataset[1, i])
        assert alone.keys() == {key for key in together if key[0] == f"r{i}"}
        assert all(torch.equal(item, together[key]) for key, item in alone.items())
    keys = [[(1, i) for i in part] for part in ([4, 1, 7], [2, 0], [11, 10, 9, 8])]
    options = {"batch_sampler": keys, "collate_fn": lambda batch: batch, "num_workers": 1}
    loader: DataLoader = DataLoader(dataset, **options)  # pyright: ignore[reportArgumentType]
    for batch in [*loader, pickle.loads(pickle.dumps(dataset)).__getitems__(keys[0])]:
        assert all(torch.equal(item, together[key]) for key, item in items(batch).items())


def test_sizes_come_from_headers(folder) -> None:
    rows = whole(folder)
    dataset = ManifestDataset(rows, None, FEATURES)
    for i in range(len(rows)):
        batch = dataset[i]
        expected = {name: FEATURES[name].tokens(held.shapes[0]) for name, held in batch.inputs.items()}
        assert dataset.size(i) == expected
        assert dataset.num_tokens()[i] == sum(expected.values())


def test_samples_in_memory_equal_the_rows_of_a_manifest(folder) -> None:
    sound, rate = soundfile.read(folder / "1.wav", dtype="float32")
    samples = [
        {"text": "text 6", "image": folder / "2.png", "audio": (sound, rate)},
        {"image": Image.open(folder / "3.png"), "audio": None},
        {"image": "missing.png"},
    ]
    batch = collate(samples, FEATURES)
    assert batch.ids == ("0", "1", "2"), "every sample keeps its row"
    assert batch.present() == (frozenset(FEATURES), frozenset({"image"}), frozenset())
    assert [(fault.id, fault.column, fault.path) for fault in batch.faults] == [("2", "image", "missing.png")]
    held = items(batch)
    assert torch.equal(held["0", "audio"], FEATURES["audio"](folder / "1.wav"))
    assert torch.equal(held["1", "image"], FEATURES["image"](folder / "3.png"))
    with pytest.raises(ValueError, match="video: give text, image, audio"):
        collate([{"video": "x"}], FEATURES)


def test_the_real_digits(shared_data) -> None:
    references = {"image": "mnist.parquet:image_degraded", "audio": "fsdd.zip:audio_degraded"}
    rows = read_manifest(shared_data / "avdigits" / "questions.csv", references=references)
    extra = {"picture": rows.read_target("image_digit"), "sound": rows.read_target("audio_digit")}
    features = FEATURES | {"audio": LogMel(Waveform(8000), 40, 200, 80, frames=40)}
    dataset = ManifestDataset(rows, "train", features, targets=extra, augment=Augment({"image": PictureJitter(2.0)}))
    batch = dataset.__getitems__([(0, i) for i in range(0, 40_000, 999)])
    assert batch.faults == ()
    assert set(batch.inputs["image"].shapes) == {(28, 28)}
    assert batch.inputs["audio"].values.shape == (40 * 41, 40)
    kinds = np.array(rows.column("kind"))[dataset.rows[list(batch.indices)]]
    names = np.array(rows.label_names)[batch.targets["label"]]
    assert (names[kinds == "image"].astype(int) == batch.targets["picture"].numpy()[kinds == "image"]).all()
    assert (names[kinds == "audio"].astype(int) == batch.targets["sound"].numpy()[kinds == "audio"]).all()


def test_the_real_archives_have_no_fault(shared_data) -> None:
    rows = read_manifest(shared_data / "emoji.zip")
    features: dict[str, Feature] = {"image": Picture(), "audio": Waveform(16_000)}
    assert scan(rows, features, "test") == []
