"""OpenAPI: the description of the service for programs, made from the classes of its requests.

Example: document()["paths"]["/v1/completions"]
"""

from typing import Any

from pydantic.json_schema import models_json_schema

from nanogpt import __version__
from nanogpt.server.protocol import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    InspectRequest,
    Model,
    TokenizeRequest,
)

JSON, TEXT, HTML, EVENTS = "application/json", "text/plain", "text/html", "text/event-stream"

REQUESTS: dict[str, tuple[type[Model], str, list[str]]] = {
    "/v1/completions": (CompletionRequest, "Continue prompts", [JSON, EVENTS]),
    "/v1/chat/completions": (ChatRequest, "Continue a dialogue", [JSON, EVENTS]),
    "/tokenize": (TokenizeRequest, "The tokens of a text", [JSON]),
    "/inspect": (InspectRequest, "How the model reads a text", [JSON]),
    "/detokenize": (DetokenizeRequest, "The text of tokens", [JSON]),
}
"""Path of a POST -> what it reads, what it does, and what it answers with."""

PAGES = {
    "/": ("The page for a browser", HTML),
    "/v1/models": ("The models that are served", JSON),
    "/v1/models/{name}": ("One of them", JSON),
    "/run": ("The training of the model: settings, curve, kept checkpoints", JSON),
    "/run/events": ("News of the training while it runs", EVENTS),
    "/tokenizer_info": ("The tokenizer", JSON),
    "/health": ("Whether the server answers", JSON),
    "/metrics": ("Metrics for Prometheus", TEXT),
    "/openapi.json": ("This document", JSON),
}
"""Path of a GET -> what it answers, and in which format."""

ERRORS = {
    "400": "The request is impossible; the message says why",
    "401": "The API key is missing or wrong",
    "403": "The Host or the origin is not allowed",
    "404": "There is no such model, or no run",
    "408": "The request did not arrive in time",
    "413": "The request is too long",
    "429": "Too many clients or texts are waiting; Retry-After says when to come again",
    "500": "A text could not be made",
    "503": "The server stops, or there is no checkpoint yet",
    "504": "The text was not finished in time",
}

SCHEMAS = "#/components/schemas/"

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def document() -> dict[str, Any]:
    """The description of the whole service."""
    kinds = [(kind, "validation") for kind, _, _ in REQUESTS.values()]
    _, schemas = models_json_schema(kinds, ref_template=SCHEMAS + "{model}")  # pyright: ignore[reportArgumentType]
    errors = {status: error_response(meaning) for status, meaning in ERRORS.items()}
    paths: dict[str, Any] = {
        path: {
            "post": {
                "summary": summary,
                "requestBody": {
                    "required": True,
                    "content": {JSON: {"schema": {"$ref": SCHEMAS + kind.__name__}}},
                },
                "responses": {"200": success({form: {} for form in forms}), **errors},
            }
        }
        for path, (kind, summary, forms) in REQUESTS.items()
    }
    for path, (summary, form) in PAGES.items():
        more = ("404", "429") if path.startswith(("/run", "/v1/models/")) else ()
        few = {status: errors[status] for status in ("401", "403", "503", *more)}
        paths[path] = {"get": {"summary": summary, "responses": {"200": success({form: {}}), **few}}}
    paths["/run/events"]["get"]["responses"]["204"] = {"description": "No training runs"}
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{name}"]["get"]["parameters"] = [name]
    return {
        "openapi": "3.1.0",
        "info": {"title": "NanoGPT", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": schemas["$defs"] | {"Error": ERROR_SCHEMA},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def success(content: dict[str, Any]) -> dict[str, Any]:
    """An answer in one of some formats."""
    return {"description": "The answer", "content": content}


def error_response(meaning: str) -> dict[str, Any]:
    """An answer with an error."""
    return {"description": meaning, "content": {JSON: {"schema": {"$ref": SCHEMAS + "Error"}}}}
