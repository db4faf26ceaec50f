"""A small Hugging Face Hub on 127.0.0.1 for tests: in memory, standard library only.

    with HubServer(users={"hf_w": ("OzLabs", "write"), "hf_r": ("OzLabs", "read")}) as hub:
        hub.add_repo("OzLabs/clips", {"data/train.parquet": content}, repo_type="dataset", private=True)
        hub.fail("POST", "/commit/", 503)
        subprocess.run([sys.executable, "job.py"], env={**os.environ, **hub.env(home=tmp_path, token="hf_w")})
        assert hub.repos["OzLabs/asr"]["main"]["README.md"] == b"..."
        assert not any(b"hf_w" in request.body for request in hub.requests)

The client is the installed huggingface_hub, pointed here by HF_ENDPOINT. Not served: Xet (hence HF_HUB_DISABLE_XET=1,
which huggingface_hub reads once, at import), pull requests, paged listings, deleting of branches and repositories,
spaces; a request for what has no route is answered 501. As on the Hub, a new
repository holds `.gitattributes`, and LFS content travels to and from a storage at another origin
(`http://localhost:port`) whose URLs are their own permission: it refuses a request with an Authorization header.
"""

import base64
import hashlib
import json
import re
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".wav", ".flac", ".mp3", ".zip", ".tar")
LFS_MIN_BYTES = 10_000_000  # a larger file of any other suffix is stored as LFS too
URL_PREFIX = {"model": "", "dataset": "datasets/"}


class Request(NamedTuple):
    """What a client sent: `path` with its query and still quoted, header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)


class Response(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes = b""


class HubError(Exception):
    """A refusal. huggingface_hub picks its exception class by `code` (header X-Error-Code), hardly by the status."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status = status
        ascii_message = message.encode("ascii", "replace").decode()  # a path may be Hebrew, a header may not
        self.headers = {"X-Error-Message": ascii_message, **(headers or {})}
        if code:
            self.headers["X-Error-Code"] = code


@dataclass
class Fault:
    """What goes wrong with the next `times` requests of `method` ("*": any) whose path or query contains `path`.

    `status`, `hang_up` and `cut_request` leave the request undone; `cut` and `corrupt` spoil the answer to one that was
    done.
    """

    method: str
    path: str
    status: int | None = None  # answered in place of doing the request
    times: int = 1
    headers: dict[str, str] = field(default_factory=dict)  # of that answer: Retry-After in seconds, X-Error-Code, …
    message: str = "injected by the test"
    delay_s: float = 0.0  # waited before anything else
    hang_up: bool = False  # the connection is closed without an answer
    cut: int | None = None  # bytes of the answer's body after which the connection is closed
    corrupt: bool = False  # the last byte of the answer's body is changed, so its hash is wrong
    cut_request: int | None = None  # bytes of the request's body after which the connection is closed
    bytes_per_s: float | None = None  # how fast the bodies of request and answer go


@dataclass(frozen=True)
class User:
    """Owner of a token with the role "read", "write" or "fineGrained".

    The token reaches the namespaces and repositories in `grants` and, unless it is fine-grained, the namespace `name`.
    """

    name: str
    role: str
    grants: tuple[str, ...] = ()

    def reaches(self, repo_id: str) -> bool:
        scopes = {*self.grants} if self.role == "fineGrained" else {self.name, *self.grants}
        return not scopes.isdisjoint({repo_id, repo_id.split("/")[0]})

    def writes(self, repo_id: str) -> bool:
        return self.role != "read" and self.reaches(repo_id)


@dataclass
class Commit:
    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, bytes]


@dataclass
class Repo:
    """A repository; `repo["main"]` is {path: bytes} at a branch, tag or commit id.

    `gated` shuts out those whose token does not reach the repository: "files" from downloads and auth_check, as the Hub
    does today, "all" from its metadata and listings too.
    """

    repo_id: str
    repo_type: str
    private: bool
    gated: str | None
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return URL_PREFIX[self.repo_type] + self.repo_id

    def resolve(self, revision: str) -> Commit:
        commit_id = self.branches.get(revision) or self.tags.get(revision) or revision
        if commit_id not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[commit_id]

    def __getitem__(self, revision: str) -> dict[str, bytes]:
        return self.resolve(revision).files

    def commit(self, branch: str, files: dict[str, bytes], title: str, message: str, author: str) -> Commit:
        parent = self.branches.get(branch)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        # New at every run: a client that finds a commit id in its cache asks for none of its files again.
        commit_id = hashlib.sha1(f"{self.key} {parent} {title} {date}".encode()).hexdigest()
        self.commits[commit_id] = Commit(commit_id, parent, title, message, author, date, files)
        self.branches[branch] = commit_id
        return self.commits[commit_id]


class HubServer:
    """The server and what it holds; a context manager that leaves no thread and no open socket behind.

    `users` maps a token to (name, role) or (name, role, grants), see `User`. `repos` maps "owner/name" of a model and
    "datasets/owner/name" of a dataset to its `Repo`. `requests` lists everything received, in order of arrival. `url`
    (for HF_ENDPOINT or HfApi(endpoint=...)) is known once the context is entered. LFS content of more than
    `lfs_part_bytes` is asked for in parts, as the Hub does from 5 GB on.
    """

    lfs_part_bytes = 5_000_000_000

    def __init__(self, users: dict[str, tuple] | None = None):
        self.users = {token: User(*user) for token, user in (users or {}).items()}
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.faults: list[Fault] = []
        self.storage: dict[str, bytes | None] = {}  # "repo key/sha256" -> LFS content, None while only announced
        self.parts: dict[str, dict[int, bytes]] = {}  # the same key -> parts that have come
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        port = self._server.server_address[1]
        self.url, self.storage_url = f"http://127.0.0.1:{port}", f"http://localhost:{port}/storage"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})  # seconds
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.closing.set()  # ends the delays
        self._server.shutdown()
        self._server.server_close()  # joins the threads of the requests
        self._thread.join()

    def env(self, home: Path | str | None = None, token: str | None = None) -> dict[str, str]:
        """Environment variables, to be laid over os.environ, that point a subprocess here and its caches below `home`.

        Without `token` an HF_TOKEN or a saved login of the caller stays in force.
        """
        variables = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        variables |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}
        if home is not None:
            variables |= {"HF_HOME": f"{home}", "HF_HUB_CACHE": f"{home}/hub", "HF_DATASETS_CACHE": f"{home}/datasets"}
        return variables | ({} if token is None else {"HF_TOKEN": token})

    def add_repo(self, repo_id, files=None, repo_type="model", private=False, gated=None) -> Repo:
        """Creates the repository `repo_id` ("owner/name") with `files` ({path: bytes}) and `.gitattributes` on main."""
        repo = Repo(repo_id, repo_type, private, gated)
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        files = {".gitattributes": attributes.encode(), **(files or {})}
        for path, content in files.items():
            if "lfs" in (entry := describe(path, content)):
                self.storage[f"{repo.key}/{entry['lfs']['oid']}"] = content
        repo.commit("main", files, "initial commit", "", repo_id.split("/")[0])
        self.repos[repo.key] = repo
        return repo

    def fail(self, method: str, path: str, status: int | None = None, **settings) -> Fault:
        """Registers a `Fault`; of several that match a request, the oldest with `times` left acts."""
        self.faults.append(Fault(method, path, status, **settings))
        return self.faults[-1]

    # From a request to its action

    def meet(self, method: str, path: str) -> Fault:
        """Uses up the fault that meets a request, if any."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and fault.method in ("*", method) and fault.path in path:
                    fault.times -= 1
                    return fault
        return Fault("", "")

    def respond(self, request: Request) -> Response:
        path = urlsplit(request.path).path  # still quoted: a %2F belongs to its segment
        for method, pattern, access, action in ROUTES:
            if request.method in method.split("|") and (match := re.fullmatch(pattern, path)):
                arguments = {name: unquote(text) for name, text in match.groupdict(default="").items()}
                with self.lock:
                    if access != "storage":
                        arguments["caller"] = self.caller(request)
                    if "repo_id" in arguments:
                        key = arguments.pop("kind").replace("models/", "") + arguments.pop("repo_id")
                        arguments["repo"] = self.admit(arguments["caller"], key, access)
                    answer = action(self, request, **arguments)
                return answer if isinstance(answer, Response) else json_response(200, answer)
        raise HubError(501, f"hub_server.py does not serve {request.method} {request.path}")

    def caller(self, request: Request) -> User | None:
        token = request.headers.get("authorization", "").removeprefix("Bearer ")
        if token and token not in self.users:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.users.get(token)

    def admit(self, caller: User | None, key: str, access: str) -> Repo:
        """The repository at `key` if `caller` may "list" it, download its "files" or "write" to it; else HubError."""
        repo = self.repos.get(key)
        reached = repo is not None and caller is not None and caller.reaches(repo.repo_id)
        if repo is None or (repo.private and not reached):
            if caller is None:
                raise HubError(401, "Invalid username or password.", "RepoNotFound")
            raise HubError(404, "Repository not found", "RepoNotFound")
        if not reached and (repo.gated == "all" or (repo.gated == "files" and access == "files")):
            hint = "you are not in the authorized list" if caller else "you must be authenticated to access it"
            raise HubError(403 if caller else 401, f"Access to {key} is restricted and {hint}.", "GatedRepo")
        if access == "write" and caller is None:
            raise HubError(401, "Invalid username or password.")
        if access == "write" and not caller.writes(repo.repo_id):
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    # Actions: each returns a Response, or what a JSON body of status 200 shall hold

    def whoami(self, request, caller):
        if caller is None:
            raise HubError(401, "Invalid username or password.")
        token = {"displayName": "test", "role": caller.role, "createdAt": "2026-01-01T00:00:00.000Z"}
        if caller.role == "fineGrained":
            grants = [{"entity": {"name": name}, "permissions": ["repo.write"]} for name in caller.grants]
            token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": grants}
        orgs = [] if caller.role == "fineGrained" else [{"type": "org", "name": name} for name in caller.grants]
        auth = {"type": "access_token", "accessToken": token}
        return {"type": "user", "name": caller.name, "fullname": caller.name, "orgs": orgs, "auth": auth}

    def validate_yaml(self, request, caller):
        return {"errors": [], "warnings": []}  # the metadata of README.md is not looked at

    def create_repo(self, request, caller):
        wanted = json.loads(request.body)
        repo_type, owner = wanted.get("type", "model"), wanted.get("organization") or (caller and caller.name)
        repo_id = f"{owner}/{wanted['name']}"
        if caller is None or not caller.writes(repo_id):
            message = f"You don't have the rights to create a {repo_type} under the namespace {owner}"
            raise HubError(403 if caller else 401, message)
        key = URL_PREFIX[repo_type] + repo_id
        answer = {"url": f"{self.url}/{key}", "name": repo_id}
        if key in self.repos:  # with exist_ok=True the client reads `url` from the body of the 409
            return json_response(409, {"error": f"You already created this {repo_type} repo", **answer})
        self.add_repo(repo_id, repo_type=repo_type, private=wanted.get("visibility") == "private")
        return answer

    def check_access(self, request, caller, repo):
        return {}

    def repo_info(self, request, caller, repo, revision=""):
        commit, siblings = repo.resolve(revision or "main"), []
        for path in sorted(commit.files):
            siblings.append({"rfilename": path})
            if "blobs" in request.query:
                entry = describe(path, commit.files[path])
                lfs = {"lfs": entry["lfs"] | {"sha256": entry["lfs"]["oid"]}} if "lfs" in entry else {}
                siblings[-1] |= {"size": entry["size"], "blobId": entry["oid"], **lfs}
        info = {"id": repo.repo_id, "author": repo.repo_id.split("/")[0], "sha": commit.id, "siblings": siblings}
        info |= {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False, "tags": []}
        return info | {"lastModified": commit.date, "createdAt": next(iter(repo.commits.values())).date}

    def list_tree(self, request, caller, repo, revision, folder=""):
        entries = tree(repo[revision], folder, recursive=request.query.get("recursive") == ["true"])
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return entries

    def paths_info(self, request, caller, repo, revision):
        wanted = parse_qs(request.body.decode())["paths"]
        return [entry for entry in tree(repo[revision], "", recursive=True) if entry["path"] in wanted]

    def list_commits(self, request, caller, repo, revision):
        history, commit = [], repo.resolve(revision)
        while commit:
            item = {"id": commit.id, "title": commit.title, "message": commit.message, "date": commit.date}
            history.append(item | {"authors": [{"user": commit.author}]})
            commit = repo.commits.get(commit.parent)
        return history

    def create_branch(self, request, caller, repo, name):
        if name in repo.branches:
            raise HubError(409, f"Reference already exists: {name}")
        repo.branches[name] = repo.resolve(json.loads(request.body).get("startingPoint", "main")).id
        return {}

    def create_tag(self, request, caller, repo, revision):
        name = json.loads(request.body)["tag"]
        if name in repo.tags:
            raise HubError(409, f"Reference already exists: {name}")
        repo.tags[name] = repo.resolve(revision).id
        return {}

    def delete_tag(self, request, caller, repo, revision):
        if repo.tags.pop(revision, None) is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return {}

    def list_refs(self, request, caller, repo):
        refs = {"converts": []}
        for kind, known in (("branches", repo.branches), ("tags", repo.tags)):
            folder = "heads" if kind == "branches" else "tags"
            refs[kind] = [{"name": n, "ref": f"refs/{folder}/{n}", "targetCommit": c} for n, c in known.items()]
        return refs

    def squash(self, request, caller, repo, revision):
        """Replaces a branch's history by one commit; LFS content that no branch or tag has any more is given up."""
        files = repo.commits[repo.branches[revision]].files
        del repo.branches[revision]
        repo.commit(revision, files, json.loads(request.body)["message"], "", caller.name)
        seen, queue = set(), [*repo.branches.values(), *repo.tags.values()]
        while queue:
            if (commit_id := queue.pop()) and commit_id not in seen:
                seen.add(commit_id)
                queue.append(repo.commits[commit_id].parent)
        repo.commits = {commit_id: commit for commit_id, commit in repo.commits.items() if commit_id in seen}
        kept = {hashlib.sha256(c).hexdigest() for commit in repo.commits.values() for c in commit.files.values()}
        for key in [key for key in self.storage if key.startswith(f"{repo.key}/")]:
            if self.storage[key] is not None and key.rsplit("/", 1)[1] not in kept:
                del self.storage[key]
        return {}

    def preupload(self, request, caller, repo, revision):
        """Says which files go as LFS and gives the hash of those present: the client commits no unchanged file."""
        present, answers = repo[revision], []
        for file in json.loads(request.body)["files"]:
            mode = "lfs" if is_lfs(file["path"], file["size"]) else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False})
            if file["path"] in present:
                entry = describe(file["path"], present[file["path"]])
                answers[-1]["oid"] = entry.get("lfs", entry)["oid"]
        return {"files": answers}

    def lfs_batch(self, request, caller, repo):
        objects = json.loads(request.body)["objects"]
        for wanted in objects:
            key = f"{repo.key}/{wanted['oid']}"
            if self.storage.setdefault(key, None) is None:  # without `actions` the client sends no content
                wanted["actions"] = {"upload": {"href": f"{self.storage_url}/{key}"}}
                if wanted["size"] > self.lfs_part_bytes:
                    numbers = range(1, -(-wanted["size"] // self.lfs_part_bytes) + 1)
                    header = {str(number): f"{self.storage_url}/{key}?part={number}" for number in numbers}
                    header["chunk_size"] = str(self.lfs_part_bytes)
                    wanted["actions"]["upload"] = {"href": f"{self.url}/complete/{key}", "header": header}
        return {"transfer": "basic", "objects": objects}

    def complete(self, request, key):
        """Puts the parts of a content together."""
        listed, parts = json.loads(request.body)["parts"], self.parts.pop(key)
        if [part["etag"] for part in listed] != [f'"{number}"' for number in sorted(parts)]:
            raise HubError(400, "The parts are not those that came")
        whole = Request("PUT", request.path, {}, b"".join(parts[number] for number in sorted(parts)))
        return self.use_storage(whole, key)

    def use_storage(self, request, key):
        if "authorization" in request.headers:
            raise HubError(400, "Only one auth mechanism allowed: the URL carries its own permission")
        if key not in self.storage or (request.method == "GET" and self.storage[key] is None):
            raise HubError(403, "Access denied")
        if request.method == "GET":
            return content_response(request, self.storage[key], {})
        if "part" in request.query:
            (number,) = request.query["part"]
            self.parts.setdefault(key, {})[int(number)] = request.body
            return Response(200, {"ETag": f'"{number}"'})
        if hashlib.sha256(request.body).hexdigest() != key.rsplit("/", 1)[1]:
            raise HubError(400, "The content does not have the announced sha256")
        self.storage[key] = request.body
        return Response(200, {})

    def commit(self, request, caller, repo, revision):
        """Applies the lines of the body, one JSON object each: a header, then one operation per file or folder."""
        if "create_pr" in request.query:
            raise HubError(501, "hub_server.py does not serve pull requests")
        if revision not in repo.branches:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        header, *operations = [json.loads(line) for line in request.body.splitlines()]
        summary, description = header["value"]["summary"], header["value"]["description"]
        if header["value"].get("parentCommit", repo.branches[revision]) != repo.branches[revision]:
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repo[revision])
        for kind, value in [(operation["key"], operation["value"]) for operation in operations]:
            path = value["path"]
            if kind == "file":
                files[path] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[path] = self.storage.get(f"{repo.key}/{value['oid']}")
                if files[path] is None:
                    raise HubError(400, f"The LFS content of {path} was not uploaded")
            else:
                start = path.rstrip("/") + "/"
                doomed = [name for name in files if (name == path if kind == "deletedFile" else name.startswith(start))]
                if not doomed:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                files = {name: content for name, content in files.items() if name not in doomed}
        commit = repo.commit(revision, files, summary, description, caller.name)
        return {"success": True, "commitOid": commit.id, "commitUrl": f"{self.url}/{repo.key}/commit/{commit.id}"}

    def download(self, request, caller, repo, revision, path):
        commit = repo.resolve(revision)
        headers = {"X-Repo-Commit": commit.id}
        if path not in commit.files:
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        entry = describe(path, commit.files[path])
        if "lfs" not in entry:
            return content_response(request, commit.files[path], headers | {"ETag": f'"{entry["oid"]}"'})
        sha256 = entry["lfs"]["oid"]
        headers |= {"X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(entry["size"])}
        return Response(302, headers | {"Location": f"{self.storage_url}/{repo.key}/{sha256}"})


_API = "/api/(?P<kind>models/|datasets/)(?P<repo_id>[^/]+/[^/]+)"
_WEB = "/(?P<kind>datasets/)?(?P<repo_id>[^/]+/[^/]+?)"
_REVISION = "(?P<revision>[^/]+)"

ROUTES = [  # methods, path, access ("storage": no account, "any", or what `HubServer.admit` knows), action
    ("GET", "/api/whoami-v2", "any", HubServer.whoami),
    ("POST", "/api/validate-yaml", "any", HubServer.validate_yaml),
    ("POST", "/api/repos/create", "any", HubServer.create_repo),
    ("GET", f"{_API}(/revision/{_REVISION})?", "list", HubServer.repo_info),
    ("GET", f"{_API}/auth-check", "files", HubServer.check_access),
    ("GET", f"{_API}/auth-check/write", "write", HubServer.check_access),
    ("GET", f"{_API}/tree/{_REVISION}(/(?P<folder>.+))?", "list", HubServer.list_tree),
    ("POST", f"{_API}/paths-info/{_REVISION}", "list", HubServer.paths_info),
    ("GET", f"{_API}/commits/{_REVISION}", "list", HubServer.list_commits),
    ("POST", f"{_API}/branch/(?P<name>[^/]+)", "write", HubServer.create_branch),
    ("POST", f"{_API}/tag/{_REVISION}", "write", HubServer.create_tag),
    ("DELETE", f"{_API}/tag/{_REVISION}", "write", HubServer.delete_tag),
    ("GET", f"{_API}/refs", "list", HubServer.list_refs),
    ("POST", f"{_API}/super-squash/{_REVISION}", "write", HubServer.squash),
    ("POST", f"{_API}/preupload/{_REVISION}", "write", HubServer.preupload),
    ("POST", f"{_API}/commit/{_REVISION}", "write", HubServer.commit),
    ("POST", rf"{_WEB}\.git/info/lfs/objects/batch", "write", HubServer.lfs_batch),
    ("GET|PUT", "/storage/(?P<key>.+)", "storage", HubServer.use_storage),
    ("POST", "/complete/(?P<key>.+)", "storage", HubServer.complete),
    ("GET|HEAD", f"{_WEB}/resolve/{_REVISION}/(?P<path>.+)", "files", HubServer.download),
]


def is_lfs(path: str, size: int) -> bool:
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_MIN_BYTES)  # the client sends empty files as regular


def describe(path: str, content: bytes) -> dict:
    """Listing entry of a file. `oid` is its git blob id, for LFS that of the pointer file; lfs.oid is the sha256."""
    entry = {"type": "file", "path": path, "size": len(content)}
    if is_lfs(path, len(content)):
        sha256 = hashlib.sha256(content).hexdigest()
        blob = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n".encode()
        entry["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": len(blob)}
    else:
        blob = content
    return entry | {"oid": hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()}


def tree(files: dict[str, bytes], folder: str, recursive: bool) -> list[dict]:
    """Entries of the files and directories in `folder` ("": the root), at all depths if `recursive`."""
    start, entries = f"{folder}/" if folder else "", {}
    for path in sorted(path for path in files if path.startswith(start)):
        parents = [path[: slash.start()] for slash in re.finditer("/", path) if slash.start() >= len(start)]
        for parent in parents if recursive else parents[:1]:
            tree_id = hashlib.sha1(parent.encode()).hexdigest()
            entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": tree_id}
        if recursive or not parents:
            entries[path] = describe(path, files[path])
    return list(entries.values())


def json_response(status: int, value, headers: dict[str, str] | None = None) -> Response:
    return Response(status, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())


def content_response(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    """All of `content`, or what the header `Range: bytes=first-last` asks for: so the client resumes a cut download."""
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    if not wanted:
        return Response(200, headers, content)
    first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
    if first > last:
        return Response(416, headers | {"Content-Range": f"bytes */{len(content)}"})
    return Response(206, headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}, content[first : last + 1])


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close() joins them
    request_queue_size = 64  # connections not yet accepted: clients open many at once


class _Handler(BaseHTTPRequestHandler):
    """Answers one request per connection (HTTP/1.0), so that closing the server waits for no idle client."""

    timeout = 30  # seconds without a byte from or to the client

    def handle(self):
        with suppress(ConnectionError):  # the client went away
            super().handle()

    def answer(self):
        hub = self.server.hub
        fault = hub.meet(self.command, self.path)
        length = int(self.headers.get("Content-Length", 0))
        if fault.cut_request is not None:
            self.rfile.read(min(length, fault.cut_request))
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        body = b"".join(self.rfile.read(size) for size in self.crawl(length, fault))
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(self.command, self.path, headers, body)
        with hub.lock:
            hub.requests.append(request)
        hub.closing.wait(fault.delay_s)
        if fault.hang_up or hub.closing.is_set():
            return
        try:
            if fault.status is not None:
                raise HubError(fault.status, fault.message, headers=fault.headers)
            response = hub.respond(request)
        except HubError as error:
            response = json_response(error.status, {"error": str(error)}, error.headers)
        content = response.body
        if fault.corrupt and content:
            content = content[:-1] + bytes([content[-1] ^ 1])
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            content, sent = content[: fault.cut], 0
            for size in self.crawl(len(content), fault):
                self.wfile.write(content[sent : sent + size])
                sent += size

    def crawl(self, length, fault):
        """Sizes of the pieces of a body, a tenth of a second apart where it shall go slowly."""
        if fault.bytes_per_s is None:
            yield length
            return
        piece = max(1, int(fault.bytes_per_s / 10))
        for start in range(0, length, piece):
            self.server.hub.closing.wait(0.1)
            yield min(piece, length - start)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

    def log_message(self, *_):
        pass
