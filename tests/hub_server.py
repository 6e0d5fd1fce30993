"""A small server on loopback that speaks the hub's file protocol."""

import hashlib
import json
from pathlib import Path

from loopback import Server, send

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubServer(Server):
    """Serves each folder in `root` as the model `town/<its name>` at `url`; a context manager."""

    def __init__(self, root):
        self.root, self.paths = Path(root), []

    def serve(self, handler):
        self.paths.append(handler.path)
        status, headers, data = self.answer(handler.path.split("?")[0])
        send(handler, data, status, headers)

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
