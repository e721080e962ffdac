"""llama.cpp: `llama-server` and its own `/completion`, which takes and gives token ids and counts per request.

Where the draft samples, drafted tokens after the end of a text are counted as accepted too, up to γ − 1 for each text
(`common_sampler_sample_and_accept_n_rejection` does not stop at the end as its greedy twin does). Target calls are then
those that `/metrics` counts.
"""

from collections.abc import Sequence

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.engines.protocol import Engine, EngineAnswer, ServedPair, ask, counter, fetch


class LlamaCpp(Engine):
    """`llama-server`. Models are GGUF files."""

    name = "llama.cpp"
    tested_version = "b11434"
    binary = "llama-server"
    sampled_rule = "top_10_draft"

    def command(self, pair: ServedPair, port: int) -> tuple[list[str], dict[str, str]]:
        words = [pair.binary, "-m", pair.target, "-t", str(pair.threads), "-np", "1", "-c", str(pair.max_context)]
        if pair.draft is not None:
            sampling = "greedy" if pair.is_greedy else "probabilistic"
            words += ["-md", pair.draft, "--spec-type", "draft-simple", "--metrics"]
            words += ["--spec-draft-n-max", str(pair.num_assistant_tokens), "--spec-draft-sampling", sampling]
        return [*words, "--port", str(port)], {}

    def version(self, url: str) -> str:
        return str(ask(f"{url}/props").get("build_info", "unknown"))

    def tokenize(self, url: str, text: str) -> list[int]:
        return ask(f"{url}/tokenize", {"content": text, "parse_special": True, "add_special": False})["tokens"]

    def complete(
        self, url: str, prompt_ids: Sequence[int], setting: DecodingSetting, max_new_tokens: int, seed: int
    ) -> EngineAnswer:
        request = {
            "prompt": list(prompt_ids),
            "n_predict": max_new_tokens,
            # In transformers' order: by default the temperature comes last here.
            "samplers": ["temperature", "top_k", "top_p"],
            "temperature": setting.temperature,
            "top_k": setting.top_k,
            "top_p": setting.top_p,
            "seed": seed,
            "cache_prompt": False,
            "return_tokens": True,
        }
        before = None if setting.is_greedy else _verifications(url)
        answer = ask(f"{url}/completion", request)
        timings = answer["timings"]
        # Absent where nothing was drafted.
        drafted, accepted = timings.get("draft_n", 0), timings.get("draft_n_accepted", 0)
        # Every call adds one token of the target's own; the first is that of the prompt.
        later = max(timings["predicted_n"] - 1, 0)
        steps = max(later - accepted, 0)
        if drafted and not setting.is_greedy:
            after = _verifications(url)
            if before is None or after is None:
                raise ValueError(
                    f"llama.cpp at {url} counts tokens after the end of a sampled text as accepted. Start it with "
                    "`--metrics`, which counts target calls."
                )
            # The last token of a full text is written without a draft, in a call that is not among these.
            steps = max(steps, after - before)
        return EngineAnswer(
            token_ids=answer["tokens"],
            seconds=answer.seconds,
            num_spec_steps=steps,
            num_draft_tokens=drafted,
            num_accepted_draft_tokens=min(accepted, later - steps),
            is_cut=bool(answer.get("truncated")),
        )


def _verifications(url: str) -> int | None:
    """Target calls that verified a draft since the server started; None of one that was started without `--metrics`."""
    try:
        return counter(fetch(f"{url}/metrics"), "llamacpp:spec_decode_num_drafts_total")
    except ValueError:
        return None
