"""Exported models without PyTorch: numpy, Pillow, soundfile, tokenizers and ONNX Runtime (or ExecuTorch)."""

from mmformer.runtime.runtime import Runtime, Sample
from mmformer.runtime.table import Hit, Table

__all__ = ["Hit", "Runtime", "Sample", "Table"]
