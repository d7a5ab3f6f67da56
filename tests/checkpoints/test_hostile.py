"""Files that someone made to harm: each is written here, refused with a reason, and its canary stays unborn."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mmformer.checkpoints import source as source_module
from mmformer.checkpoints.archives import scripted_tensors
from mmformer.checkpoints.source import open_source
from mmformer.checkpoints.store import RefusedFile


@pytest.fixture
def canary(tmp_path: Path):
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the file ran code"


class Payload:
    """Unpickled without care it runs a command."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


# Pickles.


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", ["model.pt", "model.pth", "last.ckpt", "pytorch_model.bin"])
def test_a_pickle_with_a_payload_is_refused(tmp_path, canary, name, zipped):
    path = tmp_path / name
    content = {"state_dict": {"w": torch.zeros(2)}, "extra": Payload(canary)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(RefusedFile, match=rf"{name} holds more than tensors .* could run code: refused.*system"):
        open_source(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol 4")  # torch, of a protocol it does not write
def test_a_bare_pickle_is_refused(tmp_path, canary):
    path = tmp_path / "model.pt"
    for protocol in (0, 2, 4):
        path.write_bytes(pickle.dumps(Payload(canary), protocol=protocol))
        with pytest.raises(RefusedFile):
            open_source(path)


@pytest.mark.parametrize("name", ["mod.safetensors", "model.safetensors"])
def test_a_pickle_under_another_name_is_refused(tmp_path, canary, name):
    torch.save({"w": Payload(canary)}, tmp_path / name)
    with pytest.raises(RefusedFile, match="no valid safetensors file: its header claims"):
        open_source(tmp_path / name)


def test_the_payload_would_have_run(tmp_path):
    # The tests above are worth something only if this pickle harms a careless reader.
    path, canary = tmp_path / "model.pt", tmp_path / "harmed"
    torch.save({"w": Payload(canary)}, path)
    torch.load(path, weights_only=False)
    assert canary.exists()


# TorchScript archives, whose pickle is read by our own unpickler.


def scripted(path: Path, pickled: bytes, members: dict[str, bytes] | None = None, **how) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickled)
        archive.writestr("model/constants.pkl", b"\x80\x02).")
        archive.writestr("model/version", b"3\n")
        for name, content in (members or {}).items():
            archive.writestr(name, content, **how)
    return path


def tensor_pickle(dtype="FloatStorage", key="0", numel=4, size=(2, 2), stride=(2, 1), offset=0) -> bytes:
    """The pickle of a module with one tensor, as TorchScript writes it; the opcodes are those of pickletools."""

    def row(numbers):
        return "(" + "".join(f"I{number}\n" for number in numbers) + "t"

    storage = f"(Vstorage\nctorch\n{dtype}\nV{key}\nVcpu\nI{numel}\ntQ"
    tensor = f"ctorch._utils\n_rebuild_tensor_v2\n({storage}I{offset}\n{row(size)}{row(stride)}I00\nNtR"
    return b"\x80\x02c__torch__\nNet\n)\x81}(" + f"Vweight\n{tensor}ub.".encode()


NUMBERS = struct.pack("<4f", 1, 2, 3, 4)


def test_the_hand_made_archive_is_read_as_it_should(tmp_path):
    path = scripted(tmp_path / "clip.pt", tensor_pickle(), {"model/data/0": NUMBERS})
    assert scripted_tensors(path)["weight"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("name", ["posix system", "builtins eval", "torch.jit load", "os system", "builtins getattr"])
def test_torchscript_that_asks_for_anything_else_is_refused(tmp_path, canary, name):
    call = f"c{name.replace(' ', chr(10))}\n(S'touch {canary}'\ntR.".encode()
    path = scripted(tmp_path / "clip.pt", b"\x80\x02" + call)
    with pytest.raises(RefusedFile, match=rf"asks for {name.replace(' ', '.')}: refused"):
        open_source(path)


def test_code_of_a_torchscript_archive_is_not_looked_at(tmp_path, canary):
    code = f"import os\nos.system('touch {canary}')\n".encode()
    members = {"model/data/0": NUMBERS, "model/code/__torch__.py": code}
    assert open_source(scripted(tmp_path / "clip.pt", tensor_pickle(), members)).has("weight")


@pytest.mark.parametrize(
    "lie",
    [{"numel": 5}, {"size": (3, 2)}, {"offset": 1}, {"offset": -1}, {"stride": (9, 9)}, {"stride": (-1, 1)},
     {"size": (-2, 2)}, {"key": "1"}, {"key": "../../canary"}, {"dtype": "DoubleStorage"}, {"dtype": "Storage"}],
    ids=str,
)  # fmt: skip
def test_torchscript_tensors_stay_inside_their_numbers(tmp_path, lie):
    path = scripted(tmp_path / "clip.pt", tensor_pickle(**lie), {"model/data/0": NUMBERS})
    with pytest.raises(RefusedFile):
        open_source(path)


@pytest.mark.parametrize("cut", [1, 5, 40, 200])
def test_damaged_torchscript_is_refused(tmp_path, cut):
    whole = tensor_pickle()
    with pytest.raises(RefusedFile):
        open_source(scripted(tmp_path / "clip.pt", whole[: -min(cut, len(whole) - 1)], {"model/data/0": NUMBERS}))


# Archives.


@pytest.mark.parametrize("script", [True, False], ids=["torchscript", "torch.save"])
@pytest.mark.parametrize(
    "name", ["../../canary", "/tmp/canary", "model/data/../../../canary", "model\\..\\canary", "C:\\canary"]
)
def test_an_archive_with_a_path_out_of_it_is_refused(tmp_path, canary, name, script):
    path = tmp_path / "model.pt"
    if script:
        scripted(path, tensor_pickle(), {"model/data/0": NUMBERS, name: b"x"})
    else:
        torch.save({"w": torch.zeros(2)}, path)
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, b"x")
    with pytest.raises(RefusedFile, match="points out of it: refused"):
        open_source(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pt"]


def test_an_archive_with_a_link_is_refused(tmp_path):
    path = scripted(tmp_path / "model.pt", tensor_pickle(), {"model/data/0": NUMBERS})
    link = zipfile.ZipInfo("model/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(RefusedFile, match="holds the link 'model/link'"):
        open_source(path)


def test_an_archive_with_a_name_twice_is_refused(tmp_path):
    path = scripted(tmp_path / "model.pt", tensor_pickle(), {"model/data/0": NUMBERS})
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("model/data/0", b"\0" * 16)
    with pytest.raises(RefusedFile, match="holds 'model/data/0' twice"):
        open_source(path)


def test_a_bomb_is_refused_unread(tmp_path, monkeypatch):
    monkeypatch.setattr("mmformer.checkpoints.archives.CODE_LIMIT", 1000)
    path = scripted(
        tmp_path / "a.pt", tensor_pickle(), {"model/code/x.py": b"0" * 5000}, compress_type=zipfile.ZIP_DEFLATED
    )
    with pytest.raises(RefusedFile, match="would unpack to 5000 bytes"):
        open_source(path)
    path = scripted(tmp_path / "b.pt", tensor_pickle(), {"model/data/0": NUMBERS}, compress_type=zipfile.ZIP_DEFLATED)
    with pytest.raises(RefusedFile, match="holds the compressed tensor 'model/data/0'"):
        open_source(path)


@pytest.mark.parametrize("keep", [0.2, 0.9, 0.999])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_truncated_file_is_refused(tmp_path, keep, zipped):
    path = tmp_path / "model.pt"
    torch.save({"w": torch.randn(1000), "v": torch.randn(1000)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(keep * path.stat().st_size)])
    with pytest.raises(RefusedFile, match="damaged"):
        open_source(path)


@pytest.mark.parametrize("content", [b"", b"P", b"<html>404</html>", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_file_of_weights_is_named(tmp_path, content):
    (tmp_path / "model.pt").write_bytes(content)
    with pytest.raises(RefusedFile, match=r"model\.pt is no file of weights"):
        open_source(tmp_path / "model.pt")


# safetensors.


def raw(path: Path, header: str | bytes | dict, data: bytes = bytes(16), length: int | None = None) -> Path:
    text = (
        json.dumps(header).encode()
        if isinstance(header, dict)
        else header.encode()
        if isinstance(header, str)
        else header
    )
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(begin: int, end: int, shape: list | None = None, dtype: str = "F32", **more) -> dict:
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
    } | more


HUGE = "[" * 100_000
ABUSES = {
    "header longer than the file": ({"header": {"a": entry(0, 16)}, "length": 10_000}, "header claims 10000 bytes"),
    "header of exabytes": ({"header": {"a": entry(0, 16)}, "length": 2**63 + 1}, "header claims 9223372036854775809"),
    "header over the limit": ({"header": b" " * 2000, "length": 2000}, "are the limit"),
    "no header": ({"header": b"", "data": b""}, "Expecting value"),
    "header is no JSON": ({"header": "not json"}, "Expecting value"),
    "header is no text": ({"header": b"\xff\xfe{}"}, "can't decode"),
    "header is a list": ({"header": "[]"}, "no object"),
    "header is nested beyond reason": ({"header": '{"a":' + HUGE}, "recursion"),
    "one offset overlaps": ({"header": {"a": entry(0, 12), "b": entry(8, 16)}}, "'b' starts at 8, inside another"),
    "two tensors share bytes": ({"header": {"a": entry(0, 16), "b": entry(0, 16)}}, "'b' starts at 0, inside another"),
    "hole in the middle": ({"header": {"a": entry(0, 4), "b": entry(8, 16)}}, "'b' starts at 8, after a hole"),
    "hole in front": ({"header": {"a": entry(8, 16)}}, "'a' starts at 8, after a hole"),
    "bytes behind": ({"header": {"a": entry(0, 8)}}, "its tensors end at"),
    "offset past the file": ({"header": {"a": entry(0, 64)}}, "its tensors end at"),
    "offsets backwards": ({"header": {"a": entry(16, 0, [4])}}, r"is \[4\] of F32, but has -16 bytes"),
    "negative offset": ({"header": {"a": entry(-16, 0)}}, "offsets"),
    "shape that lies": ({"header": {"a": entry(0, 16, [5])}}, r"is \[5\] of F32, but has 16 bytes"),
    "negative shape": ({"header": {"a": entry(0, 16, [-2, -2])}}, "shape"),
    "shape that overflows": ({"header": {"a": entry(0, 16, [2**62, 2**62])}}, "but has 16 bytes"),
    "shape of fractions": ({"header": {"a": entry(0, 16, [4.0])}}, r"shape \[4\.0\]"),
    "shape of truths": ({"header": {"a": entry(0, 4, [True])}, "data": bytes(4)}, r"shape \[True\]"),
    "no shape": ({"header": {"a": entry(0, 16, "4")}}, "shape '4'"),  # pyright: ignore[reportArgumentType]
    "unknown type": ({"header": {"a": entry(0, 16, dtype="F33")}}, "dtype 'F33'"),
    "type that lies": ({"header": {"a": entry(0, 16, [4], dtype="F64")}}, r"is \[4\] of F64, but has 16 bytes"),
    "more keys than belong": ({"header": {"a": entry(0, 16, code="x")}}, "not described by"),
    "fewer keys than belong": ({"header": {"a": {"dtype": "F32"}}}, "not described by"),
    "key twice": (
        {"header": json.dumps({"a": entry(0, 16), "b": entry(0, 16)}).replace('"b"', '"a"')},
        "the key 'a' stands there twice",
    ),
    "key twice inside": (
        {"header": '{"a":{"dtype":"F32","dtype":"F64","shape":[4],"data_offsets":[0,16]}}'},
        "the key 'dtype' stands there twice",
    ),
    "metadata of another kind": ({"header": {"__metadata__": [1], "a": entry(0, 16)}}, "metadata are not texts"),
    "metadata that are no texts": ({"header": {"__metadata__": {"x": {}}, "a": entry(0, 16)}}, "not texts by name"),
    "three offsets": ({"header": {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8, 16]}}}, "offsets"),
}  # fmt: skip


@pytest.mark.parametrize("abuse", ABUSES)
def test_abuses_of_safetensors_are_refused(tmp_path, abuse, monkeypatch):
    how, message = ABUSES[abuse]
    monkeypatch.setattr(
        "mmformer.checkpoints.formats.HEADER_LIMIT", 1000 if abuse == "header over the limit" else 10**8
    )
    path = raw(tmp_path / "x.safetensors", **how)
    with pytest.raises(RefusedFile, match=rf"(?s)x\.safetensors is no valid safetensors file: .*{message}"):
        open_source(path)


@pytest.mark.parametrize("keep", [0, 4, 60, -1])
def test_truncated_safetensors_are_refused(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(30), "b": torch.randn(30)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RefusedFile, match="no valid safetensors file"):
        open_source(path)


def test_a_valid_file_with_every_type_is_read(tmp_path):
    numbers = torch.arange(8)
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
             torch.int8, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]  # fmt: skip
    tensors = {str(kind): numbers.to(kind) for kind in kinds} | {"empty": torch.zeros(0, 3), "one": torch.tensor(3.0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    store = open_source(tmp_path / "x.safetensors").tensors
    assert store.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (store.shape(name), store.dtype(name)) == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(store[name], tensor)


# Shards.


def index(folder: Path, weight_map: object) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path


@pytest.mark.parametrize(
    "name", ["../../x", "../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "..\\x.safetensors"]
)
def test_an_index_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    index(folder, {"a": name})
    with pytest.raises(RefusedFile, match="does not lie beside it: refused"):
        open_source(folder)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"weight_map": []}', "not json", '{"weight_map": {}, "weight_map": {}}']
)
def test_a_damaged_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(RefusedFile, match="is no index of shards"):
        open_source(tmp_path)


def test_shards_that_do_not_hold_what_the_index_says_are_refused(tmp_path):
    save_file({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path / "one.safetensors")
    index(tmp_path, {"a": "one.safetensors"})
    with pytest.raises(RefusedFile, match=r"one\.safetensors does not hold what .* says, see b"):
        open_source(tmp_path)
    index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"two\.safetensors is missing"):
        open_source(tmp_path)


# Configs and addresses.


@pytest.mark.parametrize("content", ["[]", "{", "[" * 100_000])
def test_a_damaged_config_is_refused(tmp_path, content):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(RefusedFile, match=r"config\.json"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    "address", ["https://example.org/model.pt", "http://example.org/x", "s3://bucket/x", "file:///x"]
)
def test_addresses_are_refused(address, monkeypatch):
    monkeypatch.setattr(source_module, "fetch", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match="is an address: download the file"):
        open_source(address)
