"""Servers under load: tokens a second, and how long tokens take, at 1, 16 and 64 clients that stream.

Run:    python bench/server.py                      a model of 10 M parameters after one update; needs data/
        python bench/server.py --clients 1 4 --rounds 1 --requests 1            tries the script
The model is that of the preset qwen3, larger, with characters for tokens, so that tokens are counted by the
letters that arrive, whatever a server says. `nanogpt serve` has it in f32, bf16 and int8, llama.cpp's server
(through xllamacpp) and `transformers serve` (with continuous batching) in f32, exported. Each runs in a
process of its own, one after the other, with as many threads, and is asked for the same texts by the clients,
which have a process of their own too. A client asks for its next text as soon as it has the last one. The
table has the medians of the rounds; a warm-up comes first. Letters that come together are 0 s apart. vLLM is
left out: 336 MB, and CUDA. Adds a row for each round to bench/server.jsonl. Needs the dev extra.
"""

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import common
import llama
import torch
from rich.console import Console
from rich.table import Table

SHAPE = {"preset": "qwen3", "n_layer": 6, "n_head": 6, "n_kv_head": 6, "n_embd": 384, "block_size": 256}
NEW_TOKENS = 128
PROMPT_LENGTHS = (16, 96)
"""Fewest and most tokens of a prompt."""

MOST_CLIENTS = 64
START_SECONDS = 300.0


# --- servers ---


def python(*words: object) -> list[str]:
    """A command in this Python."""
    return [sys.executable, *map(str, words)]


def commands(checkpoint: Path, folder: Path, port: int) -> dict[str, list[str]]:
    """Name of a server -> the command that starts it."""
    served = ("-m", "nanogpt", "serve", "--checkpoint", checkpoint, "--port", port, "--device", "cpu")
    return {
        "nanogpt float32": python(*served, "--dtype", "float32"),
        "nanogpt bfloat16": python(*served, "--dtype", "bfloat16"),
        "nanogpt int8": python(*served, "--dtype", "float32", "--quantize", "int8"),
        "llama.cpp f32": python(__file__, "--serve_gguf", folder / "model.gguf", "--port", port),
        "transformers float32": python(
            *(
                "-m",
                "transformers.cli.transformers",
                "serve",
                folder / "hf",
                "--device",
                "cpu",
                "--port",
                port,
            ),
            *("--continuous-batching", "--cb-block-size", 32, "--cb-num-blocks", MOST_CLIENTS * 8 + 64),
            *("--cb-max-batch-tokens", 1024),
        ),
    }


def serve_gguf(path: str, port: int) -> None:
    """Serve a model with llama.cpp until standard input ends, in this process."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.port = path, port
    params.n_parallel, params.n_gpu_layers = MOST_CLIENTS, 0
    params.n_ctx = int(SHAPE["block_size"]) * MOST_CLIENTS
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    server = xllamacpp.Server(params)
    sys.stdin.read()
    del server
    os._exit(0)  # the destructor of the library aborts


@contextmanager
def running(command: list[str], port: int) -> Generator[str]:
    """A server, once it answers. Yields its address."""
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    try:
        wait_for_answer(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def wait_for_answer(url: str, process: "subprocess.Popen[bytes]") -> None:
    """Wait until a server answers. Raises: RuntimeError if it ends or takes too long."""
    started = time.monotonic()
    while process.poll() is None and time.monotonic() - started < START_SECONDS:
        with suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    raise RuntimeError(f"{process.args} does not answer: run it by hand to see why")


# --- clients ---


def prompts(text: str, count: int, round_number: int) -> list[str]:
    """Parts of a text, others in every round, so that no server has them in its cache."""
    chance = random.Random(1000 * round_number + count)
    starts = chance.sample(range(len(text) - PROMPT_LENGTHS[1]), count)
    return [text[start : start + chance.randint(*PROMPT_LENGTHS)] for start in starts]


async def stream(host: str, port: int, body: dict[str, Any]) -> list[float]:
    """Ask for a text. Returns the times at which it was asked for, and at which each letter came."""
    raw = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    times = [time.perf_counter()]
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(head.encode() + raw)
    async for line in reader:
        if line.startswith(b"data: {"):
            choices = json.loads(line[6:]).get("choices") or [{}]
            times += [time.perf_counter()] * len(choices[0].get("text") or "")
    writer.close()
    return times


async def load(url: str, given: dict[str, Any], clients: int, texts: Sequence[str]) -> dict[str, float]:
    """A round: clients share the texts, and each asks for one after the other. Returns the figures."""
    host, port = url.removeprefix("http://").split(":")

    async def client(number: int) -> list[list[float]]:
        """The times of a client's texts."""
        asked = texts[number::clients]
        return [await stream(host, int(port), {**given, "prompt": text, "seed": number}) for text in asked]

    began = time.perf_counter()
    streams = [times for found in await asyncio.gather(*map(client, range(clients))) for times in found]
    lasted = time.perf_counter() - began
    short = [len(times) - 1 for times in streams if len(times) - 1 != NEW_TOKENS]
    if short:
        raise RuntimeError(
            f"{len(short)} of {len(streams)} texts have not {NEW_TOKENS} tokens, but {short[:5]}"
        )
    first = [times[1] - times[0] for times in streams]
    between = [b - a for times in streams for a, b in pairwise(times[1:])]
    return {
        "tokens_per_s": NEW_TOKENS * len(streams) / lasted,
        **{f"{name}_{key}": value for name, times in (("first", first), ("between", between))
           for key, value in percentiles(times).items()},
    }  # fmt: skip


def percentiles(times: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile, in milliseconds."""
    cuts = quantiles(times, n=100, method="inclusive") if len(times) > 1 else [times[0]] * 99
    return {"p50_ms": 1000 * cuts[49], "p99_ms": 1000 * cuts[98]}


# --- the comparison ---


def plain_sampling(name: str, folder: Path) -> dict[str, Any]:
    """Fields with which a server samples from the model's own probabilities, as each of them has it."""
    if name.startswith("transformers"):
        config = {"do_sample": True, "top_k": 0, "top_p": 1.0}
        return {"model": str(folder / "hf"), "generation_config": json.dumps(config)}
    return {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "ignore_eos": True}


def measure(
    name: str, url: str, options: argparse.Namespace, text: str, folder: Path
) -> list[dict[str, Any]]:
    """The rounds of a server: each with every number of clients, in turn."""
    rows: list[dict[str, Any]] = []
    body = {"max_tokens": NEW_TOKENS, "stream": True, "temperature": 1.0, **plain_sampling(name, folder)}
    for round_number in range(options.rounds + 1):
        for clients in options.clients:
            texts = prompts(text, clients * options.requests, round_number)
            asked = [url, body, clients, texts]
            found = subprocess.run(
                python(__file__, "--load"),
                input=json.dumps(asked),
                capture_output=True,
                text=True,
                check=False,
            )
            if found.returncode:
                raise RuntimeError(f"{name}, {clients} clients: {found.stderr.strip().splitlines()[-1]}")
            if round_number:
                rows.append(
                    {"server": name, "clients": clients, "round": round_number} | json.loads(found.stdout)
                )
                with (common.FOLDER / "server.jsonl").open("a", encoding="utf-8") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    return rows


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The medians of the rounds."""
    columns = ("tokens_per_s", "first_p50_ms", "first_p99_ms", "between_p50_ms", "between_p99_ms")
    heads = ("tokens/s", "first token p50", "p99", "between p50", "p99")
    table = Table("server", "clients", heads[0], "of 1 client", *(f"{head}, ms" for head in heads[1:]))
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["server"], row["clients"]), []).append(row)
    for (name, clients), group in groups.items():
        middle = [median(row[column] for row in group) for column in columns]
        alone = groups.get((name, 1))
        ratio = f"{middle[0] / median(row['tokens_per_s'] for row in alone):.2f}" if alone else ""
        table.add_row(
            name, str(clients), f"{middle[0]:,.0f}", ratio, *(f"{value:,.1f}" for value in middle[1:])
        )
    return table


def prepare(folder: Path, given: Path | None) -> Path:
    """A checkpoint, exported to `folder` for the other servers. Returns its path."""
    path = given or folder / "out" / "last.pt"
    if given is None:
        shape = [word for name, value in SHAPE.items() for word in (f"--{name}", str(value))]
        llama.call("train.py", "--out_dir", f"{folder}/out", *shape, "--max_iters", "1", "--eval_iters", "1")
    for name, output in (("gguf", "model.gguf"), ("hf", "hf")):
        flags = ("--format", name, "--dtype", "f32", "--output", f"{folder}/{output}")
        llama.call("-m", "nanogpt", "export", "--checkpoint", str(path), *flags)
    return path


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="of characters, with a context of 256 or more")
    parser.add_argument(
        "--text", type=Path, default=llama.ROOT / "data" / "input.txt", help="has the prompts"
    )
    parser.add_argument("--servers", nargs="+", default=[""], help="words of the names of those to measure")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--requests", type=int, default=3, help="texts of each client in a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve_gguf", help="used by the script itself, as are the next two")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--load", action="store_true")
    options = parser.parse_args()
    if options.load:
        print(json.dumps(asyncio.run(load(*json.load(sys.stdin)))))
    elif options.serve_gguf:
        serve_gguf(options.serve_gguf, options.port)
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    """Measure one server after the other."""
    console, rows, text = Console(), list[dict[str, Any]](), options.text.read_text("utf-8")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = prepare(folder, options.checkpoint)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for server, command in commands(path, folder, port).items():
            if not any(word in server for word in options.servers):
                continue
            try:
                with running(command, port) as url:
                    rows += measure(server, url, options, text, folder)
            except RuntimeError as error:
                console.print(f"{server}: {error}")
    console.print(table_of(rows))


if __name__ == "__main__":
    main()
