"""What a run says before it starts and when it is over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from mmformer.training.module import Training


def parameters_line(module: Training) -> str:
    """How many parameters train, by part."""
    model = module.model
    parts = {name: _count(encoder) for name, encoder in model.encoders.items()}
    parts |= {"fusion": _count(model.fusion) if model.fusion else 0, "heads": _count(model.heads)}
    shares = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in parts.items() if count)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    note = f" ({frozen / 1e6:.2f} M frozen)" if frozen else ""
    return f"model: {_count(model) / 1e6:.2f} M parameters{note}: {shares}"


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def final_table(metrics: Mapping[str, float], folder: Path, commands: Mapping[str, str]) -> None:
    """Validation and test side by side, a row for each metric and subset; then where things lie and what to do next."""
    table = Table(box=None, pad_edge=False)
    splits = [split for split in ("val", "test") if any(name.startswith(f"{split}/") for name in metrics)]
    table.add_column("metric")
    for split in splits:
        table.add_column(split, justify="right")
    for name in dict.fromkeys(key.split("/", 1)[1] for key in metrics):
        cells = [f"{metrics[key]:.4f}" if (key := f"{split}/{name}") in metrics else "" for split in splits]
        table.add_row(name, *cells)
    console = Console(soft_wrap=True, highlight=False)
    console.print()
    console.print(table)
    for what in ("metrics.json", "checkpoints/best.ckpt", "model", "report.html", "data_errors.jsonl"):
        if (folder / what).exists():
            console.print(f"{what.split('/')[-1].split('.')[0]:<12}{folder / what}", markup=False)
    for what, line in commands.items():
        console.print(f"{what:<12}{line}", markup=False)
