"""Raw samples to tensors and outputs to answers, around a program that is a function of numpy."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest

from mmformer.datasets.features import LogMel, Picture, Text, Waveform
from mmformer.datasets.tokenizers import ByteTokenizer
from mmformer.export.describe import plain
from mmformer.runtime import Runtime
from mmformer.runtime.description import Description, Input
from mmformer.runtime.engines import open_engine

TEXT = Input(name="text", dtype="int64", shape=(0,), largest=(9,), shortest=1, least=2, axes=1, multiple=1, ragged=True,
             feature=plain(Text(ByteTokenizer(), 9)))  # fmt: skip
IMAGE = Input(name="image", dtype="uint8", shape=(8, 8, 1), largest=(8, 8, 1), shortest=4, least=4, axes=2, multiple=1,
              ragged=True, feature=plain(Picture(longest=8, multiple=4, channels=1)))  # fmt: skip
AUDIO = Input(name="audio", dtype="float32", shape=(0, 4), largest=(40, 4), shortest=2, least=2, axes=1, multiple=1,
              ragged=False, feature=plain(LogMel(Waveform(1000), 4, 100, 50)))  # fmt: skip
CLASSES = Description(inputs=(TEXT, IMAGE, AUDIO), outputs=("logits", "fused_embedding", "image_embedding"),
                      kind="Classes", labels=("no", "yes"))  # fmt: skip


@dataclass
class Sums:
    """A program that says how much there is of each input, and keeps what it was given."""

    description: Description = CLASSES
    calls: list[dict[str, np.ndarray]] = field(default_factory=list)

    def run(self, inputs):
        assert tuple(inputs) == self.description.names
        self.calls.append(dict(inputs))
        first = next(iter(inputs.values()))
        total = np.stack([v.reshape(len(first), -1).sum(1) for k, v in inputs.items() if "_size" not in k], 1)
        total = total.astype(np.float32)
        made = {"logits": total[:, :2] - 100, "value": total[:, 0], "fused_embedding": total, "image_embedding": total}
        return {name: made[name] for name in self.description.outputs}


def picture(height: int, width: int) -> np.ndarray:
    return np.full((height, width), 2, np.uint8)


def sound(samples: int) -> np.ndarray:
    return np.random.default_rng(samples).normal(size=samples).astype(np.float32)


def test_items_are_filled_up_and_told_apart():
    engine = Sums()
    Runtime.of(engine).outputs([{"text": "abc"}, {"text": "d", "image": picture(8, 4)}])
    (given,) = engine.calls
    assert given["text"].tolist() == [[102, 103, 104], [105, 0, 0]]
    assert given["text_size"].tolist() == [[3], [1]]
    assert given["image"].shape == (2, 8, 8, 1)
    assert given["image"].sum() == 2 * 32
    assert given["image_size"].tolist() == [[0, 0], [8, 4]]
    assert given["audio"].shape == (2, 2, 4)
    assert given["present"].tolist() == [[True, False, False], [True, True, False]]
    assert [values.dtype for values in given.values()] == ["int64", "int64", "uint8", "int64", "float32", "bool"]


def test_items_that_know_no_padding_go_by_their_shape_and_come_back_in_order():
    engine = Sums()
    runtime = Runtime.of(engine)
    samples = [{"audio": sound(n), "text": "x" * (1 + n % 5)} for n in (400, 900, 400, 900, 901)]
    found = runtime.outputs(samples)["fused_embedding"]
    assert sorted(len(call["audio"]) for call in engine.calls) == [2, 3]
    alone = [runtime.outputs([sample])["fused_embedding"][0] for sample in samples]
    np.testing.assert_allclose(found, np.stack(alone), rtol=1e-5)


def test_many_samples_are_cut_into_batches():
    engine = Sums(replace(CLASSES, batch=3))
    assert len(Runtime.of(engine).predict([{"text": "a"}] * 7)) == 7
    assert [len(call["text"]) for call in engine.calls] == [3, 3, 1]


def test_classes_and_their_probabilities():
    runtime = Runtime.of(Sums())
    assert runtime.predict({"text": "a", "id": 3}) == "no"
    assert runtime.predict([{"text": "a"}, {"image": picture(8, 8), "text": None}]) == ["no", "yes"]
    shares = runtime.predict_proba({"text": "a"})
    assert list(shares) == ["no", "yes"]
    assert sum(shares.values()) == pytest.approx(1)
    assert runtime.predict([]) == []


def test_labels_and_numbers():
    labels = Runtime.of(Sums(replace(CLASSES, kind="Labels")))
    assert labels.predict([{"text": "a"}, {"text": "aa", "image": picture(8, 8)}]) == [["no"], ["no", "yes"]]
    assert labels.predict_proba({"text": "a"})["no"] == pytest.approx(1 / (1 + np.exp(-2)))
    number = Runtime.of(Sums(replace(CLASSES, kind="Number", outputs=("value",))))
    assert number.predict({"text": "a"}) == 102
    with pytest.raises(ValueError, match="has no probabilities: use predict"):
        number.predict_proba({"text": "a"})


def test_what_is_read_off_one_modality_says_nothing_without_it():
    runtime = Runtime.of(Sums(replace(CLASSES, reads=("image",))))
    assert runtime.predict([{"text": "a"}, {"image": picture(8, 8)}]) == [None, "yes"]
    assert runtime.predict_proba([{"text": "a"}]) == [None]


def test_embeddings():
    runtime = Runtime.of(Sums())
    assert runtime.embed({"text": "a"}).shape == (4,)
    found = runtime.embed([{"text": "a"}, {"image": picture(8, 8)}], "image")
    assert np.isnan(found).all(1).tolist() == [True, False]
    with pytest.raises(ValueError, match="no embedding of audio here: this file gives logits, fused_embedding"):
        runtime.embed({"text": "a"}, "audio")
    only = Runtime.of(Sums(replace(CLASSES, outputs=("image_embedding",), kind=None)))
    assert only.embed({"image": picture(8, 8)}).shape == (4,)
    with pytest.raises(ValueError, match="has no labels: use embed"):
        only.predict({"text": "a"})


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        ({"smell": 3}, "sample 0 has the key 'smell': this model takes text, image, audio"),
        ({"text": None, "image": float("nan")}, "sample 0 is empty: give at least one of text, image, audio"),
        ("a.png", "sample 0 is a str: give a dict"),
        ({"text": "", "id": "r7"}, "sample r7, text: no token: the text is empty or white space"),
        ({"image": "nowhere.png"}, "sample 0, image: no such file"),
        ({"audio": sound(4000)}, "sample 0, audio: its size is 81, and this file was exported for at most 40"),
    ],
    ids=str,
)
def test_errors_name_the_sample(sample, said):
    with pytest.raises(ValueError, match=said):
        Runtime.of(Sums()).predict([sample])


def test_a_picture_of_another_size_is_named_where_none_can_be_filled_up():
    whole = replace(IMAGE, ragged=False)
    runtime = Runtime.of(Sums(replace(CLASSES, inputs=(TEXT, whole, AUDIO))))
    with pytest.raises(ValueError, match="its size is 8 x 4, and this file was exported for 8 x 8 alone"):
        runtime.predict({"image": picture(16, 8)})


def test_a_description_survives_json_and_damage_is_told():
    assert Description.from_json(CLASSES.to_json(), "it") == CLASSES
    with pytest.raises(ValueError, match=r"a.onnx does not say what it takes \(KeyError"):
        Description.from_json("{}", "a.onnx")
    with pytest.raises(ValueError, match=r"a.onnx has format 99, this version reads up to 1: update mmformer"):
        Description.from_json(CLASSES.to_json().replace('"format": 1', '"format": 99'), "a.onnx")


def test_files_that_are_none_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="write it with `mmformer export`"):
        Runtime(tmp_path / "a.onnx")
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match=r"a file that runs here ends in .onnx or .pte"):
        open_engine(tmp_path / "a.txt")
    pytest.importorskip("onnxruntime", reason="ONNX files are an extra")
    (tmp_path / "a.onnx").write_text("nothing")
    with pytest.raises(ValueError, match=r"a.onnx cannot be opened"):
        Runtime(tmp_path / "a.onnx")
    (tmp_path / "a.pte").write_text("nothing")
    with pytest.raises(FileNotFoundError, match=r"a.pte.json is missing: it travels with a.pte"):
        Runtime(tmp_path / "a.pte")
