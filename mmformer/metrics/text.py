"""What a text is worth beside those that people wrote: BLEU, ROUGE-L and CIDEr-D of captions, WER and CER of speech.

Words are what `words` makes of a text: lower case, without punctuation. COCO's figures were made with the Penn
Treebank's tokenizer, whose words differ for abbreviations and hyphens: compare figures of one tokenizer only.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

Words = Sequence[str]

_WORD = re.compile(r"\w+(?:['’]\w+)*")
_LENGTH_SIGMA = 6.0


def words(text: str) -> list[str]:
    """The words of a text in lower case, apostrophes kept inside them."""
    return _WORD.findall(text.lower())


def ngrams(given: Words, size: int) -> Counter[tuple[str, ...]]:
    """How often each run of `size` words stands in a text."""
    return Counter(zip(*(given[i:] for i in range(size)), strict=False))


def bleu_counts(found: Words, references: Sequence[Words], order: int = 4) -> Int[np.ndarray, " counts"]:
    """What BLEU adds up over a corpus: matches by size of n-gram, n-grams by size, length, length of the reference.

    An n-gram matches as often as the reference that has it most often has it; the reference that counts for the length
    is the one of the nearest length, of two the shorter.
    """
    matches, totals = [], []
    for size in range(1, order + 1):
        have = ngrams(found, size)
        most: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            most |= ngrams(reference, size)
        matches.append((have & most).total())
        totals.append(have.total())
    nearest = min((abs(len(r) - len(found)), len(r)) for r in references)[1]
    return np.array([*matches, *totals, len(found), nearest])


def bleu_of_counts(counts: Int[np.ndarray, "N counts"]) -> float:
    """BLEU of the texts whose `bleu_counts` are the rows: 0 when no n-gram of some size matches anywhere."""
    *both, length, wanted = counts.sum(0).tolist()
    matches, totals = both[: len(both) // 2], both[len(both) // 2 :]
    if not all(matches):
        return 0.0
    precision = sum(math.log(m / t) for m, t in zip(matches, totals, strict=True)) / len(matches)
    return math.exp(precision + min(0.0, 1 - wanted / length))


def bleu(found: Sequence[Words], references: Sequence[Sequence[Words]], order: int = 4) -> float:
    """BLEU of a corpus, n-grams of 1 to `order` words, not smoothed (Papineni et al., ACL 2002)."""
    _check(found, references)
    return bleu_of_counts(np.stack([bleu_counts(f, r, order) for f, r in zip(found, references, strict=True)]))


def rouge_l(found: Words, references: Sequence[Words], beta: float = 1.2) -> float:
    """The F-measure of the longest common subsequence, recall weighted `beta` times (Lin, 2004).

    As COCO's evaluation does it, precision and recall are each the best over the references; `beta` 1 is the F1 of
    summaries, which is the same for a single reference.
    """
    common = [_common(found, reference) for reference in references]
    recall = max((c / len(r) for c, r in zip(common, references, strict=True) if r), default=0.0)
    precision = max(common, default=0) / len(found) if found else 0.0
    if not precision or not recall:
        return 0.0
    return (1 + beta**2) * precision * recall / (recall + beta**2 * precision)


def cider_d(found: Sequence[Words], references: Sequence[Sequence[Words]], order: int = 4) -> list[float]:
    """CIDEr-D of each text, 0 to 10 (Vedantam et al., arXiv 1411.5726); the corpus has their mean.

    Cosines of tf-idf vectors of n-grams, counts clipped to the reference's, and a penalty for another length. The idf
    comes from these references, so figures of a small or of another set cannot be compared.
    """
    _check(found, references)
    sizes = range(1, order + 1)
    documents: Counter[tuple[str, ...]] = Counter()
    for texts in references:
        documents.update({gram for text in texts for size in sizes for gram in ngrams(text, size)})
    log_total = math.log(len(found))

    def weigh(text: Words, size: int) -> dict[tuple[str, ...], float]:
        return {g: n * (log_total - math.log(max(1, documents[g]))) for g, n in ngrams(text, size).items()}

    scores = []
    for text, others in zip(found, references, strict=True):
        total = 0.0
        vectors = [weigh(text, size) for size in sizes]
        for other in others:
            # Lengths are numbers of word pairs in the original, which is the same but for an empty text.
            gap = max(len(text) - 1, 0) - max(len(other) - 1, 0)
            likeness = sum(_clipped_cosine(v, weigh(other, s)) for v, s in zip(vectors, sizes, strict=True))
            total += likeness / order * math.exp(-(gap**2) / (2 * _LENGTH_SIGMA**2))
        scores.append(10 * total / len(others))
    return scores


def edits(found: Sequence[str], wanted: Sequence[str]) -> int:
    """The least number of insertions, deletions and substitutions between two sequences of words or characters."""
    row = list(range(len(wanted) + 1))
    for i, one in enumerate(found, 1):
        corner, row[0] = row[0], i
        for j, other in enumerate(wanted, 1):
            corner, row[j] = row[j], min(corner + (one != other), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def error_counts(found: Sequence[Sequence[str]], wanted: Sequence[Sequence[str]]) -> Int[np.ndarray, "N 2"]:
    """Edits and length of what was wanted, of each text: the rows that `error_rate` and a bootstrap take."""
    _check(found, wanted)
    return np.array([(edits(f, w), len(w)) for f, w in zip(found, wanted, strict=True)], dtype=np.int64)


def error_rate(counts: Int[np.ndarray, "N 2"]) -> float:
    """All edits over all of what was wanted: not the mean of the rates, in which a short text would weigh more.

    Raises:
        ValueError: nothing was wanted.
    """
    errors, length = counts.sum(0).tolist()
    if not length:
        raise ValueError(f"{len(counts)} references without a word have no error rate: leave empty ones out")
    return errors / length


def word_error_rate(found: Sequence[str], wanted: Sequence[str]) -> float:
    """WER of a corpus: words as they stand between spaces, so normalise case and punctuation before where you must."""
    return error_rate(error_counts([text.split() for text in found], [text.split() for text in wanted]))


def character_error_rate(found: Sequence[str], wanted: Sequence[str]) -> float:
    """CER of a corpus, spaces counted: the rate for scripts that do not part words."""
    return error_rate(error_counts(found, wanted))


def _common(a: Words, b: Words) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for one in a:
        corner = 0
        for j, other in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if one == other else max(row[j], row[j - 1])
    return row[-1]


def _clipped_cosine(a: dict[tuple[str, ...], float], b: dict[tuple[str, ...], float]) -> float:
    norm = math.hypot(*a.values()) * math.hypot(*b.values())
    return sum(min(w, b.get(g, 0.0)) * b.get(g, 0.0) for g, w in a.items()) / norm if norm else 0.0


def _check(found: Sequence[Words], references: Sequence[Sequence[Words]]) -> None:
    if not found or len(found) != len(references):
        raise ValueError(f"{len(found)} texts and {len(references)} to compare with: give one for each, at least one")
