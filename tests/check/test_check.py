"""What `mmformer data check` finds: every fault is planted here, and named to its row."""

from __future__ import annotations

import io
import json
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from mmformer.check.check import check, open_views
from mmformer.check.look import Limits, look_at_text, picture_print, riff_note, sound_print
from mmformer.check.pool import each
from mmformer.check.twins import nearly, same
from mmformer.cli import main
from mmformer.datasets.manifest import read_manifest
from mmformer.datasets.sources import DecodeError
from mmformer.datasets.tables import ManifestError

LIMITS = Limits(max_pixels=1_000_000, max_seconds=5.0)
RNG = np.random.default_rng(0)


def scene(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def tune(seed: int, seconds: float = 1.0, rate: int = 8000) -> np.ndarray:
    time = np.arange(int(seconds * rate)) / rate
    notes = np.random.default_rng(seed).integers(200, 3000, 9)
    return np.concatenate(
        [0.3 * np.sin(2 * np.pi * f * part) for f, part in zip(notes, np.array_split(time, 9), strict=True)]
    )


@pytest.fixture
def folder(tmp_path) -> Path:
    """24 rows: most whole; a cut, a missing and a hostile file, an empty row, copies and leaks."""
    rows = ["id,split,text,image,audio,label"]
    for i in range(20):
        split = "train" if i < 14 else "val" if i < 17 else "test"
        scene(i).save(tmp_path / f"{i}.png")
        soundfile.write(tmp_path / f"{i}.wav", tune(i), 8000)
        rows.append(f"r{i},{split},{f'text {i}' if i % 3 else ''},{i}.png,{f'{i}.wav' if i % 4 else ''},{'ab'[i % 2]}")
    scene(3).save(tmp_path / "same.png")
    scene(4, (128, 96)).save(tmp_path / "near.jpg", quality=80)
    soundfile.write(tmp_path / "near.ogg", 0.5 * tune(5), 8000)
    (tmp_path / "cut.png").write_bytes((tmp_path / "1.png").read_bytes()[:-40])
    long = (tmp_path / "2.wav").read_bytes()
    (tmp_path / "odd.wav").write_bytes(long[:4] + struct.pack("<I", 9) + long[8:])
    rows += [
        "leak,test,,same.png,,a",
        "near,test,,near.jpg,near.ogg,b",
        "cut,train,TEXT  2!,cut.png,,a",
        "gone,train,,gone.png,odd.wav,b",
        "out,val,x,../out.png,,a",
        "none,train,,,,rare",
    ]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


def checked(path: Path, **options):
    manifest, views = open_views(path, {}, references={}, allow_outside_root=False, **options)
    return check(manifest, views, LIMITS, seconds=20.0, workers=2)


def test_every_fault_is_named_to_its_row(folder):
    found = checked(folder / "rows.csv")
    listed = {fault.id: (fault.row, fault.column, fault.path, fault.reason) for fault in found.broken}
    assert list(listed) == ["cut", "gone", "out", "none"]
    assert listed["cut"][:3] == (23, "image", "cut.png")
    assert "cut off" in listed["cut"][3]
    assert listed["gone"][1:] == ("image", "gone.png", "no such file")
    assert "leads out" in listed["out"][3]
    assert listed["none"][1:] == ("row", "", "none of its cells holds anything")
    assert [(odd.id, odd.path) for odd in found.odd] == [("gone", "odd.wav")]
    assert re.search(r"its RIFF header says 9 bytes, [\d,]+ are there", found.odd[0].reason)
    assert found.num_files == 20 + 15 + 7
    assert found.broken_rows.tolist() == [22, 23, 24, 25]
    assert "1 classes have one row that trains: 'rare'" in found.warnings


def test_copies_and_leaks_are_found_exactly_and_nearly(folder):
    twins = {(t.modality, t.nearly): t for t in checked(folder / "rows.csv").twins}
    assert twins["image", False].copies == 1
    assert twins["image", False].leaked == {"test": 1}
    assert twins["image", False].pairs == (("leak (same.png)", "r3 (3.png)"),)
    assert twins["image", True].leaked == {"test": 2}
    assert ("near (near.jpg)", "r4 (4.png)") in twins["image", True].pairs
    assert twins["audio", False].leaked == {}
    assert twins["audio", True].leaked == {"test": 1}
    assert twins["text", False].copies == 1
    assert twins["row", False].copies == 0


def test_rows_of_which_all_is_the_same(tmp_path):
    (tmp_path / "a.csv").write_text("id,split,text,label\n1,train,Hello!,a\n2,test,hello,b\n3,val,other,a\n")
    found = checked(tmp_path / "a.csv")
    assert (found.twins[0].copies, found.twins[0].leaked, found.twins[0].pairs) == (1, {"test": 1}, (("2", "1"),))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["data", "check", *arguments])
    return int(ended.value.code or 0)


def test_the_command_lists_writes_a_page_and_ends_with_2(folder, capsys):
    assert run(str(folder / "rows.csv"), "--html", str(folder / "report.html"), "--workers", "2") == 2
    said = capsys.readouterr().out
    assert "4 cells in 4 rows cannot be used" in said
    assert "row 23 (id 'cut'), image, cut.png: " in said
    page = (folder / "report.html").read_text()
    assert not re.search(r"(src|href)=\"(?!data:)", page), "the page asks for something"
    for part in (
        "What cannot be used",
        "Copies and leaks",
        "What samples have",
        "Classes of &#x27;label&#x27;",
        "Sizes",
    ):
        assert part in page, part
    assert page.count("<audio") > 3
    assert page.count("<img") > 10
    assert "text + image + audio" in page


def test_clean_rows_are_those_without_a_fault_and_check_clean(folder, capsys):
    assert run(str(folder / "rows.csv"), "--write-clean", str(folder / "clean.csv"), "--json") == 2
    plain = json.loads(capsys.readouterr().out)
    assert [fault["id"] for fault in plain["broken"]] == ["cut", "gone", "out", "none"]
    before, after = read_manifest(folder / "rows.csv"), read_manifest(folder / "clean.csv")
    ids = [before.id(row) for row in range(len(before))]
    assert [after.id(row) for row in range(len(after))] == [
        id for id in ids if id not in ("cut", "gone", "out", "none")
    ]
    assert [after.text(row) for row in range(5)] == [before.text(row) for row in range(5)]
    assert run(str(folder / "clean.csv")) == 0
    assert run(str(folder / "rows.csv"), "--write-clean", str(folder / "sub" / "clean.csv")) == 2
    assert "as the paths in it start there" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["clean.tsv", "clean.jsonl", "clean.parquet"])
def test_clean_rows_in_other_formats_hold_the_same(folder, name):
    run(str(folder / "rows.csv"), "--write-clean", str(folder / name))
    clean = read_manifest(folder / name)
    assert len(clean) == 22
    assert clean.column("text")[:3] == [None, "text 1", "text 2"]
    assert clean.column("label")[-1] == "b"


def test_cells_that_a_format_cannot_hold_are_an_error(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"id": 1, "text": "a", "more": [1, 2]}\n')
    assert run(str(tmp_path / "a.jsonl"), "--write-clean", str(tmp_path / "b.csv")) == 2
    assert "cannot hold a cell of list: call it .parquet or .jsonl" in capsys.readouterr().err
    assert run(str(tmp_path / "a.jsonl"), "--write-clean", str(tmp_path / "b.txt")) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_checksums_are_written_then_compared(folder, capsys):
    run(str(folder / "rows.csv"), "--checksums")
    assert "39 checksums in" in capsys.readouterr().err
    data = bytearray((folder / "7.wav").read_bytes())
    data[3000] ^= 1
    (folder / "7.wav").write_bytes(data)
    run(str(folder / "rows.csv"))
    said = capsys.readouterr().out
    assert "compared with their checksums" in said
    assert re.search(r"row 8 \(id 'r7'\), audio, 7\.wav: damaged or changed: its sha256 is", said)


def test_conversations_are_checked_with_all_their_media(folder, capsys):
    line = '{{"id": "{0}", "split": "train", "images": {1}, "turns": [{{"role": "user", "text": "{2}"}}, '
    line += '{{"role": "assistant", "text": "a thing"}}]}}\n'
    (folder / "chat.jsonl").write_text(
        line.format("one", '["1.png", "cut.png"]', "<image> and <image>") + line.format("two", '["2.png"]', "<image>?")
    )
    found = checked(folder / "chat.jsonl")
    assert [(fault.row, fault.id, fault.column, fault.path) for fault in found.broken] == [
        (1, "one", "images", "cut.png")
    ]
    assert run(str(folder / "chat.jsonl"), "--html", str(folder / "chat.html")) == 2
    assert "image" in (folder / "chat.html").read_text()


def test_a_wrong_call_is_one_line(folder, capsys):
    assert run(str(folder / "rows.csv"), "--column", "image") == 2
    assert "'image': write it as image=photo" in capsys.readouterr().err
    assert run(str(folder / "no.csv")) == 2
    assert "no such file" in capsys.readouterr().err


def test_archives_are_checked_but_not_cleaned(folder, tmp_path_factory):
    import zipfile

    path = tmp_path_factory.mktemp("zip") / "set.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in folder.iterdir():
            archive.write(file, file.name)
    found = checked(path)
    assert [fault.id for fault in found.broken] == ["cut", "gone", "out", "none"]
    from mmformer.check import write_clean

    with pytest.raises(ManifestError, match="is an archive: unpack it"):
        write_clean(found, path.parent / "clean.csv")


# ---------------------------------------------------------------------- the parts


def test_the_pool_answers_every_value_whatever_the_others_do():
    def work(value: int) -> int:
        if value % 5 == 3:
            raise DecodeError(f"no {value}")
        if value == 7:
            import ctypes

            ctypes.string_at(0)
        return value * value

    found = dict(each(work, iter(range(12)), 10.0, 3))
    assert sorted(found) == list(range(12))
    assert {place: str(value) for place, value in found.items() if isinstance(value, DecodeError)} == {
        3: "no 3",
        8: "no 8",
        7: "its decoder was killed by SIGSEGV",
    }
    assert all(value == place * place for place, value in found.items() if not isinstance(value, DecodeError))


@pytest.mark.parametrize("seed", range(4))
def test_fingerprints_survive_a_new_encoding_and_tell_others_apart(seed):
    a, b = scene(seed), scene(seed + 100)
    stream = io.BytesIO()
    a.resize((200, 150), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=60)
    again = Image.open(stream)
    prints = [picture_print(np.asarray(picture)) for picture in (a, again, b)]
    assert nearly(same("xyz"), prints, [4 / 3] * 3, 0.985).tolist() == [0, 0, 2]
    noisy = 0.4 * tune(seed) + 0.0005 * RNG.standard_normal(8000)
    sounds = [sound_print(part.astype(np.float32)) for part in (tune(seed), noisy, tune(seed + 100))]
    assert nearly(same("xyz"), sounds, [1.0] * 3, 0.998).tolist() == [0, 0, 2]
    assert nearly(same("xyz"), sounds, [1.0, 1.1, 1.0], 0.998).tolist() == [0, 1, 2], "another duration"


def test_what_is_flat_is_like_nothing():
    assert picture_print(np.full((20, 20, 3), 7, dtype=np.uint8)) is None
    assert sound_print(np.zeros(4000, dtype=np.float32)) is None
    assert nearly(same("xy"), [None, None], [1.0, 1.0], 0.9).tolist() == [0, 1]


def test_many_of_one_kind_are_still_found_together():
    prints = [picture_print(np.asarray(scene(1 if i % 2 else 2))) for i in range(300)]
    found = nearly(same(list(range(300))), prints, [1.0] * 300, 0.985)
    assert set(found.tolist()) == {0, 1}


def test_texts_are_compared_by_their_words():
    digests = [look_at_text(text).digest for text in ("A cat, sat.", "a  CAT sat", "\uff21 cat\nsat!", "a dog sat")]
    assert digests[0] == digests[1] == digests[2] != digests[3]
    assert look_at_text("?!").digest != look_at_text("!!").digest
    assert look_at_text("a\0b").note == "holds NUL"
    assert look_at_text("\ud800").note == "holds half of a surrogate pair"


def test_riff_lengths():
    assert riff_note(b"RIFF" + struct.pack("<I", 8) + b"WAVEdata") == ""
    assert riff_note(b"RIFF" + struct.pack("<I", 7) + b"WAVEdata") == ""
    assert riff_note(b"RIFF" + struct.pack("<I", 0) + b"WAVEdata") == "its RIFF header says 0 bytes, 8 are there"
    assert riff_note(b"RIFF" + b"\xff" * 4 + b"WAVEdata") == ""
    assert riff_note(b"\x89PNG") == ""


def test_the_command_is_light_to_import():
    import subprocess

    code = "import sys, mmformer.cli.data; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
