"""What goes to the Hub and comes back: checkpoints while training, the final model, a run for an empty machine.

Checkpoints go to a branch of their own, `checkpoints-<name of the run's folder>`, one folder each, as they are on the
disk. The branch holds the newest ones and the one of the lowest WER; its history is cut to one commit after each
upload, so that it holds nothing else. The final model goes to `main`, under a tag. Everything is compared with the
Hub's own hashes after it was sent, and goes over LFS: files that are there already are not sent again. Imports nothing
of the training script.
"""

import functools
import hashlib
import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._http import default_client_factory

from hebrew_asr.checkpoints import store
from hebrew_asr.checkpoints.final import damage_of
from hebrew_asr.checkpoints.store import MANIFEST, NAME, UNFINISHED, InvalidCheckpoint, Say
from hebrew_asr.errors import InputError
from hebrew_asr.files import digest, flush, sha256

MAIN = "main"
CONNECT_SECONDS = 20.0
SILENT_SECONDS = 120.0  # without a byte from or to the Hub, after which an attempt has failed
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 5.0, 300.0  # from a failed attempt to the next; each wait is twice the last
START_ATTEMPTS, FINAL_ATTEMPTS = 3, 8  # before the first step, and at the end
LAST_CHECKPOINT_SECONDS = 60.0  # that the end of a run waits for, when the final model is there
LASTING = (400, 401, 403, 404, 413)  # answers that another attempt would get again
LARGE_BYTES = 1_000_000  # files that are sent one at a time
T = TypeVar("T")
Listing = dict[str, RepoFile]  # a revision's files by their paths


# ---------------------------------------------------------------------------------------------------------- The client
def client() -> HfApi:
    prepare_library()
    return HfApi()


@functools.cache
def prepare_library() -> None:
    """Has the library send over LFS, give up on silence, and keep bars and addresses off the console."""
    huggingface_hub.constants.HF_HUB_DISABLE_XET = True
    huggingface_hub.set_client_factory(_http_client)
    huggingface_hub.utils.logging.set_verbosity_error()
    huggingface_hub.utils.disable_progress_bars()


def _http_client() -> Any:
    http = default_client_factory()
    http.timeout = (CONNECT_SECONDS, SILENT_SECONDS, SILENT_SECONDS, None)  # the library has none
    return http


def reason(error: BaseException) -> str:
    """An error as one line, without tokens and without the query of an address, which may be a permission."""
    while isinstance(error, (RuntimeError, LocalEntryNotFoundError)) and error.__cause__:  # "Error while uploading …"
        error = error.__cause__
    text = " ".join(str(error).split())
    if not text or isinstance(error, (LookupError, TypeError, AttributeError)):  # an answer that is none, or a bug
        text = f"{type(error).__name__} {text}".rstrip()
    return re.sub(r"hf_\w+", "hf_…", re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text))[:300].rstrip(".")


def lasting(error: BaseException) -> bool:
    """Whether another attempt would fail the same."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in LASTING
    return isinstance(error, LocalTokenNotFoundError)


def remedy(error: BaseException) -> str:
    if isinstance(error, HfHubHTTPError) and error.response.status_code == 413:
        return "It is too large for the Hub, or for the account's quota"
    if lasting(error):
        return "Log in with a token that may write (`uv run hf auth login`, or HF_TOKEN)"
    return "Is there a network, and does https://status.huggingface.co say that the Hub is well?"


def asked_wait(error: BaseException) -> float:
    """Seconds that the Hub asks to wait for (Retry-After)."""
    asked = error.response.headers.get("Retry-After", "") if isinstance(error, HfHubHTTPError) else ""
    return float(asked) if asked.isdigit() else 0.0


def retry(action: Callable[[], T], attempts: int, say: Say, what: str) -> T:
    """Calls `action` until it does not raise, so many times at most; raises at once what lasts."""
    wait = FIRST_WAIT_SECONDS
    for left in reversed(range(attempts)):
        try:
            return action()
        except Exception as error:  # HTTP, connection, value and runtime errors, by the phase the client is in
            if lasting(error) or isinstance(error, InputError) or not left:
                raise
            pause = max(wait, asked_wait(error))
            say(f"warning: {what} failed ({reason(error)}); the next attempt is in {pause:g} s")
        time.sleep(pause)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)
    raise AssertionError("there is a last attempt")


def listing(api: HfApi, repo_id: str, revision: str) -> Listing:
    entries = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def differs(file: Path, entry: RepoFile | None, known: str | None = None) -> bool:
    """Whether a file is another than the Hub's, by the Hub's hashes; `known` is the file's SHA-256, if it is known."""
    if entry is None:
        return True
    if entry.lfs:
        return entry.lfs.sha256 != (known or sha256(file))
    content = file.read_bytes()
    return entry.blob_id != hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def send(
    api: HfApi, repo_id: str, branch: str, files: dict[str, Path], message: str, delete: Collection[str] = ()
) -> Any:
    """Commits files under their paths, and the removal of folders.

    Large files go one at a time, not in the client's pool of threads, which the end of the process would wait for.
    """
    operations = [CommitOperationAdd(path, file) for path, file in files.items()]
    for operation in operations:
        if operation.upload_info.size > LARGE_BYTES:
            api.preupload_lfs_files(repo_id, [operation], revision=branch, free_memory=False)
    removals = [CommitOperationDelete(f"{folder}/", is_folder=True) for folder in delete]
    return api.create_commit(repo_id, [*operations, *removals], commit_message=message, revision=branch)


# ------------------------------------------------------------------------------ Before the first step, and at the end
def check_upload(config: Any, folder: Path, say: Say) -> None:
    """Makes sure, before the first step, that the token exists and may write, and creates the repository.

    Raises InputError; but a run that goes on does so without the Hub, as long as only the network is missing.
    """
    api, repo_id = client(), config.hf_repo_id

    def check() -> None:
        api.whoami()
        if not api.repo_exists(repo_id) and api.repo_exists(repo_id, repo_type="dataset"):
            raise InputError(f"hf_repo_id {repo_id} is a dataset: give the model a name of its own")
        api.create_repo(repo_id, private=config.hf_private, exist_ok=True)
        api.auth_check(repo_id, write=True)

    has_checkpoint = bool(store.names(folder / "checkpoints"))
    try:
        retry(check, START_ATTEMPTS, say, f"asking for {repo_id}")
        if config.resume == "auto" and config.hub_checkpoints and not has_checkpoint:
            check_nothing_there(api, repo_id, folder)
    except InputError:
        raise
    except Exception as error:
        if has_checkpoint and not lasting(error):
            say(f"warning: {repo_id} cannot be reached ({reason(error)}); the run goes on, uploads are tried again")
            return
        raise InputError(
            f"cannot upload to {repo_id}: {reason(error)}. {remedy(error)}, or set SKIP_HF_UPLOAD=true"
        ) from error


def check_nothing_there(api: HfApi, repo_id: str, folder: Path) -> None:
    """Raises InputError when the Hub has checkpoints of the run that is about to begin, which it would replace."""
    if there := on_hub(api, repo_id, branch_of(folder)):
        raise InputError(
            f"{repo_id} holds {newest_first(there)[0]} of the run {folder.name}, of which there is no checkpoint here:"
            " --resume hub goes on from it; another --output_dir, or --resume never, begins a new run"
        )


def upload_command(config: Any, folder: Path) -> str:
    return f"uv run hf upload {config.hf_repo_id or 'OWNER/NAME'} {folder} ."


def is_of(repo_id: str | None, address: str | None) -> bool:
    """Whether a commit's address, as `upload` returns it, is of a repository."""
    return f"/{repo_id}/commit/".lower() in (address or "").lower()


def upload(config: Any, folder: Path, say: Say) -> str:
    """Uploads the model's folder, compares it with the Hub's hashes and tags it; returns the commit's address.

    Raises InputError and leaves the folder as it is.
    """
    if problem := damage_of(folder):
        raise InputError(f"{folder} is damaged and is not uploaded: {problem}. The training command makes it anew")
    api, repo_id = client(), config.hf_repo_id
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    tag = run_name(folder.parent)

    def attempt() -> str:
        api.create_repo(repo_id, private=config.hf_private, exist_ok=True)  # a run without uploads has made none
        commit = send(api, repo_id, MAIN, files, f"Fine-tuned to Hebrew speech recognition: {tag}")
        there = listing(api, repo_id, commit.oid)
        if wrong := [path for path, file in files.items() if differs(file, there.get(path))]:
            raise OSError(f"the Hub's hash of {', '.join(wrong)} is another than that of the file")
        put_tag(api, repo_id, tag, commit.oid)
        return commit.commit_url

    try:
        address = retry(attempt, FINAL_ATTEMPTS, say, f"the upload to {repo_id}")
    except Exception as error:
        raise InputError(
            f"the upload to {repo_id} failed: {reason(error)}. {remedy(error)}. The model is in {folder}; the same"
            f" command uploads it, or: {upload_command(config, folder)}"
        ) from error
    say(f"uploaded: {address}, its {len(files)} files have the hashes of those in {folder}, tag {tag}")
    return address


def put_tag(api: HfApi, repo_id: str, tag: str, revision: str) -> None:
    """Has a tag mean a revision, whatever it meant before."""
    try:
        api.create_tag(repo_id, tag=tag, revision=revision)
    except HfHubHTTPError as error:
        if error.response.status_code != 409:
            raise
        api.delete_tag(repo_id, tag=tag)
        api.create_tag(repo_id, tag=tag, revision=revision)


# ---------------------------------------------------------------------------------------------- Checkpoints to the Hub
def run_name(folder: Path) -> str:
    """The name of the run's folder, as a branch or a tag may have it; another one for every folder's name."""
    name = folder.resolve().name
    allowed = re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-") or "run"
    return allowed if allowed == name else f"{allowed}-{digest(name.encode())[:8]}"


def branch_of(folder: Path) -> str:
    return f"checkpoints-{run_name(folder)}"


def on_hub(api: HfApi, repo_id: str, branch: str) -> dict[str, Listing]:
    """The files of each checkpoint of a branch; none where there is no such branch."""
    found: dict[str, Listing] = {}
    try:
        for path, entry in listing(api, repo_id, branch).items():
            folder, _, file = path.rpartition("/")
            if NAME.fullmatch(folder):
                found.setdefault(folder, {})[file] = entry
    except RevisionNotFoundError:
        return {}
    return found


def newest_first(names: Collection[str]) -> list[str]:
    numbers = {name: [int(n or 1) for n in match.groups()] for name in names if (match := NAME.fullmatch(name))}
    return sorted(numbers, key=lambda name: numbers[name], reverse=True)


def is_there(folder: Path, entries: Listing) -> bool:
    """Whether the Hub has a checkpoint's files, all of them, by its manifest's and the Hub's hashes."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
        hashes = {MANIFEST: None} | {name: entry["sha256"] for name, entry in files.items()}
        return not any(differs(folder / name, entries.get(name), known) for name, known in hashes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # damaged, or pruned a moment ago
        return False


class CheckpointUploader:
    """Keeps a branch of the repository as the run's newest and best checkpoints are; training waits for nothing.

    A thread compares the two sides and sends what is missing, the newest first, until nothing is. It holds no list of
    work: what was left undone by a fault, or by the end of the process, is found missing by the next comparison.
    """

    def __init__(self, repo_id: str | None, folder: Path, keep: int, say: Say):
        """Does nothing where `repo_id` is None."""
        self.repo_id, self.folder, self.keep, self.say = repo_id, folder, keep, say
        self.parent, self.branch = folder / "checkpoints", branch_of(folder)
        self.in_use: set[Path] = set()  # not to be pruned
        self.uploaded: str | None = None  # the newest checkpoint that is on the Hub
        self.failures = 0
        self.problem: str | None = None  # why the last attempt failed, if it did
        self._damaged: set[str] = set()
        self._woken, self._hurry, self._idle = threading.Event(), threading.Event(), threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def _repo(self) -> str:
        assert self.repo_id is not None, "without a repository nothing is sent"
        return self.repo_id

    @property
    def step(self) -> int:
        """The last one that is on the Hub."""
        return store.number_of(Path(self.uploaded)) if self.uploaded else 0

    def numbers(self, step: int) -> dict[str, int]:
        """For the log of a step: what is there, what would be lost with this machine, what went wrong."""
        if self.repo_id is None:
            return {}
        return {"hub/uploaded_step": self.step, "hub/lag_steps": step - self.step, "hub/failures": self.failures}

    def facts(self) -> dict[str, Any]:
        """For status.json."""
        if self.repo_id is None:
            return {}
        newest = store.newest_name(self.parent)
        behind = store.number_of(Path(newest)) - self.step if newest else 0
        state = {"repository": self.repo_id, "branch": self.branch, "checkpoint": self.uploaded, "lag_steps": behind}
        return {"hub": state | {"failures": self.failures, "problem": self.problem}}

    def wake(self) -> None:
        """Says that there may be something to do."""
        if self.repo_id is None:
            return
        self._idle.clear()
        self._woken.set()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def drain(self, seconds: float) -> bool:
        """Waits until everything is on the Hub, so many seconds at most, and without the pauses after failures."""
        if self.repo_id is None:
            return False
        self._hurry.set()
        self.wake()
        return self._idle.wait(max(0.0, seconds))

    def finish(self) -> None:
        """Waits a little for the last checkpoint; the model is on the Hub by then."""
        if self.repo_id and not self.drain(LAST_CHECKPOINT_SECONDS):
            self.say(f"warning: the last checkpoint is not on the Hub, which has {self.uploaded or 'none'}")
        self.stop()

    def stop(self) -> None:
        """Makes no further attempt: one that fails closes the connections that all threads of the process share."""
        self._stopping.set()
        self._hurry.set()
        self._woken.set()

    def _run(self) -> None:
        wait = FIRST_WAIT_SECONDS
        while True:
            self._woken.wait()
            self._woken.clear()
            if self._stopping.is_set():
                return
            try:
                self._bring_up_to_date()
                wait, self.problem = FIRST_WAIT_SECONDS, None
                self._note()
                if not self._woken.is_set():
                    self._idle.set()
            except Exception as error:  # whatever it is, training goes on
                pause = max(wait, asked_wait(error))
                self._failed(reason(error), pause)
                if self._hurry.wait(pause):
                    self._stopping.wait(1)
                self._woken.set()
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)

    def _failed(self, why: str, pause: float) -> None:
        self.failures += 1
        if why != self.problem:
            self.say(
                f"warning: the upload of a checkpoint to {self.repo_id} failed ({why}); training goes on, the next"
                f" attempt is in {pause:g} s"
            )
        self.problem = why
        self._note()

    def _note(self) -> None:
        store.update_status(self.folder, **self.facts())

    def _wanted(self) -> list[Path]:
        """The checkpoints that belong on the Hub, the newest first."""
        names = [folder for folder in store.names(self.parent) if folder.name not in self._damaged]
        best = [folder for folder in store.by_wer(self.parent) if folder in names][:1]
        return names[: self.keep] + [folder for folder in best if folder not in names[: self.keep]]

    def _bring_up_to_date(self) -> None:
        api = client()
        while wanted := self._wanted():
            there = on_hub(api, self._repo, self.branch)
            present = [folder for folder in wanted if is_there(folder, there.get(folder.name, {}))]
            self.uploaded = max((folder.name for folder in present), default=None)
            missing = [folder for folder in wanted if folder not in present]
            if not missing:
                break
            self.in_use = {missing[0]}
            try:
                self._upload(api, missing[0], there.keys() - {folder.name for folder in wanted})
            finally:
                self.in_use = set()

    def _upload(self, api: HfApi, folder: Path, superfluous: set[str]) -> None:
        started = time.perf_counter()
        try:
            store.verify(folder)
        except InvalidCheckpoint as problem:
            if folder.exists():
                self._damaged.add(folder.name)
                self.say(f"warning: checkpoint {folder.name} is damaged and not uploaded: {problem}")
            return
        files = {f"{folder.name}/{path.name}": path for path in sorted(folder.iterdir())}
        api.create_branch(self._repo, branch=self.branch, revision=self._beginning(api), exist_ok=True)
        send(api, self._repo, self.branch, files, f"Checkpoint {folder.name}", sorted(superfluous))
        if not is_there(folder, on_hub(api, self._repo, self.branch).get(folder.name, {})):
            raise OSError(f"the Hub's hashes of {folder.name} are others than those of its manifest")
        try:
            api.super_squash_history(self._repo, branch=self.branch, commit_message=f"Checkpoint {folder.name}")
        except Exception as error:
            self.failures += 1
            self.say(f"warning: the history of {self.branch} was not cut ({reason(error)}), the next upload does it")
        size = sum(path.stat().st_size for path in files.values())
        self.say(
            f"checkpoint {folder.name} is on the Hub: {size / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s,"
            f" {self._repo}, branch {self.branch}"
        )

    def _beginning(self, api: HfApi) -> str:
        """The first commit of main, which holds no model."""
        return api.list_repo_commits(self._repo)[-1].commit_id


# -------------------------------------------------------------------------------------------- Checkpoints from the Hub
def fetch_checkpoints(config: Any, folder: Path, say: Say) -> None:
    """Brings the newest valid checkpoint of the Hub into the run's folder, and the best one before it.

    What is in the folder already is not brought, nor anything older than it. Raises InputError where then there is no
    checkpoint at all.
    """
    if not config.hf_repo_id:
        raise InputError("--resume hub needs hf_repo_id (HF_REPO_ID): the repository that holds the checkpoints")
    api, repo_id, branch = client(), config.hf_repo_id, branch_of(folder)
    place = folder / "checkpoints"
    here = store.newest_valid(place, say)
    try:
        there = retry(lambda: on_hub(api, repo_id, branch), START_ATTEMPTS, say, f"asking for {repo_id}")
        found = _fetch_newest(api, repo_id, branch, newest_first(there), place, say, here.step if here else -1)
        if not (found or here):
            raise InputError(f"{repo_id} has no checkpoint of this run in a branch {branch}{_others(api, repo_id)}")
    except InputError:
        raise
    except Exception as error:
        if not here:
            raise InputError(f"cannot resume from {repo_id}: {reason(error)}. {remedy(error)}") from error
        say(f"warning: {repo_id} cannot be reached ({reason(error)}); the run goes on from the checkpoint in {place}")


def _others(api: HfApi, repo_id: str) -> str:
    names = [b.name.removeprefix("checkpoints-") for b in api.list_repo_refs(repo_id).branches if b.name != MAIN]
    if not names:
        return ": begin the run without --resume hub"
    return f", but of {', '.join(names)}: give the --output_dir of that name, or begin without --resume hub"


def _fetch_newest(api: HfApi, repo_id: str, branch: str, names: list[str], place: Path, say: Say, after: int) -> bool:
    """Fetches the newest valid checkpoint of a step later than `after`, and the best one before it."""
    for position, name in enumerate(names):
        if store.number_of(Path(name)) <= after:
            return False
        if found := _fetch(api, repo_id, branch, name, place, say):
            wer = {older: _wer(api, repo_id, branch, older) for older in names[position + 1 :]}
            better = [n for n, w in wer.items() if w is not None and (found.wer is None or w <= found.wer)]
            for older in sorted(better, key=lambda name: wer[name] or 0.0)[:1]:
                _fetch(api, repo_id, branch, older, place, say)
            return True
    return False


def _wer(api: HfApi, repo_id: str, branch: str, name: str) -> float | None:
    file = api.hf_hub_download(repo_id, f"{name}/{MANIFEST}", revision=branch)
    try:
        return float(json.loads(Path(file).read_text())["wer"])
    except (ValueError, KeyError, TypeError):
        return None


def is_plain(path: str, name: str) -> bool:
    """Whether a path is a file right in a checkpoint's folder, or does not belong to that."""
    inside = path.removeprefix(f"{name}/")
    return inside == path or not ({"..", "."} & set(re.split(r"[/\\]", inside)))


def _fetch(api: HfApi, repo_id: str, branch: str, name: str, place: Path, say: Say) -> store.Checkpoint | None:
    """Downloads one checkpoint, checks it against its manifest, and only then gives it its name."""
    if (place / name).exists():
        return None
    if strange := [path for path in api.list_repo_files(repo_id, revision=branch) if not is_plain(path, name)]:
        say(f"warning: checkpoint {name} of {repo_id} is not used: it has a file {strange[0]!r}")
        return None
    unfinished = place / f"{UNFINISHED}hub"
    started = time.perf_counter()

    def download() -> None:
        api.snapshot_download(repo_id, revision=branch, allow_patterns=f"{name}/*", local_dir=unfinished)

    for what in ("downloaded again", "not used"):
        retry(download, FINAL_ATTEMPTS, say, f"the download of {name}")
        try:
            found = store.verify(unfinished / name)
            break
        except InvalidCheckpoint as problem:
            say(f"warning: checkpoint {name} of {repo_id} is {what}: {problem}")
            shutil.rmtree(unfinished)  # or the client would believe what is there
    else:
        return None
    for path in (*(unfinished / name).iterdir(), unfinished / name):
        flush(path)
    (unfinished / name).rename(place / name)
    flush(place)
    shutil.rmtree(unfinished, ignore_errors=True)
    size = sum(path.stat().st_size for path in (place / name).iterdir())
    say(f"checkpoint {name} from {repo_id}: {size / 1e6:.1f} MB in {time.perf_counter() - started:.1f} s")
    return store.Checkpoint(place / name, found.facts)
