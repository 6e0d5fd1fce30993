"""A small server on loopback that speaks W&B's GraphQL and file stream, and keeps what it is sent."""

import base64
import gzip
import json
import re
import threading

from loopback import Server, body, send

KEY = "0" * 40  # a key of the form that W&B issues


class WandbServer(Server):
    """At `url`; `seconds` is how long each answer but the first takes. A context manager.

    `calls` are (operation, variables) of GraphQL, `stream` the bodies of the file stream, `files`
    what was uploaded by name, `views` the workspaces and reports by name.
    """

    def __init__(self, seconds=0.0):
        self.seconds, self.calls, self.stream, self.files, self.views = seconds, [], [], {}, {}
        self.closing = threading.Event()

    def serve(self, handler):
        if handler.command in ("GET", "HEAD"):
            return send(handler)
        sent = body(handler)
        if handler.command == "PUT":
            self.closing.wait(self.seconds)
            self.files[handler.path.removeprefix("/upload/")] = sent
            return send(handler)
        if "otel" in handler.path:  # the client's telemetry
            return send(handler, b"{}")
        zipped = handler.headers.get("Content-Encoding") == "gzip"
        sent = json.loads(gzip.decompress(sent) if zipped else sent)
        self.closing.wait(self.seconds)
        if handler.path.startswith("/graphql"):
            send(handler, json.dumps({"data": self.answer(**sent)}).encode())
        else:
            self.stream.append(sent)
            send(handler, b"{}")

    def close(self):
        self.closing.set()
        super().close()

    def environment(self):
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY, "WANDB_MODE": "online"}

    def answer(self, query, variables=None, **_):
        operation = re.search(r"(?:query|mutation)\s+(\w+)", query)[1]
        given = (variables or {}).get("input") or variables or {}
        self.calls.append((operation, given))
        return getattr(self, f"answer_{operation}")(**given)

    def answer_Viewer(self):
        names = {"id": "1", "entity": "town", "username": "town", "email": "town@localhost"}
        return {"viewer": names | {"flags": "{}", "teams": {"edges": []}}}

    answer_GetDefaultEntity = answer_Viewer

    def answer_UpsertBucket(self, name, project, **_):
        place = {"id": "2", "name": project or "labkit", "entity": {"id": "1", "name": "town"}}
        run = {"id": f"run-{name}", "name": name, "displayName": name, "project": place}
        run |= {"config": "{}", "description": None, "sweepName": None, "historyLineCount": 0}
        return {"upsertBucket": {"bucket": run, "inserted": True}}

    def answer_CreateRunFiles(self, files, **_):
        urls = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in files]
        return {"createRunFiles": {"runID": "3", "uploadHeaders": [], "files": urls}}

    def answer_ServerFeaturesQuery(self):
        return {"serverInfo": {"features": []}}

    def answer_CreateArtifact(self, artifactCollectionName, **_):
        artifact = {"id": artifactCollectionName, "state": "PENDING"}
        artifact["artifactSequence"] = {"latestArtifact": None}
        return {"createArtifact": {"artifact": artifact}}

    def answer_CreateArtifactManifest(self, name, artifactID, **_):
        manifest = {"id": artifactID, "file": self.file(f"{artifactID}/{name}")}
        return {"createArtifactManifest": {"artifactManifest": manifest}}

    def answer_CreateArtifactFiles(self, artifactFiles, **_):
        names = [f"{file['artifactID']}/{file['name']}" for file in artifactFiles]
        nodes = [{"node": self.file(name)} for name in names]
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def answer_CommitArtifact(self, artifactID, **_):
        return {"commitArtifact": {"artifact": {"id": artifactID, "digest": "0"}}}

    def answer_UseArtifact(self, artifactID, **_):
        return {"useArtifact": {"artifact": {"id": artifactID}}}

    def answer_ProjectInternalId(self, **_):
        number = base64.b64encode(b"ProjectInternalId:1").decode()
        return {"project": {"id": "2", "internalId": number}}

    def answer_GetProjects(self, **_):
        node = {"id": "2", "name": "labkit", "entityName": "town", "createdAt": "2026-01-01"}
        edges = [{"node": node | {"isBenchmark": False, "user": None}, "cursor": "0"}]
        return {"models": {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}}

    def answer_ProjectViews(self, viewType="runs", viewName=None, **_):
        nodes = [v for v in self.views.values() if v["type"] == viewType]
        nodes = [v for v in nodes if viewName in (None, v["name"])]
        edges = [{"node": node, "cursor": "0"} for node in nodes]
        page = {"endCursor": None, "hasNextPage": False}
        return {"project": {"allViews": {"edges": edges, "pageInfo": page}}}

    answer_View = answer_ProjectViews

    def answer_SpecificReport(self, reportId):
        return {"view": self.views[reportId]}

    def answer_upsertView(self, id=None, **given):
        id = id or base64.b64encode(f"View:{len(self.views) + 1}".encode()).decode()
        view = {"description": "", "createdAt": "2026-01-01", "updatedAt": "2026-01-01"} | given
        view["project"] = {"id": "2", "name": given["projectName"]}
        view["project"]["entityName"] = given["entityName"]
        inserted, self.views[id] = id not in self.views, view | {"id": id, "user": None}
        return {"upsertView": {"view": self.views[id], "inserted": inserted}}

    answer_UpsertView2 = answer_upsertView

    def file(self, name):
        found = {"id": name, "name": name.split("/")[-1], "displayName": name, "uploadHeaders": []}
        found |= {"uploadUrl": f"{self.url}/upload/{name}", "storagePath": name}
        return found | {"uploadMultipartUrls": None, "artifact": {"id": name.split("/")[0]}}
