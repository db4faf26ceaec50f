"""Faults that a run meets on other people's machines: nothing is lost, nothing wrong is called right, and it is said."""

import errno
import json
import os
import stat

import pytest
import torch

from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.store import UnreadableCheckpoint
from hebrew_asr.errors import InputError
from hebrew_asr.training.run_folder import check_same_run

FACTS = {"wer": None, "settings": {}}


def save(folder, step, wer=None, value=1.0):
    tensors = {"model.safetensors": {"a": torch.full((10,), value)}}
    return store.write(folder, step, tensors, {"state.json": b"{}"}, {**FACTS, "wer": wer})


def unreadable(monkeypatch, name: str, number: int) -> None:
    """Lets nobody read the files whose path holds `name`, with an errno that root meets too."""
    read_text, sha256 = store.Path.read_text, store.sha256

    def refuse(path):
        if name in str(path):
            raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(store.Path, "read_text", lambda self, *a, **k: refuse(self) or read_text(self, *a, **k))
    monkeypatch.setattr(store, "sha256", lambda path: refuse(path) or sha256(path))


# --------------------------------------------------------------------------------------------- A checkpoint unreadable
@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ETIMEDOUT])
@pytest.mark.parametrize("name", ["step-00000002/manifest.json", "step-00000002/model.safetensors"])
def test_a_checkpoint_that_cannot_be_read_stops_the_start_and_nothing_is_moved(tmp_path, monkeypatch, number, name):
    save(tmp_path, 1), save(tmp_path, 2)
    with monkeypatch.context() as patched:
        unreadable(patched, name, number)
        with pytest.raises(UnreadableCheckpoint, match=r"step-00000002 cannot be read \(.*nothing was changed"):
            store.newest_valid(tmp_path, print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]
    assert store.newest_valid(tmp_path, print).step == 2


def test_a_folder_of_checkpoints_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    save(tmp_path, 1)
    monkeypatch.setattr(store.Path, "iterdir", refuse)
    with pytest.raises(UnreadableCheckpoint, match="Permission denied"):
        store.newest_valid(tmp_path, print)


def test_the_best_one_is_not_pruned_while_its_manifest_cannot_be_read(tmp_path, monkeypatch):
    for step, wer in ((1, 5.0), (2, 9.0), (3, 9.0)):
        save(tmp_path, step, wer)
    said = []
    with monkeypatch.context() as patched:
        unreadable(patched, "step-00000001/manifest.json", errno.EIO)
        store.prune(tmp_path, 1, said.append)
    assert len(store.names(tmp_path)) == 3 and "no older checkpoint is removed" in said[0]
    store.prune(tmp_path, 1, said.append)
    assert [path.name for path in store.names(tmp_path)] == ["step-00000003", "step-00000001"]


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    before = os.umask(0o027)
    try:
        folder = save(tmp_path, 1).folder
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


# --------------------------------------------------------------------------------------------------- Another checkpoint
def test_a_copy_of_another_runs_checkpoint_that_fails_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    mine, other = tmp_path / "mine", tmp_path / "other"
    save(mine, 5), save(mine, 10)
    found = save(other, 5, value=2.0)
    with monkeypatch.context() as patched:
        patched.setattr(store, "flush", lambda path: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
        with pytest.raises(InputError, match="cannot be copied"):
            store.settle(found, mine)
    assert sorted(path.name for path in mine.iterdir()) == ["step-00000005", "step-00000010"]
    settled = store.settle(found, mine)
    assert [path.name for path in store.names(mine)] == ["step-00000005"]
    assert dict(settled.tensors("model.safetensors"))["a"][0] == 2.0


# -------------------------------------------------------------------------------------------------------------- Folders
@pytest.mark.parametrize("name", ["final_model", "checkpoints"])
def test_what_stands_in_the_output_folder_and_is_of_no_run_is_refused_by_name(config, tmp_path, name):
    (tmp_path / "run" / name).mkdir(parents=True)
    check_same_run(config, tmp_path / "run")
    (tmp_path / "run" / name / "theirs.bin").write_text("x")
    with pytest.raises(InputError, match=rf"run/{name} is there, and is of no run"):
        check_same_run(config, tmp_path / "run")


@pytest.mark.parametrize("text", ["{}", "[]", "null", "", '{"seed": 41}'])
def test_a_run_that_left_no_checkpoint_begins_anew_with_other_settings(config, tmp_path, text):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("config.yaml", "status.json"):
        (run / name).write_text(text)
    for resume in ("auto", "never"):
        config.resume = resume
        check_same_run(config, run)
    save(run / "checkpoints", 2)
    with pytest.raises(InputError, match="holds a run already"):
        check_same_run(config, run)
    config.resume = "auto"
    with pytest.raises(InputError, match=r"cannot be read|with other settings"):
        check_same_run(config, run)


@pytest.mark.parametrize("text", ["[]", "null", "7", '"running"', "{}"])
def test_a_status_that_is_none_is_unknown(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    assert store.read_status(tmp_path) == {"state": "unknown"}
    store.update_status(tmp_path, step=3)
    assert json.loads((tmp_path / "status.json").read_text())["step"] == 3
