"""Odd data, each kind by name: it is right, listed with its reason, or refused with what to do."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from PIL import Image

from mmformer.check.check import Checked, check, open_views
from mmformer.check.look import Limits
from mmformer.checkpoints import build
from mmformer.datasets.dataset import ManifestDataset
from mmformer.datasets.features import LogMel, Picture, Text, Waveform
from mmformer.datasets.tables import ManifestError
from mmformer.datasets.tokenizers import ByteTokenizer
from mmformer.objectives import Classes, Number
from tests.campaign.trials import Outcome, attempt, folder, part
from tests.checkpoints.configs import model_config

LIMITS = Limits(max_pixels=2_000_000, max_seconds=5.0)
FEATURES: dict[str, Any] = {
    "text": Text(ByteTokenizer(), 64),
    "image": Picture(longest=16, multiple=4, max_pixels=LIMITS.max_pixels),
    "audio": LogMel(Waveform(4000, LIMITS.max_seconds), 5, 100, 50, multiple=4),
}
RNG = np.random.default_rng(0)
HEADER = ("id", "split", "text", "image", "audio", "label")
FINE, LISTED, ODD, WARNED, REFUSED = "fine", "listed", "odd", "warned", "refused"


@dataclass(frozen=True)
class Case:
    """A row among whole ones, or a whole table; what becomes of it, and a pattern of what is said."""

    expected: str
    said: str = ""
    cells: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    table: bytes | None = None
    name: str = "rows.csv"
    columns: Mapping[str, str | None] = field(default_factory=dict)
    shape: tuple[int, ...] | None = None


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def pixels(width: int = 12, height: int = 8, channels: int = 3) -> Image.Image:
    return Image.fromarray(RNG.integers(0, 256, (height, width, channels), dtype=np.uint8).squeeze())


def sound(samples: int = 1500, rate: int = 8000, form: str = "WAV", channels: int = 1, **options: Any) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, 0.1 * RNG.standard_normal((samples, channels)), rate, format=form, **options)
    return stream.getvalue()


def wav_header(data: bytes, **fields: int) -> bytes:
    """The bytes of a WAV with fields of its header overwritten."""
    places = {"riff": (4, "<I"), "channels": (22, "<H"), "rate": (24, "<I"), "size": (40, "<I")}
    out = bytearray(data)
    for name, value in fields.items():
        struct.pack_into(places[name][1], out, places[name][0], value)
    return bytes(out)


def claiming(width: int, height: int) -> bytes:
    """A PNG of 70 bytes that says that it is so large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    made = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(made)


def picture(expected: str, data: bytes, said: str = "", name: str = "odd.png", **more: Any) -> Case:
    return Case(expected, said, {"image": name, "text": "a picture"}, {name: data}, **more)


def recording(expected: str, data: bytes, said: str = "", name: str = "odd.wav", **more: Any) -> Case:
    return Case(expected, said, {"audio": name, "text": "a sound"}, {name: data}, **more)


def text(value: str, expected: str = FINE, said: str = "") -> Case:
    return Case(expected, said, {"text": value, "image": "good.png"})


def line(**cells: Any) -> bytes:
    return json.dumps(cells).encode() + b"\n"


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(pixels(12, 8), "JPEG", exif=exif)


def _float_wav(value: float) -> bytes:
    samples = np.full(500, 0.1, dtype=np.float32)
    samples[7] = value
    stream = io.BytesIO()
    soundfile.write(stream, samples, 8000, format="WAV", subtype="FLOAT")
    return stream.getvalue()


def _long_png() -> bytes:
    return saved(Image.new("L", (2000, 1500)), "PNG")


def _table(*rows: str, header: str = "id,split,text,label") -> bytes:
    return ("\n".join([header, *rows]) + "\n").encode()


FRAMES = [pixels(), pixels(), pixels()]
CASES: dict[str, Case] = {
    # files that are none
    "missing file": Case(LISTED, "no such file", {"image": "gone.png", "text": "x"}),
    "folder": Case(LISTED, "a folder, not a file", {"image": "sub", "text": "x"}),
    "pipe": Case(LISTED, "not a regular file", {"image": "fifo.png", "text": "x"}),
    "empty file": picture(LISTED, b"", "empty: 0 bytes"),
    "link out of the folder": Case(LISTED, "leads out", {"image": "link.png", "text": "x"}),
    "link in a circle": Case(LISTED, "not a path|leads out|cannot be read", {"image": "circle.png", "text": "x"}),
    "path out of the folder": Case(LISTED, "leads out", {"image": "../x.png", "text": "x"}),
    "absolute path": Case(LISTED, "leads out", {"image": "/etc/hostname", "text": "x"}),
    "address": Case(LISTED, "an address", {"image": "http://127.0.0.1/x.png", "text": "x"}),
    "file address": Case(LISTED, "an address", {"image": "file:///etc/hostname", "text": "x"}),
    "pipe address": Case(LISTED, "an address", {"image": "pipe:cat /etc/hostname", "text": "x"}),
    "name of 255 bytes": picture(FINE, saved(pixels(), "PNG"), name="x" * 251 + ".png"),
    "name of 300 bytes": Case(LISTED, "cannot be read|not a path", {"image": "x" * 300, "text": "x"}),
    "name with spaces and accents": picture(FINE, saved(pixels(), "PNG"), name="ä b\u200b 図.png"),
    "a NUL in a name": Case(
        LISTED, "not a path", table=line(id="g", text="a", label="a") + line(id="odd", text="x", image="a\0b.png"),
        name="rows.jsonl",
    ),
    # tables
    "empty table": Case(REFUSED, "no rows", table=b""),
    "header alone": Case(REFUSED, "no rows", table=b"id,text\n"),
    "one row": Case(WARNED, "no row is in split", table=_table("1,train,hello,a")),
    "one class": Case(WARNED, "one class only", table=_table("1,train,x,a", "2,train,y,a", "3,val,z,a", "4,test,w,a")),
    "no such column": Case(REFUSED, "no column 'photo'", columns={"image": "photo"}),
    "nothing to read": Case(REFUSED, "no column called text, image or audio", table=b"id,name\n1,x\n"),
    "double ids": Case(REFUSED, "ids stand in several rows: 'a'", table=_table("a,train,x,a", "a,train,y,b")),
    "missing id": Case(REFUSED, "have no id", table=_table("a,train,x,a", ",train,y,b")),
    "another split": Case(REFUSED, "split", table=_table("a,train,x,a", "b,holdout,y,b")),
    "semicolons": Case(FINE, table=_table("1;train;x;a", "2;train;y;b", header="id;split;text;label")),
    "tabs in a .csv": Case(FINE, table=_table("1\ttrain\tx\ta", "2\ttrain\ty\tb", header="id\tsplit\ttext\tlabel")),
    "byte order mark": Case(FINE, table=b"\xef\xbb\xbf" + _table("1,train,x,a", "2,train,y,b")),
    "mixed newlines": Case(FINE, table=b"id,split,text,label\r\n1,train,x,a\n2,train,y,b\r\n"),
    "newlines in quotes": Case(FINE, table=_table('1,train,"x\ny",a', '2,train,"z\r\nw",b')),
    "unclosed quote": Case(REFUSED, "unclosed or stray quote", table=_table('1,train,"x,a', "2,train,y,b")),
    "a cell too many": Case(REFUSED, "Expected 4 columns, got 5", table=_table("1,train,x,a", "2,train,y,b,c")),
    "Latin-1": Case(REFUSED, "is not UTF-8", table=_table("1,train,x,a") + b"2,train,\xe9t\xe9,b\n"),
    "broken JSON": Case(REFUSED, "line 2 is not JSON", table=line(id=1, text="a") + b'{"id": 2,\n', name="rows.jsonl"),
    "JSON of lists": Case(REFUSED, "line 1 is a list", table=b"[1]\n", name="rows.jsonl"),
    "cut Parquet": Case(REFUSED, "damaged Parquet", table=b"PAR1 and no more", name="rows.parquet"),
    # labels
    "label NaN": Case(REFUSED, "label.*nan", table=_table("1,train,x,1.5", "2,train,y,nan", "3,train,z,2.5")),
    "label infinite": Case(REFUSED, "label", table=_table("1,train,x,1.5", "2,train,y,inf", "3,train,z,2.5")),
    "label missing": Case(WARNED, "1 rows have no label", table=_table("1,train,x,a", "2,train,y,", "3,train,z,b")),
    "label that no row trains": Case(
        WARNED, "classes have no row that trains: 'c'", table=_table("1,train,x,a", "2,train,y,b", "3,val,z,c")
    ),
    "class of one sample": Case(
        WARNED, "have one row that trains: 'b'", table=_table("1,train,x,a", "2,train,y,a", "3,train,z,b", "4,val,w,a")
    ),
    "labels of mixed kinds": Case(FINE, table=_table("1,train,x,7", "2,train,y,b", "3,train,z,8.5")),
    # sounds
    "no samples": recording(LISTED, sound(0), "zero-length"),
    "one sample": recording(FINE, sound(1)),
    "silence": recording(ODD, wav_header(sound(800), riff=36 + 1600)[:44] + bytes(1600), "silent"),
    "8 channels": recording(FINE, sound(channels=8)),
    "192 kHz": recording(FINE, sound(rate=192_000)),
    "a rate of 1 Hz": recording(FINE, sound(3, rate=1)),
    "a rate of 0": recording(LISTED, wav_header(sound(), rate=0), "not a whole recording|sample rate"),
    "a rate of 4e9": recording(LISTED, wav_header(sound(), rate=4_000_000_000), "not a whole recording|sample rate"),
    "no channels": recording(LISTED, wav_header(sound(), channels=0), "not a whole recording"),
    "NaN among samples": recording(LISTED, _float_wav(float("nan")), "1 samples are NaN or infinite"),
    "infinity among samples": recording(LISTED, _float_wav(float("inf")), "1 samples are NaN or infinite"),
    "24 bits": recording(FINE, sound(subtype="PCM_24")),
    "8 bits": recording(FINE, sound(subtype="PCM_U8")),
    "a header of 4 GB": recording(LISTED, wav_header(sound(), size=0xFFFFFFF0), "cut off: its header says"),
    "too long": recording(LISTED, sound(9000, rate=1000), "9.0 s, more than the limit"),
    "text as sound": recording(LISTED, b"no sound at all, but long enough to be one", "not a whole recording"),
    "cut FLAC": recording(LISTED, sound(form="FLAC")[:-60], "cut off|not a whole", name="odd.flac"),
    "MP3": recording(FINE, sound(4000, form="MP3"), name="odd.mp3"),
    # pictures
    "1 x 1": picture(FINE, saved(pixels(1, 1), "PNG"), shape=(4, 4)),
    "1 x 40": picture(FINE, saved(pixels(40, 1), "PNG")),
    "CMYK": picture(FINE, saved(pixels().convert("CMYK"), "JPEG"), name="odd.jpg"),
    "16 bits": picture(
        FINE, saved(Image.fromarray(RNG.integers(0, 65536, (8, 12), dtype=np.uint16)), "PNG"), shape=(8, 12)
    ),
    "palette with transparency": picture(FINE, saved(pixels().quantize(8), "PNG", transparency=0)),
    "grey with alpha": picture(FINE, saved(pixels(channels=4).convert("LA"), "PNG")),
    "1 bit": picture(FINE, saved(pixels().convert("1"), "PNG")),
    "animated GIF": picture(
        FINE, saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), name="odd.gif", shape=(8, 12)
    ),
    "animated PNG": picture(FINE, saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), shape=(8, 12)),
    "turned by EXIF": picture(FINE, _exif(6), name="odd.jpg", shape=(12, 8)),
    "EXIF that is none": picture(FINE, saved(pixels(), "JPEG", exif=b"Exif\0\0garbage"), name="odd.jpg"),
    "a broken colour profile": picture(FINE, saved(pixels(), "PNG", icc_profile=b"no profile at all")),
    "progressive": picture(FINE, saved(pixels(), "JPEG", progressive=True), name="odd.jpg"),
    "floats in a TIFF": picture(
        LISTED, saved(Image.fromarray(RNG.random((8, 12), dtype=np.float32)), "TIFF"), "no known range", "odd.tif"
    ),
    "more pixels than allowed": picture(LISTED, _long_png(), "2000 x 1500 pixels, more than the limit"),
    "a header of 60000 x 60000": picture(LISTED, claiming(60_000, 60_000), "more pixels|more than the limit"),
    "text as picture": picture(LISTED, b"no picture at all", "not a whole picture"),
    "PostScript": picture(LISTED, b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a whole picture"),
    "sound as picture": picture(LISTED, sound(), "not a whole picture"),
    # texts
    "a text of white space": text("  \t "),
    "the word nan": text("nan"),
    "the word None": text("None"),
    "1 MB of text": text("long " * 200_000),
    "from right to left": text("שלום עולם \u202eabc"),
    "emoji": text("👩‍👩‍👧‍👦🏳️‍🌈"),
    "combining marks": text("e\u0301" * 30 + "\u0301" * 200),
    "a NUL in a text": Case(
        ODD, "holds NUL", table=line(id="g", text="a", label="a") + line(id="odd", text="a\0b", label="b"),
        name="rows.jsonl",
    ),
    "half a surrogate pair": Case(
        ODD, "half of a surrogate pair",
        table=line(id="g", text="a", label="a") + b'{"id": "odd", "text": "\\ud800 x", "label": "b"}\n',
        name="rows.jsonl",
    ),
    "a number as text": Case(
        FINE, table=line(id="g", text="a", label="a") + line(id="odd", text=5, label="b"), name="rows.jsonl"
    ),
    # rows
    "nothing in a row": Case(LISTED, "none of its cells holds anything"),
    "a picture alone": Case(FINE, "", {"image": "good.png"}),
    "a sound alone": Case(FINE, "", {"audio": "good.wav"}),
    "the same row in train and test": Case(
        FINE, table=_table("1,train,hello,a", "2,train,other,b", "3,test,Hello!,a")
    ),
}  # fmt: skip


def write(place: Path, case: Case) -> Path:
    """The files of a case and three whole rows beside its own."""
    place.mkdir()
    (place / "good.png").write_bytes(saved(pixels(), "PNG"))
    (place / "good.wav").write_bytes(sound())
    (place / "sub").mkdir()
    os.mkfifo(place / "fifo.png")
    (place.parent / "outside.png").write_bytes(saved(pixels(), "PNG"))
    (place / "link.png").symlink_to(place.parent / "outside.png")
    (place / "circle.png").symlink_to(place / "circle.png")
    for name, data in case.files.items():
        (place / name).write_bytes(data)
    path = place / case.name
    if case.table is not None:
        path.write_bytes(case.table)
        return path
    good = {"split": "train", "text": "good", "image": "good.png", "audio": "good.wav"}
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, HEADER, restval="")
        writer.writeheader()
        writer.writerows(good | {"id": f"g{i}", "label": "ab"[i % 2]} for i in range(3))
        writer.writerow({"id": "odd", "split": "train", "label": "a", **case.cells})
    return path


def one(place: Path, case: Case) -> str | None:
    """Check a table and train two steps on it; what is other than expected."""
    path = write(place, case)
    try:
        manifest, views = open_views(path, dict(case.columns), references={}, allow_outside_root=False)
    except ManifestError as error:
        if case.expected != REFUSED:
            return f"refused: {error}"
        return None if re.search(case.said, str(error)) else f"refused otherwise: {error}"
    if case.expected == REFUSED:
        return "not refused"
    found = check(manifest, views, LIMITS, seconds=30.0, workers=1)
    return _judged(found, case) or _trained(found, case)


def _judged(found: Checked, case: Case) -> str | None:
    said = {
        LISTED: [f"{fault.id}: {fault.reason}" for fault in found.broken],
        ODD: [f"{fault.id}: {fault.reason}" for fault in found.odd],
        WARNED: list(found.warnings),
    }
    if case.expected != LISTED and found.broken:
        return f"listed: {said[LISTED]}"
    wanted = said.get(case.expected)
    if wanted is None:
        return None
    hits = [line for line in wanted if re.search(case.said, line)]
    if case.expected in (LISTED, ODD):
        return (
            None
            if [line.split(":")[0] for line in hits] == ["odd"] == [line.split(":")[0] for line in wanted]
            else f"said {wanted}"
        )
    return None if hits else f"said {wanted}"


def _trained(found: Checked, case: Case) -> str | None:
    """Two steps on all rows: what a check lists is listed, and nothing else is missing."""
    manifest = found.manifest
    features = {name: FEATURES[name] for name in manifest.modalities}
    batch = ManifestDataset(manifest, None, features).__getitems__([(0, i) for i in range(len(manifest))])
    listed = {fault.id for fault in batch.faults}
    if listed != {fault.id for fault in found.broken}:
        return f"training lists {listed}, the check {[fault.id for fault in found.broken]}"
    if case.shape is not None:
        shapes = dict(zip(batch.inputs["image"].rows, batch.inputs["image"].shapes, strict=True))
        if shapes[batch.ids.index("odd")] != case.shape:
            return f"a picture of {shapes[batch.ids.index('odd')]}"
    label = manifest.label
    if label is None or not len(batch):
        return None
    torch.manual_seed(0)
    model = build(model_config(num_classes=label.num_outputs))
    objective = (Number if label.kind == "Number" else Classes)("label", "label")
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    for _ in range(2):
        losses = objective(model, model.encode(batch), batch)
        loss = losses["loss"]
        if not torch.isfinite(loss):
            return f"a loss of {loss}"
        optimizer.zero_grad()
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
    finite = all(bool(p.isfinite().all()) for p in model.parameters())
    return None if finite else "weights that are not finite"


def trials(share: float, seed: int) -> Iterator[Outcome]:
    """Each kind of odd data: a whole check, and two steps of training."""
    with folder("D2") as root:
        for i, (name, case) in enumerate(part(list(CASES.items()), share)):
            (root / f"{i}").mkdir()
            yield attempt(f"{name}: {case.expected}", partial(one, root / f"{i}" / "set", case))
