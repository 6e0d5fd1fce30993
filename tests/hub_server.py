"""A small server on loopback that speaks the hub's file protocol."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves `folder` as the model `town/tiny` at `url`; a context manager.

    With `down` every answer is 503. `requests` lists (method, path).
    """

    def __init__(self, folder, down=False, repo="town/tiny"):
        self.folder, self.down, self.repo, self.requests = Path(folder), down, repo, []

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                hub.requests.append((self.command, self.path))
                status, headers, data = hub.answer(self.path.split("?")[0])
                self.send_response(status)
                for key, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(data)

            do_HEAD = do_GET

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

    def answer(self, path):
        """Status, headers and body for a path."""
        if self.down:
            return 503, {}, b""
        if not path.startswith((f"/{self.repo}/resolve/", f"/api/models/{self.repo}")):
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        files = sorted(self.folder.iterdir())
        if path.startswith("/api/"):
            listed = [{"type": "file", "path": f.name, "size": 1, "oid": "0"} for f in files]
            about = {
                "id": self.repo,
                "sha": COMMIT,
                "siblings": [{"rfilename": f.name} for f in files],
            }
            return 200, {}, json.dumps(listed if "/tree/" in path else about).encode()
        revision, _, name = path.split("/resolve/")[1].partition("/")
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        headers = {"X-Repo-Commit": COMMIT}
        if not (self.folder / name).is_file():
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b""
        data = (self.folder / name).read_bytes()
        return 200, headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data
