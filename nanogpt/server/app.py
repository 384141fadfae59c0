"""The HTTP service: paths, and what each answers. `nanogpt serve` runs it.

Example: app = create_app(Service(config, served)); uvicorn.run(app)
Errors have OpenAI's shape. A request whose client has gone, or that takes too long, is cancelled.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nanogpt.server.chat import Chat
from nanogpt.server.completions import Completion
from nanogpt.server.config import ServeConfig
from nanogpt.server.guard import Guard
from nanogpt.server.inspection import inspect
from nanogpt.server.jobs import Job, read_prompt
from nanogpt.server.metrics import CONTENT_TYPE, Metrics
from nanogpt.server.models import Models, unknown_model
from nanogpt.server.openapi import EVENTS, JSON, document
from nanogpt.server.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    InspectRequest,
    TokenizeRequest,
    json_bytes,
    json_response,
    parse,
)
from nanogpt.server.served import Served
from nanogpt.server.training import Training
from nanogpt.server.web import page_at_root
from nanogpt.tokenizer.base import END_OF_TEXT

Result = TypeVar("Result")

BODY_SECONDS = 30.0
"""Seconds in which the body of a request must arrive."""


class Answer(Protocol):
    """A Completion or a Chat."""

    job: Job

    async def whole(self) -> bytes:
        """The answer in JSON, once all texts have ended."""
        ...

    def chunks(self) -> AsyncGenerator[bytes, None]:
        """The answer in chunks of JSON, as it is made."""
        ...


class Service:
    """What the paths answer."""

    def __init__(self, config: ServeConfig, served: Served | None) -> None:
        """served: the model of the checkpoint; None: there is none yet."""
        self.config = config
        self.models = Models(config, served)
        self.training = Training(config, self.models)
        self.metrics = Metrics(lambda: self.models.loaded)

    @property
    def served(self) -> Served:
        """The model of the checkpoint. Raises: ApiError if there is none yet."""
        return self.models.checkpoint()

    def close(self, reason: str, *, finish: bool = False) -> None:
        """Take no more requests, and end the streams of news; see Engine.close."""
        self.models.close(reason, finish=finish)
        self.training.close()

    # --- texts ---

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        given = parse(CompletionRequest, await self.body(request))
        served = await self.models.get(given.model)
        return await self.answer(request, Completion(served, given, self.config), stream=given.stream)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        given = parse(ChatRequest, await self.body(request))
        served = await self.models.get(given.model)
        return await self.answer(request, Chat(served, given, self.config), stream=given.stream)

    async def answer(self, request: Request, answer: Answer, *, stream: bool | None) -> Response:
        """The texts of a request, whole or as a stream."""
        started = time.perf_counter()
        if stream:
            return EventStream(self.events(answer), lambda: self.end(answer.job, started))
        try:
            return Response(await unless_gone(request, answer.whole()), media_type=JSON)
        finally:
            self.end(answer.job, started)

    async def events(self, answer: Answer) -> AsyncIterator[bytes]:
        """The chunks of an answer as server-sent events."""
        try:
            async with aclosing(answer.chunks()) as chunks:
                async for chunk in chunks:
                    yield b"data: " + chunk + b"\n\n"
        except ApiError as error:
            yield b"data: " + json_bytes(error.body) + b"\n\n"
        yield b"data: [DONE]\n\n"

    def end(self, job: Job, started: float) -> None:
        """Free the rows of a request that has ended, however it did."""
        job.end()
        self.metrics.count(job, started, time.perf_counter())

    # --- tokens ---

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize. The text of an end of text, alone, is its token; within a text it is text."""
        given = parse(TokenizeRequest, await self.body(request))
        field, text = ("content", given.content) if given.prompt is None else ("prompt", given.prompt)
        if text is None:
            raise ApiError(400, "prompt or content is missing: give the text", param="prompt")
        tokenizer = self.served.tokenizer
        if text == END_OF_TEXT and tokenizer.end_of_text is not None:
            ids = [tokenizer.end_of_text]
        else:
            ids = read_prompt(self.served, text, whole=False, field=field).ids if text else []
        return json_response({"count": len(ids), "max_model_len": self.served.context, "tokens": ids})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize."""
        given = parse(DetokenizeRequest, await self.body(request))
        prompt = read_prompt(self.served, given.tokens, whole=False, field="tokens") if given.tokens else None
        text = prompt.text if prompt else ""
        return json_response({"prompt": text, "content": text})

    async def inspect(self, request: Request) -> Response:
        """POST /inspect."""
        given = parse(InspectRequest, await self.body(request))
        served = await self.models.get(given.model)
        answer = inspect(served, given, self.config)
        with self.metrics.inspection(served):
            return await unless_gone(request, answer)

    async def tokenizer_info(self, request: Request) -> Response:
        """GET /tokenizer_info."""
        tokenizer = self.served.tokenizer
        end = None if tokenizer.end_of_text is None else END_OF_TEXT
        described = {"tokenizer_class": tokenizer.kind, "vocab_size": tokenizer.vocab_size}
        return json_response(
            described | {"eos_token": end, "bos_token": None, "model_max_length": self.served.context}
        )

    # --- the training ---

    async def run(self, request: Request) -> Response:
        """GET /run."""
        return Response(await self.training.describe(), media_type=JSON)

    async def run_events(self, request: Request) -> Response:
        """GET /run/events. Without a training there is no content: a browser does not come again."""
        if request.method == "HEAD":
            return Response(media_type=EVENTS)
        events = await self.training.events()
        return EventStream(events) if events else Response(status_code=204)

    # --- the server ---

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        found = await asyncio.to_thread(self.models.describe)
        return json_response({"object": "list", "data": found})

    async def show_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = str(request.path_params["name"])
        for model in await asyncio.to_thread(self.models.describe):
            if model["id"] == name:
                return json_response(model)
        raise unknown_model(f"there is no model {name!r}: GET /v1/models names all")

    async def health(self, request: Request) -> Response:
        """GET /health."""
        if self.served.engine.closing:
            raise ApiError(503, self.served.engine.closing)
        return json_response({"status": "ok"})

    async def metrics_page(self, request: Request) -> Response:
        """GET /metrics."""
        return Response(self.metrics.render(), headers={"Content-Type": CONTENT_TYPE})

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json."""
        return json_response(document())

    async def body(self, request: Request) -> bytes:
        """The body of a request. Raises: ApiError if it is too long, or takes too long."""
        most = self.config.max_body
        too_long = ApiError(413, f"the request is longer than this server's limit, {most} bytes")
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > most:
            raise too_long

        async def read() -> bytes:
            """All of it."""
            raw = bytearray()
            async for chunk in request.stream():
                raw += chunk
                if len(raw) > most:
                    raise too_long
            return bytes(raw)

        try:
            return await asyncio.wait_for(read(), BODY_SECONDS)
        except ClientDisconnect as error:
            raise ApiError(499, GONE) from error
        except asyncio.TimeoutError as error:
            raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:g} s") from error

    def routes(self) -> list[Route]:
        """The paths."""
        return [
            Route("/", page_at_root),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name}", self.show_model),
            Route("/run", self.run),
            Route("/run/events", self.run_events),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/inspect", self.inspect, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/health", self.health),
            Route("/metrics", self.metrics_page),
            Route("/openapi.json", self.openapi),
        ]


class EventStream(StreamingResponse):
    """Server-sent events as an answer."""

    media_type = EVENTS

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None] = lambda: None) -> None:
        """end: is called at the end, even where a client had gone before there was anything to send."""
        super().__init__(events, headers={"Cache-Control": "no-store"})
        self.end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.end()


GONE = "the client has gone"
"""The error that nobody hears."""


async def unless_gone(request: Request, work: Awaitable[Result]) -> Result:
    """The result of some work. Raises: ApiError, once the client has gone, who does not hear it."""
    done, gone = asyncio.ensure_future(work), asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ApiError(499, GONE)
        return done.result()
    finally:
        done.cancel()
        gone.cancel()


async def until_gone(request: Request) -> None:
    """Wait until the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def describe_api_error(request: Request, error: Exception) -> Response:
    """An ApiError as an answer."""
    assert isinstance(error, ApiError)
    return error.response()


async def describe_http_error(request: Request, error: Exception) -> Response:
    """An unknown path or method as an answer."""
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
    response.headers.update(error.headers or {})
    return response


async def describe_bug(request: Request, error: Exception) -> Response:
    """A bug as an answer; the traceback is on standard error."""
    return ApiError(500, "the server failed: its log has more").response()


Handler = Callable[[Request, Exception], Awaitable[Response]]

HANDLERS: dict[Any, Handler] = {
    ApiError: describe_api_error,
    HTTPException: describe_http_error,
    Exception: describe_bug,
}
"""Kind of error -> the answer."""


def create_app(service: Service) -> Starlette:
    """The application, for any ASGI server."""
    middleware = [Middleware(Guard, service.config)]
    if service.config.cors:
        allowed = Middleware(
            CORSMiddleware, allow_origins=list(service.config.cors), allow_methods=["*"], allow_headers=["*"]
        )
        middleware.insert(0, allowed)
    return Starlette(routes=service.routes(), middleware=middleware, exception_handlers=HANDLERS)
