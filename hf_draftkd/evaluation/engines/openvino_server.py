"""Serve an OpenVINO GenAI pipeline over HTTP, one request at a time, for measuring it.

    python openvino_server.py TARGET --draft_model DRAFT --num_assistant_tokens 4 --threads 2 --port 8080

Needs `openvino-genai` and numpy, and nothing of this package: it runs in an environment of its own.
"""

import argparse
import json
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self._answer({"version": self.server.genai.__version__})  # type: ignore[attr-defined]

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        act = self._tokenize if self.path == "/tokenize" else self._complete
        try:
            self._answer(act(self.server, request))
        except Exception as error:  # told to the client: the server stays up
            self._answer({"error": repr(error)}, 500)

    def _tokenize(self, server: Any, request: dict[str, Any]) -> dict[str, Any]:
        encoded = server.pipeline.get_tokenizer().encode(request["text"], add_special_tokens=False)
        return {"tokens": [int(token) for token in encoded.input_ids.data[0]]}

    def _complete(self, server: Any, request: dict[str, Any]) -> dict[str, Any]:
        config = server.pipeline.get_generation_config()
        config.max_new_tokens = request["max_new_tokens"]
        config.do_sample = request["temperature"] > 0
        config.repetition_penalty = request["repetition_penalty"]
        if config.do_sample:
            config.temperature, config.top_p = request["temperature"], request["top_p"]
            config.top_k = request["top_k"] or 2**31 - 1
            config.rng_seed = request["seed"]
        if server.num_assistant_tokens:
            config.num_assistant_tokens = server.num_assistant_tokens
        ids = server.tensor(server.array([request["prompt"]], dtype="int64"))
        result = server.pipeline.generate(ids, config)
        found = {"tokens": list(result.tokens[0]), "target_calls": 0, "draft_tokens": 0, "accepted": 0}
        metrics = result.extended_perf_metrics
        if server.num_assistant_tokens:
            if metrics is None:
                raise RuntimeError("the pipeline gave no extended_perf_metrics, so nothing was counted")
            found["target_calls"] = len(metrics.main_model_metrics.raw_metrics.m_batch_sizes)
            found["draft_tokens"] = metrics.get_num_draft_tokens()
            found["accepted"] = metrics.get_num_accepted_tokens()
        return found

    def _answer(self, data: dict[str, Any], status: int = 200) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def main() -> None:
    """Load the pipeline, then answer until stopped."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("target")
    parser.add_argument("--draft_model")
    parser.add_argument("--num_assistant_tokens", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--port", type=int, default=8080)
    options = parser.parse_args()

    import numpy
    import openvino
    import openvino_genai

    threads = {"INFERENCE_NUM_THREADS": options.threads}
    draft = {}
    if options.draft_model:
        draft["draft_model"] = openvino_genai.draft_model(options.draft_model, "CPU", **threads)
    server: Any = HTTPServer(("127.0.0.1", options.port), _Handler)
    server.pipeline = openvino_genai.LLMPipeline(options.target, "CPU", **draft, **threads)
    server.genai, server.tensor, server.array = openvino_genai, openvino.Tensor, numpy.array
    server.num_assistant_tokens = options.num_assistant_tokens if options.draft_model else 0
    server.serve_forever()


if __name__ == "__main__":
    main()
