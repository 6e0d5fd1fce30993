"""Responses from servers that fail in every way, a cache that pays nothing twice, and a real server.

The small server answers a prompt with the prompt in capitals; `script` says what it does instead,
one entry per request.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from loopback import OpenAIServer
from transformers.utils.import_utils import is_serve_available

from labkit import models
from labkit.generate import generate
from labkit.respond import cached, from_model, from_server

KEY = "sk-town-0123456789"
PROMPTS = [f"prompt {number} 你好" for number in range(12)]
ANSWERS = [prompt.upper() for prompt in PROMPTS]
BASE = Path(models.__file__).parent / "tinytown" / "base"


@pytest.fixture(autouse=True)
def no_settings_of_the_user(monkeypatch):
    for name in [name for name in os.environ if name.startswith("OPENAI_")]:
        monkeypatch.delenv(name)


def ask(server, **options):
    return from_server("m", base_url=server.url, **{"api_key": KEY, "timeout": 5.0} | options)


def test_responses_come_in_order_some_at_once():
    with OpenAIServer(delay=lambda number: 0.1 if number % 3 == 0 else 0.01) as server:
        assert ask(server, concurrency=4)(PROMPTS) == ANSWERS
        assert 2 <= server.most_at_once <= 4
        assert sorted(server.prompts) == sorted(PROMPTS)
        assert ask(server)([]) == [] and len(server.prompts) == len(PROMPTS)


@pytest.mark.parametrize("chat", [True, False])
def test_what_is_sent(chat, monkeypatch):
    with OpenAIServer() as server:
        monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\n")
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        options = {"chat": chat, "max_tokens": 7, "temperature": 0.5}
        assert from_server("m", **options)(["a"]) == ["A"]
        asked = {"messages": [{"role": "user", "content": "a"}]} if chat else {"prompt": "a"}
        assert server.bodies == [{"model": "m", "max_tokens": 7, "temperature": 0.5} | asked]
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        from_server("m", chat=chat, seed=3, max_tokens=None, temperature=None)(["a", "a"])
        bodies = sorted(server.bodies[1:], key=lambda body: body["seed"])
        assert bodies == [{"model": "m", "seed": seed} | asked for seed in (3, 4)]


def test_retries_wait_as_long_as_the_server_says():
    with OpenAIServer([(429, {"Retry-After": "1"}), (500, {}), "die"]) as server:
        assert ask(server)(["a"]) == ["A"]
        first, second, third, fourth = server.times
        assert second - first >= 1.0 and third - second >= 0.3 and fourth - third >= 0.7


def test_a_slow_response_is_asked_for_again():
    with OpenAIServer(delay=lambda number: 8.0 if number == 0 else 0.0) as server:
        assert ask(server, timeout=2.0)(["a"]) == ["A"]
        assert len(server.prompts) == 2


FAILURES = {
    "key": ([(401, {})], PermissionError, "OPENAI_API_KEY"),
    "model": ([(404, {})], ValueError, "name of the model"),
    "settings": ([(400, {})], ValueError, "settings"),
    "limit": ([(429, {"Retry-After-Ms": "1"})] * 2, ConnectionError, "concurrency"),
    "broken": ([(500, {})] * 2, ConnectionError, "later"),
    "cut": (["die"] * 2, ConnectionError, "server runs"),
    "page": ([b"<html>sign in</html>"], ValueError, "sign in"),
    "no json": ([b"{{{"], ValueError, "base_url"),
    "no choice": ([b'{"error": "busy"}'], ValueError, "busy"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_says_where_and_what_to_do_without_the_key(name):
    script, kind, words = FAILURES[name]
    with OpenAIServer(script) as server:
        respond = ask(server, retries=1)
        with pytest.raises(kind, match=words) as caught:
            respond(["a"])
        if isinstance(script[0], tuple):
            assert f"{script[0][0]}, {{'message': 'no, Bearer …'}}" in str(caught.value)
        assert server.url in str(caught.value) and len(server.prompts) == len(script)
        assert KEY not in f"{caught.value!r} {caught.value} {respond!r} {respond.settings()}"
        assert respond(["a"]) == ["A"]


def test_time_out_and_no_server():
    with OpenAIServer(delay=lambda number: 1.0) as server:
        with pytest.raises(TimeoutError, match="longer"):
            ask(server, timeout=0.2, retries=0)(["a"])
    with pytest.raises(ConnectionError, match=server.url):
        ask(server, retries=0)(["a"])


def test_arguments():
    with pytest.raises(ValueError, match="api_key"):
        from_server("m")
    for key in ("schlüssel", "two\nlines"):
        with pytest.raises(ValueError, match="api_key") as caught:
            from_server("m", api_key=key)
        assert key not in str(caught.value)
    with pytest.raises(ValueError, match="base_url"):
        from_server("m", base_url="localhost:8000/v1")
    with OpenAIServer() as server:
        server.url = server.url.replace("://", f"://user:{KEY}@") + f"?key={KEY}"
        with pytest.raises(ValueError, match="prompts"):
            ask(server)("a")
    with pytest.raises(ConnectionError) as caught:
        ask(server, retries=0, api_key=None)(["a"])
    assert KEY not in str(caught.value)


def test_the_cache_pays_nothing_twice_and_holds_no_key(tmp_path):
    file = tmp_path / "new" / "cache.jsonl"
    with OpenAIServer() as server:
        first = cached(ask(server, temperature=1.0), file)
        assert first(PROMPTS[:2] * 2) == ANSWERS[:2] * 2  # four samples, not two
        assert len(server.prompts) == 4
        again = cached(ask(server, temperature=1.0), file)
        assert again(PROMPTS[:2]) == ANSWERS[:2] and again(PROMPTS[:1]) == ANSWERS[:1]
        assert len(server.prompts) == 4
        again(PROMPTS[:1])  # its third sample
        assert len(server.prompts) == 5
        for options in ({"temperature": 0.9}, {"temperature": 1.0, "chat": False}):
            cached(ask(server, **options), file)(PROMPTS[:1])
        cached(ask(server, temperature=1.0), file, key="other")(PROMPTS[:1])
        assert len(server.prompts) == 8
    text = file.read_text("utf-8")
    assert len(text.splitlines()) == 8 and KEY not in text and "127.0.0.1" not in text
    assert KEY not in repr(first) and KEY not in str(first.settings())


def test_a_server_that_dies_leaves_what_came_and_another_goes_on(tmp_path):
    file = tmp_path / "cache.jsonl"
    with OpenAIServer(dies_after=5) as server:
        respond = cached(ask(server, retries=0, concurrency=1), file)
        for _ in range(2):  # a failed call does not count: the same prompts, not new samples
            with pytest.raises(ConnectionError) as caught:
                respond(PROMPTS)
            assert caught.value.__notes__[0].startswith(f"5 of 12 responses are kept in {file}")
        assert server.prompts == [*PROMPTS[:6], PROMPTS[5]]
    with OpenAIServer() as server:
        assert cached(ask(server), file)(PROMPTS) == ANSWERS
        assert sorted(server.prompts) == sorted(PROMPTS[5:])


def test_responses_on_their_way_are_kept_when_another_fails(tmp_path):
    """The first fails at once; the three that were sent with it are paid for, and kept."""
    with OpenAIServer([(400, {})], delay=lambda number: 0.5 * (number > 0)) as server:
        respond = cached(ask(server, concurrency=4), tmp_path / "cache.jsonl")
        with pytest.raises(ValueError):
            respond(PROMPTS)
        sent = len(server.prompts)
        assert sent <= 5
        assert respond(PROMPTS) == ANSWERS and len(server.prompts) == len(PROMPTS) + 1


def test_a_killed_process_resumes(tmp_path):
    file = tmp_path / "cache.jsonl"
    code = "import sys; from labkit.respond import *; url, file, *prompts = sys.argv[1:]; "
    code += "cached(from_server('m', base_url=url, concurrency=2), file)(prompts)"
    with OpenAIServer(delay=lambda number: 0.1) as server:
        process = subprocess.Popen([sys.executable, "-c", code, server.url, file, *PROMPTS])
        while len(server.prompts) < 6 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        with file.open("a") as out:
            out.write('{"id": "01", "resp')  # a line that it was writing
        before = len(server.prompts)
        assert before < len(PROMPTS)
        assert cached(from_server("m", base_url=server.url), file)(PROMPTS) == ANSWERS
        assert len(server.prompts) <= len(PROMPTS) + 2  # those on their way are asked for again


def test_damaged_lines_and_other_files(tmp_path, caplog):
    file, asked = tmp_path / "cache.jsonl", []

    def respond(prompts):
        asked.extend(prompts)
        return [prompt.upper() for prompt in prompts]

    assert cached(respond, file, key="upper")(PROMPTS) == ANSWERS
    file.write_bytes(file.read_bytes()[:-9])
    asked.clear()
    with caplog.at_level(logging.WARNING, "labkit"):
        assert cached(respond, file, key="upper")(PROMPTS) == ANSWERS
    assert asked == PROMPTS[-1:] and "line 12" in caplog.text
    assert cached(respond, file, key="upper")(PROMPTS) == ANSWERS and len(asked) == 1
    with pytest.raises(ValueError, match="key"):
        cached(respond, file)
    file.write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(ValueError, match="line 1"):
        cached(respond, file, key="upper")
    assert file.read_text().count("\n") == 1


def test_in_process_equals_generate(tiny_model, tiny_tokenizer):
    model, prompts = tiny_model(), ["Mila", "What does Otto eat?", "小城", "Mila"]
    options = {"max_new_tokens": 12, "batch_size": 2}
    respond = from_model(model, tiny_tokenizer, template="bare", **options)
    expected = generate(model, tiny_tokenizer, prompts, max_new_tokens=12)
    assert respond(prompts) == expected and any(expected)
    chat = from_model(model, tiny_tokenizer, **options)(["Mila"])
    assert chat == generate(model, tiny_tokenizer, ["<|user|>Mila<|end|><|assistant|>"], **options)
    assert respond([]) == []


def test_samples_in_process_depend_on_seed_and_number_only(tiny_model, tiny_tokenizer, tmp_path):
    """Not on batches, on what else is asked, or on what a cache had already."""
    model, prompts = tiny_model(), ["Mila", "Otto", "Mila", "What is three plus four?"]
    options = {"template": "bare", "max_new_tokens": 12, "temperature": 1.0}
    whole = from_model(model, tiny_tokenizer, **options)(prompts)
    assert whole[0] != whole[2]
    one = from_model(model, tiny_tokenizer, batch_size=1, **options)
    assert [one([prompt])[0] for prompt in prompts] == whole
    assert from_model(model, tiny_tokenizer, seed=1, **options)(prompts) != whole
    file = tmp_path / "cache.jsonl"
    cached(from_model(model, tiny_tokenizer, **options), file)(prompts[:2])
    again = from_model(model, tiny_tokenizer, **options)
    assert cached(again, file)(prompts) == whole
    assert len(file.read_text().splitlines()) == 4
    other = cached(from_model(tiny_model(seed=1), tiny_tokenizer, **options), file)
    assert other(prompts) != whole  # other weights, other entries


class Serve:
    """`transformers serve` with the embedded base on loopback; a context manager."""

    def __init__(self, folder):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{self.port}/v1", folder / "serve.txt"

    def __enter__(self):
        command = [Path(sys.executable).with_name("transformers"), "serve", BASE, "--device", "cpu"]
        command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(self.port)]
        with self.log.open("a") as out:
            threads = os.environ | {"OMP_NUM_THREADS": "1"}
            self.process = subprocess.Popen(command, stdout=out, stderr=out, env=threads)
        end = time.monotonic() + 180
        while self.process.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(self.url.replace("/v1", "/health"), timeout=5).close()
                return self
            except OSError:
                time.sleep(0.2)
        self.__exit__()
        raise RuntimeError(self.log.read_text()[-2000:])

    def requests(self):
        return self.log.read_text().count("POST /v1/chat/completions")

    def __exit__(self, *error):
        self.process.kill()
        self.process.wait()


@pytest.mark.skipif(not is_serve_available(), reason="needs fastapi and uvicorn (labkit[dev])")
def test_transformers_serve(tmp_path):
    """The real protocol: chat and text, time-out, wrong model, and a death in the middle."""
    model, tokenizer = models.load("tinytown")
    prompts = [f"Where does {name} live?" for name in ("Mila", "Otto", "Ida", "the baker")]
    file, own = tmp_path / "cache.jsonl", {"max_new_tokens": 16, "template": "chat"}
    expected = from_model(model, tokenizer, **own)(prompts)
    with Serve(tmp_path) as server:
        options = {"base_url": server.url, "max_tokens": 16, "retries": 0}
        assert from_server(str(BASE), **options)(prompts) == expected
        plain = from_server(str(BASE), chat=False, **options)(prompts)
        assert plain == generate(model, tokenizer, prompts, max_new_tokens=16)
        with pytest.raises(ValueError, match="pinned"):
            from_server("another", **options)(prompts[:1])
        with pytest.raises(TimeoutError):
            from_server(str(BASE), timeout=0.001, **options)(prompts[:1])
        respond, came = cached(from_server(str(BASE), concurrency=1, **options), file), []
        with pytest.raises(ConnectionError, match=server.url):
            for _, response in respond.ask([(prompt, 0) for prompt in prompts]):
                came.append(response)
                if len(came) == 2:
                    server.process.kill()
                    server.process.wait()
        assert 2 <= len(came) < 4 and len(file.read_text().splitlines()) == len(came)
    with Serve(tmp_path) as server:
        before = server.requests()
        options["base_url"] = server.url
        assert cached(from_server(str(BASE), **options), file)(prompts) == expected
        assert server.requests() - before == 4 - len(came)
