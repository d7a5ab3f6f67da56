"""Loading a full-size checkpoint: the difference to its reference, the time, and the memory beside the model itself.

    python -m benchmarks.load

The reference has random weights, every one of them scrambled, and saves itself; ours is loaded from that file. Time
is that of the processor on one thread, beside what the reference library takes to build its model and read the same
file into it. Memory is what the process holds at most
while loading, beyond what it held before and the model that comes out, as a share of the file: at most 1.3. It is
read from Linux's /proc, in a process of its own for each file, after a first load that pays for imports.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

BAR, SHARE = 1e-5, 1.3
FILES = ("model.safetensors", "pytorch_model.bin")
PICTURES = 2


def reference() -> nn.Module:
    """ViT-B/16 of timm."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224")
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            if parameter.ndim > 1:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
            else:
                parameter.add_(0.15 * noise)
    return model.eval()


def measure(folder: Path, name: str) -> dict[str, float]:
    """Load one file twice, the second time under watch, and compare what the model says with the reference's output."""
    from mmformer.batch import Batch, Ragged
    from mmformer.checkpoints.load import load
    from mmformer.checkpoints.source import open_source

    load(open_source(folder, weights=name))
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = time.process_time()
    loaded = load(open_source(folder, weights=name))
    seconds = time.process_time() - start
    peak, size = _memory("VmHWM"), (folder / name).stat().st_size
    model = sum(tensor.nbytes for tensor in loaded.model.state_dict().values())

    held = torch.load(folder / "outputs.pt", weights_only=True)
    images = Ragged.stack(list(held["images"]), list(range(PICTURES)), 1)
    batch = Batch(ids=tuple("ab"), inputs={"image": images}, targets={})
    with torch.inference_mode():
        ours, _ = loaded.model.output(loaded.model.encode(batch), "label", "image")
    limit = max(1.0, float(held["logits"].abs().max()))
    return {
        "difference": float((ours - held["logits"]).abs().max()) / limit,
        "seconds": seconds,
        "share": (peak - before - model) / size,
        "size": size,
    }


def _memory(field: str) -> int:
    """Bytes of this process that Linux counts under a name."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _save(folder: Path) -> float:
    """Write the reference's files and outputs; gives back the seconds its library takes to read one again."""
    import timm
    from timm.models import load_checkpoint, save_for_hf

    model = reference()
    save_for_hf(model, folder, safe_serialization="both")
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (PICTURES, 224, 224, 3), generator=generator, dtype=torch.uint8)
    pixels = ((images.double() / 255 - 0.5) / 0.5).permute(0, 3, 1, 2).float()
    with torch.inference_mode():
        torch.save({"images": images, "logits": model(pixels)}, folder / "outputs.pt")
    start = time.process_time()
    load_checkpoint(timm.create_model("vit_base_patch16_224"), str(folder / FILES[0]))
    return time.process_time() - start


def main() -> None:
    """Print a line for each kind of file, and fail where one is over a bar."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        theirs = _save(folder)
        print(f"timm builds its model and reads its file in {theirs:.2f} s")
        rows = []
        for file in FILES:
            command = [sys.executable, "-m", "benchmarks.load", "--measure", str(folder), file]
            found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            row = json.loads(found.splitlines()[-1])
            rows.append(row)
            print(
                f"{file:<18} {row['size'] / 1e6:.0f} MB: differs by {row['difference']:.1e} of max(1, reference), "
                f"{row['seconds']:.2f} s, memory beside the model {row['share']:.2f} x file"
            )
    if over := [row for row in rows if row["difference"] > BAR or row["share"] > SHARE]:
        sys.exit(f"over the bar of {BAR} or {SHARE}: {over}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        torch.set_num_threads(1)
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3])))
    else:
        main()
