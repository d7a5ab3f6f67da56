"""Evaluation of a trained model with the protocols of the field, each number with its interval of confidence."""

from mmformer.evaluate.judge import Curve, Evaluated, evaluate
from mmformer.evaluate.measure import Measure
from mmformer.evaluate.tasks import Classification, Retrieval, Task, ZeroShot
from mmformer.evaluate.written import Written, answers, captions, transcripts

__all__ = [
    "Classification",
    "Curve",
    "Evaluated",
    "Measure",
    "Retrieval",
    "Task",
    "Written",
    "ZeroShot",
    "answers",
    "captions",
    "evaluate",
    "transcripts",
]
