"""A real HTTP server that speaks vLLM's completions for a bigram model, and misbehaves as a test tells it."""

import itertools
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from tiny import tiny_tokenizer

V, KEY = 261, "sk-hush-hush"
TOKENIZER = tiny_tokenizer()
NEXT = np.random.default_rng(7).normal(0, 3, (V, V))  # logits of the next token after each


def table(temperature=1.0, logits=NEXT):
    scaled = logits / temperature
    return scaled - np.log(np.exp(scaled).sum(1, keepdims=True))


class BigramServer(ThreadingHTTPServer):
    """A bigram model. `script` answers the first completions: a function of (handler, body) that may answer instead."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, *, script=(), always=None, most=V, logits=NEXT, tempered=False, tokenize=True, context=128):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.always, self.most, self.logits, self.tempered = list(script), always, most, logits, tempered
        self.tokenize, self.context, self.lock = tokenize, context, threading.Lock()
        self.connections = self.running = self.most_running = 0
        self.times, self.bodies, self.keys = [], [], set()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def positions(self, ids, k, temperature):
        rows, logprobs = [None], table(temperature if self.tempered else 1.0, self.logits)
        for before, token in itertools.pairwise(ids):
            best = np.argsort(-logprobs[before])[: None if k == -1 else k].tolist()
            rows.append({str(i): {"logprob": float(logprobs[before, i]), "rank": 1} for i in [token, *best]})
        return rows


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True
    server: BigramServer

    def setup(self):
        super().setup()
        with self.server.lock:
            self.server.connections += 1

    def log_message(self, format, *args):
        pass

    def answer(self, status, value, headers=()):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in [*headers, ("Content-Length", str(len(data)))]:
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        known = [{"id": "other"}, {"id": "big", "max_model_len": self.server.context}]
        self.answer(200, {"data": known})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/tokenize":
            ids = TOKENIZER(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return self.answer(200, {"tokens": ids}) if server.tokenize else self.answer(404, {})
        with server.lock:
            server.running += 1
            server.most_running = max(server.most_running, server.running)
            server.times.append(time.monotonic())
            server.bodies.append(body)
            server.keys.add(self.headers.get("Authorization"))
            behave = server.script.pop(0) if server.script else server.always
        try:
            if behave is None or not behave(self, body):
                self.answer(*self.complete(body))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client had gone
        finally:
            with server.lock:
                server.running -= 1

    def complete(self, body, **changed):
        if isinstance(body["prompt"], str):
            given = TOKENIZER(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]
            return 200, {"model": body["model"], "choices": [{"prompt_token_ids": given}]}
        k = body["prompt_logprobs"]
        if k > self.server.most or (k == -1 and self.server.most < self.server.logits.shape[1]):
            return 400, {"error": {"message": f"{k} is greater than max allowed", "param": "prompt_logprobs"}}
        rows = self.server.positions(body["prompt"], k, body["temperature"])
        return 200, {"model": body["model"], "choices": [{"prompt_logprobs": rows}]} | changed


@contextmanager
def serving(*servers):
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield [server.url for server in servers]
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def status(code, *headers):
    def behave(handler, body):
        handler.answer(code, {"error": f"no, {KEY}\n\x1b[31m"}, headers)
        return True

    return behave


def edited(edit):
    """The right answer with its rows changed by `edit`."""

    def behave(handler, body):
        code, answer = handler.complete(body)
        if code == 200 and "prompt_logprobs" in answer["choices"][0]:
            edit(answer["choices"][0]["prompt_logprobs"], body)
        handler.answer(code, answer)
        return True

    return behave


def hang(handler, body):
    time.sleep(3)
    return True
