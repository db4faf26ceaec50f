"""Uploads that can be relied on: whatever the Hub does, it ends up there after all, or in one message."""

import dataclasses
import json
import threading
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import HubServer

import checkpoints
import hub_upload
from hebrew_corpora import InputError
from hub_upload import CheckpointUploader, branch_of, check_upload, fetch_checkpoints, upload

TOKEN = "hf_write_token_that_must_not_leak"
USERS = {TOKEN: ("OzLabs", "write"), "hf_read_token": ("OzLabs", "read")}
REPO = "OzLabs/asr"
BRANCH = "checkpoints-run"


@dataclasses.dataclass
class Config:
    hf_repo_id: str | None = REPO
    hf_private: bool = True
    hub_checkpoints: bool = True
    resume: str = "auto"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A running server that the client of this process takes for the Hub; pauses after failures are short."""
    with HubServer(users=USERS) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr("huggingface_hub.utils._http.time", Clock)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(hub_upload, "FIRST_WAIT_SECONDS", 0.01)
        monkeypatch.setattr(hub_upload, "SILENT_SECONDS", 2.0)
        hub_upload.prepare_library()
        huggingface_hub.utils._http.close_session()
        yield server
    huggingface_hub.utils._http.close_session()


class Clock:
    """The time module as the client sees it, which waits a hundredth of what it means to between its own attempts."""

    waited: float = 0.0

    def __getattr__(self, name):
        return getattr(time, name)

    @staticmethod
    def sleep(seconds):
        Clock.waited += seconds
        time.sleep(seconds / 100)


Clock = Clock()


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    checkpoints.write_status(tmp_path / "run", "running")
    return tmp_path / "run"


def save(run: Path, step: int, wer: float | None = None) -> checkpoints.Checkpoint:
    """A checkpoint with a file large enough to be cut in the middle."""
    tensors = {
        "model.safetensors": {"w": torch.randn(300_000, generator=torch.Generator().manual_seed(step))},
        "optimizer.safetensors": {"w/exp_avg": torch.full((1000,), float(step))},
    }
    documents = {"state.json": json.dumps({"step": step}).encode(), "config.json": b"{}"}
    return checkpoints.write(run / "checkpoints", step, tensors, documents, {"wer": wer})


class Lines(list):
    def __call__(self, line: str) -> None:
        self.append(line)

    def __contains__(self, part: str) -> bool:
        return any(part in line for line in self)


def uploader_of(run: Path, keep: int = 1) -> CheckpointUploader:
    huggingface_hub.HfApi().create_repo(REPO, private=True, exist_ok=True)
    return CheckpointUploader(REPO, run, keep, Lines())


def wait_for(condition, seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def files_on(hub: HubServer, branch: str = BRANCH) -> dict[str, bytes]:
    return {path: content for path, content in hub.repos[REPO][branch].items() if path != ".gitattributes"}


def files_in(*found: checkpoints.Checkpoint) -> dict[str, bytes]:
    return {f"{c.folder.name}/{path.name}": path.read_bytes() for c in found for path in c.folder.iterdir()}


# What stays on the Hub


def test_the_newest_and_the_best_checkpoint_are_on_the_hub_and_its_history_holds_nothing_else(hub, run):
    uploader = uploader_of(run)
    hub.repos[REPO].commit("main", {"README.md": b"of an earlier model"}, "earlier", "", "OzLabs")
    saved = {}
    for step, wer in ((2, 40.0), (4, 30.0), (6, None), (8, 35.0)):
        saved[step] = save(run, step, wer)
        checkpoints.prune(run / "checkpoints", 1, print, uploader.in_use)
        uploader.wake()
        assert uploader.drain(20)
    assert files_on(hub) == files_in(saved[4], saved[8])
    assert hub.repos[REPO].private
    repo = hub.repos[REPO]
    assert len([c for c in repo.commits.values() if c.title.startswith("Checkpoint")]) == 1
    assert repo.commits[repo.branches[BRANCH]].parent is None
    contents = set(files_on(hub).values())
    assert all(content in contents for content in hub.storage.values()), "nothing else is stored"
    assert uploader.say[-1].startswith("checkpoint step-00000008 is on the Hub: 1.2 MB in ")
    assert uploader.numbers(9) == {"hub/uploaded_step": 8, "hub/lag_steps": 1, "hub/failures": 0}
    status = checkpoints.read_status(run)
    assert status["state"] == "running" and status["hub"]["checkpoint"] == "step-00000008"
    assert (status["hub"]["lag_steps"], status["hub"]["failures"], status["hub"]["problem"]) == (0, 0, None)


def test_a_run_without_a_repository_starts_no_thread(run):
    before = threading.active_count()
    uploader = CheckpointUploader(None, run, 1, Lines())
    save(run, 2)
    uploader.wake()
    assert not uploader.drain(1) and threading.active_count() == before
    assert (uploader.numbers(3), uploader.facts()) == ({}, {})


def test_a_checkpoint_that_is_being_uploaded_is_not_pruned(hub, run):
    uploader = uploader_of(run)
    first = save(run, 2)
    hub.fail("PUT", "/storage/", delay_s=1)
    uploader.wake()
    wait_for(lambda: uploader.in_use)
    save(run, 4)
    checkpoints.prune(run / "checkpoints", 1, print, uploader.in_use)
    assert first.folder.exists()
    assert uploader.drain(20) and uploader.failures == 0
    checkpoints.prune(run / "checkpoints", 1, print, uploader.in_use)
    assert not first.folder.exists() and uploader.uploaded == "step-00000004"


def test_a_checkpoint_that_goes_away_while_it_is_uploaded_does_no_harm(hub, run):
    uploader = uploader_of(run)
    save(run, 2)
    hub.fail("PUT", "/storage/", delay_s=0.5)
    uploader.wake()
    wait_for(lambda: hub.faults[0].times == 0)
    checkpoints.set_aside_after(run / "checkpoints", 0)
    last = save(run, 1)
    assert uploader.drain(20)
    assert files_on(hub) == files_in(last)


def test_a_damaged_checkpoint_is_named_and_not_uploaded(hub, run):
    uploader = uploader_of(run)
    first, second = save(run, 2), save(run, 4)
    (second.folder / "state.json").write_text("torn")
    assert uploader.drain(20)
    assert files_on(hub) == files_in(first)
    assert "step-00000004 is damaged and not uploaded: state.json has" in uploader.say


# Faults while a checkpoint is uploaded


FAULTS = {
    "401": ("POST", "/commit/", {"status": 401}),
    "403": ("POST", "/preupload/", {"status": 403}),
    "404": ("POST", "/commit/", {"status": 404}),
    "409": ("POST", "/commit/", {"status": 409}),
    "413": ("POST", "/commit/", {"status": 413}),
    "500": ("POST", "/commit/", {"status": 500}),
    "503 of the storage": ("PUT", "/storage/", {"status": 503, "times": 8}),
    "503 of the branch": ("POST", "/branch/", {"status": 503}),
    "a refused content": ("PUT", "/storage/", {"status": 403}),
    "silence": ("POST", "/commit/", {"delay_s": 2.5}),
    "a silent storage": ("PUT", "/storage/", {"delay_s": 2.5}),
    "a connection cut before the answer": ("POST", "/commit/", {"hang_up": True}),
    "a connection cut in the middle of the content": ("PUT", "/storage/", {"cut_request": 100_000, "times": 8}),
    "a connection cut in the middle of the answer": ("GET", "/tree/", {"cut": 10, "times": 7}),
    "an answer that is no JSON": ("GET", "/tree/", {"corrupt": True, "times": 2}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_checkpoint_is_on_the_hub_after_another_attempt(hub, run, name):
    method, path, settings = FAULTS[name]
    uploader = uploader_of(run)
    fault = hub.fail(method, path, **settings)
    last = save(run, 2)
    uploader.wake()
    assert uploader._idle.wait(30)
    assert fault.times == 0 and files_on(hub) == files_in(last)
    if name == "a silent storage":  # the client itself tries again
        return
    assert uploader.failures >= 1
    assert [line for line in uploader.say if "training goes on, the next attempt is in" in line]
    assert checkpoints.read_status(run)["hub"]["failures"] == uploader.failures
    assert checkpoints.read_status(run)["hub"]["problem"] is None
