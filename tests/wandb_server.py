"""A stand-in of W&B's server on loopback: as much of it as wandb 0.31 asks for in a run."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

VIEWER = {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
PROJECT = {"id": "p", "name": "a-project", "entity": {"id": "e", "name": "me"}}
BUCKET = {"id": "b", "displayName": "a-name", "historyLineCount": 0, "config": "{}", "project": PROJECT}


class WandbServer:
    """`history` is what was logged, `said` all that came; after `fall_silent` every request waits until the end."""

    def __init__(self):
        self.history: list[dict[str, Any]] = []
        self.said = b""
        self.is_silent, self.ended = threading.Event(), threading.Event()
        handler = type("Handler", (_Handler,), {"server_state": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "WandbServer":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    def fall_silent(self) -> None:
        self.is_silent.set()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        self.said += body
        if path.endswith("/file_stream"):
            lines = json.loads(body).get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
            self.history += map(json.loads, lines)
            return {}
        asked = json.loads(body) if path.endswith("/graphql") else {"query": ""}
        if "query Viewer" in asked["query"]:
            return {"data": {"viewer": VIEWER}}
        if "mutation UpsertBucket" in asked["query"]:
            bucket = BUCKET | {"name": asked["variables"]["name"]}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "mutation CreateRunFiles" in asked["query"]:
            files = [{"name": name, "uploadUrl": f"{self.url}/put/{name}"} for name in asked["variables"]["files"]]
            return {"data": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}}
        return {"data": {}}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: ClassVar[WandbServer]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.server_state.is_silent.is_set():
            self.server_state.ended.wait()
            self.close_connection = True
            return
        answer = json.dumps(self.server_state.answer(self.path, body)).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_PUT = do_POST

    def log_message(self, *_) -> None:
        """Nothing on the console."""
