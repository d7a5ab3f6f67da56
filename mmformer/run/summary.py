"""What a run says before it starts and when it is over."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from mmformer.model import Model
from mmformer.training.evaluation import subsets


def parameters_line(model: Model) -> str:
    """How many parameters train, by part; those that several parts share are named once, by themselves."""
    kinds = {**dict(model.encoders.items()), "fusion": model.fusion, "views": model.views, "heads": model.heads}
    sets = {name: set(part.parameters()) for name, part in kinds.items() if part is not None}
    uses = Counter(parameter for owned in sets.values() for parameter in owned)
    parts = {name: sum(p.numel() for p in owned if uses[p] == 1) for name, owned in sets.items()}
    parts["shared"] = sum(p.numel() for p, times in uses.items() if times > 1)
    shares = ", ".join(f"{name} {count / 1e6:.2f}" for name, count in parts.items() if count)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    note = f" ({frozen / 1e6:.2f} M frozen)" if frozen else ""
    return f"model: {_count(model) / 1e6:.2f} M parameters{note}: {shares}"


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def final_table(
    metrics: Mapping[str, float], modalities: Sequence[str], folder: Path, commands: Mapping[str, str]
) -> None:
    """A row a metric: validation, test, test by subset of the modalities; then where things lie and what is next."""
    console = Console(soft_wrap=True, highlight=False)
    console.print()
    console.print(_table(metrics, list(subsets(modalities))))
    for what in ("metrics.json", "checkpoints/best.ckpt", "model", "report.html", "data_errors.jsonl"):
        if (folder / what).exists():
            console.print(f"{what.split('/')[-1].split('.')[0]:<12}{folder / what}", markup=False)
    for what, line in commands.items():
        console.print(f"{what:<12}{line}", markup=False)


def _table(metrics: Mapping[str, float], letters: Sequence[str]) -> Table:
    names = dict.fromkeys(key.split("/", 1)[1] for key in metrics)
    # "acc_ti" is "acc" by subset only where there is an "acc".
    parts = {f"{name}_{letter}" for name in names for letter in letters}
    whole = [name for name in names if name not in parts]
    last = "test" if any(key.startswith("test/") for key in metrics) else "val"
    columns = {split: f"{split}/{{}}" for split in ("val", "test") if any(k.startswith(f"{split}/") for k in metrics)}
    columns |= {c: f"{last}/{{}}_{c}" for c in letters if any(f"{last}/{name}_{c}" in metrics for name in whole)}
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("metric")
    for title in columns:
        table.add_column(title, justify="right")
    for name in whole:
        found = (metrics.get(key.format(name)) for key in columns.values())
        table.add_row(name, *("" if value is None else f"{value:.4f}" for value in found))
    return table
