"""Servers on loopback for tests: a base for any, and one that speaks OpenAI's protocol."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Calls `serve(handler)` of its subclass for each request to `url`; a context manager."""

    def __enter__(self):
        serve = self.serve

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def do_GET(self):
                serve(self)

            do_HEAD = do_POST = do_PUT = do_GET

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *error):
        self.close()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def body(handler):
    return handler.rfile.read(int(handler.headers["Content-Length"]))


def send(handler, data=b"", status=200, headers=None):
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(data)


class OpenAIServer(Server):
    """Answers a prompt with `says(prompt)`, but for what `script` has for its first requests.

    That is "answer", "die" (in the middle of the response), bytes, or a status with headers.
    """

    def __init__(self, script=(), delay=lambda number: 0.0, dies_after=None, says=str.upper):
        self.script, self.delay, self.dies_after = list(script), delay, dies_after
        self.prompts, self.bodies, self.headers, self.times = [], [], [], []
        self.busy = self.most_at_once = 0
        self.lock, self.says = threading.Lock(), says

    def __enter__(self):
        super().__enter__()
        self.url += "/v1"
        return self

    def serve(self, handler):
        given = json.loads(body(handler))
        chat = handler.path == "/v1/chat/completions"
        prompt = given["messages"][-1]["content"] if chat else given["prompt"]
        with self.lock:
            number = len(self.prompts)
            self.prompts.append(prompt)
            self.bodies.append(given)
            self.headers.append(handler.headers)
            self.times.append(time.monotonic())
            does = self.script.pop(0) if self.script else "answer"
            self.busy += 1
            self.most_at_once = max(self.most_at_once, self.busy)
        time.sleep(self.delay(number))
        with self.lock:
            self.busy -= 1
        if self.dies_after is not None and number >= self.dies_after:
            does = "die"
        text = {"text": self.says(prompt)}
        if chat:
            text = {"message": {"role": "assistant", "content": self.says(prompt)}}
        reply = {"id": "1", "object": "completion", "created": 0, "model": "m"}
        reply |= {"choices": [{"index": 0, "finish_reason": "stop", **text}]}
        data, status, headers = json.dumps(reply).encode(), 200, {}
        kind = "application/json"
        if does == "die":
            headers = {"Content-Length": str(len(data))}
            data, handler.close_connection = data[:20], True
        elif isinstance(does, bytes):
            data, kind = does, "text/html" if does.startswith(b"<") else kind
        elif does != "answer":
            status, headers = does
            said = f"no, {handler.headers['Authorization']}"
            data = json.dumps({"error": {"message": said}}).encode()
        send(handler, data, status, {"Content-Type": kind} | headers)
