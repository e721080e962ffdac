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
  (SPEC_VOCAB_MAX_SIZE_DIFFERENCE) and equal token texts.
"""

import json
import shlex
from dataclasses import dataclass

from hf_draftkd.hub.markdown import python_string
from hf_draftkd.hub.provenance import PairFacts
from hf_draftkd.models.draft_length import draft_length_settings

LLAMA_CPP_MAX_VOCAB_DIFFERENCE = 128
# Said of commands that `examples/engines.py` runs.
_RUN = "Run with {} on a CPU by `examples/engines.py` of hf_draftkd, on its demo pair."
# A starting point where no length was tuned; the card says that it is one.
UNTUNED_LENGTH = 5


@dataclass(frozen=True)
class Command:
    """One way to start the pair: a title, the language of the block, the block, and a remark or none."""

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
    one_by_one: bool = False,
) -> list[Command]:
    """The commands that are true for this pair.

    Args:
        draft: Hub id or path, as the reader will type it.
        target: The same for the target.
        target_revision: Commit of the target that was measured; None where it is not known.
        pair: An engine whose condition is not known to hold is left out; transformers is left out only where its
            condition is known to fail.
        num_assistant_tokens: The tuned draft length, None where none was tuned.
        custom_generate: Whether the draft's repository holds code for `generate(custom_generate=...)`.
        one_by_one: Whether a parallel draft is recommended to draft one token at a time all the same.
    """
    found = []
    same_size = pair.draft_vocab_size == pair.target_vocab_size
    sizes_known = None not in (pair.draft_vocab_size, pair.target_vocab_size)
    if same_size or not sizes_known:
        found.append(_generate(draft, target, target_revision, pair, num_assistant_tokens))
        if custom_generate:
            found.append(_custom_generate(draft))
        if pair.same_special_ids is not False:
            found.append(_pipeline(draft, target, target_revision, pair, num_assistant_tokens))
    if not sizes_known:
        return found
    length = num_assistant_tokens or UNTUNED_LENGTH
    pin = f" --revision {shlex.quote(target_revision)}" if target_revision else ""
    if same_size:
        at_once = None if one_by_one else pair.parallel_tokens
        found += [
            _vllm(draft, target, pin, length, at_once),
            _openvino(draft, target, pin, length),
            _sglang(draft, target, pin, length),
        ]
    distance = abs((pair.draft_vocab_size or 0) - (pair.target_vocab_size or 0))
    if distance <= LLAMA_CPP_MAX_VOCAB_DIFFERENCE and pair.same_special_ids:
        found.append(_llama_cpp(draft, target, pin, length))
    return found


def _call(function: str, *arguments: str) -> str:
    """A call with one argument a line: how formatters leave it, however long the names are."""
    return "\n".join([f"{function}(", *(f"    {argument}," for argument in arguments), ")"])


def _load(name: str, *options: str) -> str:
    return _call("AutoModelForCausalLM.from_pretrained", python_string(name), *options, *_PLACEMENT)


_PLACEMENT = ('dtype="auto"', 'device_map="auto"')


def _revision(revision: str | None) -> list[str]:
    return [f"revision={python_string(revision)}"] if revision else []


def _length_lines(name: str, pair: PairFacts, length: int | None) -> list[str]:
    """Set the length by hand where the draft's generation config does not carry it."""
    if length is None or pair.num_assistant_tokens == length:
        return []
    options = (f"{key}={json.dumps(value)}" for key, value in draft_length_settings(length).items())
    return [_call(f"{name}.generation_config.update", *options)]


def _generate(draft: str, target: str, revision: str | None, pair: PairFacts, length: int | None) -> Command:
    if pair.has_chat_template:
        options = ("messages", "add_generation_prompt=True", "return_dict=True", 'return_tensors="pt"')
        inputs = [
            'messages = [{"role": "user", "content": "Your question."}]',
            f"inputs = {_call('tokenizer.apply_chat_template', *options)}.to(target.device)",
        ]
    else:
        inputs = ['inputs = tokenizer("Your text.", return_tensors="pt").to(target.device)']
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"tokenizer = {_call('AutoTokenizer.from_pretrained', python_string(target), *_revision(revision))}",
        f"target = {_load(target, *_revision(revision))}",
        f"draft = {_load(draft)}",
        *_length_lines("draft", pair, length),
        *inputs,
        "output = target.generate(**inputs, assistant_model=draft, max_new_tokens=256)",
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    remark = "Batch size 1 only: transformers refuses assisted generation for larger batches."
    if length is not None and pair.num_assistant_tokens == length:
        remark = f"The tuned draft length ({length}) is read from the draft's `generation_config.json`. {remark}"
    return Command("transformers: `generate`", "python", "\n".join(lines), remark)


def _custom_generate(draft: str) -> Command:
    options = ("assistant_model=draft", f"custom_generate={python_string(draft)}", "trust_remote_code=True")
    remark = (
        "With the models and inputs above. It runs `custom_generate/generate.py` of this repository, a few lines that "
        "hand the draft to `hf_draftkd.SpeculativeDecoding`: that package must be installed. Batches work too."
    )
    call = _call("output = target.generate", "**inputs", *options, "max_new_tokens=256")
    return Command("transformers: `generate` with the code in this repository", "python", call, remark)


def _pipeline(draft: str, target: str, revision: str | None, pair: PairFacts, length: int | None) -> Command:
    prompt = '[{"role": "user", "content": "Your question."}]' if pair.has_chat_template else '"Your text."'
    models = (f"model={python_string(target)}", *_revision(revision), f"assistant_model={python_string(draft)}")
    lines = [
        "from transformers import pipeline",
        "",
        f"generator = {_call('pipeline', python_string('text-generation'), *models, *_PLACEMENT)}",
        *_length_lines("generator.assistant_model", pair, length),
        f'print(generator({prompt}, max_new_tokens=256)[0]["generated_text"])',
    ]
    return Command("transformers: `pipeline`", "python", "\n".join(lines))


def _vllm(draft: str, target: str, pin: str, length: int, parallel_tokens: int | None) -> Command:
    options = {"method": "draft_model", "model": draft, "num_speculative_tokens": length}
    if parallel_tokens is not None:
        options |= {"num_speculative_tokens": min(length, parallel_tokens), "parallel_drafting": True}
    config = json.dumps(options)
    content = f"vllm serve {shlex.quote(target)}{pin} \\\n    --speculative-config {shlex.quote(config)}"
    remark = (
        "By default the draft proposes its likeliest token: when sampling compare with the metrics for `greedy_draft`. "
        '`"draft_sample_method": "probabilistic"` in the config lets it sample, which is `rejection_sampling`. The CPU '
        "build of 0.32 is right for greedy decoding only: sampling with a draft reads a temperature that was never "
        "set, and top-k or top-p end its engine core. "
    )
    if parallel_tokens is None:
        remark += _RUN.format("vLLM 0.32.0")
    else:
        remark += "With `parallel_drafting` it proposes all tokens in one pass, from mask tokens; that was not run."
    return Command("vLLM", "bash", content, remark)


def _sglang(draft: str, target: str, pin: str, length: int) -> Command:
    content = (
        f"python -m sglang.launch_server --model-path {shlex.quote(target)}{pin} \\\n"
        f"    --speculative-algorithm STANDALONE --speculative-draft-model-path {shlex.quote(draft)} \\\n"
        f"    --speculative-num-steps {length} --speculative-eagle-topk 1 --speculative-num-draft-tokens {length + 1}"
    )
    return Command("SGLang", "bash", content, "Not run: as SGLang's documentation has it.")


def _llama_cpp(draft: str, target: str, pin: str, length: int) -> Command:
    content = (
        f"hf download {shlex.quote(target)}{pin} --local-dir target-hf\n"
        f"hf download {shlex.quote(draft)} --local-dir draft-hf\n"
        "python convert_hf_to_gguf.py target-hf --outfile target.gguf\n"
        "python convert_hf_to_gguf.py draft-hf --outfile draft.gguf\n"
        f"llama-server -m target.gguf -md draft.gguf --spec-type draft-simple --spec-draft-n-max {length} \\\n"
        "    --spec-draft-sampling probabilistic --threads 2"
    )
    remark = (
        "The converter must know the architecture and the tokenizer of both models: it refuses a pair whose "
        "pre-tokenizer it does not recognize. Give `--threads` the cores there are. For greedy decoding leave "
        "`--spec-draft-sampling` out; without it llama.cpp verifies sampled text by `exact_match`, with it by "
        f"`rejection_sampling`. {_RUN.format('llama.cpp 0.6.0 (build 11434)')}"
    )
    return Command("llama.cpp", "bash", content, remark)


def _openvino(draft: str, target: str, pin: str, length: int) -> Command:
    export = "optimum-cli export openvino --task text-generation-with-past --model"
    lines = [
        "# Once, in a shell:",
        f"#   hf download {shlex.quote(target)}{pin} --local-dir target-hf",
        f"#   {export} target-hf target-ov",
        f"#   {export} {shlex.quote(draft)} draft-ov",
        "import openvino_genai",
        "",
        'draft = openvino_genai.draft_model("draft-ov", "CPU")',
        'pipeline = openvino_genai.LLMPipeline("target-ov", "CPU", draft_model=draft)',
        "config = pipeline.get_generation_config()",
        f"config.num_assistant_tokens = {length}",
        "config.max_new_tokens = 256",
        'print(pipeline.generate("Your text.", config))',
    ]
    return Command("OpenVINO", "python", "\n".join(lines), _RUN.format("OpenVINO GenAI 2026.4.1"))
