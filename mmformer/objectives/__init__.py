"""What a model is trained to do."""

from mmformer.objectives.answers import Cache
from mmformer.objectives.classify import Classes, Labels, Number
from mmformer.objectives.contrastive import Contrastive, info_nce, sigmoid
from mmformer.objectives.ctc import CTC
from mmformer.objectives.distilled import DistilledWords
from mmformer.objectives.generate import Generates
from mmformer.objectives.language import NextToken
from mmformer.objectives.masked import Codes, Masked, Pixels, Words
from mmformer.objectives.matching import Matching
from mmformer.objectives.momentum import Momentum, MomentumContrastive
from mmformer.objectives.objective import Meter, Objective
from mmformer.objectives.qformer import QueryContrastive
from mmformer.objectives.reconstruct import Reconstruct
from mmformer.objectives.span import SpanPenalty
from mmformer.objectives.starting import StartingWith
from mmformer.objectives.taught import SoftClasses, SoftLabels, SoftNumber, TaughtOutput, TaughtTokens, WithoutSome
from mmformer.objectives.taught_space import TaughtContrastive, TaughtRelations
from mmformer.objectives.taught_states import TaughtAttention, TaughtEnergy, TaughtStates
from mmformer.objectives.teacher import Teacher

__all__ = [
    "CTC",
    "Cache",
    "Classes",
    "Codes",
    "Contrastive",
    "DistilledWords",
    "Generates",
    "Labels",
    "Masked",
    "Matching",
    "Meter",
    "Momentum",
    "MomentumContrastive",
    "NextToken",
    "Number",
    "Objective",
    "Pixels",
    "QueryContrastive",
    "Reconstruct",
    "SoftClasses",
    "SoftLabels",
    "SoftNumber",
    "SpanPenalty",
    "StartingWith",
    "TaughtAttention",
    "TaughtContrastive",
    "TaughtEnergy",
    "TaughtOutput",
    "TaughtRelations",
    "TaughtStates",
    "TaughtTokens",
    "Teacher",
    "WithoutSome",
    "Words",
    "info_nce",
    "sigmoid",
]
