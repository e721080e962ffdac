import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from hf_draftkd.data import synthesis
from hf_draftkd.data.backends import Completion
from hf_draftkd.data.filters import QueryFilter, script_share
from hf_draftkd.data.generation import generate_alignment_data
from hf_draftkd.data.synthesis import _in_turn, open_user_turn, query_text, synthesize_prompts
from tests.data.small import make_target, make_tokenizer

CHATML = (
    "{% if messages[0].role != 'system' %}<|system|>be brief<|end|>\n{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ bos_token }}[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }} {{ eos_token }}{% endif %}{% endfor %}"
)


def writing_target(end_bias=0.0):
    """A target that writes letters and spaces and now and then ends its turn."""
    target, tokenizer = make_target(), make_tokenizer()
    bias = torch.full((264,), -1e4)
    bias[tokenizer.convert_tokens_to_ids([*"abcdefghijklmnopqrstuvwxyz", "Ġ"])] = 0.0
    bias[1] = end_bias
    target.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return target


@pytest.mark.parametrize(
    ("template", "prefix", "suffix"),
    [
        (CHATML, "<|system|>be brief<|end|>\n<|user|>\n", "<|end|>\n"),
        (LLAMA2, "<s>[INST] ", " [/INST]"),
        ("{{ bos_token }}{% for m in messages %}User: {{ m.content }}\n{% endfor %}", "<s>User: ", "\n"),
    ],
)
def test_any_template_is_opened_by_rendering_it(template, prefix, suffix):
    """No list of model names: what stays when the user's text changes is what stands around it."""
    tokenizer = make_tokenizer(template)
    turn = open_user_turn(tokenizer)
    # A space before the text may belong to the text's first token, so that the target has to write it.
    assert tokenizer.decode(turn.prefix_ids) in (prefix, prefix.rstrip(" "))
    assert turn.suffix == suffix
    for text in ("hello", "7 cats?", "ünï", "(x)"):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=True, return_dict=False, add_generation_prompt=False
        )
        assert ids[: len(turn.prefix_ids)] == turn.prefix_ids


def test_a_system_message_stands_in_front():
    tokenizer = make_tokenizer(CHATML)
    turn = open_user_turn(tokenizer, system="cats only")
    assert tokenizer.decode(turn.prefix_ids) == "<|system|>\ncats only<|end|>\n<|user|>\n"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('a system message must come first') }}", "must come first"),
        ("{{ bos_token }}{% for m in messages %}{{ m.content | upper }}{% endfor %}", "as it is"),
        ("{{ bos_token }}fixed", "as it is"),
        ("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "nothing stands in front"),
    ],
)
def test_templates_that_cannot_be_opened_say_so(template, message):
    with pytest.raises(ValueError, match=message):
        open_user_turn(make_tokenizer(template))


def test_a_query_ends_where_its_template_ends_it():
    """The token that closes a user's turn need not be among those that stop generation; nor need it be one token."""
    tokenizer = make_tokenizer(CHATML)
    turn = open_user_turn(tokenizer)
    ids = tokenizer("<s>the cat<|end|>\n<|assistant|>meow", add_special_tokens=False)["input_ids"][1:]
    assert query_text(Completion(ids, "length"), tokenizer, turn) == ("the cat", True)
    assert query_text(Completion(ids[:3], "length"), tokenizer, turn)[1] is False
    tokenizer = make_tokenizer(LLAMA2)
    ids = tokenizer(" on the mat [/INST] meow", add_special_tokens=False)["input_ids"]
    assert query_text(Completion(ids, "length"), tokenizer, open_user_turn(tokenizer)) == ("on the mat", True)


def test_an_aligned_target_writes_its_queries(tokenizer):
    target = writing_target(end_bias=2.0)
    prompts, counts = synthesize_prompts(target, tokenizer, 20, max_new_tokens=30, seed=1)
    assert len(prompts) == 20
    for prompt in prompts["prompt"]:
        assert [message["role"] for message in prompt] == ["user"]
        text = prompt[0]["content"]
        assert text == text.strip() != ""
        assert "<|" not in text
    assert counts["kept"] == 20, "what the card says beside the number of prompts"
    assert counts["unfinished"] > 0
    assert sum(counts.values()) % 16 == 0
    again, _ = synthesize_prompts(target, tokenizer, 20, max_new_tokens=30, seed=1)
    assert again["prompt"] == prompts["prompt"]
    other, _ = synthesize_prompts(target, tokenizer, 20, max_new_tokens=30, seed=2)
    assert other["prompt"] != prompts["prompt"]
    rows = generate_alignment_data(target, tokenizer, prompts, max_new_tokens=4, scenario="synthetic")
    assert set(rows["scenario"]) == {"synthetic"}
    assert len(rows) == 20


def test_the_target_is_fed_the_open_turn_and_nothing_else(tokenizer, monkeypatch):
    """With the turn closed, or the assistant's opened, the target would write answers instead of queries."""
    target, fed = writing_target(end_bias=2.0), []
    generate = target.generate

    def watched(input_ids, **options):
        fed.extend(input_ids.tolist())
        return generate(input_ids, **options)

    monkeypatch.setattr(target, "generate", watched)
    synthesize_prompts(target, tokenizer, 2, max_new_tokens=30)
    opened = tokenizer.convert_tokens_to_ids(["<s>", "<|user|>"])
    assert fed
    assert all(ids == opened for ids in fed)


def test_a_base_model_starts_from_its_beginning_of_text():
    target, tokenizer = writing_target(end_bias=-1e4), make_tokenizer(template=None)
    prompts, counts = synthesize_prompts(target, tokenizer, 10, max_new_tokens=12)
    assert all(isinstance(prompt, str) and prompt for prompt in prompts["prompt"])
    assert "unfinished" not in counts
    tokenizer.bos_token = None
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="beginning-of-text"):
        synthesize_prompts(target, tokenizer, 10)


def test_rounds_on_disk_are_not_written_twice(tmp_path, tokenizer):
    target = writing_target(end_bias=2.0)
    options = {"max_new_tokens": 30, "batch_size": 2}
    expected, counts = synthesize_prompts(target, tokenizer, 12, **options)
    synthesize_prompts(target, tokenizer, 3, output_dir=tmp_path / "out", **options)  # a run that got this far
    resumed, again = synthesize_prompts(target, tokenizer, 12, output_dir=tmp_path / "out", **options)
    assert resumed["prompt"] == expected["prompt"]
    assert again == counts
    target.generate = None
    finished, _ = synthesize_prompts(target, tokenizer, 12, output_dir=tmp_path / "out", **options)
    assert finished["prompt"] == expected["prompt"]
    with pytest.raises(ValueError, match="begun with other settings"):
        synthesize_prompts(target, tokenizer, 12, output_dir=tmp_path / "out", **{**options, "seed": 5})


def test_the_bar_counts_the_queries_that_are_kept(tmp_path, tokenizer, monkeypatch):
    """It counted rejected ones too, beyond its total, and none of those that a killed run had left."""
    steps = []
    monkeypatch.setattr(synthesis.logging, "tqdm", lambda **options: SimpleBar(options["total"], steps))
    options = {"max_new_tokens": 30, "batch_size": 2, "output_dir": tmp_path}
    for count in (3, 12):
        steps.clear()
        _, counts = synthesize_prompts(writing_target(end_bias=2.0), tokenizer, count, **options)
        assert counts["unfinished"] > 0
        assert sum(steps) == count


class SimpleBar(nullcontext):
    def __init__(self, total, steps):
        super().__init__(self)
        self.total, self.update = total, steps.append


def test_processes_write_their_rounds_at_the_same_time(tmp_path):
    """Each waited for the round before its own: two processes took as long as one."""
    (tmp_path / "data").mkdir()
    together = threading.Barrier(2, timeout=60)

    def sample(number):
        together.wait()  # breaks where the other one waits for this round instead of writing its own
        return [(f"query {number}", True)]

    def process(index):
        state = SimpleNamespace(num_processes=2, process_index=index)
        return [queries[0][0] for queries in _in_turn(sample, 4, tmp_path, state)]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(process, range(2))) == [[f"query {number}" for number in range(4)]] * 2


def test_too_few_queries_are_said_and_none_is_refused(tokenizer, caplog):
    """The advice named `max_rounds`, which `draftkd generate` does not have, and the length of the answers."""
    target = writing_target(end_bias=2.0)
    prompts, counts = synthesize_prompts(target, tokenizer, 5000, max_new_tokens=8, max_rounds=1)
    assert len(prompts) == counts["kept"] < 16
    assert "raise `query_max_new_tokens` where they are unfinished, else `query_temperature`" in caplog.text
    with pytest.raises(ValueError, match=r"None of 16 queries was kept .*16 unfinished.*`query_max_new_tokens`"):
        synthesize_prompts(writing_target(end_bias=-1e4), tokenizer, 5, max_new_tokens=8, max_rounds=1)


@pytest.mark.parametrize(("options", "message"), [({"num_prompts": 0}, "at least 1"), ({"temperature": 0.0}, "same")])
def test_bad_options_are_refused(target, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        synthesize_prompts(target, tokenizer, **{"num_prompts": 5, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_max_new_tokens": 100, "max_new_tokens": 40}, r"and its answer 40 .* reads at most 128"),
        ({"script": "klingon"}, "No letter's Unicode name begins with 'KLINGON'"),
    ],
)
def test_what_no_query_could_pass_is_said_before_the_first(tokenizer, options, message):
    """Queries are written for an hour, and then there is no room for an answer, or none is kept."""
    target = make_target()
    target.generate = None  # a single call would fail with another error
    with pytest.raises(ValueError, match=message):
        generate_alignment_data(target, tokenizer, scenario="synthetic", num_prompts=2, **options)


def test_a_served_target_writes_no_queries(tokenizer):
    """A server renders the template itself, so the turn would not be open."""
    with pytest.raises(ValueError, match="cannot be fed an open turn exactly"):
        generate_alignment_data("served", tokenizer, scenario="synthetic", endpoint="http://127.0.0.1:9/v1")


def test_each_filter_is_counted_by_its_name():
    accept = QueryFilter(min_characters=5, max_characters=60, script="latin", keep=lambda text: "forbidden" not in text)
    long = "How do I sort a list of numbers in Python, please?"
    queries = [
        ("", True),
        ("   ", True),
        ("What is", False),
        ("Hm?", True),
        ("x" * 61, True),
        ("Как отсортировать список?", True),
        ("This is forbidden.", True),
        (long, True),
        (long.upper() + "!!", True),
        ("How do I sort a list of numbers in Python please", True),
        ("How do I sort a list of numbers in python, pleasse?", True),
        ("Name three rivers of France.", True),
    ]
    kept = [text for text, finished in queries if accept(text, finished)]
    assert kept == [long, "Name three rivers of France."]
    assert accept.counts == {
        "empty": 2,
        "unfinished": 1,
        "too_short": 1,
        "too_long": 1,
        "script": 1,
        "rejected": 1,
        "kept": 2,
        "repeated": 2,
        "near_duplicate": 1,
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [("What is 12+5?", "What is 12*5?"), ("2 + 2", "2 - 2"), ("C", "C++"), ("दिन", "दान"), ("ไก่", "ไก")],
)
def test_signs_that_mean_something_make_another_query(first, second):
    """Catches sums, names of languages and words of scripts with vowel signs that fall as repeated."""
    accept = QueryFilter()
    assert accept(first)
    assert accept(second)
    assert not accept(f'"{second}"!')


def test_near_duplicates_are_found_among_many():
    """Locality-sensitive hashing must find the one pair without comparing all, and must not take strangers for it."""
    generator = torch.Generator().manual_seed(0)
    letters = "abcdefghijklmnopqrstuvwxyz "
    texts = ["".join(letters[i] for i in torch.randint(27, (80,), generator=generator).tolist()) for _ in range(500)]
    accept = QueryFilter()
    assert all(accept(text) for text in texts)
    changed = [text[:40] + "#" + text[41:] for text in texts]
    assert sum(accept(text) for text in changed) <= 5  # 87% common shingles
    assert accept.counts["near_duplicate"] > 450  # the others are equal but for signs that do not count


def test_scripts_are_told_apart():
    assert script_share("hello wörld 123", "latin") == 1
    assert script_share("привет", "cyrillic") == 1
    assert script_share("漢字 ab", "cjk") == 0.5
    assert script_share("123 ?", "latin") == 1
