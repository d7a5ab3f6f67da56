from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmformer.checkpoints.build import build
from mmformer.checkpoints.load import load
from mmformer.checkpoints.report import MisfitError
from tests.checkpoints.families.recordings import (
    all_close,
    goes_back_to,
    gradients_flow,
    heard,
    loaded_from,
    noise,
)
from tests.checkpoints.families.visions import epsilons
from tests.checkpoints.oracles import batch, close, saved, scramble

transformers = pytest.importorskip("transformers", reason="the oracle: pip install mmformer[transformers]")

# Channels, heads, layers, hidden channels, frames, mel bins, patch and both strides are all different.
SHAPE = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 44, "max_length": 50,
    "num_mel_bins": 20, "patch_size": 8, "time_stride": 6, "frequency_stride": 5,
}  # fmt: skip
GRID = (3, 8)
"""Patches over the mel bins and in time: (20 - 8) // 5 + 1 and (50 - 8) // 6 + 1."""
MEAN, STD = -4.2677393, 2 * 4.5689974
CLIPS = [10 * clip for clip in noise(50, 50, 50, width=20)]


def made(kind: str = "ASTModel", **changes):
    return getattr(transformers, kind)(transformers.ASTConfig(**SHAPE | changes))


def normal(clips) -> torch.Tensor:
    """Spectrograms as the reference takes them."""
    return (torch.stack(list(clips)) - MEAN) / STD


def pooled(loaded, clips=CLIPS) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model.summary(loaded.model.encode(batch(len(clips), audio=clips)), "audio")[0]


def labels(loaded, clips=CLIPS) -> torch.Tensor:
    with torch.inference_mode():
        return loaded.model.output(loaded.model.encode(batch(len(clips), audio=clips)), "label", "audio")[0]


@pytest.mark.parametrize(
    "changes", [{}, {"qkv_bias": False, "hidden_act": "gelu_new"}, {"layer_norm_eps": 1e-5, "time_stride": 8}]
)
def test_tokens_and_their_mean_of_two_are_those_of_transformers(changes, tmp_path) -> None:
    reference = made(**changes)
    loaded = loaded_from(reference, tmp_path)
    with torch.inference_mode():
        theirs = reference(normal(CLIPS))
    close(pooled(loaded), theirs.pooler_output)
    ours = torch.stack(heard(loaded, batch(3, audio=CLIPS)))
    in_time = theirs.last_hidden_state[:, 2:].unflatten(1, (GRID[0], -1)).transpose(1, 2).flatten(1, 2)
    close(ours, torch.cat([theirs.last_hidden_state[:, :2], in_time], 1))  # ours count the mel bins fastest
    assert epsilons(loaded.model) == epsilons(reference)
    goes_back_to(reference, loaded, tmp_path)
    gradients_flow(loaded, batch(3, audio=CLIPS))


def test_classes_are_those_of_transformers(tmp_path) -> None:
    reference = made("ASTForAudioClassification", num_labels=7)
    loaded = loaded_from(reference, tmp_path)
    with torch.inference_mode():
        close(labels(loaded), reference(normal(CLIPS)).logits)
    goes_back_to(reference, loaded, tmp_path)
    gradients_flow(loaded, batch(3, audio=CLIPS), "label")

    other = load(tmp_path, options={"num_classes": 5})
    new = {item.name for line in other.report.of("new") for item in line.targets}
    assert new == {f"heads.label.{place}.{kind}" for place in (0, 1) for kind in ("weight", "bias")}
    assert labels(other).shape == (3, 5)


def test_silence_behind_a_recording_is_normalised_too(tmp_path) -> None:
    """AST fills up before it subtracts the mean, so that what is filled in is not 0 but 0.467."""
    reference = made()
    loaded_from(reference, tmp_path)
    extractor = transformers.ASTFeatureExtractor(num_mel_bins=20, max_length=50)
    extractor.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    clips = noise(5000, 20_000)  # filled up and cut
    values = torch.cat([extractor(c.numpy(), sampling_rate=16000, return_tensors="pt").input_values for c in clips])
    assert abs(float(values[0, -1, 0]) - 0.467) < 1e-3
    feature = build(loaded.described.features["audio"])
    with torch.inference_mode():
        close(pooled(loaded, [feature(clip) for clip in clips]), reference(values).pooler_output)


@pytest.mark.parametrize("changes", [{"do_normalize": False}, {"mean": -3.0, "std": 2.0}])
def test_mean_and_deviation_are_those_of_the_processor(changes, tmp_path) -> None:
    reference = made()
    loaded_from(reference, tmp_path)
    transformers.ASTFeatureExtractor(num_mel_bins=20, max_length=50, **changes).save_pretrained(tmp_path)
    values = torch.stack(CLIPS) if "do_normalize" in changes else (torch.stack(CLIPS) + 3) / 4
    with torch.inference_mode():
        close(pooled(load(tmp_path)), reference(values).pooler_output)


def test_recordings_of_several_lengths_do_not_see_each_other(tmp_path) -> None:
    loaded = loaded_from(made(), tmp_path)
    clips = noise(50, 8, 31, 8, width=20)
    alone = [heard(loaded, batch(1, audio=[clip]))[0] for clip in clips]
    assert [len(tokens) for tokens in alone] == [2 + 3 * columns for columns in (8, 1, 4, 1)]
    all_close(heard(loaded, batch(4, audio=clips)), alone)
    close(pooled(loaded, clips), torch.cat([pooled(loaded, [clip]) for clip in clips]))


def test_other_frames_and_mel_bins_interpolate_the_positions(tmp_path) -> None:
    reference = scramble(made())
    loaded = load(saved(reference, tmp_path), options={"max_length": 80, "num_mel_bins": 25})
    assert [line.note for line in loaded.report.of("resized")] == ["8x3x24 to 13x4x24"]
    assert loaded.described.features["audio"] | {"num_mels": 25, "frames": 80} == loaded.described.features["audio"]
    table = reference.embeddings.position_embeddings.detach()
    grid = table[:, 2:].unflatten(1, GRID).permute(0, 3, 1, 2)
    grown = torch.nn.functional.interpolate(grid, (4, 13), mode="bicubic", align_corners=False).flatten(2).mT
    larger = made(max_length=80, num_mel_bins=25).eval()
    larger.load_state_dict(
        reference.state_dict() | {"embeddings.position_embeddings": torch.cat([table[:, :2], grown], 1)}
    )
    clips = [10 * clip for clip in noise(80, 80, width=25)]
    with torch.inference_mode():
        close(pooled(loaded, clips), larger(normal(clips)).pooler_output)


def test_a_kernel_whose_axes_are_swapped_is_no_accident_of_shape(tmp_path) -> None:
    """The patch is a square, so that only the numbers tell the axes apart."""
    reference = scramble(made())
    stored = load_file(saved(reference, tmp_path) / "model.safetensors")
    name = "embeddings.patch_embeddings.projection.weight"
    stored[name] = stored[name].transpose(2, 3).contiguous()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with torch.inference_mode(), pytest.raises(AssertionError, match="differs by"):
        close(pooled(load(tmp_path)), reference(normal(CLIPS)).pooler_output)


def test_a_table_of_another_size_is_named(tmp_path) -> None:
    stored = load_file(saved(made(), tmp_path) / "model.safetensors")
    stored["embeddings.position_embeddings"] = stored["embeddings.position_embeddings"][:, :-1].contiguous()
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MisfitError, match="25 positions, not 2 and a grid of 3 x 8"):
        load(tmp_path)
