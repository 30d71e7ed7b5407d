"""A stand-in for the Hugging Face Hub: as much of its HTTP interface as uploading a few files takes, with files in memory.

with HubDouble() as hub:
    api = HfApi(endpoint=hub.url, token="hf_test")
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class HubDouble:
    """One user, `me`, and their repositories.

    Attributes:
        files: of each repository, path to content, as of its last commit.
        commits: (repository, message, paths added, paths deleted).
        uploaded: bytes of large files that came in.
        refuse: path to (status, text) that it is answered with.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: list[tuple[str, str, set[str], set[str]]] = []
        self.blobs: dict[str, bytes] = {}
        self.uploaded = 0
        self.refuse: dict[str, tuple[int, str]] = {}
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def __enter__(self) -> HubDouble:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubDouble
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    def _answer(self, status: int, body: object = None, message: str = "") -> None:
        content = json.dumps(body).encode() if body is not None else b""
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        if message:
            self.send_header("X-Error-Message", message)
        self.end_headers()
        self.wfile.write(content)

    def _serve(self) -> None:
        hub, path = self.hub, self.path.partition("?")[0]
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path in hub.refuse:
            status, text = hub.refuse[path]
            return self._answer(status, {"error": text}, text)
        if path.startswith("/blobs/"):
            hub.uploaded += len(raw)
            hub.blobs[hashlib.sha256(raw).hexdigest()] = raw
            return self._answer(200)
        if self.headers.get("Authorization") != "Bearer hf_test":
            return self._answer(401, {"error": "Invalid username or password."}, "Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(raw)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            status = 409 if repo in hub.files else 200
            hub.files.setdefault(repo, {})
            return self._answer(status, {"url": f"{hub.url}/{repo}", "id": repo})
        if path == "/api/validate-yaml":
            return self._answer(200, {"errors": [], "warnings": []})
        repo = "/".join(path.removeprefix("/api/models").removesuffix(".git/info/lfs/objects/batch").split("/")[1:3])
        if repo not in hub.files:
            return self._answer(404, {"error": "Repository not found"}, "Repository not found")
        kind = path.rstrip("/").split("/")[-2]
        if path.endswith("/objects/batch"):
            return self._answer(200, {"transfer": "basic", "objects": [self._object(one) for one in json.loads(raw)["objects"]]})
        if kind == "preupload":
            named = [(file["path"], "lfs" if file["path"].endswith(".gguf") else "regular") for file in json.loads(raw)["files"]]
            return self._answer(200, {"files": [{"path": one, "uploadMode": mode, "shouldIgnore": False} for one, mode in named]})
        if kind == "tree":
            return self._answer(200, [{"type": "file", "path": one, "size": 1, "oid": "0" * 40} for one in hub.files[repo]])
        if kind == "commit":
            self._commit(repo, [json.loads(line) for line in raw.splitlines()])
            return self._answer(200, {"success": True, "commitUrl": f"{hub.url}/{repo}/commit/1", "commitOid": "1" * 40})
        self._answer(404, {"error": path}, path)

    do_GET = do_POST = do_PUT = _serve

    def _object(self, asked: dict) -> dict:
        there = asked["oid"] in self.hub.blobs
        return asked if there else {**asked, "actions": {"upload": {"href": f"{self.hub.url}/blobs/{asked['oid']}"}}}

    def _commit(self, repo: str, lines: list[dict]) -> None:
        files, added, deleted = self.hub.files[repo], set(), set()
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                added.add(value["path"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
                added.add(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
                deleted.add(value["path"])
        self.hub.commits.append((repo, lines[0]["value"]["summary"], added, deleted))
