"""OpenVINO GenAI: a library without a server that counts, so `openvino_server.py` serves it for measuring.

The file is not named after the library: beside `openvino_server.py` it would be imported in its place.
"""

from collections.abc import Sequence
from pathlib import Path

from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.engines import openvino_server
from hf_draftkd.evaluation.engines.protocol import Engine, EngineAnswer, ServedPair, ask


class OpenVINO(Engine):
    """`openvino_genai.LLMPipeline` with `draft_model`. Models are folders of `optimum-cli export openvino`."""

    name = "openvino"
    tested_version = "2026.4.1"

    def command(self, pair: ServedPair, port: int) -> tuple[list[str], dict[str, str]]:
        # By its path, since the environment of OpenVINO need not hold this package.
        words = [pair.binary, str(Path(openvino_server.__file__).resolve()), pair.target, "--port", str(port)]
        words += ["--threads", str(pair.threads)]
        if pair.draft is not None:
            words += ["--draft_model", pair.draft, "--num_assistant_tokens", str(pair.num_assistant_tokens)]
        return words, {}

    def fault(self, setting: DecodingSetting, is_launched: bool) -> str | None:
        if setting.is_greedy:
            # Also with a repetition penalty, which counts the prompt and, while a draft is verified, the tokens
            # accepted before, as in transformers (`RepetitionPenaltyTransform` and `sample_from_sequence_group` in
            # src/cpp/src/sampling of openvino.genai, read and not run).
            return None
        # Sampling from the likeliest token alone it wrote none of 80 greedy texts (`examples/engines.py
        # --check_sampling`); at temperature 1 every second text ended in an error.
        return (
            f"while OpenVINO GenAI {self.tested_version} samples with a draft, it stops at some texts, and others are "
            "not the target's (openvinotoolkit/openvino.genai#4190)"
        )

    def tokenize(self, url: str, text: str) -> list[int]:
        return ask(f"{url}/tokenize", {"text": text})["tokens"]

    def complete(
        self, url: str, prompt_ids: Sequence[int], setting: DecodingSetting, max_new_tokens: int, seed: int
    ) -> EngineAnswer:
        request = {"prompt": list(prompt_ids), "max_new_tokens": max_new_tokens, "seed": seed, **setting.to_dict()}
        answer = ask(f"{url}/complete", request)
        return EngineAnswer(
            token_ids=answer["tokens"],
            seconds=answer.seconds,
            num_spec_steps=max(answer["target_calls"] - 1, 0),  # one call reads the prompt
            num_draft_tokens=answer["draft_tokens"],
            num_accepted_draft_tokens=answer["accepted"],
        )
