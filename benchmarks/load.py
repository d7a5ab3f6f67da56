"""Loading full-size checkpoints: the difference to their references, the time, and the memory beside the model itself.

    python -m benchmarks.load

ViT-B/16 of timm, BERT-base and wav2vec2-base of transformers, with random weights, every one of them scrambled, are
saved by their library; ours are loaded from these files. Time is that of the processor on one thread, beside what the
reference library takes to build its model and read the same file into it. Memory is what the process holds at most
while loading, beyond what it held before and the model that comes out, as a share of the file: at most 1.3. It is read
from Linux's /proc, in a process of its own for each file, after a first load that pays for imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

BAR, SHARE = 1e-5, 1.3
FILES = ("model.safetensors", "pytorch_model.bin")
SAMPLES = 2


@dataclass(frozen=True)
class Case:
    """A reference: `save` writes its folder and gives back its model, `inputs` makes items, `output` what it says."""

    modality: str
    save: Callable[[Path], nn.Module]
    read: Callable[[Path], object]
    inputs: Callable[[torch.Generator], Tensor]
    output: Callable[[nn.Module, Tensor], Tensor]


def _save_vit(folder: Path) -> nn.Module:
    import timm
    from timm.models import save_for_hf

    model = scramble(timm.create_model("vit_base_patch16_224"))
    save_for_hf(model, folder, safe_serialization=True)
    return model


def _read_vit(folder: Path) -> object:
    import timm
    from timm.models import load_checkpoint

    return load_checkpoint(timm.create_model("vit_base_patch16_224"), str(folder / FILES[0]))


def _vit(model: nn.Module, images: Tensor) -> Tensor:
    pixels = ((images.double() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).float()
    return getattr(model, "forward_features")(pixels)  # noqa: B009 - a method that nn.Module does not know


def _saved_by_transformers(name: str) -> Callable[[Path], nn.Module]:
    def save(folder: Path) -> nn.Module:
        import transformers

        model = scramble(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the library, about its own past
            getattr(model, "save_pretrained")(folder)  # noqa: B009
        return model

    return save


def _read_by_transformers(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> object:
        import transformers

        return getattr(transformers, f"{name}Model").from_pretrained(folder)

    return read


CASES = {
    "ViT-B/16": Case(
        "image", _save_vit, _read_vit, lambda g: torch.randint(0, 256, (SAMPLES, 224, 224, 3), generator=g).byte(), _vit
    ),
    "BERT-base": Case(
        "text",
        _saved_by_transformers("Bert"),
        _read_by_transformers("Bert"),
        lambda g: torch.randint(0, 30522, (SAMPLES, 77), generator=g),
        lambda model, ids: model(ids).last_hidden_state,
    ),
    "wav2vec2-base": Case(
        "audio",
        _saved_by_transformers("Wav2Vec2"),
        _read_by_transformers("Wav2Vec2"),
        lambda g: torch.randn(SAMPLES, 16000, generator=g),
        lambda model, waves: model(waves).last_hidden_state,
    ),
}


def scramble(model: nn.Module) -> nn.Module:
    """Random weights of the size that keeps activations apart; what is a vector stays near what it was."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.15 * noise)
    return model.eval()


def measure(folder: Path, name: str, modality: str) -> dict[str, float]:
    """Load one file twice, the second time under watch, and compare what the model says with the reference's output."""
    from mmformer.batch import Batch, Ragged
    from mmformer.checkpoints.load import load
    from mmformer.checkpoints.source import open_source
    from mmformer.tokens import to_padded

    load(open_source(folder, weights=name))
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.process_time()
    loaded = load(open_source(folder, weights=name))
    seconds = time.process_time() - start
    peak, size = _memory("VmHWM"), (folder / name).stat().st_size
    model = sum(tensor.nbytes for tensor in loaded.model.state_dict().values())

    held = torch.load(folder / "outputs.pt", weights_only=True)
    items = Ragged.stack(list(held["inputs"]), list(range(SAMPLES)), int(modality == "image"))
    with torch.inference_mode():
        encoded = loaded.model.encode(Batch(ids=tuple("ab"), inputs={modality: items}))
        ours = to_padded(encoded[modality]).x
    limit = max(1.0, float(held["output"].abs().max()))
    return {
        "difference": float((ours - held["output"]).abs().max()) / limit,
        "seconds": seconds,
        "share": (peak - before - model) / size,
        "size": size,
    }


def _memory(field: str) -> int:
    """Bytes of this process that Linux counts under a name."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _save(case: Case, folder: Path) -> float:
    """Write the reference's files and outputs; gives back the seconds its library takes to read one again."""
    from safetensors.torch import load_file

    model = case.save(folder)
    torch.save(load_file(folder / FILES[0]), folder / FILES[1])
    inputs = case.inputs(torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.save({"inputs": inputs, "output": case.output(model, inputs)}, folder / "outputs.pt")
    case.read(folder)  # pays for imports
    start = time.process_time()
    case.read(folder)
    return time.process_time() - start


def main() -> None:
    """Print a line for each model and kind of file, and fail where one is over a bar."""
    torch.set_num_threads(1)
    rows = []
    for title, case in CASES.items():
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            theirs = _save(case, folder)
            print(f"{title}: its library builds the model and reads its file in {theirs:.2f} s", flush=True)
            for file in FILES:
                command = [sys.executable, "-m", "benchmarks.load", "--measure", str(folder), file, case.modality]
                found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                row = json.loads(found.splitlines()[-1])
                rows.append(row)
                print(
                    f"  {file:<18} {row['size'] / 1e6:.0f} MB: differs by {row['difference']:.1e} of max(1, reference),"
                    f" {row['seconds']:.2f} s, memory beside the model {row['share']:.2f} x file",
                    flush=True,
                )
    if over := [row for row in rows if row["difference"] > BAR or row["share"] > SHARE]:
        sys.exit(f"over the bar of {BAR} or {SHARE}: {over}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        torch.set_num_threads(1)
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3], sys.argv[4])))
    else:
        main()
