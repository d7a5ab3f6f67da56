"""What a model is trained to do."""

from mmformer.objectives.classify import Classes, Labels, Number
from mmformer.objectives.contrastive import Contrastive, info_nce, sigmoid
from mmformer.objectives.objective import Meter, Objective
from mmformer.objectives.reconstruct import Reconstruct

__all__ = ["Classes", "Contrastive", "Labels", "Meter", "Number", "Objective", "Reconstruct", "info_nce", "sigmoid"]
