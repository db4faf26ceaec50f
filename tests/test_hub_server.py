"""The stand-in Hub of hub_server.py answers the installed huggingface_hub and datasets as the Hub does."""

import hashlib
import io
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from hub_server import HubServer
from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError

USERS = {
    "hf_write_token": ("OzLabs", "write"),
    "hf_read_token": ("OzLabs", "read"),
    "hf_fine_token": ("someone", "fineGrained", ("OzLabs/asr",)),
    "hf_stranger_token": ("stranger", "write"),
}


@pytest.fixture
def hub(monkeypatch):
    """A running server; clients in this process upload over LFS, as HF_HUB_DISABLE_XET=1 makes a subprocess do."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    with HubServer(users=USERS) as server:
        yield server


def api(hub: HubServer, token: str | bool = "hf_write_token") -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


def run_client(code: str, hub: HubServer, tmp_path, *arguments) -> str:
    """Runs `code` in a fresh Python whose environment knows the server only by `HubServer.env`; returns its stdout."""
    environment = {**os.environ, **hub.env(home=tmp_path / "home", token="hf_write_token")}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    settings = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True, "timeout": 60}  # seconds
    done = subprocess.run(command, check=False, **settings)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_uploaded_folder_comes_back_byte_for_byte(hub, tmp_path):
    sent, received = tmp_path / "sent", tmp_path / "received"
    (sent / "processor").mkdir(parents=True)
    files = {"model.safetensors": os.urandom(3_000_000), "README.md": "---\nlicense: mit\n---\nתמלול".encode()}
    files |= {"processor/config.json": b"{}", "empty.bin": b""}
    for path, content in files.items():
        (sent / path).write_bytes(content)
    code = """if True:
        import sys
        from huggingface_hub import HfApi, snapshot_download
        api = HfApi()
        print(api.create_repo("OzLabs/asr", private=True, exist_ok=True).repo_id)
        api.upload_folder(repo_id="OzLabs/asr", folder_path=sys.argv[1], commit_message="a step")
        api.upload_folder(repo_id="OzLabs/asr", folder_path=sys.argv[1], commit_message="nothing new")
        snapshot_download("OzLabs/asr", local_dir=sys.argv[2])
    """
    assert run_client(code, hub, tmp_path, sent, received) == "OzLabs/asr\n"

    stored = hub.repos["OzLabs/asr"]["main"]
    assert stored.keys() == files.keys() | {".gitattributes"}
    assert hub.repos["OzLabs/asr"].private
    for path, content in files.items():
        assert stored[path] == (received / path).read_bytes() == content, path
    assert [commit.title for commit in api(hub).list_repo_commits("OzLabs/asr")] == ["a step", "initial commit"]

    sha256 = hashlib.sha256(files["model.safetensors"]).hexdigest()
    listing = {entry.path: entry for entry in api(hub).list_repo_tree("OzLabs/asr", recursive=True)}
    assert listing["model.safetensors"].lfs.sha256 == sha256
    assert listing["empty.bin"].blob_id == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's id of an empty file
    assert api(hub).list_repo_files("OzLabs/asr") == sorted(stored)
    [info] = api(hub).get_paths_info("OzLabs/asr", ["model.safetensors", "missing"])
    assert (info.size, info.lfs.sha256) == (3_000_000, sha256)

    storage = [request for request in hub.requests if request.path.startswith("/storage/")]
    assert {request.method for request in storage} == {"PUT", "GET"}
    assert not any("authorization" in request.headers for request in storage)
    assert not any(b"hf_write_token" in request.body or "hf_write_token" in request.path for request in hub.requests)


@pytest.mark.parametrize(
    "token, role, writes",
    [("hf_write_token", "write", True), ("hf_read_token", "read", False), ("hf_fine_token", "fineGrained", True)],
)
def test_the_role_of_a_token_decides_who_may_write(hub, token, role, writes):
    hub.add_repo("OzLabs/asr", private=True)
    client = api(hub, token)
    assert client.whoami()["auth"]["accessToken"]["role"] == role
    client.auth_check("OzLabs/asr")
    if writes:
        client.auth_check("OzLabs/asr", write=True)
        client.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="OzLabs/asr")
        return
    with pytest.raises(HfHubHTTPError) as refusal:
        client.auth_check("OzLabs/asr", write=True)
    assert refusal.value.response.status_code == 403
    with pytest.raises(HfHubHTTPError) as refusal:
        client.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="OzLabs/asr")
    assert refusal.value.response.status_code == 403
    assert hub.repos["OzLabs/asr"]["main"].keys() == {".gitattributes"}


def test_an_unknown_token_is_refused(hub):
    with pytest.raises(HfHubHTTPError) as refusal:
        api(hub, "hf_unknown").whoami()
    assert refusal.value.response.status_code == 401


@pytest.mark.parametrize("token, status", [(False, 401), ("hf_stranger_token", 404)])
def test_a_private_repository_looks_missing_to_others(hub, token, status):
    hub.add_repo("OzLabs/clips", repo_type="dataset", private=True)
    for name in ("OzLabs/clips", "OzLabs/missing"):
        with pytest.raises(RepositoryNotFoundError) as refusal:
            api(hub, token).dataset_info(name)
        assert refusal.value.response.status_code == status


@pytest.mark.parametrize("token, status", [(False, 401), ("hf_stranger_token", 403)])
def test_a_gate_lets_in_those_who_reach_the_repository(hub, tmp_path, token, status):
    hub.add_repo("OzLabs/gated", {"a.txt": b"1"}, repo_type="dataset", gated="files")
    hub.add_repo("OzLabs/shut", repo_type="dataset", gated="all")
    client, settings = api(hub, token), {"repo_type": "dataset", "cache_dir": tmp_path}
    assert client.dataset_info("OzLabs/gated").gated == "manual"
    with pytest.raises(GatedRepoError) as refusal:
        client.hf_hub_download("OzLabs/gated", "a.txt", **settings)
    assert refusal.value.response.status_code == status
    with pytest.raises(GatedRepoError) as refusal:
        client.dataset_info("OzLabs/shut")
    assert refusal.value.response.status_code == status
    assert api(hub).hf_hub_download("OzLabs/gated", "a.txt", **settings).endswith("a.txt")


def test_branches_tags_and_deletions(hub):
    repo, client = hub.add_repo("OzLabs/asr", {"old/a.txt": b"1", "b.txt": b"2"}), api(hub)
    client.create_branch("OzLabs/asr", branch="step/100", exist_ok=True)
    client.create_branch("OzLabs/asr", branch="step/100", exist_ok=True)
    client.create_tag("OzLabs/asr", tag="v1", revision="step/100")
    client.delete_folder("old", repo_id="OzLabs/asr", revision="step/100")
    client.delete_files("OzLabs/asr", ["*.txt"])
    assert repo["main"].keys() == {".gitattributes"}
    assert repo["step/100"].keys() == {".gitattributes", "b.txt"}
    assert client.list_repo_files("OzLabs/asr", revision="v1") == [".gitattributes", "b.txt", "old/a.txt"]
    with pytest.raises(RevisionNotFoundError):
        client.list_repo_files("OzLabs/asr", revision="v2")


def test_a_commit_on_an_outdated_parent_is_refused(hub):
    client, first = api(hub), hub.add_repo("OzLabs/asr").branches["main"]
    client.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="OzLabs/asr", parent_commit=first)
    operation = CommitOperationAdd("b.txt", b"2")
    with pytest.raises(HfHubHTTPError) as refusal:
        client.create_commit("OzLabs/asr", [operation], commit_message="late", parent_commit=first)
    assert refusal.value.response.status_code == 412


@pytest.mark.parametrize("status", [401, 403, 409, 413, 429, 500, 503])
def test_an_injected_status_makes_the_commit_raise(hub, status):
    fault = hub.fail("POST", "/commit/main", status, headers={"Retry-After": "1"})
    hub.add_repo("OzLabs/asr")
    upload = {"path_or_fileobj": b"1", "path_in_repo": "a.txt", "repo_id": "OzLabs/asr"}
    with pytest.raises(HfHubHTTPError, match="injected by the test") as refusal:
        api(hub).upload_file(**upload)
    assert (refusal.value.response.status_code, fault.times) == (status, 0)
    assert "a.txt" not in hub.repos["OzLabs/asr"]["main"]
    api(hub).upload_file(**upload)
    assert "a.txt" in hub.repos["OzLabs/asr"]["main"]


def test_a_cut_download_is_resumed_and_a_corrupt_one_is_not_noticed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)  # bytes; kept once complete
    content = os.urandom(1_000_000)
    hub.add_repo("OzLabs/asr", {"model.safetensors": content})
    hub.fail("GET", "/storage/", cut=400_000)
    with open(api(hub).hf_hub_download("OzLabs/asr", "model.safetensors", cache_dir=tmp_path / "1"), "rb") as file:
        assert file.read() == content
    assert hub.requests[-1].headers["range"] == "bytes=400000-"

    hub.fail("GET", "/storage/", corrupt=True)
    with open(api(hub).hf_hub_download("OzLabs/asr", "model.safetensors", cache_dir=tmp_path / "2"), "rb") as file:
        assert file.read() == content[:-1] + bytes([content[-1] ^ 1])  # the client compares sizes, not hashes


def test_load_dataset_reads_parquet_files(hub, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["שלום", "עולם"]}), table := io.BytesIO())
    hub.add_repo("OzLabs/clips", {"data/train-00000-of-00001.parquet": table.getvalue()}, "dataset", private=True)
    code = """if True:
        import datasets
        clips = datasets.load_dataset("OzLabs/clips", split="train")
        assert clips["text"][:] == ["שלום", "עולם"], clips["text"][:]
        try:
            datasets.load_dataset("OzLabs/missing", split="train")
        except datasets.exceptions.DatasetNotFoundError as error:
            print(error)
    """
    assert "OzLabs/missing" in run_client(code, hub, tmp_path)


def test_closing_leaves_no_thread_even_in_the_middle_of_a_delay():
    before = set(threading.enumerate())
    with ThreadPoolExecutor(max_workers=1) as pool:
        with HubServer(users=USERS) as hub:
            hub.fail("GET", "/api/whoami-v2", delay_s=60)
            answer = pool.submit(api(hub).whoami)
            while not hub.requests:
                time.sleep(0.01)
        with pytest.raises(httpx2.RemoteProtocolError):
            answer.result(timeout=5)
    assert set(threading.enumerate()) == before
