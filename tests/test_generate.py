"""Truths about generation: batching cannot matter, the end stops, nothing is inherited."""

import json
import logging
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from labkit.generate import generate, generate_server

PROMPTS = [
    "<|user|>What does Otto like to eat?<|end|><|assistant|>",
    "Mila",
    "<|user|>小城里有一条河<|end|><|assistant|>",
    "What is three plus four?",
]


def test_batched_equals_one_by_one(tiny_model, tiny_tokenizer, arch):
    model = tiny_model(arch)
    alone = [generate(model, tiny_tokenizer, [p], max_new_tokens=12)[0] for p in PROMPTS]
    together = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=12, batch_size=4)
    by_two = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=12, batch_size=2)
    assert together == alone == by_two
    assert len(set(alone)) > 1


def test_greedy_takes_the_most_probable_token_each_time(tiny_model, tiny_tokenizer):
    model = tiny_model()
    ids = tiny_tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    new = ids[0, -8:].tolist()
    new = new[: new.index(1)] if 1 in new else new
    expected = tiny_tokenizer.decode(new, skip_special_tokens=True)
    assert generate(model, tiny_tokenizer, [PROMPTS[1]], max_new_tokens=8) == [expected]


def test_nothing_follows_the_end_token(tiny_model, tiny_tokenizer):
    """A model that can only say "a", or only the end token."""
    model = tiny_model()
    a = tiny_tokenizer("a").input_ids[0]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
        model.lm_head.bias[a] = 9.0
        assert generate(model, tiny_tokenizer, ["hello"], max_new_tokens=5) == ["aaaaa"]
        model.lm_head.bias[tiny_tokenizer.eos_token_id] = 99.0
        assert generate(model, tiny_tokenizer, ["hello"], max_new_tokens=5) == [""]


def test_the_models_own_sampling_settings_are_not_inherited(tiny_model, tiny_tokenizer):
    model = tiny_model()
    before = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config.repetition_penalty = 50.0
    model.generation_config.bad_words_ids = [[i] for i in range(10, 300)]
    settings = model.generation_config
    assert generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=12) == before
    assert model.generation_config is settings


def test_nor_those_of_a_model_with_an_adapter(tiny_model, tiny_tokenizer):
    from peft import LoraConfig, get_peft_model

    model = tiny_model()
    before = generate(model, tiny_tokenizer, PROMPTS, max_new_tokens=12)
    model.generation_config.repetition_penalty = 50.0
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    assert generate(adapted, tiny_tokenizer, PROMPTS, max_new_tokens=12) == before
    assert model.generation_config.repetition_penalty == 50.0


def test_modes_are_restored_module_by_module(tiny_model, tiny_tokenizer):
    model = tiny_model().train()
    model.lm_head.eval()
    generate(model, tiny_tokenizer, ["Mila"], max_new_tokens=2)
    assert model.training and not model.lm_head.training


def test_a_seed_repeats_samples_and_leaves_the_global_state(tiny_model, tiny_tokenizer):
    model = tiny_model()
    state = torch.get_rng_state()
    first, again, other = (
        generate(model, tiny_tokenizer, PROMPTS, temperature=1.0, max_new_tokens=12, seed=s)
        for s in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(state, torch.get_rng_state())


def test_samples_follow_the_models_distribution(tiny_model, tiny_tokenizer):
    """Two thirds "a", one third "b": with 600 draws the share lies within 4 deviations."""
    model = tiny_model()
    a, b = tiny_tokenizer("a").input_ids[0], tiny_tokenizer("b").input_ids[0]
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.full((model.config.vocab_size,), -99.0))
        model.lm_head.bias[a], model.lm_head.bias[b] = 0.693147, 0.0
    said = generate(
        model,
        tiny_tokenizer,
        ["x"] * 600,
        temperature=1.0,
        max_new_tokens=1,
        batch_size=600,
        seed=0,
    )
    assert set(said) == {"a", "b"}
    assert said.count("a") / 600 == pytest.approx(2 / 3, abs=4 * (2 / 9 / 600) ** 0.5)


def test_prompts_longer_than_the_context_lose_their_beginning(tiny_model, tiny_tokenizer, caplog):
    model = tiny_model("gpt2")
    long = "river " * 400
    kept = tiny_tokenizer.decode(tiny_tokenizer(long).input_ids[-(256 - 4) :])
    with caplog.at_level(logging.WARNING, "labkit"):
        got = generate(model, tiny_tokenizer, [long, "Mila"], max_new_tokens=4)
    assert "1 of 2 prompts" in caplog.text
    assert got[0] == generate(model, tiny_tokenizer, [kept], max_new_tokens=4)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": "one"}, "prompts.*list"),
        ({"prompts": ["fine", ""]}, "prompt 1 is empty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 256}, "max_new_tokens.*context of 256"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"batch_size": 0}, "batch_size"),
    ],
)
def test_bad_arguments_are_named(tiny_model, tiny_tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), tiny_tokenizer, **{"prompts": ["Mila"], **change})


def test_no_prompts_give_no_responses(tiny_model, tiny_tokenizer):
    assert generate(tiny_model(), tiny_tokenizer, []) == []


@pytest.fixture
def server(monkeypatch):
    """An OpenAI-compatible echo; `statuses` are answered first, then 200."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            state = self.server
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.seen.append((self.path, body, self.headers.get("Authorization")))
            status = state.statuses.pop(0) if state.statuses else 200
            answer = {"choices": [{"text": f"<{body['prompt']}>"}]} if status == 200 else "no such"
            data = state.raw or json.dumps(answer).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.seen, httpd.statuses, httpd.raw = [], [], None
    httpd.url = f"http://127.0.0.1:{httpd.server_port}"
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield httpd
    httpd.shutdown()
    httpd.server_close()


def test_server_answers_in_order_with_key_and_settings(server, monkeypatch):
    monkeypatch.setenv("LAB_KEY", "k-123")
    prompts = [f"p{i}" for i in range(20)]
    got = generate_server(
        server.url, "m", prompts, max_new_tokens=7, temperature=0.5, seed=3, api_key_env="LAB_KEY"
    )
    assert got == [f"<{p}>" for p in prompts]
    path, body, key = server.seen[0]
    assert path == "/v1/completions" and key == "Bearer k-123"
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == (
        "m",
        7,
        0.5,
        3,
    )


def test_no_key_is_sent_when_none_is_set(server, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    generate_server(server.url + "/v1/", "m", ["p"])
    assert server.seen[0][0] == "/v1/completions" and server.seen[0][2] is None


def test_a_busy_server_is_asked_again(server):
    server.statuses = [503, 429]
    assert generate_server(server.url, "m", ["p"]) == ["<p>"]


@pytest.mark.parametrize("statuses", [[404], [302], [503] * 3, [401]])
def test_error_answers_are_told_without_the_key(server, monkeypatch, statuses):
    monkeypatch.setenv("OPENAI_API_KEY", "k-secret")
    server.statuses = list(statuses)
    with pytest.raises(ConnectionError, match=f"answered {statuses[0]}") as error:
        generate_server(server.url, "m", ["p"])
    assert "k-secret" not in str(error.value)
    assert len(server.seen) == len(statuses)


@pytest.mark.parametrize("raw", [b"<html>", b'{"choices": []}'])
def test_answers_of_another_kind_are_refused(server, raw):
    server.raw = raw
    with pytest.raises(ConnectionError, match="OpenAI-compatible"):
        generate_server(server.url, "m", ["p"])


def test_nobody_listening_is_told():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(ConnectionError, match=f"127.0.0.1:{port}"):
        generate_server(f"http://127.0.0.1:{port}/v1", "m", ["p"] * 3)
    with pytest.raises(ValueError, match="base_url"):
        generate_server("localhost:8000", "m", ["p"])
