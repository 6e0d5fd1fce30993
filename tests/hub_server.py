"""A small server on loopback that speaks the hub's file protocol, with faults on demand."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `folder` as the model `town/tiny` at `url`; a context manager.

    `fault` is None, "503" (every answer), "503-weights" (weights only), "cut" (weights are
    always cut in the middle, no ranges) or "cut-once" (cut once, ranges understood).
    `requests` lists (method, path).
    """

    commit = COMMIT

    def __init__(self, folder, fault=None, repo="town/tiny"):
        self.folder, self.fault, self.repo = Path(folder), fault, repo
        self.requests: list[tuple[str, str]] = []
        self.cuts = 0

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self, body=False)

            def do_GET(self):
                hub.answer(self, body=True)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, request, body):
        path = request.path.split("?")[0]
        self.requests.append((request.command, path))
        name = path.rsplit("/", 1)[-1]
        is_weights = name.endswith(".safetensors")
        if self.fault == "503" or (self.fault == "503-weights" and is_weights):
            return self.reply(request, 503, b"", body)
        if path.startswith(f"/api/models/{self.repo}"):
            return self.reply(request, 200, json.dumps(self.listing(path)).encode(), body)
        if not path.startswith(f"/{self.repo}/resolve/"):
            return self.reply(request, 404, b"", body, {"X-Error-Code": "RepoNotFound"})
        revision = path.split("/resolve/")[1].split("/")[0]
        if revision not in ("main", COMMIT):
            return self.reply(request, 404, b"", body, {"X-Error-Code": "RevisionNotFound"})
        headers = {"X-Repo-Commit": COMMIT}
        if not (self.folder / name).is_file():
            headers["X-Error-Code"] = "EntryNotFound"
            return self.reply(request, 404, b"", body, headers)
        data = (self.folder / name).read_bytes()
        headers["ETag"] = f'"{hashlib.sha1(data).hexdigest()}"'
        cut = body and is_weights and (self.fault == "cut" or self.fault == "cut-once")
        return self.send_file(request, data, body, headers, cut)

    def send_file(self, request, data, body, headers, cut):
        if cut and (self.fault == "cut" or self.cuts == 0):
            self.cuts += 1
            return self.reply(request, 200, data, body, headers, send=len(data) // 2)
        asked = request.headers.get("Range")
        if asked and self.fault == "cut-once":
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            return self.reply(request, 206, data[start:], body, headers)
        return self.reply(request, 200, data, body, headers)

    def listing(self, path):
        files = sorted(p for p in self.folder.iterdir() if p.is_file())
        if "/tree/" in path:
            return [{"type": "file", "path": p.name, "size": p.stat().st_size,
                     "oid": hashlib.sha1(p.name.encode()).hexdigest()} for p in files]  # fmt: skip
        siblings = [{"rfilename": p.name} for p in files]
        return {"id": self.repo, "modelId": self.repo, "sha": COMMIT, "siblings": siblings,
                "private": False, "tags": [], "downloads": 0, "likes": 0}  # fmt: skip

    def reply(self, request, status, data, body, headers=None, send=None):
        request.send_response(status)
        for key, value in (headers or {}).items():
            request.send_header(key, value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        if body:
            request.wfile.write(data if send is None else data[:send])
            request.wfile.flush()
        if send is not None:
            request.close_connection = True
            request.connection.shutdown(2)
