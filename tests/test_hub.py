"""hf:// sources, over the Hub's own protocol spoken by a server on this machine."""

import hashlib
import http.server
import json
import os
import subprocess
import sys
import threading
from urllib.parse import parse_qs, unquote

from corpus import labelled, write_tar

REPO = "clip-benchmark/wds_tiny"
COMMIT = "a" * 40


class FakeHub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks of a data-set repository: its tree, paths in it, and file bytes with ranges."""

    files: dict[str, bytes] = {}  # noqa: RUF012

    def entries(self, folder):
        folders = {name.rsplit("/", 1)[0] for name in self.files if "/" in name}
        for name, data in self.files.items():
            if name.startswith(folder):
                yield {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
        for name in folders:
            if name.startswith(folder) and name != folder:
                yield {"type": "directory", "path": name, "size": 0, "oid": hashlib.sha1(name.encode()).hexdigest()}

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, document):
        self.answer(200, json.dumps(document).encode(), Content_Type="application/json")

    def do_GET(self):
        path = unquote(self.path.split("?")[0])
        if path.startswith(f"/api/datasets/{REPO}/tree/"):
            self.json(list(self.entries(path.split("/tree/")[1].partition("/")[2])))
        elif path.startswith(f"/api/datasets/{REPO}"):
            about = {"private": False, "tags": [], "downloads": 0, "likes": 0}
            self.json({"id": REPO, "sha": COMMIT, "siblings": [], **about})
        elif path.startswith(f"/datasets/{REPO}/resolve/"):
            data = self.files.get(path.split("/resolve/")[1].partition("/")[2])
            if data is None:
                self.answer(404, X_Error_Code="EntryNotFound")
                return
            first, _, last = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")
            part = data[int(first) : int(last) + 1 if last else None]
            self.answer(206, part, ETag=f'"{hashlib.sha1(data).hexdigest()}"', Accept_Ranges="bytes")
        else:
            self.answer(404)

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
        self.json([entry for entry in self.entries("") if entry["path"] in wanted])

    def log_message(self, *args):
        pass


def test_a_data_set_on_the_hub_is_read_like_a_local_one(tmp_path):
    for at in range(2):
        tar = write_tar(tmp_path / f"{at}.tar", labelled([f"k{at}_{i}" for i in range(4)]))
        FakeHub.files[f"test/{at}.tar"] = tar.read_bytes()
    FakeHub.files["test/nshards.txt"] = b"2\n"
    code = (
        "import sys, json; from clipindex import list_shards, read_samples\n"
        f"shards = list_shards(['hf://datasets/{REPO}/test'])\n"
        "print(json.dumps([[s.url, s.version != '', [x.key for x in read_samples(s)]] for s in shards]))"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [url.rsplit("@")[-1].split("/")[-2:] for url, _, _ in found] == [["test", "0.tar"], ["test", "1.tar"]]
    assert all(versioned for _, versioned, _ in found)
    assert [keys for _, _, keys in found] == [[f"k{at}_{i}" for i in range(4)] for at in range(2)]
