"""Uploads that can be relied on: whatever the Hub does, it ends up there after all, or in one message."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import hub_server
import huggingface_hub
import pytest
import safetensors.torch
import torch
from conftest import ROOT, TOKEN
from hub_server import HubServer

from hebrew_asr.checkpoints import hub as hub_upload
from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.hub import CheckpointUploader, check_upload, fetch_checkpoints, upload
from hebrew_asr.errors import InputError

REPO = "OzLabs/asr"
BRANCH = "checkpoints-run"


@dataclasses.dataclass
class Config:
    hf_repo_id: str | None = REPO
    hf_private: bool = True
    hub_checkpoints: bool = True
    resume: str = "auto"


@pytest.fixture
def run(tmp_path) -> Path:
    """The folder of a run."""
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    store.write_status(tmp_path / "run", "running")
    return tmp_path / "run"


def save(run: Path, step: int, wer: float | None = None) -> store.Checkpoint:
    """A checkpoint with a file large enough to be cut in the middle."""
    tensors = {
        "model.safetensors": {"w": torch.randn(300_000, generator=torch.Generator().manual_seed(step))},
        "optimizer.safetensors": {"w/exp_avg": torch.full((1000,), float(step))},
    }
    documents = {"state.json": json.dumps({"step": step}).encode(), "config.json": b"{}"}
    return store.write(run / "checkpoints", step, tensors, documents, {"wer": wer})


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


def files_in(*found: store.Checkpoint) -> dict[str, bytes]:
    return {f"{c.folder.name}/{path.name}": path.read_bytes() for c in found for path in c.folder.iterdir()}


# What stays on the Hub


def test_the_newest_and_the_best_checkpoint_are_on_the_hub_and_its_history_holds_nothing_else(hub, run):
    uploader = uploader_of(run)
    hub.repos[REPO].commit("main", {"README.md": b"of an earlier model"}, "earlier", "", "OzLabs")
    saved = {}
    for step, wer in ((2, 40.0), (4, 30.0), (6, None), (8, 35.0)):
        saved[step] = save(run, step, wer)
        store.prune(run / "checkpoints", 1, print, uploader.in_use)
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
    status = store.read_status(run)
    assert status["state"] == "running" and status["hub"]["checkpoint"] == "step-00000008"
    assert (status["hub"]["lag_steps"], status["hub"]["failures"], status["hub"]["problem"]) == (0, 0, None)


def test_a_history_that_cannot_be_cut_is_said_and_cut_by_the_next_upload(hub, run):
    uploader = uploader_of(run)
    hub.fail("POST", "/super-squash/", 503)
    save(run, 2)
    assert uploader.drain(20) and uploader.uploaded == "step-00000002" and uploader.failures == 1
    assert "the history of checkpoints-run was not cut" in uploader.say
    last = save(run, 4)
    assert uploader.drain(20) and files_on(hub) == files_in(last)
    repo = hub.repos[REPO]
    assert repo.commits[repo.branches[BRANCH]].parent is None


def test_a_run_without_a_repository_starts_no_thread(run):
    before = threading.active_count()
    uploader = CheckpointUploader(None, run, 1, Lines())
    save(run, 2)
    uploader.wake()
    assert not uploader.drain(1) and threading.active_count() == before
    assert (uploader.numbers(3), uploader.facts()) == ({}, {})


def test_an_upload_that_keeps_failing_ends_with_its_run(hub, run, monkeypatch):
    monkeypatch.setattr(hub_upload, "FIRST_WAIT_SECONDS", 300.0)
    monkeypatch.setattr(hub_upload, "LAST_CHECKPOINT_SECONDS", 0.1)
    uploader = uploader_of(run)
    hub.fail("*", "/", 500, times=10_000)
    save(run, 2)
    uploader.wake()
    wait_for(lambda: uploader.failures)
    uploader.finish()
    uploader._thread.join(20)
    assert not uploader._thread.is_alive()
    asked = len(hub.requests)
    uploader.wake()
    time.sleep(0.1)
    assert len(hub.requests) == asked and "is not on the Hub, which has none" in uploader.say


def test_a_checkpoint_that_is_being_uploaded_is_not_pruned(hub, run):
    uploader = uploader_of(run)
    first = save(run, 2)
    hub.fail("PUT", "/storage/", delay_s=1)
    uploader.wake()
    wait_for(lambda: uploader.in_use)
    save(run, 4)
    store.prune(run / "checkpoints", 1, print, uploader.in_use)
    assert first.folder.exists()
    assert uploader.drain(20) and uploader.failures == 0
    store.prune(run / "checkpoints", 1, print, uploader.in_use)
    assert not first.folder.exists() and uploader.uploaded == "step-00000004"


def test_a_checkpoint_that_goes_away_while_it_is_uploaded_does_no_harm(hub, run):
    uploader = uploader_of(run)
    save(run, 2)
    hub.fail("PUT", "/storage/", delay_s=0.5)
    uploader.wake()
    wait_for(lambda: hub.faults[0].times == 0)
    store.set_aside_after(run / "checkpoints", 0)
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
    assert store.read_status(run)["hub"]["failures"] == uploader.failures
    assert store.read_status(run)["hub"]["problem"] is None


def put_requests(hub: HubServer) -> int:
    return sum(request.method == "PUT" for request in hub.requests)


def test_content_that_is_there_already_is_not_sent_again_by_the_next_attempt_or_the_next_process(hub, run, monkeypatch):
    monkeypatch.setattr(hub_upload, "FIRST_WAIT_SECONDS", 1000)
    hub.fail("POST", "/commit/", 500)
    interrupted = uploader_of(run)
    last = save(run, 2)
    interrupted.wake()
    wait_for(lambda: interrupted.failures)
    assert put_requests(hub) == 2 and BRANCH in hub.repos[REPO].branches and not files_on(hub)
    after = uploader_of(run)
    assert after.drain(20) and files_on(hub) == files_in(last)
    assert put_requests(hub) == 2, "the two safetensors, once"
    assert uploader_of(run).drain(20) and put_requests(hub) == 2


def test_a_large_file_goes_in_parts(hub, run):
    hub.lfs_part_bytes = 500_000
    uploader = uploader_of(run)
    last = save(run, 2)
    assert uploader.drain(20) and files_on(hub) == files_in(last)
    assert put_requests(hub) == 3 + 1


def test_retry_after_is_kept_to(hub, run):
    uploader = uploader_of(run)
    hub.fail("POST", "/commit/", 429, headers={"Retry-After": "2"})
    last, started = save(run, 2), time.monotonic()
    uploader.wake()
    assert uploader._idle.wait(20) and time.monotonic() - started > 2
    assert "the next attempt is in 2 s" in uploader.say and files_on(hub) == files_in(last)


def tamper(monkeypatch, file: str, times: int) -> None:
    """Has the Hub keep another content of a file than it was sent."""
    commit, left = hub_server.Repo.commit, [times]

    def tampering(self, branch, files, *args):
        for path in files:
            if path.endswith(file) and left[0] > 0:
                left[0] -= 1
                files = files | {path: files[path][:-1] + b"?"}
        return commit(self, branch, files, *args)

    monkeypatch.setattr(hub_server.Repo, "commit", tampering)


@pytest.mark.parametrize("file", ["state.json", "optimizer.safetensors", "manifest.json"])
def test_a_wrong_hash_on_the_hub_is_noticed_and_sent_again(hub, run, monkeypatch, file):
    uploader = uploader_of(run)
    tamper(monkeypatch, file, times=1)
    last = save(run, 2)
    uploader.wake()
    assert uploader._idle.wait(20) and files_on(hub) == files_in(last)
    assert uploader.failures == 1 and "the Hub's hashes of step-00000002 are others" in uploader.say


def test_a_network_that_is_gone_for_long_is_said_once_and_made_up_for(hub, run, monkeypatch):
    uploader = uploader_of(run)
    fault = hub.fail("*", "", hang_up=True, times=10**6)
    for step in (2, 4, 6):
        save(run, step)
        store.prune(run / "checkpoints", 1, print, uploader.in_use)
        uploader.wake()
        wait_for(lambda before=uploader.failures: uploader.failures > before)
    assert len(uploader.say) == 1 and uploader.numbers(7)["hub/lag_steps"] == 7
    assert store.read_status(run)["hub"]["problem"] == uploader.problem is not None
    fault.times = 0
    last = store.newest_valid(run / "checkpoints", print)
    assert uploader.drain(20) and files_on(hub) == files_in(last)


def test_a_crawling_connection_holds_nothing_up_and_is_left_when_time_is_short(hub, run):
    uploader = uploader_of(run)
    fault = hub.fail("PUT", "/storage/", bytes_per_s=1000, times=10**6)
    started = time.monotonic()
    first = save(run, 2)
    uploader.wake()
    save(run, 4)
    assert time.monotonic() - started < 1
    assert not uploader.drain(1.0) and time.monotonic() - started < 3
    assert uploader.uploaded is None and first.folder.exists()
    fault.bytes_per_s = 2e6
    assert uploader.drain(40) and uploader.uploaded == "step-00000004"


def test_a_process_ends_at_once_while_an_upload_is_stuck(hub, run, tmp_path):
    save(run, 2)
    huggingface_hub.HfApi().create_repo(REPO)
    hub.fail("PUT", "/storage/", delay_s=60, times=10**6)
    code = f"""if True:
        import pathlib, sys, time
        sys.path.insert(0, {str(ROOT)!r})
        from hebrew_asr.checkpoints.hub import CheckpointUploader
        uploader = CheckpointUploader({REPO!r}, pathlib.Path({str(run)!r}), 1, print)
        print(uploader.drain(2), time.time())
    """
    env = {**os.environ, **hub.env(home=tmp_path / "home", token=TOKEN)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    ended = time.time()
    assert put_requests(hub) >= 1 and done.stdout.startswith("False ")
    assert ended - float(done.stdout.split()[1]) < 10 and not done.stderr


# The final model


@pytest.fixture
def model(run) -> Path:
    (run / "final_model").mkdir()
    weights = {"a": torch.arange(1_280_000).to(torch.uint8)}
    safetensors.torch.save_file(weights, run / "final_model" / "model.safetensors")
    (run / "final_model" / "config.json").write_text("{}")
    (run / "final_model" / "README.md").write_text("---\nlanguage: he\n---\n# תמלול\n")
    return run / "final_model"


MODEL_FAULTS = {
    "409": ("POST", "/commit/", {"status": 409}),
    "429": ("POST", "/commit/", {"status": 429, "headers": {"Retry-After": "0"}}),
    "500": ("POST", "/commit/", {"status": 500, "times": 3}),
    "503": ("GET", "/tree/", {"status": 503, "times": 7}),
    "silence": ("POST", "/commit/", {"delay_s": 2.5}),
    "a connection cut before the answer": ("POST", "/commit/", {"hang_up": True}),
    "a connection cut in the middle of the content": ("PUT", "/storage/", {"cut_request": 100_000, "times": 7}),
    "a connection cut in the middle of the answer": ("POST", "/tag/", {"cut": 1}),
    "a tag that cannot be set": ("POST", "/tag/", {"status": 500}),
}


def model_on(hub: HubServer, revision: str) -> dict[str, bytes]:
    return {path: content for path, content in hub.repos[REPO][revision].items() if path != ".gitattributes"}


@pytest.mark.parametrize("name", MODEL_FAULTS)
def test_the_model_is_on_the_hub_and_tagged_after_another_attempt(hub, model, name):
    method, path, settings = MODEL_FAULTS[name]
    repo = hub.add_repo(REPO, {"README.md": b"an earlier one"})
    repo.tags["run"] = repo.branches["main"]
    fault, say = hub.fail(method, path, **settings), Lines()
    address = upload(Config(), model, say)
    assert fault.times == 0
    assert model_on(hub, "main") == model_on(hub, "run") == {f.name: f.read_bytes() for f in model.iterdir()}
    assert f"uploaded: {address}, its 3 files have the hashes of those in" in say


def test_a_model_with_another_hash_on_the_hub_is_sent_again(hub, model, monkeypatch):
    hub.add_repo(REPO)
    tamper(monkeypatch, "model.safetensors", times=1)
    say = Lines()
    upload(Config(), model, say)
    assert model_on(hub, "run")["model.safetensors"] == (model / "model.safetensors").read_bytes()
    assert "the Hub's hash of model.safetensors is another" in say


@pytest.mark.parametrize(
    ("fault", "attempts", "remedy"),
    [
        ({"status": 401}, 1, "Log in with a token"),
        ({"status": 403}, 1, "Log in with a token"),
        ({"status": 404}, 1, "Log in with a token"),
        ({"status": 413}, 1, "too large for the Hub"),
        ({"status": 500}, 8, "Is there a network"),
        ({"hang_up": True}, 8, "Is there a network"),
    ],
)
def test_a_model_that_cannot_be_uploaded_stays_and_one_message_says_how_to_do_it(hub, model, fault, attempts, remedy):
    hub.add_repo(REPO)
    left = hub.fail("POST", "/commit/", times=100, **fault)
    before = {file: file.read_bytes() for file in model.iterdir()}
    with pytest.raises(InputError) as problem:
        upload(Config(), model, Lines())
    assert 100 - left.times == attempts
    assert remedy in str(problem.value) and "\n" not in str(problem.value)
    assert str(problem.value).endswith(f"uv run hf upload {REPO} {model} .")
    assert {file: file.read_bytes() for file in model.iterdir()} == before


# Before the first step


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_unknown", "Invalid user token.* Log in with a token that may write"),
        ("hf_read_token", "403.* Log in with a token"),
    ],
)
def test_a_token_that_may_not_write_is_refused_before_the_first_step(hub, run, monkeypatch, token, message):
    hub.add_repo(REPO)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(InputError, match=message) as problem:
        check_upload(Config(), run, Lines())
    assert token not in str(problem.value)


def test_no_token_at_all_is_refused(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="Log in with a token that may write"):
        check_upload(Config(), run, Lines())


def test_the_name_of_a_dataset_is_refused(hub, run):
    hub.add_repo(REPO, repo_type="dataset")
    with pytest.raises(InputError, match="OzLabs/asr is a dataset: give the model a name of its own"):
        check_upload(Config(), run, Lines())
    assert REPO not in hub.repos
    hub.add_repo(REPO)
    check_upload(Config(), run, Lines())


def test_the_repository_is_private_unless_asked_otherwise(hub, run):
    check_upload(Config(), run, Lines())
    assert hub.repos[REPO].private
    check_upload(Config(hf_repo_id="OzLabs/open", hf_private=False), run, Lines())
    assert not hub.repos["OzLabs/open"].private


def test_without_a_network_a_new_run_does_not_begin_and_one_that_was_begun_goes_on(hub, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"cannot upload to OzLabs/asr: .* Is there a network.*SKIP_HF_UPLOAD=true"):
        check_upload(Config(), run, Lines())
    save(run, 2)
    say = Lines()
    check_upload(Config(), run, say)
    assert "the run goes on, uploads are tried again" in say


def test_a_new_run_does_not_replace_the_checkpoints_of_one_whose_machine_is_gone(hub, run, tmp_path):
    save(run, 20)
    assert uploader_of(run).drain(20)
    check_upload(Config(), run, Lines())
    empty = tmp_path / "elsewhere" / "run"
    with pytest.raises(InputError, match=r"holds step-00000020 of the run run, .* --resume hub goes on from it"):
        check_upload(Config(), empty, Lines())
    check_upload(Config(resume="hub"), empty, Lines())
    check_upload(Config(), tmp_path / "another", Lines())


# On an empty machine


@pytest.fixture
def gone(hub, run, tmp_path) -> dict[int, dict[str, bytes]]:
    """A run of which only the Hub has checkpoints: of step 2 with a WER of 30, of 4 with one of 20, of 6 without."""
    uploader = uploader_of(run, keep=3)
    saved = {step: files_in(save(run, step, wer)) for step, wer in ((2, 30.0), (4, 20.0), (6, None))}
    assert uploader.drain(20)
    run.rename(tmp_path / "lost")
    (run / "checkpoints").mkdir(parents=True)
    return saved


def here(run: Path) -> dict[str, bytes]:
    return {f"{p.parent.name}/{p.name}": p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}


def test_the_newest_checkpoint_comes_back_from_the_hub_with_the_best_one(gone, run):
    say = Lines()
    fetch_checkpoints(Config(), run, say)
    assert here(run) == gone[6] | gone[4]
    assert "checkpoint step-00000006 from OzLabs/asr: 1.2 MB in" in say
    fetch_checkpoints(Config(), run, say)
    assert here(run) == gone[6] | gone[4]


def test_a_newer_checkpoint_in_the_folder_is_kept_to(gone, run):
    save(run, 8)
    fetch_checkpoints(Config(), run, Lines())
    assert [folder.name for folder in store.names(run / "checkpoints")] == ["step-00000008"]


DOWNLOAD_FAULTS = {
    "a wrong hash": ("GET", "/storage/", {"corrupt": True}),
    "a connection cut in the middle": ("GET", "/storage/", {"cut": 100_000}),
    "503": ("GET", "/storage/", {"status": 503}),
    "429": ("GET", "/tree/", {"status": 429, "headers": {"Retry-After": "0"}}),
    "a small file with another content": ("GET", "/resolve/", {"corrupt": True}),
    "a crawl": ("GET", "/storage/", {"bytes_per_s": 1e6}),
}


@pytest.mark.parametrize("name", DOWNLOAD_FAULTS)
def test_a_checkpoint_comes_back_whole_after_another_attempt(hub, gone, run, name):
    method, path, settings = DOWNLOAD_FAULTS[name]
    fault = hub.fail(method, path, **settings)
    fetch_checkpoints(Config(), run, Lines())
    assert fault.times == 0 and here(run) == gone[6] | gone[4]


def test_a_checkpoint_that_stays_damaged_is_named_and_the_one_before_it_taken(hub, gone, run):
    damaged = dict(hub.repos[REPO][BRANCH])
    damaged["step-00000006/state.json"] = b"{}"
    hub.repos[REPO].commit(BRANCH, damaged, "", "", "")
    say = Lines()
    fetch_checkpoints(Config(), run, say)
    assert here(run) == gone[4]
    assert "checkpoint step-00000006 of OzLabs/asr is not used: state.json has 2 bytes" in say


def test_a_hub_without_a_checkpoint_is_one_message(hub, run, tmp_path):
    with pytest.raises(InputError, match=r"needs hf_repo_id"):
        fetch_checkpoints(Config(hf_repo_id=None), run, Lines())
    with pytest.raises(InputError, match=r"cannot resume from OzLabs/asr: .*404"):
        fetch_checkpoints(Config(), run, Lines())
    hub.add_repo(REPO)
    with pytest.raises(InputError, match=r"has no checkpoint of this run in a branch checkpoints-run: begin the run"):
        fetch_checkpoints(Config(), run, Lines())
    save(run, 2)
    assert uploader_of(run).drain(20)
    with pytest.raises(InputError, match=r"in a branch checkpoints-other, but of run: give the --output_dir"):
        fetch_checkpoints(Config(), tmp_path / "other", Lines())


def test_without_a_network_a_folder_with_a_checkpoint_goes_on_and_an_empty_one_does_not(hub, run, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(InputError, match=r"cannot resume from OzLabs/asr: .*Is there a network"):
        fetch_checkpoints(Config(), run, Lines())
    save(run, 2)
    say = Lines()
    fetch_checkpoints(Config(), run, say)
    assert "the run goes on from the checkpoint in" in say


# What is said


def test_neither_a_token_nor_the_permission_in_an_address_is_in_a_message():
    error = RuntimeError("Error while uploading 'model.safetensors' to the Hub.")
    error.__cause__ = OSError("403 for url https://s3/lfs/ab?X-Amz-Signature=secret with Bearer hf_secretsecret\nmore")
    assert hub_upload.reason(error) == "403 for url https://s3/lfs/ab with Bearer hf_… more"


def test_the_name_of_a_run_is_one_that_a_branch_may_have():
    names = {"runs/hebrew-asr-0f3c": "hebrew-asr-0f3c", "/x/סבב 2": "2-", "/x/a.b..lock": "a-b-lock-", "/": "run-"}
    found = {folder: hub_upload.run_name(Path(folder)) for folder in names}
    assert {folder: re.sub("-[0-9a-f]{8}$", "-", name) for folder, name in found.items()} == names
    assert len({hub_upload.run_name(Path(name)) for name in ("סבב א", "סבב ב", "a.b", "a-b", "a b")}) == 5
