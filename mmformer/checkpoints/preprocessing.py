"""What a checkpoint's side files say of how its inputs were made, as plain configs of our features.

Read are preprocessor_config.json and processor_config.json (transformers), the `preprocess_cfg` of open_clip and the
`pretrained_cfg` of timm, and the tokenizer's files. A setting that would change the input and has no counterpart here
is an error; one that is not known is a note.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mmformer.datasets.cleaning import Cleaning
from mmformer.datasets.pretrained import read_tokenizer
from mmformer.datasets.tokenizer_files import read_object
from mmformer.datasets.tokenizers import Tokenizer

Plain = dict[str, Any]
"""A config of plain values; those of parts have a `_target_`."""

_FEATURES, _MELS, _RESIZE = "mmformer.datasets.features", "mmformer.datasets.mels", "mmformer.datasets.resize"
_TOKENIZERS = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model", "spm.model")
_MERGES = "bpe_simple_vocab_16e6.txt.gz"
_UNLIMITED = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the embedder subtracts and divides by: of pictures for each channel on the scale 0 to 1, of sounds one."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Configs of the features, None where the files say nothing of a modality; `text` still wants the tokenizer.

    `tokenizer` is the main file of it, `cleaning` what texts go through first. `notes` say what was left aside.
    """

    text: Plain | None = None
    image: Plain | None = None
    audio: Plain | None = None
    tokenizer: Path | None = None
    cleaning: Cleaning | None = None
    image_statistics: Statistics | None = None
    audio_statistics: Statistics | None = None
    notes: tuple[str, ...] = ()

    def open_tokenizer(self) -> Tokenizer | None:
        return read_tokenizer(self.tokenizer, cleaning=self.cleaning) if self.tokenizer else None


def preprocessing(files: Mapping[str, Path], config: Mapping[str, Any]) -> Preprocessing:
    """Read the side files of a checkpoint, by name, beside its `config` (config.json or open_clip_config.json).

    Raises:
        ValueError: a file is damaged, or a setting that changes the inputs has no counterpart; the message names it.
    """
    notes: list[str] = []
    text, tokenizer, cleaning = _text(files, config, notes)
    image = audio = image_statistics = audio_statistics = None
    if "preprocess_cfg" in config:
        image, image_statistics = _open_clip_image(config["preprocess_cfg"], config, notes)
    elif "pretrained_cfg" in config:
        image, image_statistics = _timm_image(config["pretrained_cfg"], config, notes)
    else:
        for held in _processors(files):
            kind = str(held.get("feature_extractor_type") or held.get("image_processor_type") or "")
            read = next((found for name, found in _SOUNDS.items() if kind.startswith(name)), None)
            if read is not None:
                audio, audio_statistics = read(held, config, notes)
            elif "sampling_rate" in held:
                raise ValueError(f"preprocessor_config.json is of {kind!r}; sounds are read of {', '.join(_SOUNDS)}")
            else:
                image, image_statistics = _image(held, kind, config, notes)
    return Preprocessing(
        text=text,
        image=image,
        audio=audio,
        tokenizer=tokenizer,
        cleaning=cleaning,
        image_statistics=image_statistics,
        audio_statistics=audio_statistics,
        notes=tuple(notes),
    )


def _processors(files: Mapping[str, Path]) -> list[Plain]:
    """The settings of pictures and of sounds; processor_config.json may hold either, or both."""
    found: list[Plain] = []
    for name in ("preprocessor_config.json", "processor_config.json"):
        if name not in files:
            continue
        held = read_object(files[name])
        parts = [held[key] for key in ("image_processor", "feature_extractor") if isinstance(held.get(key), dict)]
        if not parts and {"image_processor_type", "feature_extractor_type", "image_mean"} & set(held):
            parts = [held]
        known = {part.get("image_processor_type") or part.get("feature_extractor_type") for part in found}
        found += [p for p in parts if (p.get("image_processor_type") or p.get("feature_extractor_type")) not in known]
    return found


# ------------------------------------------------------------------ pictures

_RESCALE = 1 / 255
_OF_NO_EFFECT = (
    "processor_class data_format input_data_format device return_tensors do_convert_rgb default_to_square "
    "disable_grouping crop_size size do_rescale do_normalize do_resize do_center_crop resample rescale_factor "
    "image_mean image_std size_divisor do_pad image_processor_type feature_extractor_type image_seq_length"
)
"""Read below, or without an effect on the pixels. ViLT's `do_pad` fills a batch up, which a packed one does without."""


def _image(held: Plain, kind: str, config: Mapping[str, Any], notes: list[str]) -> tuple[Plain, Statistics]:
    """Settings of transformers' processors of pictures, in the order in which they work: resize, crop, normalise."""
    steps: list[Plain] = []
    shortest = "CLIP" in kind or "Vilt" in kind
    if held.get("do_resize", True):
        steps.append(_transformers_resize(held, shortest))
    if held.get("do_center_crop", False):
        crop = _wanted(held, "crop_size", kind)
        height, width = (crop, crop) if isinstance(crop, int) else (crop["height"], crop["width"])
        steps.append({**_part(_RESIZE, "CentreCrop"), "height": height, "width": width, "even": False})
    factor = held.get("rescale_factor", _RESCALE)
    if held.get("do_rescale", True) and not math.isclose(factor, _RESCALE, rel_tol=1e-3):
        raise ValueError(f"preprocessor_config.json: rescale_factor {factor}: only 1/255 has a counterpart")
    if held.get("crop_pct") is not None or (held.get("do_pad") and held.get("pad_size")):
        raise ValueError("preprocessor_config.json: crop_pct and pad_size have no counterpart: give the steps yourself")
    mean, std = (0.0,), (1.0,)
    if held.get("do_normalize", True):
        mean, std = _floats(_wanted(held, "image_mean", kind)), _floats(_wanted(held, "image_std", kind))
    _note(held, _OF_NO_EFFECT, "preprocessor_config.json", notes)
    return _picture(steps, config), Statistics(mean=mean, std=std)


def _transformers_resize(held: Plain, shortest: bool) -> Plain:
    size, filter = _wanted(held, "size", "pictures"), Image.Resampling(_wanted(held, "resample", "pictures"))
    if isinstance(size, int):
        size = {"shortest_edge": size} if shortest else {"height": size, "width": size}
    size = {key: value for key, value in size.items() if value is not None}
    how = {"filter": filter.name.lower()} if filter is not Image.Resampling.BICUBIC else {}
    if set(size) == {"height", "width"}:
        return {**_part(_RESIZE, "Squash"), "height": size["height"], "width": size["width"], **how}
    if set(size) == {"shortest_edge"} and held.get("size_divisor"):
        within = {"side": size["shortest_edge"], "longest": int(1333 / 800 * size["shortest_edge"])}
        return {**_part(_RESIZE, "ShortestSideWithin"), **within, "multiple": held["size_divisor"], **how}
    if set(size) == {"shortest_edge"}:
        return {**_part(_RESIZE, "ShortestSide"), "side": size["shortest_edge"], **how}
    raise ValueError(f"preprocessor_config.json: size {size} has no counterpart: height and width, or shortest_edge")


def _open_clip_image(held: Plain, config: Mapping[str, Any], notes: list[str]) -> tuple[Plain, Statistics]:
    """The transform of open_clip's evaluation (its transform.py); the defaults are its own."""
    size = held.get("size", 224)
    height, width = (size, size) if isinstance(size, int) else size
    mode, filter = held.get("resize_mode") or "shortest", held.get("interpolation") or "bicubic"
    # What is called random is bicubic outside training.
    how = {"filter": "bilinear"} if filter == "bilinear" else {}
    box = {"height": height, "width": width}
    if mode == "squash":
        steps = [{**_part(_RESIZE, "Squash"), **box, **how}]
    elif mode == "longest":
        fill = {"fill": held["fill_color"]} if held.get("fill_color") else {}
        steps = [{**_part(_RESIZE, "Fit"), **box, **how}, {**_part(_RESIZE, "CentreCrop"), **box, **fill}]
    elif mode == "shortest":
        # For what is not square, open_clip resizes by its default filter, whatever the settings say.
        resize = _shortest(height, width, how if height == width else {})
        steps = [resize, {**_part(_RESIZE, "CentreCrop"), **box}]
    else:
        raise ValueError(f"preprocess_cfg: resize_mode {mode!r} has no counterpart: shortest, longest or squash")
    if held.get("mode", "RGB") != "RGB":
        raise ValueError(f"preprocess_cfg: mode {held['mode']!r} has no counterpart: only RGB")
    known = "size mode mean std interpolation resize_mode fill_color"
    _note(held, known, "preprocess_cfg", notes)
    mean = held.get("mean") or (0.48145466, 0.4578275, 0.40821073)
    std = held.get("std") or (0.26862954, 0.26130258, 0.27577711)
    return _picture(steps, config), Statistics(mean=_floats(mean), std=_floats(std))


_TIMM = "input_size interpolation crop_pct crop_mode mean std fixed_input_size"
_TIMM_OTHER = (
    "url hf_hub_id hf_hub_filename file source architecture tag custom_load min_input_size pool_size num_classes "
    "classifier first_conv license description origin_url paper_name paper_ids notes test_input_size "
    "test_crop_pct label_offset label_names label_descriptions state_dict head_file"
)


def _timm_image(held: Plain, config: Mapping[str, Any], notes: list[str]) -> tuple[Plain, Statistics]:
    """The transform of timm's evaluation (its transforms_factory.py)."""
    channels, height, width = _wanted(held, "input_size", "pretrained_cfg")
    mode, share = held.get("crop_mode") or "center", held.get("crop_pct") or 0.875
    filter = held.get("interpolation") or "bicubic"
    how = {"filter": filter} if filter != "bicubic" else {}
    scaled = math.floor(height / share), math.floor(width / share)
    crop = {**_part(_RESIZE, "CentreCrop"), "height": height, "width": width}
    mean, std = _floats(_wanted(held, "mean", "pretrained_cfg")), _floats(_wanted(held, "std", "pretrained_cfg"))
    box = {"height": scaled[0], "width": scaled[1]}
    if mode == "center":
        steps = [_shortest(*scaled, how), crop]
    elif mode == "squash":
        steps = [{**_part(_RESIZE, "Squash"), **box, **how}, crop]
    elif mode == "border":
        steps = [{**_part(_RESIZE, "Fit"), **box, **how}, {**crop, "fill": [round(255 * m) for m in mean]}]
    else:
        raise ValueError(f"pretrained_cfg: crop_mode {mode!r} has no counterpart: center, squash or border")
    _note(held, f"{_TIMM} {_TIMM_OTHER}", "pretrained_cfg", notes)
    picture = _picture(steps, config)
    return picture if channels == 3 else {**picture, "channels": channels}, Statistics(mean=mean, std=std)


def _shortest(height: int, width: int, how: Plain) -> Plain:
    """Both libraries leave squares to torchvision, which rounds in another way."""
    if height == width:
        return {**_part(_RESIZE, "ShortestSide"), "side": height, **how}
    return {**_part(_RESIZE, "Cover"), "height": height, "width": width, **how}


def _picture(steps: list[Plain], config: Mapping[str, Any]) -> Plain:
    """With the patches of the model, that the last step must fill."""
    patch = _patch(config)
    extra = {}
    if patch is not None:
        last = steps[-1] if steps else {}
        sides = [last.get("height", patch), last.get("width", patch)]
        if any(side % patch for side in sides):
            steps = [*steps, {**_part(_RESIZE, "WholePatches"), "patch": patch}]
        extra = {"multiple": patch}
    return {**_part(_FEATURES, "Picture"), "steps": steps, **extra}


def _patch(config: Mapping[str, Any]) -> int | None:
    """The side of a patch, where the config tells of square ones."""
    inner = config.get("vision_config") or config.get("image_config") or config.get("model_cfg", {}).get("vision_cfg")
    patch = {**config, **(inner or {})}.get("patch_size")
    if isinstance(patch, list | tuple):
        patch = patch[0] if len(set(patch)) == 1 else None
    return patch if isinstance(patch, int) else None


# ------------------------------------------------------------------ sounds

_SOUND = (
    "feature_extractor_type processor_class feature_size sampling_rate padding_side padding_value "
    "return_attention_mask do_normalize"
)


def _whisper(held: Plain, config: Mapping[str, Any], notes: list[str]) -> tuple[Plain, None]:
    _fixed(held, {"n_fft": 400, "hop_length": 160, "padding_value": 0.0, "dither": 0.0})
    known = "n_fft hop_length chunk_length n_samples nb_max_frames dither mel_filters"
    _note(held, f"{_SOUND} {known}", "preprocessor_config.json", notes)
    mels, seconds = held.get("feature_size", 80), float(held.get("chunk_length", 30))
    return {**_part(_MELS, "WhisperMel"), "waveform": _waveform(held), "num_mels": mels, "seconds": seconds}, None


def _ast(held: Plain, config: Mapping[str, Any], notes: list[str]) -> tuple[Plain, Statistics]:
    known = "num_mel_bins max_length mean std"
    _note(held, f"{_SOUND} {known}", "preprocessor_config.json", notes)
    feature = {**_part(_MELS, "KaldiMel"), "waveform": _waveform(held), "num_mels": held.get("num_mel_bins", 128)}
    mean, std = (0.0,), (1.0,)
    if held.get("do_normalize", True):
        mean, std = (float(held.get("mean", -4.2677393)),), (2 * float(held.get("std", 4.5689974)),)
    return {**feature, "frames": held.get("max_length", 1024)}, Statistics(mean=mean, std=std)


def _wav2vec2(held: Plain, config: Mapping[str, Any], notes: list[str]) -> tuple[Plain, None]:
    _note(held, _SOUND, "preprocessor_config.json", notes)
    _fixed(held, {"feature_size": 1, "padding_value": 0.0})
    reach = 1
    strides, kernels = config.get("conv_stride", ()), config.get("conv_kernel", ())
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        reach = (reach - 1) * stride + kernel
    options = {"normalize": True} if held.get("do_normalize", True) else {}
    return {**_waveform(held), **options, **({"min_samples": reach} if reach > 1 else {})}, None


def _clap(held: Plain, config: Mapping[str, Any], notes: list[str]) -> tuple[Plain, None]:
    wanted = {"truncation": "rand_trunc", "padding": "repeatpad", "hop_length": 480, "fft_window_size": 1024}
    _fixed(held, {**wanted, "top_db": None})
    known = f"{' '.join(wanted)} top_db max_length_s frequency_min frequency_max n_fft chunk_length_s"
    known += " nb_frequency_bins nb_max_frames nb_max_samples"
    _note(held, f"{_SOUND} {known}", "preprocessor_config.json", notes)
    limits = {"lowest": float(held.get("frequency_min", 0)), "highest": float(held.get("frequency_max", 14000))}
    size = {"num_mels": held.get("feature_size", 64), "seconds": float(held.get("max_length_s", 10))}
    return {**_part(_MELS, "ClapMel"), "waveform": _waveform(held), **size, **limits}, None


_SOUNDS = {
    "WhisperFeatureExtractor": _whisper,
    "ASTFeatureExtractor": _ast,
    "Wav2Vec2FeatureExtractor": _wav2vec2,
    "ClapFeatureExtractor": _clap,
}


def _waveform(held: Plain) -> Plain:
    return {**_part(_FEATURES, "Waveform"), "sample_rate": _wanted(held, "sampling_rate", "sounds")}


def _fixed(held: Plain, wanted: Mapping[str, Any]) -> None:
    """Settings that are part of the formula here."""
    for key, value in wanted.items():
        if key in held and held[key] != value:
            raise ValueError(f"preprocessor_config.json: {key} {held[key]!r} has no counterpart: only {value!r}")


# ------------------------------------------------------------------ texts


def _text(
    files: Mapping[str, Path], config: Mapping[str, Any], notes: list[str]
) -> tuple[Plain | None, Path | None, Cleaning | None]:
    settings = read_object(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    path = _tokenizer(files, settings, notes)
    inner = config.get("text_config") or config.get("model_cfg", {}).get("text_cfg") or {}
    if path is None:
        if inner:
            name = inner.get("hf_tokenizer_name") or "the weights"
            notes.append(f"no file of a tokenizer lies beside the weights: give that of {name}, or {_MERGES} for CLIP")
        return None, None, None
    clean = (inner.get("tokenizer_kwargs") or {}).get("clean")
    cleaning = Cleaning(canonical=True) if clean == "canonicalize" else None
    if clean not in (None, "canonicalize"):
        notes.append(f"text_cfg: the cleaning {clean!r} of texts was left aside")
    specials = read_tokenizer(path).specials
    siglip = "siglip" in f"{config.get('model_type')} {inner.get('hf_tokenizer_name')}".lower()
    options = {"begin": bool(specials.begin), "end": bool(specials.end), "pad": siglip}
    feature = {**_part(_FEATURES, "Text"), "_partial_": True, "max_length": _max_length(settings, config, inner, notes)}
    return {**feature, **{name: True for name, on in options.items() if on}}, path, cleaning


def _tokenizer(files: Mapping[str, Path], settings: Plain, notes: list[str]) -> Path | None:
    """The main file of a tokenizer: tokenizer.json first, but for SigLIP, whose class reads the SentencePiece model."""
    names = [name for name in _TOKENIZERS if name in files]
    if str(settings.get("tokenizer_class", "")).startswith("SiglipTokenizer") and "spiece.model" in names:
        names.insert(0, "spiece.model")
    if names[:1] == ["vocab.json"] and "merges.txt" not in files:
        notes.append("vocab.json has no merges.txt beside it (letters of a CTC head, for one) and was left aside")
        names.pop(0)
    return files[names[0]] if names else files.get(_MERGES)


def _max_length(settings: Plain, config: Mapping[str, Any], inner: Mapping[str, Any], notes: list[str]) -> int:
    """The least of what the tokenizer and the model name."""
    merged = {**config, **inner}
    offset = int(merged.get("pad_token_id") or 0) + 1 if merged.get("model_type") in _OFFSET_POSITIONS else 0
    positions = merged.get("max_position_embeddings") or merged.get("n_positions") or merged.get("context_length")
    limits = [settings.get("model_max_length"), positions - offset if positions else None]
    known = [int(limit) for limit in limits if limit and limit < _UNLIMITED]
    if not known:
        notes.append("no file says how long a text may be: 512 tokens were taken")
    return min(known, default=512)


_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "longformer", "clap_text_model")
"""Their first position is the one behind that of padding."""


# ------------------------------------------------------------------ shared


def _part(module: str, name: str) -> Plain:
    return {"_target_": f"{module}.{name}"}


def _wanted(held: Mapping[str, Any], key: str, of: str) -> Any:
    if held.get(key) is None:
        raise ValueError(f"the settings of {of} lack {key}: what the weights were trained with cannot be known")
    return held[key]


def _floats(value: Any) -> tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, list | tuple) else (float(value),)


def _note(held: Mapping[str, Any], known: str, where: str, notes: list[str]) -> None:
    """Say which settings are set and not among the `known`, names with a space between them."""
    names, nothing = known.split(), (None, False, "", {}, [])
    unknown = {key: value for key, value in held.items() if key not in names and value not in nothing}
    notes += [f"{where}: {key} {value!r} is not known here and was left aside" for key, value in unknown.items()]
