"""A judge is asked in both positions, once, and what it says is kept; a command, an endpoint, and how they fail."""

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vgf_llm.evaluation.judge import Comparison, JudgeDown, command_judge, endpoint_judge, judge, verdict


def longer(prompt, a, b):
    return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"


PAIRS = [Comparison("p", "long answer", "short"), Comparison("p", "no", "much better"), Comparison("p", "same", "same")]


def test_both_positions_have_to_agree(tmp_path):
    found = judge(PAIRS, longer, tmp_path / "log.jsonl", name="longer", progress=False)
    assert found.scores == [1.0, 0.0, 0.5]
    assert found.first == 0.5 and found.unanswered == 0
    always_first = judge(PAIRS, lambda p, a, b: "A", tmp_path / "first.jsonl", name="first", progress=False)
    assert always_first.scores == [0.5, 0.5, 0.5]
    assert always_first.first == 1.0


def test_equal_answers_are_not_asked_about(tmp_path):
    def never(*question):
        raise AssertionError

    assert judge(PAIRS[2:], never, tmp_path / "log.jsonl", name="n", progress=False).scores == [0.5]


def test_an_answer_is_asked_for_once_ever(tmp_path):
    asked, log = [], tmp_path / "log.jsonl"

    def ask(*question):
        asked.append(question)
        return longer(*question)

    first = judge(PAIRS[:1], ask, log, name="j", progress=False)
    assert len(asked) == 2
    assert judge(PAIRS, ask, log, name="j", progress=False).scores[:1] == first.scores
    assert len(asked) == 4 == len(set(asked)) == len(log.read_text().splitlines())
    judge(PAIRS[:1], ask, log, name="another judge", progress=False)
    assert len(asked) == 6


def test_a_killed_run_goes_on(tmp_path):
    log, asked = tmp_path / "log.jsonl", []

    def down_after_three(*question):
        asked.append(question)
        if len(asked) > 3:
            raise JudgeDown("no answer")
        return longer(*question)

    with pytest.raises(JudgeDown, match="no answer.*log.jsonl.*run the same again"):
        judge(PAIRS, down_after_three, log, name="j", workers=1, progress=False)
    assert len(log.read_text().splitlines()) == 3
    log.write_text(log.read_text() + '{"key": "half a li', encoding="utf-8")  # killed while it wrote
    asked.clear()
    assert judge(PAIRS, lambda *q: asked.append(q) or longer(*q), log, name="j", progress=False).scores == [1.0, 0.0, 0.5]
    assert len(asked) == 1
    assert len([json.loads(line) for line in log.read_text().splitlines()]) == 4


def test_a_file_that_is_no_log(tmp_path):
    (tmp_path / "log.jsonl").write_text("hello\n", encoding="utf-8")
    with pytest.raises(ValueError, match="line 1 is no answer of a judge"):
        judge(PAIRS, longer, tmp_path / "log.jsonl", name="j", progress=False)


def test_nonsense_is_asked_again_so_often_and_then_counted(tmp_path):
    asked = []

    def nonsense(prompt, a, b):
        asked.append((a, b))
        return "I would rather not say" if a == "no" else longer(prompt, a, b)

    found = judge(PAIRS, nonsense, tmp_path / "log.jsonl", name="j", retries=2, progress=False)
    assert found.scores == [1.0, None, 0.5]
    assert found.unanswered == 1
    assert asked.count(("no", "much better")) == 3


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("A", "A"), (" b.\n", "B"), ("**Tie**", "tie"), ("Answer: A", "A"), ('"B"', "B"),
        ("", None), ("A or B", None), ("neither", None), ("Apple", None),
    ],
)  # fmt: skip
def test_what_counts_as_an_answer(said, meant):
    assert verdict(said) == meant


def test_a_command_is_run_without_a_shell(tmp_path):
    program = "import json, sys; d = json.load(sys.stdin); print('A' if len(d['a']) > len(d['b']) else 'B')"
    ask = command_judge([sys.executable, "-c", program])
    pairs = [Comparison("$(touch x) `id` 'ü'", "a longer; answer", "short")]
    assert judge(pairs, ask, tmp_path / "log.jsonl", name="c", progress=False).scores == [1.0]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([sys.executable, "-c", "import sys; sys.exit('out of memory')"], "exited with 1: out of memory"),
        ([sys.executable, "-c", "import time; time.sleep(60)"], "timed out"),
    ],
)
def test_a_command_that_fails(tmp_path, argv, says):
    with pytest.raises(JudgeDown, match=says):
        judge(PAIRS, command_judge(argv, timeout=1.0), tmp_path / "log.jsonl", name="c", progress=False)


def test_no_such_command():
    with pytest.raises(ValueError, match="no program 'no-such-program'"):
        command_judge(["no-such-program"])


@pytest.fixture
def endpoint():
    """An OpenAI-compatible endpoint that prefers the longer answer; its address and what it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(body)
            text = body["messages"][0]["content"]
            a, b = text.split("[Answer A]\n")[1].split('\n\nSay "A"')[0].split("\n\n[Answer B]\n")
            message = {"role": "assistant", "content": longer("", a, b)}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            answer = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
            data = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint_judges(endpoint, tmp_path):
    url, asked = endpoint
    found = judge(PAIRS, endpoint_judge(url, "m"), tmp_path / "log.jsonl", name="e", progress=False)
    assert found.scores == [1.0, 0.0, 0.5]
    assert len(asked) == 4
    assert {body["model"] for body in asked} == {"m"} and {body["temperature"] for body in asked} == {0.0}


def test_an_endpoint_that_is_down(tmp_path):
    ask = endpoint_judge("http://127.0.0.1:9/v1", "m", timeout=1.0)
    with pytest.raises(JudgeDown, match="judge endpoint http://127.0.0.1:9/v1.*run the same again"):
        judge(PAIRS[:1], ask, tmp_path / "log.jsonl", name="e", progress=False)
