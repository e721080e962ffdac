"""How to start a draft in the engines that can run one, and which of them can run this pair.

Each engine has its own condition on the pair, taken from its source or documentation:

- transformers: `generate(assistant_model=...)` without tokenizers wants equal `vocab_size`
  (`GenerationMixin._validate_assistant`); a pipeline also wants equal bos, eos and pad ids (`load_assistant_model`).
- vLLM: `SpeculativeConfig.verify_equal_vocab_size_if_draft_model` wants equal vocabulary sizes. Drafts trained with
  `parallel_tokens` draft in one pass with `parallel_drafting` (docs, "Parallel Draft Models").
- OpenVINO GenAI: hands token ids from one model to the other, as vLLM does.
- SGLang: STANDALONE hands token ids from draft to target and has refused pairs with other vocabularies since
  sgl-project/sglang#23838.
- llama.cpp: `common/speculative.cpp` wants the same vocabulary type and bos/eos handling, sizes at most 128 apart
  (SPEC_VOCAB_MAX_SIZE_DIFFERENCE) and equal token texts. Its converter wants a tokenizer that it knows
  (`hf_draftkd.hub.llama_cpp`): for another its name for the split rules has to be given, and without one a pair gets
  the reason instead of a command.
"""

import json
import shlex
from dataclasses import dataclass

from jinja2 import Environment, PackageLoader, StrictUndefined

from hf_draftkd.hub.llama_cpp import RULES, converter
from hf_draftkd.hub.markdown import python_string
from hf_draftkd.hub.provenance import PairFacts
from hf_draftkd.models.draft_length import draft_length_settings

LLAMA_CPP_MAX_VOCAB_DIFFERENCE = 128
# A starting point where no length was tuned; the card says that it is one.
UNTUNED_LENGTH = 5
# Block of templates/serving_commands.txt -> title and language.
_TITLES = {
    "generate": ("transformers: `generate`", "python"),
    "speculative_decoding": ("transformers: `SpeculativeDecoding`", "python"),
    "custom_generate": ("transformers: `generate` with the code in this repository", "python"),
    "pipeline": ("transformers: `pipeline`", "python"),
    "vllm": ("vLLM", "bash"),
    "openvino": ("OpenVINO", "python"),
    "sglang": ("SGLang", "bash"),
    "llama_cpp": ("llama.cpp", "bash"),
}


@dataclass(frozen=True)
class Command:
    """One way to start the pair: a title, the language of the block, the block, and a remark or none.

    Without content the engine cannot run this pair: the remark says why.
    """

    title: str
    language: str
    content: str
    remark: str = ""


def serving_commands(
    draft: str,
    target: str,
    *,
    target_revision: str | None,
    pair: PairFacts,
    num_assistant_tokens: int | None,
    custom_generate: bool = False,
    num_parallel_tokens: int | None = None,
) -> list[Command]:
    """The commands that are true for this pair.

    Args:
        draft: Hub id or path, as the reader will type it.
        target: The same for the target.
        target_revision: Commit of the target that was measured; None where it is not known.
        pair: An engine whose condition is not known to hold is left out; transformers is left out only where its
            condition is known to fail.
        num_assistant_tokens: The tuned draft length one token at a time, None where none was tuned.
        custom_generate: Whether the draft's repository holds code for `generate(custom_generate=...)`.
        num_parallel_tokens: Tokens that a parallel draft had better draft in one pass; None: one token at a time.
    """
    same_size = pair.draft_vocab_size == pair.target_vocab_size
    sizes_known = None not in (pair.draft_vocab_size, pair.target_vocab_size)
    distance = abs((pair.draft_vocab_size or 0) - (pair.target_vocab_size or 0))
    can = dict.fromkeys(("vllm", "openvino", "sglang"), sizes_known and same_size) | {
        "generate": same_size or not sizes_known,
        "speculative_decoding": same_size or not sizes_known,
        "custom_generate": custom_generate and (same_size or not sizes_known),
        "pipeline": pair.same_special_ids is not False and (same_size or not sizes_known),
        "llama_cpp": sizes_known and distance <= LLAMA_CPP_MAX_VOCAB_DIFFERENCE and pair.same_special_ids,
    }
    length = num_assistant_tokens or UNTUNED_LENGTH
    vllm = {"method": "draft_model", "model": draft, "num_speculative_tokens": length}
    if num_parallel_tokens is not None:
        vllm |= {"num_speculative_tokens": num_parallel_tokens, "parallel_drafting": True}
    # To be set by hand where the draft's generation config does not carry the tuned length.
    by_hand = {} if num_assistant_tokens in (None, pair.num_assistant_tokens) else draft_length_settings(length)
    context = {
        "draft": draft,
        "target": target,
        "pair": pair,
        "llama_cpp_build": converter()["build"],
        # It goes into code: no other name than one of these.
        "rules": pair.llama_cpp_pre_tokenizer if pair.llama_cpp_pre_tokenizer in RULES else None,
        "length": length,
        "is_tuned": num_assistant_tokens is not None,
        "length_options": [f"{key}={json.dumps(value)}" for key, value in by_hand.items()],
        "revision": [f"revision={python_string(target_revision)}"] if target_revision else [],
        "pin": f" --revision {shlex.quote(target_revision)}" if target_revision else "",
        "placement": ['dtype="auto"', 'device_map="auto"'],
        "vllm_config": json.dumps(vllm),
        "in_parallel": num_parallel_tokens is not None,
        "call": lambda function, *arguments: "\n".join([f"{function}(", *(f"    {each}," for each in arguments), ")"]),
        "run_with": "Run with {} on a CPU by `examples/engines.py` of hf_draftkd, on its demo pair.".format,
    }
    loader = PackageLoader("hf_draftkd.hub", "templates")
    environment = Environment(loader=loader, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"python": python_string, "shell": shlex.quote}
    template = environment.get_template("serving_commands.txt")

    def command(name: str) -> Command:
        text = "".join(template.blocks[name](template.new_context(context)))
        content, _, remark = f"\n{text}".partition("\n---\n")
        return Command(*_TITLES[name], content.strip("\n"), remark.strip("\n"))

    return [command(name) for name in _TITLES if can[name]]
