"""A small OpenAI-compatible server on a loopback port: the tiny target behind HTTP, with faults on demand."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BROKEN = {
    "half": b'{"id": "x", "object": "text_completion", "choices": [{"te',
    "html": b"<html>The proxy is sorry.</html>",
    "no choices": b'{"id": "x", "object": "text_completion", "choices": []}',
    "no object": b'"later"',
}


class Server(ThreadingHTTPServer):
    """Answers `/v1/completions` token by token from its own greedy loop; what it was asked stands in `requests`."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, logprobs: str | None) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.target, self.tokenizer, self.logprobs = target, tokenizer, logprobs
        self.faults: list[str] = []  # one is used up by each request: a key of `_BROKEN`, a status, "cut", "hang"
        self.end_ids = {tokenizer.eos_token_id}
        self.key: str | None = None
        self.repeats_key = False  # in its refusal
        self.die_after: int | None = None
        self.longest_prompt: int | None = None  # characters
        self.always_greedy = False
        self.refused_fields: set[str] = set()  # as OpenAI refuses what its protocol lacks
        self.hides_end = False  # among the tokens with log-probabilities
        self.finish_reasons: dict[str, str | None] = {}  # text in a prompt -> what its answer says instead
        self.requests: list[dict[str, Any]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    @property
    def authorization(self) -> str:
        return self.key if self.key and " " in self.key else f"Bearer {self.key}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections cut on purpose are no news."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        self._send(200, {"object": "list", "data": [{"id": "tiny-target", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            fault = self.server.faults.pop(0) if self.server.faults else None
            dead = self.server.die_after is not None and len(self.server.requests) > self.server.die_after
        if dead:
            self.connection.close()
        elif self.server.key and self.headers.get("Authorization") != self.server.authorization:
            repeated = f": {self.headers.get('Authorization')}" if self.server.repeats_key else ""
            self._send(401, {"error": {"message": f"wrong key{repeated}"}})
        elif refused := self.server.refused_fields & body.keys():
            self._send(400, {"error": {"message": f"Unrecognized request argument supplied: {min(refused)}"}})
        elif body["model"] != "tiny-target":
            self._send(404, {"error": {"message": f"no model {body['model']}"}})
        elif self.server.longest_prompt and len(body["prompt"]) > self.server.longest_prompt:
            self._send(400, {"detail": "this prompt is too long for me"})
        elif fault and fault.isdigit():
            self._send(int(fault), {"error": {"message": "not now"}})
        elif fault == "hang":
            threading.Event().wait(3)
        elif fault in _BROKEN:
            self.send_response(200)  # without a length: the end of the connection is the end of the answer
            self.send_header("Content-Type", "text/html" if fault == "html" else "application/json")
            self.end_headers()
            self.wfile.write(_BROKEN[fault])
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"id": "x", "choices": [{"te')
            self.wfile.flush()
            self.connection.close()
        else:
            self._send(200, self._complete(body))

    def _complete(self, body: dict[str, Any]) -> dict[str, Any]:
        tokenizer, target = self.server.tokenizer, self.server.target
        prompt = body["prompt"]
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        generator = torch.Generator().manual_seed(body.get("seed") or 0)
        written: list[int] = []
        steps: list[torch.Tensor] = []
        reason = "length"
        while len(written) < body["max_tokens"]:
            with torch.no_grad(), self.server.lock:
                logits = target(torch.tensor([ids + written])).logits[0, -1]
            log_p = logits.log_softmax(-1)
            if body["temperature"] == 0 or self.server.always_greedy:
                token = int(log_p.argmax())
            else:
                p = (logits / body["temperature"]).softmax(-1)
                token = int(torch.multinomial(p, 1, generator=generator))
            steps.append(log_p)
            written.append(token)
            if token in self.server.end_ids:
                reason = "stop"
                break
        text = tokenizer.decode(written, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for part, said in self.server.finish_reasons.items():
            reason = said if part in str(prompt) else reason
        choice = {"index": 0, "text": text, "finish_reason": reason, "logprobs": None}
        if body.get("logprobs") and self.server.logprobs:
            shown = written[:-1] if reason == "stop" and self.server.hides_end else written
            choice["logprobs"] = self._logprobs(shown, steps[: len(shown)], body["logprobs"])
        return {"id": "x", "object": "text_completion", "created": 0, "model": body["model"], "choices": [choice]}

    def _logprobs(self, written: list[int], steps: list[torch.Tensor], count: int) -> dict[str, Any]:
        def name(token: int) -> str:
            return f"token_id:{token}" if self.server.logprobs == "ids" else self.server.tokenizer.decode([token])

        top = []
        for log_p in steps:
            values, ids = log_p.topk(count)
            top.append({name(token): value for token, value in zip(ids.tolist(), values.tolist(), strict=True)})
        return {
            "tokens": [name(token) for token in written],
            "token_logprobs": [float(log_p[token]) for log_p, token in zip(steps, written, strict=True)],
            "top_logprobs": top,
            "text_offset": [0] * len(written),
        }

    def _send(self, status: int, body: dict[str, Any]) -> None:
        content = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@contextmanager
def serving(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, logprobs: str | None = None
) -> Iterator[Server]:
    """Serve until the block ends. `logprobs`: None ignores the wish, "text" and "ids" name tokens so."""
    server = Server(target, tokenizer, logprobs)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
