"""vLLM: its OpenAI-compatible `/v1/completions` with token ids; the counters are those of `/metrics`."""

import json
from collections.abc import Sequence

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.engines.protocol import Engine, EngineAnswer, ServedPair, ask, counter, fetch

_COUNTERS = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")


class VLLM(Engine):
    """`vllm serve`. It reads the models' own folders, or ids on the Hub."""

    name = "vllm"
    tested_version = "0.32.0"
    busy_seconds = 1.0  # `SpinCondition` in shm_broadcast.py

    def command(self, pair: ServedPair, port: int) -> tuple[list[str], dict[str, str]]:
        # Not `vllm serve`: that asks for the metadata of a package named vllm, which the CPU build does not have.
        words = [pair.binary, "-m", "vllm.entrypoints.openai.api_server", "--model", pair.target, "--dtype", pair.dtype]
        words += ["--max-model-len", str(pair.max_context), "--max-num-seqs", "1", "--no-enable-prefix-caching"]
        if pair.draft is not None:
            config = {
                "method": "draft_model",
                "model": pair.draft,
                "num_speculative_tokens": pair.num_assistant_tokens,
                "draft_sample_method": "greedy" if pair.is_greedy else "probabilistic",
            }
            if pair.parallel_drafting:
                config["parallel_drafting"] = True
            words += ["--speculative-config", json.dumps(config)]
        threads = str(pair.threads)
        cpu = {
            "OMP_NUM_THREADS": threads,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        return [*words, "--port", str(port)], cpu

    def fault(self, setting: DecodingSetting, is_launched: bool) -> str | None:
        if is_launched and not setting.is_greedy:
            # `_expand_kernel_impl` in vllm/utils/cpu_triton_utils.py fills a copy and drops it unless the tensor is
            # int64: called alone it leaves float32 (temperature, top-p) and int32 (top-k) as they were.
            return (
                f"vLLM {self.tested_version} on a CPU samples with a draft from an uninitialised temperature (and ends "
                "its engine core for top-k and top-p): its texts would not be the target's"
            )
        return super().fault(setting, is_launched)

    def tokenize(self, url: str, text: str) -> list[int]:
        request = {"model": _model(url), "prompt": text, "add_special_tokens": False}
        return ask(f"{url}/tokenize", request)["tokens"]

    def complete(
        self, url: str, prompt_ids: Sequence[int], setting: DecodingSetting, max_new_tokens: int, seed: int
    ) -> EngineAnswer:
        request = {
            "model": _model(url),
            "prompt": list(prompt_ids),
            "max_tokens": max_new_tokens,
            # Values that change nothing are still sent: a server applies the model's own sampling defaults otherwise.
            **setting.to_dict(),
            "min_p": 0.0,
            "seed": seed,
            "return_token_ids": True,
        }
        before = _counters(url)
        answer = ask(f"{url}/v1/completions", request)
        steps, drafted, accepted = (now - then for now, then in zip(_counters(url), before, strict=True))
        (choice,) = answer["choices"]
        return EngineAnswer(
            token_ids=choice["token_ids"],
            seconds=answer.seconds,
            num_spec_steps=steps,
            num_draft_tokens=drafted,
            num_accepted_draft_tokens=accepted,
            is_cut=choice.get("finish_reason") == "length" and len(choice["token_ids"]) < max_new_tokens,
        )


def _model(url: str) -> str:
    return ask(f"{url}/v1/models")["data"][0]["id"]


def _counters(url: str) -> list[int]:
    """Blocks, drafted and accepted tokens since the server started; 0 where it has no draft."""
    metrics = fetch(f"{url}/metrics")
    return [counter(metrics, f"vllm:spec_decode_{name}_total") for name in _COUNTERS]
