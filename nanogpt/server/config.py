"""The settings of the `serve` command.

This file knows nothing of torch, of HTTP, or of how flags are parsed.
"""

from dataclasses import dataclass

from nanogpt.config import Dtype, at_least
from nanogpt.errors import require
from nanogpt.inference.config import Quantization
from nanogpt.settings import Settings

LOOPBACK = "127.0.0.1"
"""The address that only programs on this machine reach."""

MAX_PORT = 65535


@dataclass(frozen=True)
class ServeConfig(Settings):
    """Serve a checkpoint over HTTP, to clients of the OpenAI API."""

    checkpoint: str = "out/ckpt.pt"
    """The checkpoint to serve; everything needed is inside it."""
    run: str | None = None
    """Run folder to serve instead, while train.py writes there: its first checkpoint and all that follow."""
    name: str | None = None
    """Name of the model in the API; None: that of the checkpoint's folder."""
    host: str = LOOPBACK
    """Address to listen on; 0.0.0.0: all of this machine's, so that other machines reach the server."""
    port: int = 8000
    """Port to listen on; 0: any that is free."""
    api_key: str | None = None
    """Key that clients must send (Authorization: Bearer KEY); None: $NANOGPT_API_KEY, else none."""
    allowed_hosts: tuple[str, ...] = ()
    """Name by which clients call this machine, besides localhost; may be given several times."""
    cors: tuple[str, ...] = ()
    """Origin whose web pages may call the server, as https://example.org; may be given several times."""
    watch: bool = False
    """Load the checkpoint again when the file changes, between requests."""
    rows: int = 64
    """Most texts that grow at the same time; each has a row of the KV cache."""
    max_queue: int = 256
    """Most texts that may wait for a row; further requests get 429."""
    max_connections: int = 512
    """Most connections at the same time; further ones get 503."""
    max_tokens: int = 4096
    """Most tokens that a request may ask for, for each of its texts."""
    max_texts: int = 64
    """Most texts that a request may ask for: prompts times n, or times best_of."""
    max_body: int = 1_000_000
    """Most bytes of a request."""
    deadline: float = 600.0
    """Seconds after which a request that is not finished ends with an error."""
    grace: float = 10.0
    """Seconds that running requests have to finish when the server stops."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: Dtype = "auto"
    """float32, bfloat16 or float16; auto: as in the training, where the device multiplies that fast."""
    quantize: Quantization = "none"
    """int8: weights of 8 bits, which are read faster and lose a little quality."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "port", 0)
        require(self.port <= MAX_PORT, f"--port {self.port} is too large: ports end at {MAX_PORT}")
        for name in ("rows", "max_connections", "max_tokens", "max_texts", "max_body"):
            at_least(self, name, 1)
        require(self.deadline > 0, f"--deadline {self.deadline:g} is too small: try 600")
        require(self.grace >= 0, f"--grace {self.grace:g} is negative: try 10")
        require(
            self.max_queue >= self.max_texts,
            f"--max_queue {self.max_queue} is less than --max_texts {self.max_texts}",
        )
        require(
            self.api_key is None or self.api_key.strip() != "",
            '--api_key "" is empty: leave it out, or give a key',
        )
        require(self.run != "", '--run "" is empty: give a run folder, as --run out')
        require(
            self.run is None or self.checkpoint == ServeConfig.checkpoint,
            f"--run {self.run} serves the checkpoints of that run: leave out --checkpoint {self.checkpoint}",
        )
        require(self.name != "", '--name "" is empty: leave it out, or give a name')
