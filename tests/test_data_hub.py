"""Data sets of a Hub that this test runs itself: fetched, pinned, found again without a network, and what is said where they cannot be had."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

CARD = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: train.jsonl}\n---\n"
NASTY = "مرحبا\u200f 👩‍💻\r\n\t[x]"
ROWS = [{"messages": [{"role": "user", "content": f"{number} {NASTY}"}, {"role": "assistant", "content": "a"}]} for number in range(3)]
FILES = {"README.md": CARD, "train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode()}
SETS = {"me/set": FILES, "me/bare": {"train.jsonl": FILES["train.jsonl"]}, "me/empty": {"test.csv": b"text\n"}, "me/cut": {}}
SCRIPT = """
import json, sys
from olpack.data import HubSet, Source, load_chats
from olpack.errors import OlpackError
for asked in json.loads(sys.argv[1]):
    source = Source(HubSet(**asked))
    try:
        print(json.dumps([source.digest(), [[chat.source, chat.messages] for chat in load_chats(source)]]))
    except OlpackError as error:
        print(json.dumps(str(error)))
"""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    commit = "a" * 40

    def log_message(self, *_args: object) -> None:
        pass

    def _serve(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        repo = "/".join(path.removeprefix("/api").split("/")[2:4])
        rest = path.partition(f"{repo}/")[2]
        if repo == "me/closed":
            return self._answer(403, b"", {"X-Error-Code": "GatedRepo"})
        if repo not in SETS:
            return self._answer(401, b"", {"X-Error-Code": "RepoNotFound"})
        if rest.startswith("resolve/nowhere/"):
            return self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        if rest.startswith("resolve/"):
            name = rest.split("/", 2)[2]
            if name not in SETS[repo]:
                return self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return self._answer(200, SETS[repo][name], {"X-Repo-Commit": self.commit, "ETag": f'"{self.commit[:8]}{name}"'})
        if rest.startswith("tree/"):
            files = [{"type": "file", "path": name, "size": len(content), "oid": "0" * 40} for name, content in SETS[repo].items()]
            return self._answer(200, json.dumps(files).encode(), {})
        if repo == "me/cut":  # the connection ends before the answer
            self.close_connection = True
            return None
        siblings = [{"rfilename": name} for name in SETS[repo]]
        self._answer(200, json.dumps({"id": repo, "sha": self.commit, "siblings": siblings, "tags": []}).encode(), {})

    do_GET = do_POST = do_HEAD = _serve

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@pytest.fixture
def hub():
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    handler.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield handler
    server.shutdown()
    server.server_close()


def ask(home: Path, url: str, *asked: dict, **env: str) -> list:
    """What each data set gives, in a process of its own: the library reads its settings when it is loaded."""
    env = {**os.environ, "HF_HOME": str(home), "HF_ENDPOINT": url, "PYTHONPATH": str(Path(__file__).parent.parent), **env}
    child = subprocess.run([sys.executable, "-c", SCRIPT, json.dumps(asked)], env=env, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    return [json.loads(line) for line in child.stdout.splitlines()]


def test_a_data_set_is_fetched_once_and_pinned_to_its_commit(hub, tmp_path):
    found = ask(
        tmp_path,
        hub.url,
        {"id": "me/set"},
        {"id": "me/set", "split": "train[1:]"},
        {"id": "me/set", "split": "test"},
        {"id": "me/set", "subset": "other"},
        {"id": "me/set", "revision": "nowhere"},
        {"id": "me/closed"},
        {"id": "me/none"},
    )
    digest, rows = found[0]
    assert rows == [[f"me/set[train]:{number}", row["messages"]] for number, row in enumerate(ROWS, 1)]
    assert [messages for _, messages in found[1][1]] == [row["messages"] for row in ROWS[1:]] and found[1][0] != digest
    for said, expected in zip(
        found[2:],
        (
            "Unknown split \"test\". Should be one of ['train']",
            "'other' not found",
            "has no revision nowhere",
            "me/closed is gated",
            "me/none is not on the Hugging Face Hub",
        ),
        strict=True,
    ):
        assert expected in said
    offline = {"HF_HUB_OFFLINE": "1"}
    assert ask(tmp_path, hub.url, {"id": "me/set"}, {"id": "me/none"}, **offline) == [
        [digest, rows],
        "The data set me/none is not in the local cache and the Hugging Face Hub cannot be reached. "
        "Connect once, or save it as a file and name that.",
    ]
    # The card of a newer commit was seen, but its data never fetched.
    (tmp_path / "hub/datasets--me--set/refs/main").write_text("b" * 40)
    (tmp_path / "hub/datasets--me--set/snapshots" / ("a" * 40)).rename(tmp_path / "hub/datasets--me--set/snapshots" / ("b" * 40))
    (said,) = ask(tmp_path, hub.url, {"id": "me/set"}, **offline)
    assert "in the local cache at another revision only" in said


def test_a_data_set_without_a_card_and_a_split_without_rows(hub, tmp_path):
    commit = {"id": "me/bare", "revision": hub.commit}
    empty = {"id": "me/empty", "split": "test", "subset": "default"}
    (digest, rows), pinned, said = ask(tmp_path, hub.url, {"id": "me/bare"}, commit, empty)
    assert [messages for _, messages in rows] == [row["messages"] for row in ROWS] and pinned == [digest, rows]
    assert '"test" corresponds to no data' in said and "another revision" not in said
    # Which commit a branch stands for is remembered with the card; a commit needs nobody to ask.
    named, pinned = ask(tmp_path, hub.url, {"id": "me/bare"}, commit, HF_HUB_OFFLINE="1")
    assert "me/bare is not in the local cache and the Hugging Face Hub cannot be reached" in named and pinned == [digest, rows]
    (cut,) = ask(tmp_path, hub.url, {"id": "me/cut"})
    assert "me/cut is not in the local cache and the Hugging Face Hub cannot be reached" in cut
