"""Trained models on disk."""

from mmformer.checkpoints.build import RefusedTarget as RefusedTarget
from mmformer.checkpoints.build import build as build
from mmformer.checkpoints.folder import SavedModel as SavedModel
from mmformer.checkpoints.folder import load_model as load_model
from mmformer.checkpoints.folder import save_model as save_model
from mmformer.checkpoints.load import Loaded as Loaded
from mmformer.checkpoints.load import load as load
from mmformer.checkpoints.load import load_into as load_into
from mmformer.checkpoints.report import MisfitError as MisfitError
from mmformer.checkpoints.report import Report as Report
from mmformer.checkpoints.source import open_source as open_source
from mmformer.checkpoints.store import RefusedFile as RefusedFile
