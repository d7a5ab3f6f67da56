"""Laws that hold for any data, each tried on many that Hypothesis draws."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from mmformer.checkpoints.plan import Terms, plan
from mmformer.checkpoints.store import TensorStore
from mmformer.checkpoints.table import Rule
from mmformer.datasets.features import Picture
from mmformer.datasets.labels import read_target
from mmformer.datasets.manifest import read_manifest
from mmformer.datasets.sampler import Batching, BatchSampler
from mmformer.datasets.tokenizers import BPE, ByteTokenizer
from mmformer.run.config import changes
from tests.campaign.trials import Outcome, attempt, folder, part
from tests.helpers import SUBSETS, random_batch, small_model

EXAMPLES = 200
WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1).filter(lambda t: t.strip() == t)
MODEL: list[Any] = []
BPES: list[BPE] = []


def manifests(root: Path) -> Callable[[], None]:
    """A table reads the same from CSV, JSON lines and Parquet."""

    @given(st.lists(st.tuples(WORDS, st.sampled_from("abc")), min_size=1, max_size=6))
    def law(rows: list[tuple[str, str]]) -> None:
        cells = [{"id": str(i), "text": text, "label": label} for i, (text, label) in enumerate(rows)]
        stream = io.StringIO(newline="")
        writer = csv.DictWriter(stream, ["id", "text", "label"], quoting=csv.QUOTE_ALL)
        writer.writeheader()
        writer.writerows(cells)
        (root / "a.csv").write_text(stream.getvalue(), encoding="utf-8", newline="")
        (root / "a.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells), encoding="utf-8")
        pyarrow.parquet.write_table(pa.Table.from_pylist(cells), root / "a.parquet")
        for suffix in ("csv", "jsonl", "parquet"):
            found = read_manifest(root / f"a.{suffix}")
            assert [found.text(i) for i in range(len(found))] == [text for text, _ in rows], suffix
            assert [found.id(i) for i in range(len(found))] == [cell["id"] for cell in cells]

    return law


def subsets(root: Path) -> Callable[[], None]:
    """A sample answers the same in any batch, whatever subset of the modalities it and the others have."""
    MODEL[:] = MODEL or [small_model().eval()]

    @given(st.lists(st.sampled_from(SUBSETS), min_size=1, max_size=5), st.integers(0, 99))
    def law(chosen: list[tuple[str, ...]], draw: int) -> None:
        model = MODEL[0]
        batch = random_batch(len(chosen), draw, tuple(chosen))
        with torch.no_grad():
            together, _ = model.output(model.encode(batch), "answer")
            for row in range(len(chosen)):
                single = batch.select([row])
                alone, _ = model.output(model.encode(single), "answer")
                assert torch.allclose(together[row], alone[0], atol=1e-4)

    return law


def tokenizers(root: Path) -> Callable[[], None]:
    """Bytes and byte pairs give back any text."""
    BPES[:] = BPES or [BPE.train(["the cat sat on the mat", "a dog sat", "katze und hund"] * 5, vocab_size=290)]

    @given(st.text())
    def law(text: str) -> None:
        for tokenizer in (ByteTokenizer(), BPES[0]):
            ids = tokenizer.encode(text)
            assert all(0 <= i < tokenizer.vocab_size for i in ids)
            assert tokenizer.decode(ids) == text

    return law


def labels(root: Path) -> Callable[[], None]:
    """A class has one index, and each row that of its class."""

    @given(st.lists(st.one_of(st.none(), WORDS.filter(lambda t: "|" not in t)), min_size=1))
    def law(cells: list[str | None]) -> None:
        if not any(cells):
            return
        target = read_target("label", cells, [str(i) for i in range(len(cells))], kind="Classes")
        assert len(set(target.names)) == len(target.names)
        for cell, value in zip(cells, target.rows(np.arange(len(cells))).tolist(), strict=True):
            assert (value == -100) == (cell is None)
            assert cell is None or target.names[value] == cell

    return law


def configs(root: Path) -> Callable[[], None]:
    """Every key in which two configs differ is said once, and no other."""
    leaf = st.one_of(st.integers(0, 3), st.sampled_from("ab"), st.none())
    node = st.dictionaries(st.sampled_from(["x", "y", "z"]), leaf | st.dictionaries(st.sampled_from("uv"), leaf))

    @given(node, node)
    def law(old: dict[str, Any], new: dict[str, Any]) -> None:
        allowed, refused = changes({"module": old}, {"module": new})
        before, after = _flat(old, "module"), _flat(new, "module")
        differ = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
        assert sorted(line.split(":")[0] for line in [*allowed, *refused]) == sorted(differ)

    return law


def _flat(config: Any, key: str = "") -> dict[str, Any]:
    if isinstance(config, dict) and config:
        return {k: v for name, value in config.items() for k, v in _flat(value, f"{key}.{name}").items()}
    return {key: config}


def samplers(root: Path) -> Callable[[], None]:
    """Each sample once an epoch, from any batch on the same as without a stop, over any number of processes."""

    @given(
        st.lists(st.integers(1, 30), min_size=1, max_size=40),
        st.integers(1, 9),
        st.booleans(),
        st.integers(0, 5),
        st.integers(1, 3),
    )
    def law(sizes: list[int], size: int, tokens: bool, epoch: int, world: int) -> None:
        rule = Batching(
            seed=3,
            batch_size=None if tokens else size,
            batch_tokens=10 * size if tokens else None,
            shuffle=True,
            drop_last=False,
        )
        shares = []
        for rank in range(world):
            sampler = BatchSampler(sizes, rule, rank, world)
            sampler.set_epoch(epoch)
            whole = list(sampler)
            again = BatchSampler(sizes, rule, rank, world)
            again.resume_at(epoch, len(whole) // 2)
            assert list(again) == whole[len(whole) // 2 :]
            shares.append(whole)
        seen = [index for whole in shares for batch in whole for _, index in batch]
        assert sorted(seen) == list(range(len(sizes)))
        assert len({len(whole) for whole in shares}) == 1

    return law


def shapes(root: Path) -> Callable[[], None]:
    """The shape that a header promises is that of the picture."""

    @given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.integers(1, 8), st.booleans())
    def law(height: int, width: int, side: int, multiple: int, shorter: bool) -> None:
        feature = Picture(short=side if shorter else None, longest=None if shorter else side, multiple=multiple)
        array = np.zeros((height, width, 3), dtype=np.uint8)
        found = feature(array)
        assert tuple(found.shape[:2]) == feature.shape(array)
        assert all(length % multiple == 0 and length > 0 for length in found.shape[:2])

    return law


def keys(root: Path) -> Callable[[], None]:
    """Every tensor of a file and of a model stands on exactly one line of the account."""
    names = st.dictionaries(st.sampled_from("abcdefg"), st.sampled_from([(2,), (3,), (2, 3)]), max_size=7)

    @given(names, names)
    def law(file: dict[str, tuple[int, ...]], model: dict[str, tuple[int, ...]]) -> None:
        store = TensorStore.of({name: torch.zeros(shape) for name, shape in file.items()})
        targets = {name: torch.zeros(shape) for name, shape in model.items()}
        rules = [Rule((name,), (name,)) for name in "abcdefg"]
        report = plan("a file", store, targets, rules, Terms(ignored={}, configured=(), resize=False)).report
        assert sorted(item.name for line in report for item in line.sources) == sorted(file)
        assert sorted(item.name for line in report for item in line.targets) == sorted(model)
        wrong = {name for name in file.keys() | model.keys() if file.get(name) != model.get(name)}
        assert report.ok == (not wrong)

    return law


LAWS = (manifests, subsets, tokenizers, labels, configs, samplers, shapes, keys)


def tried(law: Callable[[], None], count: int, draw: int) -> str | None:
    options = settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck), print_blob=False
    )
    seed(draw)(options(law))()
    return None


def trials(share: float, seed: int) -> Iterator[Outcome]:
    """8 laws, each on 200 examples, in portions of 20."""
    portion = 20
    for law in LAWS:
        for i in part(range(EXAMPLES // portion), share):
            with folder("D3") as root:
                work = partial(tried, law(root), portion, seed * 1000 + i)
                yield attempt(f"{law.__name__}, {portion} examples ({i})", work)
