"""The card of a draft: it says what the data says, no more, and in a form that the Hub reads back."""

import re
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from hf_draftkd.evaluation.report import SpeculationReport
from hf_draftkd.hub.card_merge import merged, read_card, sections_of
from hf_draftkd.hub.citations import papers_used
from hf_draftkd.hub.metadata import eval_results
from hf_draftkd.hub.model_card import DraftModelCard
from hf_draftkd.hub.provenance import PairFacts, Provenance, TrainingSummary
from hf_draftkd.hub.public_names import public_name, public_report, without_paths
from tests.hub import samples
from tests.tiny import tiny_tokenizer

GOLDEN = Path(__file__).parent / "golden.md.txt"


def full_card(**options) -> DraftModelCard:
    known = {
        "training": samples.training(),
        "pair": samples.pair(),
        "provenance": samples.provenance(),
        "name": "me/draft-115m",
        "license": "apache-2.0",
        "language": "en",
        "plots": {"Block efficiency by draft length": "plots/block_efficiency.png"},
    }
    return DraftModelCard.from_report(samples.report(), **(known | options))


def test_the_whole_card_is_the_golden_file():
    """Catches any change of wording, order or numbers that nobody meant."""
    golden = GOLDEN.read_text(encoding="utf-8")
    assert full_card().render() == golden, "see tests/hub/make_golden.py to rewrite it"


def test_every_figure_of_the_report_is_on_the_card_with_its_interval():
    """Catches a column that silently dropped out."""
    text = full_card().render()
    for expected in (
        "0.710 \\[0.690, 0.730\\]",
        "2.50 \\[2.40, 2.60\\]",
        "0.500 \\[0.480, 0.520\\]",
        "+0.60 \\[+0.55, +0.65\\]",
        "1.85 \\[1.79, 1.91\\]",
        "0.620 \\[0.600, 0.640\\]",
        "`rejection_sampling`",
        "NVIDIA H100 (cuda, bfloat16)",
        samples.REVISION,
    ):
        assert expected in text


def test_what_was_not_measured_does_not_appear():
    """Catches `None`, zeros and empty headings where a metric is absent."""
    bare = samples.report(baseline=None, paired_difference=None, latency=None, recommendation=None)
    for setting in bare["settings"]:
        setting.pop("assisted", None)
        setting.pop("speculative", None)
        setting.pop("recommendation", None)
    text = DraftModelCard.from_report(bare, name="me/draft").render()
    body = text.split("---", 2)[2]
    assert "None" not in body
    assert "nan" not in body
    for absent in ("Speed-up", "### Speed", "stock draft", "worth using", "## Training", "costs"):
        assert absent not in body
    assert "No speed-up was measured" in body
    assert "not compared with another draft" in body


def test_a_verdict_of_no_is_printed_as_no():
    """Catches a card that only knows success."""
    verdict = {
        "worth_it": False,
        "num_assistant_tokens": 1,
        "predicted_speedup": 0.83,
        "reason": "The draft is too slow.",
    }
    text = DraftModelCard.from_report(samples.report(recommendation=verdict), name="me/draft").render()
    assert "?** No: predicted speed-up 0.83. The draft is too slow." in text


def test_metadata_round_trips_through_the_hubs_own_classes(tmp_path):
    """Catches a model-index that the Hub's classes cannot read, or that loses settings on the way."""
    card = full_card()
    path = card.save(tmp_path / "README.md")
    loaded = ModelCard.load(path)
    assert loaded.data.eval_results == eval_results(samples.checked_report())
    assert loaded.data.to_dict() == card.data.to_dict()
    assert loaded.data.base_model == "org/stock-draft"
    assert loaded.data.license == "apache-2.0"
    assert loaded.data.library_name == "transformers"
    assert {
        "speculative-decoding",
        "draft-model",
        "assistant-model",
        "knowledge-distillation",
        "draft-for:org/target-7b",
    } == set(loaded.data.tags)
    first = loaded.data.eval_results[0]
    assert (first.metric_type, first.metric_value) == ("acceptance_rate", 0.71)
    assert first.metric_args["verification"] == "greedy_draft"
    assert first.metric_args["low"] == 0.69


def test_the_index_names_prompts_by_the_id_of_a_data_set_alone():
    """Prompts given in Python stood in the Hub's index as a data set called "given"."""
    for source, name in (("given", "prompts"), ("prompts.jsonl", "prompts"), ("org/prompts", "org/prompts")):
        about = {"source": source, "count": 3, "sha256": "00"}
        results = eval_results(samples.checked_report(prompts=about))
        assert {(result.dataset_type, result.dataset_name) for result in results} == {(name, name)}


def test_two_settings_never_share_one_result():
    """Catches a model-index keyed so that temperature 1 overwrites temperature 0."""
    rates = [result for result in eval_results(samples.checked_report()) if result.metric_type == "acceptance_rate"]
    assert [(rate.metric_args["temperature"], rate.metric_value) for rate in rates] == [(0.0, 0.71), (1.0, 0.62)]


def test_a_group_that_is_the_whole_is_not_repeated():
    """Catches every number standing twice, on the card and in its metadata, where all prompts are of one domain."""
    whole = samples.report()
    unnamed = {key: value for key, value in whole["prompts"].items() if key != "domain"}
    report = samples.report(groups={"biology": whole["settings"]}, prompts=unnamed)
    card = DraftModelCard.from_report(report, name="me/draft")
    assert card.text.count("0.710 \\[0.690, 0.730\\]") == 1
    assert card.text.count("### biology") == 1
    rates = [result for result in card.data.eval_results if result.metric_type == "acceptance_rate"]
    assert [(rate.dataset_config, rate.metric_value) for rate in rates] == [("biology", 0.71), ("biology", 0.62)]
    # A group of some of the texts is another thing.
    part = [setting | {"num_texts": 10} for setting in whole["settings"]]
    card = DraftModelCard.from_report(samples.report(groups={"biology": part}), name="me/draft")
    assert card.text.count("0.710 \\[0.690, 0.730\\]") == 2


def test_groups_become_domains():
    """Catches per-domain metrics that are lost, or mixed with the whole."""
    groups = {"biology": [samples.setting(0.0, "greedy_draft", 0.33, 1.1)]}
    card = DraftModelCard.from_report(samples.report(groups=groups), name="me/draft")
    assert "### biology" in card.text
    by_domain = {result.dataset_config: result.metric_value for result in card.data.eval_results}
    assert by_domain["biology"] == 1.6
    assert "It was tested on function calling, biology only." in card.text


def test_a_card_needs_no_report():
    """Catches a card that `trainer.create_model_card()` cannot write right after training."""
    card = DraftModelCard.from_report(training=samples.training(metrics={"eval_acceptance_rate": 0.7}), name="draft")
    assert card.data.to_dict().get("model-index") is None
    assert "| `eval_acceptance_rate` | 0.7 |" in card.text
    assert "Only the metrics above were measured" in card.text
    assert "`forward_kl`" in card.text
    with pytest.raises(ValueError, match="needs something to say"):
        DraftModelCard.from_report()


def test_a_name_without_an_owner_is_no_hub_id():
    """Catches `from_pretrained("my-draft")` on a card, for a draft that nobody published."""
    card = DraftModelCard.from_report(samples.report(), name="my-draft")
    assert card.text.startswith("\n# my-draft\n") or card.text.startswith("# my-draft\n")
    assert '"path/to/my-draft",' in card.text


def test_no_path_of_this_machine_is_published(tmp_path):
    """Catches a home directory on a public page."""
    (tmp_path / "secret-user" / "target").mkdir(parents=True)
    local = str(tmp_path / "secret-user" / "target")
    report = samples.report(
        target={"name": local, "num_parameters": 2},
        draft={"name": local + "/draft", "num_parameters": 1},
        prompts={"source": local + ".jsonl", "count": 3, "sha256": "00"},
    )
    report["baseline"]["draft"] = {"name": local + "-stock", "num_parameters": 1}
    card = DraftModelCard.from_report(
        report, training=samples.training(target=local, draft=local, dataset=local), name=local
    )
    assert "secret-user" not in card.render()
    assert not any(tag.startswith("draft-for:") for tag in card.data.tags)
    assert card.data.to_dict().get("base_model") is None
    assert 'from_pretrained(\n    "path/to/target",' in card.text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train --model /home/me/d --output_dir ~/x", "train --model path/to/d --output_dir path/to/x"),
        ("made by /a/b/target, here it is", "made by path/to/target, here it is"),
        ("in '/a/b/c'.", "in 'path/to/c'."),
        ("from C:\\Users\\me\\draft on", "from path/to/draft on"),
        ("--model=/a/b.", "--model=path/to/b."),
        ("train --model '/home/me/My Drafts/d' '/x'", "train --model 'path/to/d' 'path/to/x'"),
    ],
)
def test_paths_inside_a_text_lose_their_directories(text: str, expected: str):
    assert without_paths(text) == expected


@pytest.mark.parametrize("text", ["https://huggingface.co/a/b", "org/name and ./here", "1/2, and/or", "tokens / s"])
def test_what_is_no_absolute_path_stays(text: str):
    """Catches addresses and names on the Hub that are mangled."""
    assert without_paths(text) == text


def test_a_path_with_spaces_in_a_warning_is_a_path(tmp_path):
    """Catches half of `/home/me/My Drafts/d`, and of `C:\\Users\\Jane Doe\\d`: a path in a sentence ends nowhere."""
    name = "/home/me/My Drafts/d"
    report = samples.report(draft={"name": name, "num_parameters": 1}, warnings=[f"Texts that {name} helped to write."])
    assert public_report(SpeculationReport.from_dict(report)).warnings == ["Texts that path/to/d helped to write."]


def test_prompts_described_in_words_keep_them():
    """Catches `path/to/the demo's queries`."""
    for source, expected in (
        ("the demo pair's test queries", "3 prompts of the demo pair's test queries (sha256"),
        ("given", "3 prompts (sha256"),
        ("/home/me/prompts.jsonl", "3 prompts of `path/to/prompts.jsonl` (sha256"),
        ("org/prompts", "3 prompts of [org/prompts](https://huggingface.co/datasets/org/prompts) (sha256"),
    ):
        report = samples.report(prompts={"source": source, "count": 3, "sha256": "00"})
        assert expected in DraftModelCard.from_report(report, name="me/draft").text


def test_a_directory_that_looks_like_a_hub_id_is_a_directory(tmp_path, monkeypatch):
    """Catches `quickstart/draft`, a path, being tagged as a repository on the Hub."""
    monkeypatch.chdir(tmp_path)
    assert public_name("quickstart/draft") == "quickstart/draft"
    (tmp_path / "quickstart" / "draft").mkdir(parents=True)
    assert public_name("quickstart/draft") == "path/to/draft"


HOSTILE = [
    "x: [y",
    "{{ 7*7 }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "<script>alert(1)</script>",
    '<img src=x onerror="alert(1)">',
    "a | b | c",
    "`code` ``more`` ```fence```",
    "](javascript:alert(1))",
    "line\n---\nlicense: mit\n---\n# owned",
    "\n<!-- draftkd:end summary -->\n",
    "```\n# owned\n```",
    "--> <h1>owned</h1>",
    "- item\n# heading",
    "\u202egnp.exe",
    "!!python/object/apply:os.system ['true']",
    "&lt;b&gt;",
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_names_from_others_stay_text(hostile):
    """Catches a name that becomes YAML, HTML, a template, a link, a heading, a table cell or a mark of ours."""
    benign = "PLAIN NAME"
    cards = []
    for name in (hostile, benign):
        report = samples.report(
            target={"name": name, "revision": name, "num_parameters": 7},
            draft={"name": name, "num_parameters": 1},
            prompts={"source": name, "count": 64, "domain": name, "sha256": name},
            hardware=samples.report()["hardware"] | {"name": name},
            warnings=[name],
            groups={name: samples.report()["settings"]},
        )
        report["recommendation"]["reason"] = name
        report["baseline"]["draft"] = {"name": name, "num_parameters": 1}
        for setting in report["settings"]:
            setting["verification"] = name
        for gain in report["paired_difference"]:
            gain["verification"] = name
        training = samples.training(
            target=name,
            draft=name,
            dataset=name,
            divergence=name,
            peft=name,
            scenarios=[name],
            hyperparameters={name: name},
            divergence_options={name: name},
        )
        provenance = samples.provenance(command=f"train {name}", versions={name: name}, commit=name, notes=[name])
        cards.append(
            DraftModelCard.from_report(
                report,
                training=training,
                pair=samples.pair(tokenizer_fingerprint=name),
                provenance=provenance,
                name=name,
                license=name,
                language=name,
                tags=[name],
                plots={name: name},
                notes=[name],
            )
        )
    bad, good = cards
    text = bad.render()
    assert text.count("49") == good.render().count("49")
    # Parsed again, the metadata has the same shape, and the body the same skeleton, as with a harmless name.
    metadata = yaml.safe_load(text.removeprefix("---\n").split("\n---\n", 1)[0])
    assert set(metadata) <= {*good.data.to_dict(), "base_model", "datasets"}
    assert metadata["library_name"] == "transformers"
    assert metadata["license"] == " ".join(re.split(r"[\x00-\x1f\u202e]+", hostile)).strip() or "owned" in hostile
    assert skeleton(bad.text) == skeleton(good.text)
    assert ModelCard(text).data.to_dict() == bad.data.to_dict()


def skeleton(body: str) -> list[str]:
    """What Markdown makes of a body, without the words: headings, table rows by cell count, fences, marks, lists."""
    marks = []
    fence = None
    for line in body.splitlines():
        opening = re.match(r"(`{3,})(\w*)$", line)
        if fence:
            if line.startswith(fence) and not line.strip("`"):
                fence = None
                marks.append("fence closes")
            continue
        if opening:
            fence = opening[1]
            marks.append(f"fence {opening[2]}")
        elif line.startswith("<!--"):
            marks.append(line)
        elif line.startswith("|"):
            marks.append("row of {}".format(len(re.findall(r"(?<!\\)\|", line))))
        elif re.match(r"#{1,6} ", line):
            marks.append("heading " + line.split(" ")[0])
        elif re.match(r"(- |> )", line):
            marks.append("item")
        # HTML is live outside of code spans only.
        outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", line)
        assert not re.search(r"<(?!!-- draftkd:)", outside), line
        assert not re.search(r"(?<!\\)\]\(javascript", outside), line
    assert fence is None
    return marks


def test_a_command_from_others_stays_in_its_block():
    """Catches a line of a stranger's `provenance.json` that ends the section, and text that shows in another order."""
    command = "one\n<!-- draftkd:end training -->\n# owned \u202egnp.exe"
    card = DraftModelCard.from_report(provenance=samples.provenance(command=command), name="me/draft")
    assert "# owned" in sections_of(card.text)["training"]
    assert "\u202e" not in card.text


def test_jinja_in_a_report_is_never_evaluated():
    """Catches a second rendering of the finished card."""
    report = samples.report()
    report["recommendation"]["reason"] = "{{ 7*7 }} {{ cycler.__init__.__globals__ }}"
    assert "{{ 7\\*7 }}" in DraftModelCard.from_report(report, name="me/draft").text


IN_TRANSFORMERS = {"transformers: `generate`", "transformers: `SpeculativeDecoding`"}


class TestCommands:
    """Engines appear only where their condition on the pair is known to hold."""

    def titles(self, **facts) -> set[str]:
        card = full_card(pair=samples.pair(**facts), provenance=None)
        return set(re.findall(r"^### (transformers: `\w+`|vLLM|SGLang|llama\.cpp)$", card.text, re.MULTILINE))

    def test_equal_vocabularies_run_everywhere(self):
        assert self.titles() == {*IN_TRANSFORMERS, "transformers: `pipeline`", "vLLM", "SGLang", "llama.cpp"}

    def test_the_way_that_a_card_recommends_is_shown(self):
        """Catches `SpeculativeDecoding` recommended to a reader who is never told how to decode so."""
        assert "custom_generate=SpeculativeDecoding(draft)" in full_card().text
        assert "in one pass of the draft" not in full_card().text

    def test_sizes_128_apart_are_for_llama_cpp_alone(self):
        """Qwen2.5 0.5B and 7B are 128 apart: exactly what llama.cpp still takes, and vLLM refuses."""
        assert self.titles(draft_vocab_size=151936, target_vocab_size=152064) == {"llama.cpp"}
        assert self.titles(draft_vocab_size=151935, target_vocab_size=152064) == set()
        card = full_card(pair=samples.pair(draft_vocab_size=151936, target_vocab_size=152064))
        assert "align_vocabulary(draft, target)" in card.text

    def test_other_special_ids_keep_pipeline_and_llama_cpp_out(self):
        assert self.titles(same_special_ids=False) == {*IN_TRANSFORMERS, "vLLM", "SGLang"}

    def test_a_tokenizer_that_llama_cpp_refuses_gets_the_reason(self):
        """Its converter looks byte-level vocabularies up by a hash: the command would end in an error."""
        refused = full_card(pair=samples.pair(llama_cpp_converts=False), provenance=None).text
        assert "### llama.cpp\n\nNo command:" in refused
        assert "llama-server" not in refused
        named = samples.pair(llama_cpp_converts=False, llama_cpp_pre_tokenizer="smollm")
        named = full_card(pair=named, provenance=None).text
        assert 'get_vocab_base_pre = lambda self, tokenizer: "smollm"' in named
        assert "python convert.py target-hf --outfile target.gguf" in named
        plain = full_card(pair=samples.pair(llama_cpp_converts=True), provenance=None).text
        assert "python convert_hf_to_gguf.py target-hf" in plain
        assert "knows this tokenizer" in plain

    def test_unknown_sizes_promise_nothing_about_other_engines(self):
        transformers = {*IN_TRANSFORMERS, "transformers: `pipeline`"}
        assert self.titles(draft_vocab_size=None, target_vocab_size=None) == transformers
        # The draft's size is always known; a target that cannot be looked at must not hide every command.
        assert self.titles(target_vocab_size=None) == transformers

    def test_the_tuned_length_is_in_every_command(self):
        report = samples.report()
        report["recommendation"]["num_assistant_tokens"] = 3
        text = DraftModelCard.from_report(report, pair=samples.pair(), name="me/draft").text
        for expected in (
            "num_assistant_tokens=3",
            '"num_speculative_tokens": 3',
            "--speculative-num-steps 3",
            "--speculative-num-draft-tokens 4",
            "--spec-draft-n-max 3",
        ):
            assert expected in text

    def test_an_untuned_length_is_called_a_starting_value(self):
        card = DraftModelCard.from_report(training=samples.training(), pair=samples.pair(num_assistant_tokens=None))
        assert "No draft length was tuned for this draft; the 5 above is a starting value." in card.text


def test_only_the_papers_of_the_methods_used_are_cited():
    """Catches a fixed list of citations."""
    plain = papers_used(samples.training(divergence="cross_entropy", signal="black_box"))
    assert plain == ["leviathan2023", "chen2023", "hong2025"]
    assert "goel2024" in papers_used(samples.training(divergence="tvd_plus_plus"))
    assert "samarin2026" in papers_used(samples.training(divergence="lk_hybrid"))
    assert "zhou2024" in papers_used(samples.training(completions="draft"))
    assert "xu2024" in papers_used(samples.training(scenarios=["synthetic"]))


def test_summary_and_provenance_survive_the_file(tmp_path):
    """Catches fields that are written but not read back."""
    stored = samples.provenance(training=samples.training(), pair=samples.pair(), notes=["A note."])
    stored.save(tmp_path)
    assert Provenance.load(tmp_path) == stored
    assert Provenance.load(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ('{"commandd": "x"}', "Did you mean"),
        ('{"command": 3}', "must be a string"),
        ('{"training": {"num_rows": "many"}}', "must be a whole number"),
        ('{"training": {"signal": "whitebox"}}', "Did you mean 'white_box'"),
        ('{"training": {"loss_temperature": NaN}}', "must be a number"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_a_strangers_provenance_is_checked(tmp_path, content, message):
    """Catches unchecked JSON from somebody else's repository."""
    (tmp_path / "provenance.json").write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        Provenance.load(tmp_path)


def test_an_unknown_signal_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match="Did you mean 'black_box'"):
        TrainingSummary(signal="blackbox")


def test_pair_facts_read_the_tuned_length_only_where_it_takes_effect():
    """Catches a length that transformers' adaptive schedule or confidence threshold would override."""
    from transformers import GenerationConfig, LlamaConfig

    config, tokenizer = LlamaConfig(vocab_size=64), tiny_tokenizer()
    tuned = GenerationConfig(
        num_assistant_tokens=4, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    assert PairFacts.from_configs(config, config, tokenizer, draft_generation_config=tuned).num_assistant_tokens == 4
    adaptive = GenerationConfig(num_assistant_tokens=4)
    assert (
        PairFacts.from_configs(config, config, tokenizer, draft_generation_config=adaptive).num_assistant_tokens is None
    )
    other = LlamaConfig(vocab_size=72, eos_token_id=7)
    facts = PairFacts.from_configs(config, other, tokenizer)
    assert (facts.draft_vocab_size, facts.target_vocab_size, facts.same_special_ids) == (64, 72, False)


class TestEditedByHand:
    """A card that somebody wrote in: numbers change, words stay."""

    def test_prose_is_kept_and_figures_are_new(self):
        old = full_card()
        edited = DraftModelCard(
            old.render()
            .replace("It is not meant to be used by itself.", "My own words.")
            .replace("## Limits", "## Limits\nscribble inside the marks")
            + "\n## Thanks\n\nTo everybody.\n"
        )
        edited.data.license = "mit"
        edited.data["extra_key"] = "kept"
        edited.data.tags.append("my-tag")
        better = samples.report()
        better["settings"][0]["acceptance_rate"]["value"] = 0.8125
        fresh = DraftModelCard.from_report(better, name="me/draft-115m", license="apache-2.0")
        result = merged(fresh, edited)[0]
        text = result.render()
        assert "My own words." in text
        assert "## Thanks\n\nTo everybody." in text
        assert "scribble" not in text
        assert "0.812" in text
        assert "0.710" not in text
        assert result.data.license == "mit"
        assert result.data["extra_key"] == "kept"
        assert "my-tag" in result.data.tags
        assert result.data.eval_results[0].metric_value == 0.8125
        # The new card does not mention training: the old training section described other weights.
        assert "## Training" not in text

    def test_a_card_without_marks_is_kept_whole_and_gets_the_sections(self):
        written = DraftModelCard("---\nlicense: mit\n---\n# By hand\n\nAll mine.\n")
        result = merged(full_card(), written)[0]
        assert result.text.startswith("# By hand\n\nAll mine.")
        assert "## How much it helps" in result.text
        assert result.data.license == "mit"

    def test_updating_twice_changes_nothing_more(self):
        once = merged(full_card(), full_card())[0]
        assert merged(full_card(), once)[0].render() == once.render()

    def test_words_behind_a_removed_mark_are_kept(self):
        """Catches words that were lost at the second update, between a mark without its end and the new section."""
        edited = full_card().render().replace("<!-- draftkd:end summary -->\n", "MY OWN WORDS\n")
        card = DraftModelCard(edited)
        for _ in range(3):
            card = merged(full_card(), card)[0]
            assert "MY OWN WORDS" in card.text
        assert set(sections_of(card.text)) == set(sections_of(full_card().text))

    @pytest.mark.parametrize("language", ["no", "[en, no]", "\n- no"])
    def test_norwegian_is_no_boolean(self, language: str):
        """Catches `language: false`, which the Hub refuses: YAML 1.1 reads a bare `no` so, the Hub does not."""
        text = f"---\nlanguage: {language}\n---\n# By hand\n"
        card = merged(full_card(), read_card(DraftModelCard, text, "the card"))[0]
        assert "no" in card.data.language
        assert "false" not in card.data.to_yaml()

    def test_an_old_target_tag_does_not_linger(self):
        """Catches a draft that is still found for the target it was made for before."""
        other = samples.report(target={"name": "org/other", "revision": samples.REVISION, "num_parameters": 7})
        result = merged(DraftModelCard.from_report(other, name="me/draft-115m"), full_card())[0]
        assert [tag for tag in result.data.tags if tag.startswith("draft-for:")] == ["draft-for:org/other"]


def test_saving_never_leaves_half_a_card(tmp_path, monkeypatch):
    """Catches a card that is truncated when the disk is full."""
    card = full_card()
    card.save(tmp_path)
    before = (tmp_path / "README.md").read_text()

    def fails(self, *args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="No space"):
        full_card(name="me/other").save(tmp_path)
    assert (tmp_path / "README.md").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
