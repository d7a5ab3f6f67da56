"""Trained models on disk."""

from mmformer.checkpoints.build import RefusedTarget as RefusedTarget
from mmformer.checkpoints.build import build as build
from mmformer.checkpoints.folder import SavedModel as SavedModel
from mmformer.checkpoints.folder import load_model as load_model
from mmformer.checkpoints.folder import save_model as save_model
