"""Engines that serve a pair: what they answered when they were run, and everything that can be wrong there."""

import io
import json
import os
import signal
import socket
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from datasets import Dataset, concatenate_datasets
from rich.console import Console

from hf_draftkd.acceptance import Estimate
from hf_draftkd.decoding.setting import DecodingSetting
from hf_draftkd.evaluation.engines import ENGINES, launch, measure
from hf_draftkd.evaluation.engines.config import EngineConfig
from hf_draftkd.evaluation.engines.launch import launched
from hf_draftkd.evaluation.engines.llama_cpp import LlamaCpp
from hf_draftkd.evaluation.engines.measure import check_settings, evaluate_in_engine, recommend_in_engine, written_texts
from hf_draftkd.evaluation.engines.protocol import Engine, EngineAnswer, ServedPair
from hf_draftkd.evaluation.html import render_page
from hf_draftkd.evaluation.plots import speed_by_length_figure
from hf_draftkd.evaluation.report import EngineResult, ParallelResult, SpeculationReport
from hf_draftkd.evaluation.tables import ReportTable
from hf_draftkd.hub.report_tables import engine_table
from tests.evaluation import samples

GREEDY = DecodingSetting()
PAIR = ServedPair("target", "draft", 4, True, 1, 64, "x")
# Answers of llama-server 0.6.0-dev, vLLM 0.32.0 and OpenVINO GenAI 2026.4.1 to one prompt, shortened.
LLAMA_CPP = {
    "/completion": {
        "tokens": list(range(40)),
        "truncated": False,
        "timings": {"prompt_n": 85, "predicted_n": 40, "predicted_ms": 135.7, "draft_n": 52, "draft_n_accepted": 24},
    },
    "/tokenize": {"tokens": [3, 62, 5]},
    "/props": {"build_info": "b11434"},
    "/metrics": ["llamacpp:spec_decode_num_drafts_total 90\n", "llamacpp:spec_decode_num_drafts_total 107\n"],
}
METRICS = """# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{{engine="0",model_name="target"}} {0}.0
vllm:spec_decode_num_drafts_created{{engine="0",model_name="target"}} 1.79e+09
vllm:spec_decode_num_draft_tokens_total{{engine="0",model_name="target"}} {1}.0
vllm:spec_decode_num_accepted_tokens_total{{engine="0",model_name="target"}} {2}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{{engine="0",model_name="target",position="0"}} 9.0
"""
VLLM = {
    "/version": {"version": "0.32.0"},
    "/v1/models": {"data": [{"id": "target"}]},
    "/tokenize": {"count": 1, "tokens": [282]},
    "/v1/completions": {"choices": [{"finish_reason": "length", "token_ids": list(range(40))}]},
    "/metrics": [METRICS.format(15, 60, 26), METRICS.format(30, 120, 52)],
}
OPENVINO = {
    "/version": {"version": "2026.4.1.0"},
    "/tokenize": {"tokens": [3]},
    "/complete": {"tokens": list(range(40)), "target_calls": 16, "draft_tokens": 59, "accepted": 24},
}


@contextmanager
def serving(answers, status=200):
    """A server that gives recorded answers by path; of a list one after the other."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(None)

        def do_POST(self):
            self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def answer(self, request):
            asked.append((self.path, request))
            if self.path not in answers:
                self.send_error(501)
                return
            found = answers[self.path]
            found = found.pop(0) if isinstance(found, list) else found
            self.send_response(status)
            self.end_headers()
            self.wfile.write((found if isinstance(found, str) else json.dumps(found)).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("name", "answers", "expected", "version"),
    [
        ("llama.cpp", LLAMA_CPP, (17, 52, 22), "b11434"),
        ("vllm", VLLM, (15, 60, 26), "0.32.0"),
        ("openvino", OPENVINO, (15, 59, 24), "2026.4.1.0"),
    ],
)
def test_counters_are_read_from_recorded_answers(name, answers, expected, version):
    """Catches counts taken from the wrong key, from all requests since the start, or with the prompt's call."""
    with serving(json.loads(json.dumps(answers))) as (url, asked):
        found = ENGINES[name].complete(url, [3, 62], DecodingSetting(1.0), 40, 7)
        assert (found.num_spec_steps, found.num_draft_tokens, found.num_accepted_draft_tokens) == expected
        assert found.token_ids == list(range(40))
        assert not found.is_cut
        assert ENGINES[name].version(url) == version
        assert ENGINES[name].tokenize(url, "a")
    (request,) = [sent for _, sent in asked if sent and "prompt" in sent and isinstance(sent["prompt"], list)]
    # Nothing that a server would filter with by default may be left to it.
    assert request["prompt"] == [3, 62]
    assert (request["temperature"], request["top_k"], request["top_p"], request["seed"]) == (1.0, 0, 1.0, 7) or (
        name == "openvino" and request["top_p"] == 1.0
    )


def test_tokens_behind_the_end_are_no_accepted_ones():
    """llama.cpp counts them where its draft samples: 17 verified drafts cannot be 15 target calls."""
    with serving({**LLAMA_CPP, "/metrics": "llamacpp:spec_decode_num_drafts_total 3\n"}) as (url, _):
        # Less than by the tokens: those of a text that was not ended by its model, without a draft at its last token.
        assert ENGINES["llama.cpp"].complete(url, [3], DecodingSetting(1.0), 40, 0).num_spec_steps == 15
    unmetered = {path: answer for path, answer in LLAMA_CPP.items() if path != "/metrics"}
    with serving(unmetered) as (url, _):
        assert ENGINES["llama.cpp"].complete(url, [3], GREEDY, 40, 0).num_spec_steps == 15
        with pytest.raises(ValueError, match="Start it with `--metrics`"):
            ENGINES["llama.cpp"].complete(url, [3], DecodingSetting(1.0), 40, 0)


def test_answers_cut_by_the_context_are_seen():
    answers = {**LLAMA_CPP, "/completion": {**LLAMA_CPP["/completion"], "truncated": True}}
    with serving(answers) as (url, _):
        assert ENGINES["llama.cpp"].complete(url, [3], GREEDY, 40, 0).is_cut
    with serving(json.loads(json.dumps(VLLM))) as (url, _):
        assert ENGINES["vllm"].complete(url, [3], GREEDY, 41, 0).is_cut


def test_what_is_no_engine_says_so():
    """A traceback of urllib, or a KeyError, in place of one message."""
    engine = ENGINES["llama.cpp"]
    with pytest.raises(ConnectionError, match=r"Nothing answers at http://127\.0\.0\.1:9/completion"):
        engine.complete("http://127.0.0.1:9", [3], GREEDY, 4, 0)
    with serving({"/completion": "<html>"}) as (url, _), pytest.raises(ValueError, match="did not answer in JSON"):
        engine.complete(url, [3], GREEDY, 4, 0)
    with serving({"/completion": {"choices": []}}) as (url, _), pytest.raises(ValueError, match="has no timings"):
        engine.complete(url, [3], GREEDY, 4, 0)
    with serving({"/completion": "bad"}, 400) as (url, _), pytest.raises(ValueError, match="status 400: bad"):
        engine.complete(url, [3], GREEDY, 4, 0)


def test_a_program_that_does_not_speak_http_is_no_engine():
    """A traceback of `BadStatusLine` for the port of another program."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet():
            with server.accept()[0] as client:
                client.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(ValueError, match=r"does not speak HTTP: SSH-2\.0"):
            ENGINES["vllm"].version(f"http://127.0.0.1:{server.getsockname()[1]}")
        thread.join()


def test_a_server_that_dies_quotes_what_it_said():
    """`--launch` waited fifteen minutes for a program that had ended."""

    class Dying(LlamaCpp):
        def command(self, pair, port):
            return [sys.executable, "-c", "raise SystemExit('no such model')"], {}

    with pytest.raises(ValueError, match="no such model"), launched(Dying(), PAIR):
        pass


def answering(code, pid):
    """An engine that answers once its server, which runs `code`, has written its process id to a file."""

    class Answering(LlamaCpp):
        def command(self, pair, port):
            return [sys.executable, "-c", code.format(path=str(pid))], {}

        def tokenize(self, url, text):
            if not (pid.exists() and pid.read_text()):
                raise ConnectionError
            return [1]

    return Answering()


def test_a_command_that_is_told_to_end_leaves_no_server(tmp_path):
    """`timeout draftkd evaluate --launch` left two servers that held the cores from then on."""
    pid = tmp_path / "pid"
    engine = answering("import os, time; open({path!r}, 'w').write(str(os.getpid())); time.sleep(60)", pid)
    with pytest.raises(SystemExit), launched(engine, PAIR):
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


STUBBORN = """
import os, signal, time

def tell_the_command_again(*_):
    os.kill(os.getppid(), signal.SIGTERM)
    os.kill(os.getppid(), signal.SIGINT)

signal.signal(signal.SIGTERM, tell_the_command_again)
open({path!r}, "w").write(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize(("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_command_that_is_told_to_end_again_leaves_no_server(tmp_path, monkeypatch, number, error):
    """A signal that came while a server was being stopped left it running, if it did not obey at once."""
    monkeypatch.setattr(launch, "_STOP_SECONDS", 1)
    pid = tmp_path / "pid"

    def before(*_):
        """What would otherwise end the tests with this one."""

    handlers = {each: signal.signal(each, before) for each in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(error), launched(answering(STUBBORN, pid), PAIR):
            os.kill(os.getpid(), number)
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
        assert [signal.getsignal(each) for each in handlers] == [before, before]
    finally:
        for each, handler in handlers.items():
            signal.signal(each, handler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"endpoint": "http://a"}, "needs `engine`"),
        ({"engine": "vlm", "launch": True}, "vllm"),
        ({"engine": "vllm"}, "or `launch`"),
        ({"engine": "vllm", "plain_endpoint": "http://a"}, "give `endpoint` too"),
        # It was asked, and said not to answer.
        ({"engine": "vllm", "endpoint": "localhost:8000"}, "`endpoint` must begin with http:// or https://"),
        ({"engine": "llama.cpp", "launch": True}, "engine_models"),
        ({"engine": "vllm", "launch": True, "engine_rounds": 0}, "engine_rounds"),
        ({"engine": "vllm", "launch": True, "engine_prompts": 0}, "engine_prompts"),
        ({"engine": "openvino", "endpoint": "http://a", "parallel_drafting": True}, "option of vLLM"),
    ],
)
def test_options_are_checked_before_the_work(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


def test_an_address_may_be_the_one_that_openai_clients_take():
    """A server asked for `/v1/metrics` and `/v1/v1/completions`."""
    config = EngineConfig(engine="vllm", endpoint="http://a:8000/v1/", plain_endpoint="http://b:8000/")
    assert (config.endpoint, config.plain_endpoint) == ("http://a:8000", "http://b:8000")


class Served(Engine):
    """An engine in Python: time is simulated, the draft gets every second token right."""

    name, tested_version = "vllm", "1.0"

    def __init__(self, **faults):
        self.faults = faults

    def command(self, pair, port):
        raise AssertionError("It runs already: nothing is launched.")

    def version(self, url):
        return self.faults.get("version", "1.0")

    def tokenize(self, url, text):
        return [ord(letter) for letter in text] if "tokenize" not in self.faults else [9, 9]

    def complete(self, url, prompt_ids, setting, max_new_tokens, seed):
        drafts = ("draft" in url) != self.faults.get("undrafted", False) or self.faults.get("drafting", False)
        ids = [prompt_ids[0] + place + self.faults.get("shift", 0) for place in range(max_new_tokens)]
        calls = (len(ids) - 1) // 2 if drafts else 0
        seconds = 1.0 + (3.0 * calls if drafts else 2.0 * (len(ids) - 1))
        return EngineAnswer(ids, seconds, calls, 4 * calls, calls, is_cut=self.faults.get("cut", False))


class Letters:
    eos_token_id = 0

    def decode(self, ids, **_):
        return "".join(map(chr, ids))

    def __call__(self, text, **_):
        return {"input_ids": [ord(letter) for letter in text]}


ROWS = Dataset.from_list(
    [
        {
            "prompt_ids": [65 + number, 66],
            "completion_ids": [65 + number + place for place in range(9)],
            "ids_source": "generated",
            **GREEDY.to_dict(),
        }
        for number in range(3)
    ]
)


SAMPLED = ROWS.map(lambda _: DecodingSetting(1.0).to_dict())


def run(
    monkeypatch, plain_endpoint="http://plain", parallel_drafting=False, rows=ROWS, num_assistant_tokens=4, **faults
):
    monkeypatch.setitem(ENGINES, "vllm", Served(**faults))
    report = samples.report()
    report.max_new_tokens = 9
    servers = {"engine": "vllm", "endpoint": "http://draft", "plain_endpoint": plain_endpoint, "engine_rounds": 2}
    servers["parallel_drafting"] = parallel_drafting
    return report, evaluate_in_engine(report, rows, Letters(), num_assistant_tokens=num_assistant_tokens, **servers)


def test_an_engine_is_measured_beside_the_prediction(monkeypatch):
    """By hand: 9 tokens are one of the prompt and 8 of 4 calls; 17 seconds plain, 13 with the draft."""
    report, (found,) = run(monkeypatch)
    assert report.engines == [found]
    assert (found.num_prompts, found.num_rounds, found.num_identical, found.num_plain_identical) == (3, 2, 3, 3)
    assert found.mean_acceptance_length.value == 2.0
    assert found.draft_acceptance_rate == 0.25
    assert found.speedup.value == pytest.approx(17 / 13)
    assert found.target_step_seconds == pytest.approx(2.0)
    assert found.call_seconds == {4: pytest.approx(3.0)}
    assert found.predicted_mean_acceptance_length == report.settings[0].block_efficiency[4]
    assert found.recommendation.worth_it
    assert found.recommendation.predicted_speedup == pytest.approx(2 * 2 / 3)
    assert "in vllm on this machine" in found.recommendation.reason
    assert SpeculationReport.from_json(report.to_json()) == report
    assert "<h3>vllm 1.0, greedy</h3>" in render_page(report)
    line = {each.get_label(): each for each in speed_by_length_figure(report).axes[0].lines}["vllm, greedy"]
    assert line.get_xydata().tolist() == [[4, pytest.approx(found.predicted_mean_acceptance_length.value * 2 / 3)]]


def test_settings_that_the_report_does_not_have_are_left_out(monkeypatch):
    """Alignment data holds texts at two temperatures, of which the report was asked for one."""
    report = samples.report()
    report.settings = report.settings[:1]
    monkeypatch.setattr(samples, "report", lambda: report)
    _, (found,) = run(monkeypatch, rows=concatenate_datasets([SAMPLED, ROWS]))
    assert found.decoding == GREEDY
    with pytest.raises(ValueError, match=r"None of the texts .* of the report, which has greedy\. Give the texts"):
        run(monkeypatch, rows=SAMPLED)


class Launched(Served):
    def command(self, pair, port):
        return ["serve", "--port", str(port)], {}


def test_no_server_is_started_for_steps_whose_times_say_nothing(monkeypatch):
    """Two more servers at other draft lengths, where no block efficiency says what they would be worth."""
    started = []

    @contextmanager
    def launched(engine, pair):
        started.append(pair.draft and pair.num_assistant_tokens)
        yield "http://draft" if pair.draft else "http://plain"

    monkeypatch.setitem(ENGINES, "vllm", Launched())
    monkeypatch.setattr(measure, "launched", launched)
    report = samples.report()
    for computed, lengths in ((True, [None, 4, 1, 8]), (False, [None, 4])):
        if not computed:
            report.settings[0].block_efficiency = None
        started.clear()
        evaluate_in_engine(report, ROWS, Letters(), num_assistant_tokens=4, engine="vllm", launch=True)
        assert started == lengths


def test_what_was_counted_is_kept_where_a_later_server_does_not_start(monkeypatch):
    """Half an hour of rounds was lost with the last of four servers, which only times steps."""

    @contextmanager
    def launched(engine, pair):
        if pair.num_assistant_tokens == 8:
            raise ValueError("no memory")
        yield "http://draft" if pair.draft else "http://plain"

    monkeypatch.setitem(ENGINES, "vllm", Launched())
    monkeypatch.setattr(measure, "launched", launched)
    report = samples.report()
    with pytest.raises(ValueError, match="no memory"):
        evaluate_in_engine(report, ROWS, Letters(), num_assistant_tokens=4, engine="vllm", launch=True)
    (found,) = report.engines
    assert found.speedup.value > 1
    assert found.recommendation.worth_it


def test_a_server_alone_is_counted_and_nothing_is_said_of_speed(monkeypatch):
    """A ratio to a server that nobody asked, or a page and a card that need one."""
    report, (found,) = run(monkeypatch, plain_endpoint=None)
    assert found.mean_acceptance_length.value == 2.0
    assert (found.num_identical, found.num_plain_identical) == (3, None)
    assert (found.speedup, found.recommendation, found.target_step_seconds) == (None, None, None)
    assert SpeculationReport.from_json(report.to_json()) == report
    page = render_page(report)
    assert "<h3>vllm 1.0, greedy</h3>" in page
    assert "None" not in page
    console = Console(record=True, file=io.StringIO())
    console.print(ReportTable(report))
    table = console.export_text()
    assert "vllm 1.0, greedy" in table
    assert "3, 2 times" in table
    assert "speed-up" not in table
    assert "Speed-up" not in engine_table(report)
    assert "vllm, greedy" not in [each.get_label() for each in speed_by_length_figure(report).axes[0].lines]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({"tokenize": True}, r"prompt 0 token 0 is \[9\] there and \[65\] here"),
        ({"undrafted": True, "drafting": False}, "drafts: start it without"),
        ({"drafting": True}, "drafts: start it without a draft"),
        ({"cut": True}, "context of at least 12 tokens"),
    ],
)
def test_servers_that_cannot_be_measured_are_refused(monkeypatch, faults, message):
    with pytest.raises(ValueError, match=message):
        run(monkeypatch, **faults)


def test_a_server_without_a_draft_is_refused(monkeypatch):
    monkeypatch.setattr(Served, "complete", lambda self, url, ids, *_: EngineAnswer([1, 2], 1.0, 0, 0, 0))
    with pytest.raises(ValueError, match="no draft loaded"):
        run(monkeypatch)


def test_a_first_answer_of_one_token_is_no_server_without_a_draft(monkeypatch):
    """A draft proposes nothing where the target ends at once: "it has no draft loaded", of a server that has one."""
    answer = Served.complete

    def ends_at_once(self, url, ids, setting, limit, seed):
        return answer(self, url, ids, setting, 1 if ids[0] == 65 else limit, seed)

    monkeypatch.setattr(Served, "complete", ends_at_once)
    rows = ROWS.map(lambda row: {"completion_ids": [65] if row["prompt_ids"][0] == 65 else row["completion_ids"]})
    _, (found,) = run(monkeypatch, rows=rows)
    assert found.num_identical == 3
    assert found.mean_acceptance_length.value == 2.0


def test_another_model_and_another_version_are_noted(monkeypatch):
    report, (found,) = run(monkeypatch, shift=1, version="2.0")
    assert found.num_identical == 0
    notes = " ".join(report.warnings)
    assert "Only 0 of 3 plain greedy texts" in notes
    assert "says it is version 2.0" in notes


@pytest.mark.parametrize("engine", ["vllm", "openvino"])
def test_an_engine_is_not_started_for_what_it_gets_wrong(monkeypatch, engine):
    """VLLM 0.32 on a CPU samples with a draft from memory that nobody filled; OpenVINO loses tokens."""
    setting = DecodingSetting(1.0, top_p=0.9)
    rows = ROWS.map(lambda _: setting.to_dict())
    monkeypatch.setattr(measure, "launched", None)
    report = samples.report()
    report.settings[1].decoding = setting
    models = ["target", "draft"]
    assert evaluate_in_engine(report, rows, Letters(), engine=engine, launch=True, engine_models=models) == []
    assert f"temperature 1, top-p 0.9 was not measured in {engine}" in report.warnings[-1]


def test_settings_that_no_engine_decodes_are_refused_before_the_pair_is_evaluated():
    """Catches an hour of evaluation that ends with "was not measured", and with exit code 0."""
    config = EngineConfig(engine="vllm", launch=True)
    check_settings(config, [GREEDY, DecodingSetting(1.0)])
    with pytest.raises(ValueError, match=r"vllm cannot measure temperature 1: vLLM .* Ask for another setting"):
        check_settings(config, [DecodingSetting(1.0)])
    penalised = [replace(GREEDY, repetition_penalty=1.1)]
    with pytest.raises(ValueError, match="repetition penalty differently"):
        check_settings(EngineConfig(engine="llama.cpp", endpoint="http://a"), penalised)
    check_settings(EngineConfig(engine="openvino", endpoint="http://a"), penalised)
    with pytest.raises(ValueError, match="do not say under which setting"):
        written_texts(ROWS.remove_columns("ids_source"))


def test_a_length_that_was_not_predicted_is_refused(monkeypatch):
    """Catches a KeyError behind the engine's start."""
    with pytest.raises(ValueError, match="`num_assistant_tokens=20` cannot be compared"):
        evaluate_in_engine(samples.report(), ROWS, Letters(), num_assistant_tokens=20, engine="vllm", launch=True)


def test_a_server_that_drafts_in_one_pass_is_held_against_that_prediction(monkeypatch):
    """Catches vLLM's `parallel_drafting` compared with the prediction for one token a pass."""
    words, _ = ENGINES["vllm"].command(replace(PAIR, parallel_drafting=True), 0)
    assert json.loads(words[words.index("--speculative-config") + 1])["parallel_drafting"] is True
    assert "parallel_drafting" not in " ".join(ENGINES["vllm"].command(PAIR, 0)[0])
    report, (found,) = run(monkeypatch)
    one_by_one = found.predicted_mean_acceptance_length
    monkeypatch.setattr(samples, "report", lambda: report)
    with pytest.raises(ValueError, match="needs a parallel draft"):
        run(monkeypatch, parallel_drafting=True)
    efficiency = {length: Estimate(1.0 + length / 10) for length in (1, 2, 3, 4)}
    for setting in report.settings:
        rates = [Estimate(0.1)] * 4
        setting.parallel = ParallelResult(num_tokens=4, acceptance_by_depth=rates, block_efficiency=efficiency)
    report, (found,) = run(monkeypatch, parallel_drafting=True)
    assert found.predicted_mean_acceptance_length == efficiency[4] != one_by_one
    assert report.num_assistant_tokens == 5
    report, (found,) = run(monkeypatch, parallel_drafting=True, num_assistant_tokens=None)
    assert found.num_assistant_tokens == 4  # the report's own cannot be predicted for it


@pytest.mark.parametrize("name", ENGINES)
def test_the_reported_command_holds_no_path_of_this_machine(tmp_path, monkeypatch, name):
    """Catches a published report that tells where its author keeps models; formats must stay apart by their names."""
    monkeypatch.chdir(tmp_path)
    for file in ("bin/server", "work/target-q8_0.gguf", "work/draft"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    models = {"target": str(tmp_path / "work/target-q8_0.gguf"), "draft": "work/draft"}
    flags = measure._flags(ENGINES[name], replace(PAIR, binary=str(tmp_path / "bin/server"), **models))
    assert str(tmp_path) not in flags
    assert "work" not in flags
    assert "--port" not in flags
    assert all(part in flags for part in ("server ", "target-q8_0.gguf", "draft", "4"))
    assert "org/target" in measure._flags(ENGINES[name], replace(PAIR, target="org/target"))


def served(length, efficiency, target_step, calls, speedup):
    """What vLLM measured, as far as a recommendation depends on it."""
    counts = dict.fromkeys(("num_prompts", "num_rounds", "num_spec_steps"), 1)
    counts |= dict.fromkeys(("num_draft_tokens", "num_accepted_draft_tokens"), 1)
    return EngineResult(
        engine="vllm",
        version="0.32.0",
        decoding=GREEDY,
        num_assistant_tokens=length,
        **counts,
        mean_acceptance_length=efficiency[length],
        draft_acceptance_rate=1.0,
        tokens_per_second=1.0,
        call_seconds=calls,
        target_step_seconds=target_step,
        speedup=speedup,
    )


def test_a_draft_of_which_nothing_was_accepted_is_no_other_model():
    """1.00 [1.00, 1.00] lies apart from a prediction of 1.01 [1.0003, 1.04] only because so little was asked."""
    found = served(4, {4: Estimate(1.0)}, 10e-3, {4: 12e-3}, Estimate(1.0))
    found.version, found.num_spec_steps = ENGINES["vllm"].tested_version, 96
    found.mean_acceptance_length, found.predicted_mean_acceptance_length = (
        Estimate(1, 1, 1),
        Estimate(1.01, 1.0003, 1.04),
    )
    assert not list(measure._notes(ENGINES["vllm"], found))
    found.predicted_mean_acceptance_length = Estimate(1.2, 1.1, 1.3)
    assert "more than their intervals apart" in next(measure._notes(ENGINES["vllm"], found))


def test_the_best_length_follows_from_times_in_the_engine():
    """Calls of 3 + γ: with block efficiency 1 + γ/2 for γ ≤ 3 and 2.5 beyond, γ = 3 is best, by hand 2.5 · 3 ÷ 6."""
    efficiency = {length: Estimate(min(1 + length / 2, 2.5), None, None) for length in range(1, 17)}
    result = served(8, efficiency, 3.0, {1: 4.0, 8: 11.0}, Estimate(0.75, 0.7, 0.8))
    found = recommend_in_engine(result, efficiency)
    assert found.num_assistant_tokens == 3
    assert found.predicted_speedup == pytest.approx(1.25)
    assert found.worth_it
    assert "Worth it by prediction, with 3 draft tokens a step, in vllm" in found.reason
    assert "3 would be best" in found.reason


def test_no_length_is_best_by_times_that_a_busy_machine_took():
    """By steps of 7, 20 and 11 ms a draft of 11 tokens would have been best."""
    efficiency = {length: Estimate(1 + length / 4, None, None) for length in range(1, 17)}
    result = served(4, efficiency, 9.0, {1: 7.0, 4: 20.0, 8: 11.0}, Estimate(1.25, 1.1, 1.4))
    found = recommend_in_engine(result, efficiency)
    assert found.num_assistant_tokens == 4
    assert found.worth_it
    assert "with 1, 4, 8 draft tokens do not grow" in found.reason
