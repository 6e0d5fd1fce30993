"""A small server on loopback that speaks the hub's file protocol."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer:
    """Serves each folder in `root` as the model `town/<its name>` at `url`; a context manager."""

    def __init__(self, root):
        self.root, self.paths = Path(root), []

    def __enter__(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                hub.paths.append(self.path)
                status, headers, data = hub.answer(self.path.split("?")[0])
                self.send_response(status)
                for key, value in (headers | {"Content-Length": str(len(data))}).items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(data if self.command == "GET" else b"")

            do_HEAD = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path):
        """Status, headers and body for /town/NAME/resolve/REV/FILE or /api/models/town/NAME/…"""
        parts = path.removeprefix("/api/models").split("/")[2:]
        if not (self.root / parts[0]).is_dir():
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if len(parts) > 2 and parts[2] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if path.startswith("/api"):
            names = sorted(file.name for file in (self.root / parts[0]).iterdir())
            listed = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in names]
            about = {"id": f"town/{parts[0]}", "sha": COMMIT, "siblings": []}
            return 200, {}, json.dumps(listed if "tree" in parts else about).encode()
        file, headers = self.root / parts[0] / "/".join(parts[3:]), {"X-Repo-Commit": COMMIT}
        if not file.is_file():
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b""
        data = file.read_bytes()
        return 200, headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data
