"""A checkpoint is complete or invisible, whatever happens while it is written or afterwards, and runs no code."""

import json
import os
import pickle
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from hebrew_asr import files
from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.store import (
    InvalidCheckpoint,
    Writer,
    best_valid,
    names,
    newest_valid,
    prune,
    verify,
    write,
)
from hebrew_asr.training.watch import checksum, take_lock

FACTS = {"wer": None, "settings": {}}


def tensors(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model.safetensors": {"a": torch.full((100,), value), "b": torch.arange(7)}}


def save(folder: Path, step: int, wer: float | None = None) -> store.Checkpoint:
    return write(folder, step, tensors(step), {"state.json": b'{"x": 1}'}, {**FACTS, "wer": wer})


def test_what_is_written_is_read_again(tmp_path):
    save(tmp_path, 3, wer=12.5)
    found = newest_valid(tmp_path, print)
    assert (found.step, found.wer, found.document("state.json")) == (3, 12.5, {"x": 1})
    read = dict(found.tensors("model.safetensors"))
    assert torch.equal(read["a"], torch.full((100,), 3.0)) and torch.equal(read["b"], torch.arange(7))
    assert found.shapes("model.safetensors") == {"a": [100], "b": [7]}


def killed_at(call: int, folder: Path, monkeypatch) -> bool:
    """Writes step 2 in a child that dies, as by kill -9, at its `call`-th flush or rename; False if it got through."""
    child = os.fork()
    if not child:
        left = [call]

        def count(function):
            def wrapped(*args, **kwargs):
                left[0] -= 1
                if not left[0]:
                    os._exit(9)
                return function(*args, **kwargs)

            return wrapped

        store.flush = count(store.flush)
        store.save_file = count(store.save_file)
        Path.rename = count(Path.rename)
        save(folder, 2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_killed_at_any_moment_of_writing_leaves_the_last_one(tmp_path, monkeypatch):
    save(tmp_path, 1)
    moments = 0
    for call in range(1, 20):
        said = []
        if not killed_at(call, tmp_path, monkeypatch):
            break
        moments += 1
        found = newest_valid(tmp_path, said.append)
        assert found.step in (1, 2) and not said, "nothing torn is seen, and nothing needs a warning"
        if found.step == 2:
            shutil.rmtree(found.folder)  # killed after the rename: it is there, whole
    assert moments == 7, "the file, its flush, the document's, the manifest's, the folder's, the rename, the parent's"
    assert newest_valid(tmp_path, print).step == 2
    prune(tmp_path, 5, print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_without_the_rename_a_torn_one_is_seen(tmp_path, monkeypatch):
    """The control: the same kills, with a checkpoint that is written where readers look."""
    monkeypatch.setattr(store, "UNFINISHED", "")
    save(tmp_path, 1)
    seen = []
    for call in range(1, 6):
        killed_at(call, tmp_path, monkeypatch)
        newest_valid(tmp_path, seen.append)
    assert seen and "step-00000002" in seen[0]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize(
    ("damage", "name", "reason"),
    [
        (flip, "model.safetensors", "model.safetensors has another content"),
        (cut, "model.safetensors", "model.safetensors has .* bytes, the manifest says"),
        (Path.unlink, "state.json", "state.json is not there"),
        (Path.unlink, "manifest.json", "it has no manifest"),
        (cut, "manifest.json", "its manifest cannot be read"),
        (lambda file: file.write_text("[1]"), "manifest.json", "its manifest cannot be read"),
    ],
)
def test_a_damaged_one_is_named_and_the_one_before_is_taken(tmp_path, damage, name, reason):
    save(tmp_path, 1)
    damage(save(tmp_path, 2).folder / name)
    said = []
    assert newest_valid(tmp_path, said.append).step == 1
    (line,) = said
    assert "step-00000002" in line
    with pytest.raises(InvalidCheckpoint, match=reason):
        verify(tmp_path / "step-00000002")


class Bomb:
    def __reduce__(self):
        return os.mkdir, (os.environ["BOMB"],)


def test_a_strangers_checkpoint_runs_no_code(tmp_path, monkeypatch):
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    bomb = pickle.dumps(Bomb())
    hostile = write(tmp_path, 1, tensors(1), {"training_args.bin": bomb, "optimizer.pt": bomb}, FACTS)
    for name in ("rng_state.pth", "__init__.py", "state.json"):
        (hostile.folder / name).write_bytes(bomb)
    found = newest_valid(tmp_path, print)
    assert dict(found.tensors("model.safetensors"))
    with pytest.raises(UnicodeDecodeError):
        found.document("state.json")
    disguised = write(tmp_path, 2, {}, {"model.safetensors": bomb}, FACTS)
    with pytest.raises(Exception, match=r"(?i)header|safetensor"):
        dict(disguised.tensors("model.safetensors"))
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)
    assert (tmp_path / "exploded").exists(), "it would have gone off"


def test_no_file_outside_of_the_folder_is_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("x")
    for name, link in (("../secret", False), ("link", True)):
        found = save(tmp_path / "run", 1)
        if link:
            (found.folder / name).symlink_to(secret)
        manifest = json.loads((found.folder / "manifest.json").read_text())
        manifest["files"][name] = {"bytes": 1, "sha256": files.sha256(secret)}
        (found.folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(InvalidCheckpoint, match="no file of the folder"):
            verify(found.folder)
        shutil.rmtree(found.folder)


def test_the_last_ones_and_the_best_are_kept(tmp_path):
    for step, wer in ((1, None), (2, 20.0), (3, 10.0), (4, 10.0), (5, None), (6, 30.0)):
        save(tmp_path, step, wer)
        prune(tmp_path, 2, print)
    assert [store.number_of(path) for path in names(tmp_path)] == [6, 5, 3]
    assert best_valid(tmp_path, print).step == 3


def test_pruning_never_removes_the_last_valid_one(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    flip(tmp_path / "step-00000003" / "model.safetensors")
    said = []
    prune(tmp_path, 1, said.append)
    assert len(names(tmp_path)) == 3 and "no older one is removed" in said[0]
    assert newest_valid(tmp_path, said.append).step == 2


def test_later_ones_are_set_aside_and_removed_once_there_is_a_new_one(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    store.set_aside_after(tmp_path, 1)
    assert [path.name for path in names(tmp_path)] == ["step-00000001"]
    assert len(list(tmp_path.glob("set-aside-*"))) == 2
    save(tmp_path, 2)
    prune(tmp_path, 5, print)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_a_run_knows_which_checkpoint_of_another_run_it_took_over(tmp_path):
    other, mine = tmp_path / "other", tmp_path / "mine"
    taken, later = save(other, 4), save(other, 6)
    assert not store.is_adopted(taken.folder, mine)
    store.settle(taken, mine)
    save(mine, 5)
    assert store.is_adopted(taken.folder, mine) and not store.is_adopted(later.folder, mine)
    assert not store.is_adopted(mine / "step-00000004", mine), "the run's own: it is to go back"
    shutil.rmtree(taken.folder)
    assert store.is_adopted(taken.folder, mine), "also when it is gone"
    write(other, 4, tensors(9), {}, FACTS)
    assert not store.is_adopted(taken.folder, mine), "another one of this name"
    store.settle(later, mine)
    assert store.is_adopted(later.folder, mine) and not store.is_adopted(taken.folder, mine)
    store.settle(None, mine)
    assert not store.is_adopted(later.folder, mine), "the run has begun anew"
    for text in ("", "[]", "null", "{}"):
        (mine / store.ADOPTED).write_text(text)
        assert not store.is_adopted(later.folder, mine)


def test_a_second_checkpoint_of_a_step_comes_after_the_first(tmp_path):
    assert [save(tmp_path, 7).folder.name for _ in range(3)] == ["step-00000007", "step-00000007-2", "step-00000007-3"]
    assert newest_valid(tmp_path, print).folder.name == "step-00000007-3"


def test_training_waits_for_the_copy_and_not_for_the_disk(tmp_path, monkeypatch):
    flush = store.flush
    monkeypatch.setattr(store, "flush", lambda path: (time.sleep(0.2), flush(path)))
    writer, weights = Writer(tmp_path, 2, print, lambda _: None), tensors(1)
    writer.save(1, weights, {}, FACTS)
    weights["model.safetensors"]["a"].fill_(99)  # training goes on
    assert writer.stalls[0] < 0.1
    writer.wait()
    assert torch.equal(dict(writer.newest.tensors("model.safetensors"))["a"], torch.ones(100))


def test_a_full_disk_is_said_and_counted_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    said, done = [], []
    writer = Writer(tmp_path, 2, said.append, done.append)
    writer.save(1, tensors(1), {}, FACTS)
    writer.wait()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))  # bytes that a file may have
    try:
        writer.save(2, tensors(2), {}, FACTS)
        writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (
        writer.failures == 1 and "no checkpoint of step 2" in said[-1] and "the last one is step-00000001" in said[-1]
    )
    with monkeypatch.context() as patched:
        patched.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        writer.save(3, tensors(3), {}, FACTS)
        writer.wait()
    assert writer.failures == 2 and "GB are free" in said[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    writer.save(4, tensors(4), {}, FACTS)
    writer.wait()
    assert [found.step for found in done] == [1, 4] and newest_valid(tmp_path, print).step == 4


def test_a_mistake_in_the_writer_ends_the_run_and_is_not_taken_for_a_full_disk(tmp_path):
    said = []
    writer = Writer(tmp_path, 2, said.append, lambda _: None)
    writer.save(1, tensors(1), {"state.json": "text, which is not bytes"}, FACTS)
    with pytest.raises(TypeError):
        writer.wait()
    assert not said and not writer.failures and not list(tmp_path.iterdir())


def test_settings_are_compared_field_by_field():
    old = {"seed": 1, "stages": [{"name": "B", "rates": {"x": 1e-3}}], "gone": 1}
    new = {"seed": 2, "stages": [{"name": "B", "rates": {"x": 1e-3, "y": 2}}, {"name": "A"}]}
    assert store.differences(old, new) == [
        "gone: 1 → (none)",
        "seed: 1 → 2",
        "stages.0.rates.y: (none) → 2",
        "stages.1.name: (none) → A",
    ]
    assert store.differences(new, json.loads(json.dumps(new))) == []


def test_a_checksum_sees_one_bit():
    parameters = [torch.randn(1000), torch.randn(10, 10).to(torch.bfloat16), torch.zeros(3)]
    before = checksum(parameters)
    assert checksum([p.clone() for p in parameters]) == before
    for parameter in parameters:
        changed = parameter.view(-1).view(torch.int16)
        changed[1] ^= 1
        assert checksum(parameters) != before
        changed[1] ^= 1


def test_a_folder_has_one_run_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("hebrew_asr.training.watch.LOCK_SECONDS", 0.0)
    held = take_lock(tmp_path)
    assert held and take_lock(tmp_path) is None
    held.close()
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        _held = take_lock(tmp_path)
        os.write(writes, b"x")
        time.sleep(60)
    os.read(reads, 1)
    assert take_lock(tmp_path) is None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert take_lock(tmp_path), "it is free as soon as its holder is gone"
