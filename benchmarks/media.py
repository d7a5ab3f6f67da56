"""Files to tensors: JPEGs against Pillow's way, log-mel spectrograms against torchaudio's.

    uv run python -m benchmarks.media

Pictures are two photographs (scikit-learn's) at 640 x 480 and 1600 x 1200, JPEG of quality 90. The way of most
preprocessors, open_clip's among them, is Pillow's: decode, resize the shorter side to 224 by its bicubic filter, cut
the middle, scale and normalise. Ours is `Picture(short=224)` and the normalisation that its embedder does. PSNR is that
of the two resized pictures, in bytes. Sounds are 10 s at 16 kHz in memory, to 80 mels of a transform of 400 samples
each 10 ms.
"""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.timing import Timings, interleave, parse_args, show
from mmformer.datasets.features import LogMel, Picture, Waveform

SIDE, RATE = 224, 16_000
SIZES = ((640, 480), (1600, 1200))
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def photographs(size: tuple[int, int]) -> list[bytes]:
    """The JPEG files of two photographs at one size."""
    from sklearn.datasets import load_sample_images

    files = []
    for pixels in load_sample_images().images:
        stream = io.BytesIO()
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
        files.append(stream.getvalue())
    return files


def pillows(file: bytes) -> Image.Image:
    """The shorter side to `SIDE` by Pillow's own decoder and filter."""
    picture = Image.open(io.BytesIO(file)).convert("RGB")
    scale = SIDE / min(picture.size)
    return picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)


def middle(picture: Tensor) -> Tensor:
    """The middle square of a picture of (height, width, channels)."""
    top, left = ((side - SIDE) // 2 for side in picture.shape[:2])
    return picture[top : top + SIDE, left : left + SIDE]


def normal(picture: Tensor) -> Tensor:
    mean, std = (torch.tensor(values) * 255 for values in (MEAN, STD))
    return (picture.permute(2, 0, 1).float() - mean[:, None, None]) / std[:, None, None]


def pictures(size: tuple[int, int], rounds: int) -> Timings:
    files, feature = photographs(size), Picture(short=SIDE)

    def every(one: Callable[[bytes], Tensor]) -> Callable[[int], object]:
        return lambda _: [normal(middle(one(file))) for file in files for _ in range(8)]

    def as_tensor(file: bytes) -> Tensor:
        return torch.from_numpy(np.array(pillows(file)))

    for number, file in enumerate(files):
        apart = (as_tensor(file).float() - feature(file).float()).square().mean().item()
        print(f"{size[0]} x {size[1]}, photograph {number}: {len(file) >> 10} KiB, PSNR {psnr(apart):.1f} dB")
    title = f"{size[0]} x {size[1]}, {8 * len(files)} pictures"
    return interleave(title, "Pillow", {"Pillow": every(as_tensor), "mmformer": every(feature)}, rounds, CPU)


def psnr(squares: float) -> float:
    """Peak signal to noise of bytes, in decibels, of the mean square of what they differ by."""
    return float("inf") if squares == 0 else 10 * float(np.log10(255**2 / squares))


def sounds(rounds: int) -> Timings:
    from torchaudio.transforms import MelSpectrogram

    clips = [torch.randn(10 * RATE, generator=torch.Generator().manual_seed(seed)) / 10 for seed in range(16)]
    theirs = MelSpectrogram(RATE, n_fft=400, hop_length=160, n_mels=80)
    ours = LogMel(Waveform(RATE), num_mels=80, window=400, hop=160, fft=400, normalize=False)
    apart = max(((theirs(clip) + 1e-6).log().T - ours(clip)).abs().max().item() for clip in clips)
    print(f"log-mel: at most {apart:.1e} apart")
    steps = {
        "torchaudio": lambda _: [(theirs(clip) + 1e-6).log().T.contiguous() for clip in clips],
        "mmformer": lambda _: [ours(clip) for clip in clips],
    }
    return interleave("10 s of sound, 16 clips", "torchaudio", steps, rounds, CPU)


CPU = torch.device("cpu")


def main() -> None:
    args = parse_args(__doc__ or "", rounds=9)
    show([*(pictures(size, args.rounds) for size in SIZES), sounds(args.rounds)], args)


if __name__ == "__main__":
    main()
