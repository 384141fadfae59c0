"""The server as a process: load the model, listen, watch the checkpoint, and stop without losing an answer.

Run:    nanogpt serve --checkpoint out/ckpt.pt           nanogpt serve --run out, while train.py runs
When a signal asks it to stop, it takes no more connections, lets running requests finish for --grace seconds,
and ends those that are left with an error that says so.
"""

import asyncio
import socket
import sys
from pathlib import Path
from types import FrameType

import uvicorn

from nanogpt.errors import UserError, require
from nanogpt.server.app import Service, create_app
from nanogpt.server.config import LOOPBACK, ServeConfig
from nanogpt.server.connection import Connection
from nanogpt.server.guard import key_of
from nanogpt.server.served import Served, load, newest_stamp
from nanogpt.terminal.console import say, warn

WATCH_SECONDS = 1.0
"""Seconds between two looks at the checkpoint."""

CLOSING = "the server is shutting down"


class Server(uvicorn.Server):
    """uvicorn's server, which tells of a signal that asks it to stop."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.loop = asyncio.get_running_loop()
        self.stopping = asyncio.Event()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Hear of a signal. A second one ends the requests that are left."""
        super().handle_exit(sig, frame)
        self.loop.call_soon_threadsafe(self.stopping.set)


def serve(config: ServeConfig) -> None:
    """Serve until a signal comes. Raises: UserError for a missing checkpoint, or a port that is taken."""
    listener = listen(config)
    try:
        asyncio.run(run(config, listener))
    finally:
        listener.close()


def listen(config: ServeConfig) -> socket.socket:
    """A socket that listens. Raises: UserError if the address or the port cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UserError(f"--host {config.host}: {error.strerror}: give an address of this machine") from error
    listener = socket.socket(family, kind, protocol)
    if sys.platform != "win32":  # there it would let two servers share a port
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen()  # a client that reads the address and connects at once waits, and is not refused
    except OSError as error:
        listener.close()
        raise UserError(
            f"--host {config.host} --port {config.port}: {error.strerror}: give another --port, or 0 for any"
        ) from error
    return listener


async def run(config: ServeConfig, listener: socket.socket) -> None:
    """Serve on a socket until a signal comes."""
    service = Service(config, await first_model(config))
    server = Server(
        uvicorn.Config(
            create_app(service),
            http=Connection,
            ws="none",
            limit_concurrency=config.max_connections + 1,
            log_level="error",  # whatever clients send is no reason to warn of
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=int(config.grace) + 5,
        )
    )
    announce(service, listener)
    tasks = [asyncio.create_task(shut_down(server, service))]
    if config.watch or config.run:
        tasks.append(asyncio.create_task(watch(service)))
    try:
        await server.serve(sockets=[listener])
    finally:
        for task in tasks:
            task.cancel()
        service.close(CLOSING)
        for served in service.models.loaded:
            served.engine.thread.join(config.grace)


async def first_model(config: ServeConfig) -> Served | None:
    """The model to begin with; None if --run has none yet. Raises: UserError if there has to be one."""
    if config.run:
        require(not Path(config.run).is_file(), f"--run {config.run} is a file: give a run folder")
        if newest_stamp(config) == (0, 0):
            return None
    return await asyncio.to_thread(load, config, asyncio.get_running_loop())


def announce(service: Service, listener: socket.socket) -> None:
    """Say what is served, and where."""
    config, served = service.config, service.models.current
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(describe(served) if served else f"Waiting for the first checkpoint in {config.run}")
    say(f"Serving at http://{shown}:{port} (Ctrl-C stops it)")
    if config.host != LOOPBACK and not key_of(config):
        warn("Whoever reaches this address can use the model: give --api_key, or $NANOGPT_API_KEY")


def describe(served: Served) -> str:
    """The line about a model."""
    size, context = served.model.num_parameters(), served.context
    return f"Model: {served.path}, {size:,} parameters, context of {context} tokens, as {served.name!r}"


async def shut_down(server: Server, service: Service) -> None:
    """When a signal has come: give running requests their time, then end them."""
    await server.stopping.wait()
    service.close(CLOSING, finish=True)
    engines = [served.engine for served in service.models.loaded]
    deadline = server.loop.time() + service.config.grace
    while any(engine.thread.is_alive() for engine in engines):
        if server.loop.time() >= deadline or server.force_exit:
            break
        await asyncio.sleep(0.02)
    service.close(CLOSING)


async def watch(service: Service) -> None:
    """Serve the checkpoint anew whenever its file has changed; a damaged one is reported and passed over."""
    passed_over, models = (0, 0), service.models
    while not models.closing:
        await asyncio.sleep(WATCH_SECONDS)
        served, stamp = models.current, await asyncio.to_thread(newest_stamp, service.config)
        if stamp in {served and served.stamp, passed_over, (0, 0)}:
            continue
        try:
            newer = await asyncio.to_thread(load, service.config, asyncio.get_running_loop())
        except (UserError, OSError) as error:
            warn(f"{'Still serving the earlier checkpoint' if served else 'No checkpoint yet'}: {error}")
            passed_over = stamp
            continue
        models.replace(newer)
        say(f"Serving the new {newer.path}" if served else describe(newer))
