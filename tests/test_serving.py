"""`vgf serve`, asked by OpenAI's own client, gives what the sampler gives, and says clearly what it does not."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import openai
import pytest

from tests import tiny
from vgf_llm import TransportBudget, VGFSampler, cli
from vgf_llm.serving import Limits, create_app, listen
from vgf_llm.text.field import fit_field


PROMPT = "the food was"
MESSAGES = [{"role": "user", "content": "the staff were"}]
SMALL = {"num_particles": 3, "steps": 2}


def make_sampler(chat=True, **options):
    ours = tiny.tokenizer(chat=chat)
    eos, pad = ours.eos_token_id, ours.pad_token_id
    model = tiny.language_model("llama", len(ours), eos=eos, pad=pad)
    return VGFSampler(model, tiny.reward_model("llama", len(ours), pad=pad), ours, flow_batch_size=8, **options)


@contextmanager
def running(sampler, limits=None, api_key=None):
    """A client of a server in a thread; no retries, so that every answer is seen."""
    import uvicorn

    listening = listen("127.0.0.1", 0, api_key)
    config = uvicorn.Config(create_app(sampler, "tiny", limits, api_key), log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
    with openai.OpenAI(base_url=url, api_key=api_key or "none", max_retries=0, timeout=60) as client:
        yield client
    server.should_exit = True
    thread.join()
    listening.close()


@pytest.fixture
def command(saved):
    return ["serve", "--model", str(saved["lm"]), "--reward-model", str(saved["reward"])]


@pytest.fixture(scope="module")
def sampler():
    return make_sampler()


@pytest.fixture(scope="module")
def client(sampler):
    with running(sampler, Limits(tokens=16, particles=8, steps=6, rounds=2, queue=32, body_bytes=2000)) as client:
        yield client


def complete(client, prompt=PROMPT, **options):
    extra = {**SMALL, **options.pop("extra_body", {})}
    return client.completions.create(**{"model": "tiny", "prompt": prompt, "max_tokens": 8, "extra_body": extra, **options})


def expected(sampler, prompt, seed, steps=2, kl_budget=2.0, rounds=1):
    budget = TransportBudget(steps=steps, kl_budget=kl_budget, rounds=rounds)
    return sampler.sample([prompt], 3, budget, max_completion_length=8, seed=seed)


# Answers


@pytest.mark.parametrize("budget", [{"steps": 0}, {"steps": 3, "kl_budget": 4.0, "rounds": 2}], ids=["zero", "large"])
def test_a_completion_is_the_samplers(client, sampler, budget):
    answer = complete(client, seed=5, extra_body=budget)
    output = expected(sampler, PROMPT, 5, **budget)
    (choice,) = answer.choices
    assert choice.text == output.completions[0]
    assert choice.vgf["reward"] == pytest.approx(output.rewards.item(), abs=1e-5)
    assert choice.vgf["reward_initial_best"] == pytest.approx(output.initial.rewards.max().item(), abs=1e-5)
    assert choice.vgf["seed"] == 5
    assert (choice.vgf["kl"] == 0) or budget["steps"] > 0
    ids = output.completion_ids[0]
    assert choice.finish_reason == ("stop" if ids[-1] == sampler.processing_class.eos_token_id else "length")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, len(ids))
    assert (answer.object, answer.model) == ("text_completion", "tiny")


def test_a_chat_completion_is_the_samplers(client, sampler):
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_completion_tokens=8, seed=7, extra_body={"num_particles": 3, "steps": 2}
    )
    assert answer.choices[0].message.content == expected(sampler, MESSAGES, 7).completions[0]
    assert answer.choices[0].message.role == "assistant"
    assert answer.object == "chat.completion"


def test_several_prompts_are_several_choices(client, sampler):
    answer = complete(client, [PROMPT, "a room"], seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert [choice.text for choice in answer.choices] == [expected(sampler, p, 1).completions[0] for p in (PROMPT, "a room")]


def test_without_a_seed_the_answer_names_the_one_it_took(client):
    first, second = complete(client), complete(client)
    seed = first.choices[0].vgf["seed"]
    assert seed != second.choices[0].vgf["seed"]
    assert complete(client, seed=seed).choices[0].text == first.choices[0].text


def test_along_a_learned_gradient_too(sampler):
    field = fit_field(sampler, [PROMPT, "a room"] * 2, num_samples=64, max_completion_length=8, epochs=4, learning_rate=3e-3)
    steered = make_sampler(gradient_field=field)
    with running(steered) as client:
        answers = complete(client, [PROMPT, "a room"], seed=1, extra_body={"kl_budget": 4.0}).choices
        zero = complete(client, seed=1, extra_body={"steps": 0}).choices[0]
    for choice, prompt in zip(answers, (PROMPT, "a room"), strict=True):
        output = expected(steered, prompt, 1, kl_budget=4.0)
        assert choice.text == output.completions[0]
        assert choice.vgf["reward"] == pytest.approx(choice.vgf["reward_initial_best"])
        assert 0 < choice.vgf["kl"] <= 4 * (1 + 1e-5)
    assert (zero.text, zero.vgf["kl"]) == (expected(sampler, PROMPT, 1, steps=0).completions[0], 0)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_requests_that_agree_share_a_batch_and_nobody_can_tell(monkeypatch):
    sampler = make_sampler()
    asked = [(prompt, seed, steps) for seed in range(3) for prompt in (PROMPT, "a room") for steps in (1, 2)]
    alone = [expected(sampler, prompt, seed, steps).completions[0] for prompt, seed, steps in asked]
    sizes, sample, gate = [], sampler.sample, threading.Event()

    def slow(prompts, *args):
        gate.wait(30)
        sizes.append(len(prompts))
        return sample(prompts, *args)

    monkeypatch.setattr(sampler, "sample", slow)
    with running(sampler, Limits(batch=4)) as client, ThreadPoolExecutor(len(asked)) as pool:
        waiting = [pool.submit(complete, client, p, seed=s, extra_body={"steps": steps}) for p, s, steps in asked]
        time.sleep(1)  # all have arrived
        gate.set()
        together = [future.result().choices[0].text for future in waiting]
    assert together == alone
    assert sum(sizes) == len(asked)
    assert 4 == max(sizes)


# Refusals


def refused(status, call, says):
    with pytest.raises(openai.APIStatusError) as error:
        call()
    assert error.value.status_code == status
    body = error.value.response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert says in body["error"]["message"]
    assert "\n" not in body["error"]["message"]
    return body["error"]


@pytest.mark.parametrize(
    ("status", "options", "says"),
    [
        (404, {"model": "gpt"}, "'gpt' is not served"),
        (400, {"prompt": []}, "empty list"),
        (400, {"prompt": ""}, "has no tokens"),
        (400, {"prompt": "food " * 41}, "the prompt has 41 tokens"),
        (400, {"prompt": ["a room"] * 33}, "prompt: 33 is above the limit of this server, 32"),
        (413, {"prompt": "a room " * 500}, "the limit is 2000"),
        (400, {"max_tokens": 17}, "max_tokens: 17 is above"),
        (400, {"max_tokens": 0}, "max_tokens"),
        (400, {"temperature": 0.5}, "samples at 1.0, not at 0.5"),
        (400, {"top_p": 0.5}, "top_p"),
        (400, {"n": 2}, "n: "),
        (400, {"stream": True}, "stream: "),
        (400, {"stop": "x"}, "stop: "),
        (400, {"seed": -1}, "seed: "),
        (400, {"extra_body": {"num_particles": 9}}, "num_particles: 9 is above"),
        (400, {"extra_body": {"num_particles": 0}}, "num_particles: "),
        (400, {"extra_body": {"steps": 7}}, "steps: 7 is above"),
        (400, {"extra_body": {"rounds": 3}}, "rounds: 3 is above"),
        (400, {"extra_body": {"kl_budget": -1}}, "kl_budget: "),
        (400, {"extra_body": {"kl_bugdet": 1}}, "kl_bugdet: "),
    ],
)
def test_requests_that_are_refused(client, status, options, says):
    error = refused(status, lambda: complete(client, **options), says)
    assert error["type"] == "invalid_request_error"


def test_bodies_that_are_none(client):
    url = str(client.base_url)
    for content, says in (
        ("{", "JSON"),
        ("[]", "dictionary"),
        ('{"model": "tiny", "prompt": "a", "kl_budget": NaN}', "kl_budget"),
    ):
        answer = httpx.post(url + "completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400
        assert says in answer.json()["error"]["message"]
    assert httpx.post(url + "completions", content=iter([b"{}"])).status_code == 411
    assert httpx.get(url + "nonsense").json()["error"]["message"] == "GET /v1/nonsense: Not Found"
    assert httpx.get(url + "completions").status_code == 405


def test_a_tokenizer_without_a_chat_template():
    with running(make_sampler(chat=False)) as client:
        refused(400, lambda: client.chat.completions.create(model="tiny", messages=MESSAGES), "chat_template")
        assert complete(client).choices  # and the server lives on


def test_one_failure_spoils_nobody_else(monkeypatch):
    sampler = make_sampler()
    sample = sampler.sample

    def fragile(prompts, *args):
        if "bad" in prompts:
            raise ValueError("the reward of a completion is nan")
        return sample(prompts, *args)

    monkeypatch.setattr(sampler, "sample", fragile)
    with running(sampler) as client, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(complete, client, prompt, seed=2) for prompt in (PROMPT, "bad", "a room")]
        good, _, fine = (future.exception() for future in waiting)
        assert good is None
        assert fine is None
        error = refused(500, waiting[1].result, "sampling failed")
    assert error["type"] == "server_error"
    assert "nan" not in error["message"]  # what happens inside is for the log


def test_a_full_queue_and_a_long_wait(monkeypatch):
    sampler = make_sampler()
    sample, gate, started = sampler.sample, threading.Event(), threading.Event()

    def stuck(*args):
        started.set()
        gate.wait(30)
        return sample(*args)

    monkeypatch.setattr(sampler, "sample", stuck)
    with running(sampler, Limits(queue=2, seconds=2.0)) as client, ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(complete, client)]
        assert started.wait(30)
        waiting += [pool.submit(complete, client, [PROMPT, PROMPT])]
        time.sleep(0.5)
        assert refused(429, lambda: complete(client), "2 prompts are waiting")["code"] == "queue_full"
        for future in waiting:
            assert refused(504, future.result, "no answer within 2 seconds")["code"] == "timeout"
        gate.set()
        # Those whose time ran out have left the queue.
        assert len(complete(client, [PROMPT, PROMPT]).choices) == 2


def test_the_api_key():
    with running(make_sampler(), api_key="secret") as client:
        assert complete(client).choices
        stranger = client.with_options(api_key="secrets")
        assert refused(401, lambda: complete(stranger), "API key")["code"] == "invalid_api_key"
        url = str(client.base_url)
        assert httpx.get(url + "models").status_code == 401
        assert httpx.get(url.removesuffix("v1/") + "health").json() == {"status": "ok"}


def test_without_a_key_other_names_of_this_machine_are_refused(client):
    answer = httpx.get(f"{client.base_url}models", headers={"host": "example.org"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "wrong_host")


def test_a_form_of_a_web_page_is_no_request(client):
    body = '{"model": "tiny", "prompt": "a"}'
    answer = httpx.post(f"{client.base_url}completions", content=body, headers={"content-type": "text/plain"})
    assert answer.status_code == 400


def test_limits_must_be_positive(command, capsys):
    assert cli.main([*command, "--queue", "0"]) == 2
    assert capsys.readouterr().err == "vgf: error: the limit queue must be positive, got 0\n"


# The command


def test_beyond_loopback_a_key_is_needed(command, monkeypatch, capsys):
    monkeypatch.delenv("VGF_API_KEY", raising=False)
    for host in ("0.0.0.0", "", "::", "example.org"):
        assert cli.main([*command, "--host", host, "--port", "0"]) == 2
        assert "set VGF_API_KEY" in capsys.readouterr().err
    listen("0.0.0.0", 0, "secret").close()


def test_a_port_in_use_is_one_line(command, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main([*command, "--port", str(port)]) == 2
    assert capsys.readouterr().err == f"vgf: error: cannot listen on 127.0.0.1, port {port}: Address already in use\n"
    assert cli.main([*command, "--port", "70000"]) == 2
    assert "cannot listen on 127.0.0.1, port 70000" in capsys.readouterr().err


def test_without_the_extra_the_command_names_it(command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "vgf_llm.serving")
    assert cli.main(command) == 2
    assert capsys.readouterr().err == "vgf: error: vgf serve needs fastapi: pip install 'vgf_llm[serve]'\n"


def test_the_command_serves_until_it_is_interrupted(command):
    # A test run in the background of a shell ignores Ctrl-C, and so would everything it starts.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "vgf_llm", *command, "--port", "0", "--model-name", "tiny"],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "VGF_API_KEY": "secret"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        name, url = process.stdout.readline().split(" at ")
        assert name == "tiny"
        with openai.OpenAI(base_url=url.strip(), api_key="secret", timeout=60) as client:
            assert complete(client, seed=1).choices[0].vgf["seed"] == 1
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "vgf: interrupted"
    assert "Traceback" not in errors
