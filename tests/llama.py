"""llama.cpp in a process of its own, since it ends with an abort: JSON lines in, JSON lines out.

Run:     python tests/llama.py model.gguf       {"route": "/tokenize", "body": {"content": "hello"}}
Example: with Llama(path) as llama: llama.ask("/tokenize", content="hello")["tokens"]
"""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

from typing_extensions import Self

CONTEXT = 256


class Llama:
    """A server of llama.cpp with a model. It computes in f32, but for GELU, which is a table in f16."""

    def __init__(self, model: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(30)

    def ask(self, route: str, **body: Any) -> dict[str, Any]:
        """The answer to a request."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"route": route, "body": body}).encode() + b"\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "llama.cpp has ended"
        return json.loads(answer)

    def encode(self, text: str) -> list[int]:
        """The ids of a text. What spells a special token is text."""
        return self.ask("/tokenize", content=text, parse_special=False)["tokens"]

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        return self.ask("/detokenize", tokens=ids)["content"]

    def continue_greedily(self, ids: list[int], count: int, **options: Any) -> dict[str, Any]:
        """The likeliest token after another: tokens, content, stop_type."""
        return self.ask(
            "/completion",
            prompt=ids,
            n_predict=count,
            temperature=0,
            samplers=["temperature"],
            return_tokens=True,
            cache_prompt=False,
            **options,
        )


def serve(model: str) -> None:
    """Answer requests on standard input until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the library prints on standard output, too
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.n_gpu_layers, params.warmup = CONTEXT, 1, 0, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED  # f16
    server = xllamacpp.Server(params)  # it stops when it is collected
    for line in sys.stdin:
        asked = json.loads(line)
        request = urllib.request.Request(
            server.listening_address + asked["route"],
            json.dumps(asked["body"]).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            print(json.dumps(json.load(response)), file=answers, flush=True)


if __name__ == "__main__":
    try:
        serve(sys.argv[1])
    finally:
        os._exit(0)  # the destructor of the library aborts
