"""What the tests of wrapped backbones share: the laws that all of them keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from mmformer.batch import Ragged
from mmformer.tokens import Tokens


def shaken(module: nn.Module, seed: int = 0) -> nn.Module:
    """Evaluation mode, and no parameter or statistic as it was initialised."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in module.parameters():
            scale = max(tensor[0].numel(), 16) if tensor.ndim > 1 else 16
            tensor += torch.randn(tensor.shape, generator=generator) / (2 * scale**0.5)
        for name, tensor in module.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                tensor += torch.rand(tensor.shape, generator=generator)
    return module.eval()


def of_row(tokens: Tokens, row: int) -> tuple[Tensor, Tensor]:
    """The vectors and positions of one sample."""
    mine = tokens.sample()[0] == row
    return tokens.x[0][mine], tokens.position[0][mine]


def equals_own_call(
    encoder: nn.Module, items: Sequence[Tensor], feature_dims: int, own: Callable[[Tensor], tuple[Tensor, list]]
) -> Tokens:
    """Each sample has what `own` gives of its item alone, batch-mates or not; a sample without an item has nothing."""
    count = len(items) + 1  # the last sample lacks the modality
    with torch.no_grad():
        together = encoder(Ragged.stack(items, range(len(items)), feature_dims), count)
        assert together.layout.num_samples == count
        assert sum(together.layout.lengths) == together.x.shape[1]
        for row, item in enumerate(items):
            x, position = of_row(together, row)
            wanted, places = own(item)
            wanted = encoder.projection(wanted)
            assert x.shape == wanted.shape
            assert (x - wanted).abs().max() <= 1e-5 * max(1, float(wanted.abs().max()))
            assert position.tolist() == places
    assert not len(of_row(together, len(items))[0])
    return together


def grid(rows: int, columns: int, prefix: int = 0) -> list[list[int]]:
    return [[0, 0, 0]] * prefix + [[0, r, c] for r in range(rows) for c in range(columns)]


def clock(count: int) -> list[list[int]]:
    return [[t, 0, 0] for t in range(count)]


def gradients_flow_and_stop(encoder: nn.Module, items: Ragged, num_samples: int) -> None:
    """A trained backbone gets gradients; a frozen one gets none and changes nothing of itself, in training mode too."""
    encoder.train()
    encoder(items, num_samples).x.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.backbone.parameters())
    encoder.zero_grad()
    encoder.backbone.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in encoder.backbone.state_dict().items()}
    encoder.train()
    encoder(items, num_samples).x.square().mean().backward() if encoder.projection.state_dict() else None
    assert all(p.grad is None for p in encoder.backbone.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in encoder.backbone.state_dict().items())
    encoder.backbone.requires_grad_(True)
