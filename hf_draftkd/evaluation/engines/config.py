"""Which engine to measure, and where it is."""

from dataclasses import dataclass

from hf_draftkd.evaluation.engines import ENGINES
from hf_draftkd.utils.checks import one_of, whole_number
from hf_draftkd.utils.fields import option


@dataclass
class EngineConfig:
    """Configuration class for [`evaluate_in_engine`]; every field is an option of `draftkd evaluate`.

    Raises:
        ValueError: A value is out of range, or neither servers nor a way to start them are given.
    """

    engine: str | None = option(None, "Also measure the pair served by an engine: llama.cpp, vllm or openvino.")
    endpoint: str | None = option(
        None, "Address of a running server with the draft, such as http://127.0.0.1:8080 (`/v1` is cut)."
    )
    plain_endpoint: str | None = option(
        None, "Address of a running server of the target alone; without one no speed-up is reported."
    )
    launch: bool = option(False, "Start both servers here, and stop them afterwards.")
    engine_binary: str | None = option(
        None, "For `launch`: llama-server, or the Python of the environment that holds vLLM or OpenVINO GenAI."
    )
    engine_models: list[str] | None = option(
        None,
        "For `launch`: target and draft in the engine's own format (two GGUF files, two OpenVINO folders); vLLM reads "
        "the models themselves.",
    )
    parallel_drafting: bool = option(
        False, "vLLM: the server drafts in one pass, by its option of this name; with `launch` it is started so."
    )
    engine_threads: int = option(1, "For `launch`: CPU threads of a server.")
    engine_rounds: int = option(3, "Times every prompt is decoded plainly and with the draft, in turns.")
    engine_prompts: int | None = option(None, "Prompts to decode in the engine; all by default.")

    def __post_init__(self) -> None:
        """Check every value that can be checked without a server."""
        given = [
            name for name in ("endpoint", "plain_endpoint", "engine_binary", "engine_models") if getattr(self, name)
        ]
        if self.engine is None:
            if given or self.launch:
                raise ValueError(f"`{(given or ['launch'])[0]}` needs `engine`: llama.cpp, vllm or openvino.")
            return
        one_of("engine", self.engine, ENGINES)
        for name in ("engine_threads", "engine_rounds", "engine_prompts"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name))
        if self.launch == bool(self.endpoint or self.plain_endpoint):
            raise ValueError("Give `endpoint`, for a running server with the draft, or `launch`: one of the two ways.")
        for name in ("endpoint", "plain_endpoint"):
            if address := getattr(self, name):
                if not address.startswith(("http://", "https://")):
                    raise ValueError(f"`{name}` must begin with http:// or https://, got {address!r}.")
                # OpenAI clients take the address with `/v1`, counters lie outside of it.
                setattr(self, name, address.rstrip("/").removesuffix("/v1"))
        if self.parallel_drafting and self.engine != "vllm":
            raise ValueError(f"`parallel_drafting` is an option of vLLM, which {self.engine} does not have.")
        if self.plain_endpoint and not self.endpoint:
            raise ValueError("`plain_endpoint` is compared with a server that drafts: give `endpoint` too.")
        if self.launch and self.engine != "vllm" and len(self.engine_models or ()) != 2:
            raise ValueError(
                f"`launch` of {self.engine} needs `engine_models`: the target and the draft, converted for it. The "
                "card's commands show how."
            )
