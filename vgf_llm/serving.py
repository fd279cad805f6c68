"""`vgf serve`: OpenAI-compatible completions by `VGFSampler`, at a budget that every request names for itself.

One thread samples. What waits while it is busy, and agrees with the oldest waiting prompt on budget, particles and length, is
sampled with it in one batch: a prompt's result does not depend on the other prompts of a call, so nobody can tell.

Needs the extra `vgf_llm[serve]`: FastAPI and uvicorn.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import secrets
import socket
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from vgf_llm.flow import TransportBudget
from vgf_llm.text.sampler import Prompt, VGFSampler


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait.

    Attributes:
        body_bytes: size of a request.
        tokens, particles, steps, rounds: upper bounds of what a request sets.
        queue: prompts that wait, over all requests.
        batch: prompts sampled at once.
        seconds: from arrival to answer. What is being sampled is finished nevertheless; what still waits is dropped.
    """

    body_bytes: int = 1_000_000
    tokens: int = 512
    particles: int = 64
    steps: int = 50
    rounds: int = 16
    queue: int = 64
    batch: int = 16
    seconds: float = 300.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"the limit {name} must be positive, got {value}")


class APIError(Exception):
    """An answer other than 200, in the form of OpenAI's."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


# Requests


class _Budget(BaseModel):
    """What both endpoints take. Anything else is refused: a field that is silently ignored misleads."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: int = Field(64, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    seed: int | None = Field(None, ge=0, lt=2**31)
    user: str | None = None
    num_particles: int = Field(8, ge=1)
    steps: int = Field(5, ge=0)
    kl_budget: float = Field(2.0, ge=0, allow_inf_nan=False)
    rounds: int = Field(1, ge=1)


class _Completions(_Budget):
    prompt: str | list[str]


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str


class _Chat(_Budget):
    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)


# Sampling


@dataclass(frozen=True)
class _Settings:
    """Prompts that agree on these are sampled together."""

    num_particles: int
    budget: TransportBudget
    max_completion_length: int


@dataclass(frozen=True)
class _Answer:
    text: str
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    completion_tokens: int
    vgf: dict[str, float]


@dataclass(frozen=True)
class _Job:
    prompt: Prompt
    seed: int
    settings: _Settings
    answer: Future[_Answer]


class Batcher:
    """The queue and the thread that empties it. All use of model and tokenizer is in that thread."""

    def __init__(self, sampler: VGFSampler, limits: Limits) -> None:
        self.sampler, self.limits = sampler, limits
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="vgf-sampler", daemon=True)
        self._thread.start()

    def submit(self, prompts: Sequence[Prompt], seed: int, settings: _Settings) -> list[Future[_Answer]]:
        """One future per prompt.

        Raises:
            APIError: the queue is full (429).
        """
        with self._changed:
            # Those whose time ran out no longer take up room.
            self._waiting = deque(job for job in self._waiting if not job.answer.cancelled())
            if len(self._waiting) + len(prompts) > self.limits.queue:
                raise APIError(429, f"{len(self._waiting)} prompts are waiting already: try again later", "queue_full")
            jobs = [_Job(prompt, seed, settings, Future()) for prompt in prompts]
            self._waiting.extend(jobs)
            self._changed.notify()
        return [job.answer for job in jobs]

    def close(self) -> None:
        """Ends the thread after the batch it works on; what waits is refused."""
        with self._changed:
            self._closed = True
            for job in self._waiting:
                if job.answer.set_running_or_notify_cancel():
                    job.answer.set_exception(APIError(503, "the server is shutting down", "shutting_down"))
            self._changed.notify()
        self._thread.join()

    def _next(self) -> list[_Job] | None:
        """The oldest job and those that agree with it; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            settings = self._waiting[0].settings
            batch = [job for job in self._waiting if job.settings == settings][: self.limits.batch]
            taken = set(map(id, batch))
            self._waiting = deque(job for job in self._waiting if id(job) not in taken)
        return [job for job in batch if job.answer.set_running_or_notify_cancel()]

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            ready = []
            for job in batch:
                try:
                    ready.append((job, len(self.sampler.encode([job.prompt], job.settings.max_completion_length)[0])))
                except (ValueError, TemplateError) as error:
                    # The prompt's number is one within a batch of strangers.
                    message = str(error).replace("prompt 0 has", "the prompt has")
                    job.answer.set_exception(APIError(400, message, param="prompt"))
            self._sample(ready)

    def _sample(self, jobs: list[tuple[_Job, int]]) -> None:
        if not jobs:
            return
        settings = jobs[0][0].settings
        try:
            output = self.sampler.sample(
                [job.prompt for job, _ in jobs],
                settings.num_particles,
                settings.budget,
                settings.max_completion_length,
                [job.seed for job, _ in jobs],
            )
        except Exception as error:
            # Not narrower: whatever it is, somebody waits for the answer and the thread has to go on.
            if len(jobs) > 1:
                for one in jobs:  # a bad prompt must not spoil the others
                    self._sample([one])
                return
            logger.exception("sampling failed")
            jobs[0][0].answer.set_exception(APIError(500, f"sampling failed: {type(error).__name__}", "sampling_failed"))
            return
        kl = torch.cat([output.transported.kl, output.initial.kl], 1).gather(1, output.selected[:, None])[:, 0].tolist()
        best = output.initial.rewards.amax(1).tolist()
        eos = set(self.sampler.eos_ids.tolist())
        for index, (job, prompt_tokens) in enumerate(jobs):
            ids = output.completion_ids[index]
            job.answer.set_result(
                _Answer(
                    text=output.completions[index],
                    finish_reason="stop" if ids[-1] in eos else "length",
                    prompt_tokens=prompt_tokens,
                    completion_tokens=len(ids),
                    vgf={
                        "reward": output.rewards[index].item(),
                        "reward_initial_best": best[index],
                        "kl": kl[index],
                        "generations": output.generations[index].item(),
                        "seed": job.seed,
                    },
                )
            )


# The application


def create_app(sampler: VGFSampler, name: str, limits: Limits | None = None, api_key: str | None = None) -> FastAPI:
    """The web application. docs/serving.md describes its requests and answers.

    Args:
        sampler: what answers.
        name: of the model, as requests have to give it.
        limits: default `Limits()`.
        api_key: what `Authorization: Bearer ...` has to carry. Default None: everybody on this machine is served.
    """
    limits = Limits() if limits is None else limits

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        app.state.batcher = Batcher(sampler, limits)
        yield
        await asyncio.to_thread(app.state.batcher.close)

    app = FastAPI(title="vgf serve", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.middleware("http")
    async def admit(request: Request, go_on: Callable[[Request], Awaitable[Response]]) -> Response:
        if api_key is not None and request.url.path != "/health":
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), api_key.encode()):
                return _error(401, "give the API key of this server: Authorization: Bearer ...", "invalid_api_key")
        if api_key is None and not _is_loopback(request.url.hostname or ""):
            # A page in a browser of this machine can point a name of its own at loopback.
            return _error(403, f"this server answers at loopback only, not as {request.url.hostname}", "wrong_host")
        if request.method == "POST":
            length = request.headers.get("content-length", "")
            if not length.isdecimal():
                return _error(411, "the request does not say how long it is (Content-Length)")
            if int(length) > limits.body_bytes:
                return _error(413, f"the request has {length} bytes, the limit is {limits.body_bytes}", "request_too_large")
        return await go_on(request)

    @app.exception_handler(APIError)
    async def api_error(request: Request, error: APIError) -> Response:
        return _error(error.status, str(error), error.code, error.param)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        param = ".".join(map(str, first["loc"][1:])) or None
        return _error(400, f"{param or 'request'}: {first['msg']}", param=param)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return _error(error.status_code, f"{request.method} {request.url.path}: {error.detail}")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model", "created": 0, "owned_by": "vgf_llm"}]}

    @app.post("/v1/completions")
    async def completions(request: _Completions) -> dict[str, Any]:
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        answers = await answer(request, list(prompts), request.max_tokens)
        choices = [{"text": a.text, "logprobs": None} for a in answers]
        return _body("text_completion", "cmpl", name, answers, choices)

    @app.post("/v1/chat/completions")
    async def chat_completions(request: _Chat) -> dict[str, Any]:
        messages = [message.model_dump() for message in request.messages]
        answers = await answer(request, [messages], request.max_completion_tokens or request.max_tokens)
        choices = [{"message": {"role": "assistant", "content": a.text}, "logprobs": None} for a in answers]
        return _body("chat.completion", "chatcmpl", name, answers, choices)

    async def answer(request: _Budget, prompts: list[Prompt], max_tokens: int) -> list[_Answer]:
        _check(request, len(prompts), max_tokens, name, sampler, limits)
        budget = TransportBudget(steps=request.steps, kl_budget=request.kl_budget, rounds=request.rounds)
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        futures = app.state.batcher.submit(prompts, seed, _Settings(request.num_particles, budget, max_tokens))
        try:
            return await asyncio.wait_for(asyncio.gather(*map(asyncio.wrap_future, futures)), limits.seconds)
        except TimeoutError:
            raise APIError(504, f"no answer within {limits.seconds:g} seconds", "timeout") from None

    return app


def _check(request: _Budget, prompts: int, max_tokens: int, name: str, sampler: VGFSampler, limits: Limits) -> None:
    if request.model != name:
        raise APIError(404, f"the model {request.model!r} is not served here, only {name!r}", "model_not_found", "model")
    for param, value, limit in (
        ("prompt", prompts, limits.queue),
        ("max_tokens", max_tokens, limits.tokens),
        ("num_particles", request.num_particles, limits.particles),
        ("steps", request.steps, limits.steps),
        ("rounds", request.rounds, limits.rounds),
    ):
        if value > limit:
            raise APIError(400, f"{param}: {value} is above the limit of this server, {limit}", param=param)
    if prompts == 0:
        raise APIError(400, "prompt: an empty list", param="prompt")
    # They make the base distribution that all requests share.
    for param, asked, served in (
        ("temperature", request.temperature, sampler.base.temperature),
        ("top_p", request.top_p, sampler.base.top_p),
    ):
        if asked is not None and asked != served:
            raise APIError(400, f"{param}: this server samples at {served}, not at {asked}: leave it out", param=param)


def _body(kind: str, prefix: str, name: str, answers: list[_Answer], choices: list[dict[str, Any]]) -> dict[str, Any]:
    prompt_tokens, completion_tokens = sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers)
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": name,
        "choices": [
            {"index": index, "finish_reason": answer.finish_reason, "vgf": answer.vgf, **choice}
            for index, (answer, choice) in enumerate(zip(answers, choices, strict=True))
        ],
        "usage": {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        },
    }


def _error(status: int, message: str, code: str | None = None, param: str | None = None) -> JSONResponse:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


# The server


def listen(host: str, port: int, api_key: str | None) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises:
        ValueError: a place that others can reach, without a key.
        OSError: the port is in use or not ours to take.
    """
    if api_key is None and not _is_loopback(host):
        raise ValueError(f"{host} can be reached by others: set VGF_API_KEY to the key that requests must carry")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        # Python's own text repeats the address behind that of the system.
        number = getattr(error, "errno", None) or 0
        why = os.strerror(number) if number > 0 else str(error)
        raise OSError(f"cannot listen on {host}, port {port}: {why}") from None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Answers requests until it is interrupted."""
    # Its own words about requests, not uvicorn's lines for each of them.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listening])
