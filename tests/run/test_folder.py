"""Which folder a run goes on in, and who holds it."""

import os

import pytest

from mmformer.run import folder as folders
from mmformer.run.folder import METRICS, FolderError, Lock, run_folder, unfinished
from tests.campaign.kill_resume import forked


def test_a_run_goes_on_in_the_newest_folder_that_did_not_finish(tmp_path):
    task = tmp_path / "task"
    for name in ("2026-01-01_00-00-00", "2026-01-02_00-00-00", "2026-01-03_00-00-00"):
        (task / name / "checkpoints").mkdir(parents=True)
        (task / name / "checkpoints" / "last.ckpt").touch()
    (task / "2026-01-04_00-00-00").mkdir()  # it stopped before there was anything to go on from
    (task / "2026-01-03_00-00-00" / METRICS).write_text("{}")
    assert run_folder(str(tmp_path), "task", "auto") == str(task / "2026-01-02_00-00-00")
    assert run_folder(str(tmp_path), "task", str(task / "2026-01-01_00-00-00")).endswith("2026-01-01_00-00-00")
    assert run_folder(str(tmp_path), "other", "auto").startswith(str(tmp_path / "other"))
    with pytest.raises(FolderError, match="no such folder"):
        run_folder(str(tmp_path), "task", "nowhere")


def test_two_processes_do_not_share_a_folder(tmp_path):
    (tmp_path / "task" / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "task" / "run" / "checkpoints" / "last.ckpt").touch()
    lock = Lock(tmp_path / "task" / "run")

    def other():
        with pytest.raises(FolderError, match=f"in use by process {os.getppid()}"):
            Lock(tmp_path / "task" / "run")
        assert unfinished(tmp_path / "task") == []

    assert forked(other) == 0
    lock.release()
    assert forked(lambda: Lock(tmp_path / "task" / "run").release()) == 0
    assert unfinished(tmp_path / "task") == [tmp_path / "task" / "run"]


def test_json_is_whole_or_absent(tmp_path, monkeypatch):
    folders.write_json(tmp_path / "m.json", {"a": 1})
    with pytest.raises(TypeError):
        folders.write_json(tmp_path / "m.json", {"a": object()})
    assert (tmp_path / "m.json").read_text() == '{\n  "a": 1\n}\n'
