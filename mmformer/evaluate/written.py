"""Texts that a model writes, beside those that people wrote: captions, transcripts, answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mmformer.batch import Batch
from mmformer.datasets.labels import Target
from mmformer.datasets.manifest import ABSENT, Manifest
from mmformer.datasets.tables import ManifestError
from mmformer.evaluate.measure import Measure
from mmformer.generation import GREEDY
from mmformer.metrics.text import bleu_counts, bleu_of_counts, cider_d, error_counts, error_rate, rouge_l, words
from mmformer.metrics.vqa import normalise_answer, vqa_accuracy
from mmformer.predict import Predictor
from mmformer.writing import Writing

Judge = Callable[[Sequence[str], Sequence[Sequence[str]]], dict[str, Measure]]
"""Metrics of texts, each beside its references."""

_SEPARATOR = "|"


@dataclass(frozen=True)
class Written:
    """What the model writes about each sample, greedily, judged beside the column `target`.

    A cell may hold several references, as a list or parted by `|`. `prompted` gives it the text of the sample first, as
    a question; otherwise the text is kept from it. Rows that share all other modalities are one sample with the
    references of all, unless it is `prompted`: a picture has its captions.
    """

    judge_texts: Judge
    target: str = "text"
    prompted: bool = False
    max_length: int = 64
    headline: str = ""
    by_subset: bool = False

    def targets(self, predictor: Predictor, manifest: Manifest) -> dict[str, Target]:
        """None are needed."""
        return {}

    def judge(self, predictor: Predictor, manifest: Manifest, batches: Iterable[Batch]) -> dict[str, Measure]:
        """Of the samples that have something to write about and a reference."""
        writing = Writing.of(predictor.model, predictor.objectives, predictor.features, predictor.marks)
        row_of = {manifest.id(i): i for i in range(len(manifest))}
        sample_of = self._samples(manifest, writing.writer.modality)
        references = self._references(manifest, sample_of)
        found: dict[int, str] = {}
        for batch in batches:
            kept = batch if self.prompted else batch.only([m for m in batch.inputs if m != writing.writer.modality])
            new: dict[int, int] = {}
            for i, (id, have) in enumerate(zip(batch.ids, kept.present(), strict=True)):
                if have:
                    new.setdefault(sample_of[row_of[id]], i)
            rows = [i for sample, i in new.items() if sample not in found and references[sample]]
            if rows:
                part = kept.select(rows).to(predictor.device)
                texts = writing.write(writing.prompted(part), writing.limits(self.max_length), GREEDY)
                found |= {sample_of[row_of[id]]: best[0] for id, best in zip(part.ids, texts, strict=True)}
        if not found:
            return {}
        return self.judge_texts(list(found.values()), [references[sample] for sample in found])

    def _samples(self, manifest: Manifest, written: str) -> list[int]:
        """The number of the first row with the same sample, for each row."""
        if self.prompted:
            return list(range(len(manifest)))
        others = [cells.codes for name, cells in manifest.inputs.items() if name != written]
        first: dict[tuple[int, ...], int] = {}
        return [first.setdefault(tuple(codes), i) for i, codes in enumerate(np.stack(others, 1).tolist())]

    def _references(self, manifest: Manifest, sample_of: Sequence[int]) -> dict[int, list[str]]:
        """The texts of the column by sample."""
        known = manifest.inputs.get(self.target)
        if known is None and self.target not in manifest.table.columns:
            have = ", ".join(manifest.table.columns)
            raise ManifestError(
                f"{manifest.path} has no column {self.target!r} of references; it has {have} (--target)"
            )
        cells = manifest.column(self.target) if known is None else _texts(manifest, self.target)
        found: dict[int, list[str]] = {}
        for sample, cell in zip(sample_of, cells, strict=True):
            several = cell if isinstance(cell, list) else str(cell).split(_SEPARATOR) if cell is not None else []
            found.setdefault(sample, []).extend(text for each in several if (text := str(each).strip()))
        return found


def captions(found: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Measure]:
    """CIDEr-D, BLEU-4 and ROUGE-L over words in lower case."""
    texts, wanted = [words(text) for text in found], [[words(text) for text in texts] for texts in references]
    pairs = list(zip(texts, wanted, strict=True))
    return {
        "cider_d": Measure(rows=np.array(cider_d(texts, wanted))),
        "bleu4": Measure(rows=np.stack([bleu_counts(*pair) for pair in pairs]), statistic=bleu_of_counts),
        "rouge_l": Measure(rows=np.array([rouge_l(*pair) for pair in pairs])),
    }


def transcripts(found: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Measure]:
    """WER and CER beside the first reference, as both are written: nothing is made lower case."""
    wanted = [texts[0] for texts in references]
    by_word = error_counts([text.split() for text in found], [text.split() for text in wanted])
    return {
        "wer": Measure(rows=by_word, statistic=error_rate),
        "cer": Measure(rows=error_counts(found, wanted), statistic=error_rate),
    }


def answers(found: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, Measure]:
    """The share that is the most frequent answer once both are normalised, and VQA accuracy where people disagree.

    The latter needs several people's answers to each question.
    """
    usual = [max(dict.fromkeys(texts), key=texts.count) for texts in map(list, references)]
    pairs = zip(found, usual, strict=True)
    out = {"exact": Measure(rows=np.array([normalise_answer(one) == normalise_answer(two) for one, two in pairs]))}
    if min(map(len, references)) < 2:
        return out
    scores = [vqa_accuracy(text, people) for text, people in zip(found, references, strict=True)]
    return {"vqa_acc": Measure(rows=np.array(scores))} | out


def _texts(manifest: Manifest, modality: str) -> Iterable[str | None]:
    codes = manifest.inputs[modality].codes
    return (manifest.text(i, modality) if codes[i] != ABSENT else None for i in range(len(manifest)))
