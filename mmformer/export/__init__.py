"""A trained model as a file that runs elsewhere: torch.export, ONNX, ExecuTorch. Each is checked against the model."""

from mmformer.export.check import EXACT, INT8, Bar, Compared, ExportError, rows_of
from mmformer.export.program import Program
from mmformer.export.write import Exported, Options, export, known_rows, program_of

__all__ = [
    "EXACT",
    "INT8",
    "Bar",
    "Compared",
    "ExportError",
    "Exported",
    "Options",
    "Program",
    "export",
    "known_rows",
    "program_of",
    "rows_of",
]
