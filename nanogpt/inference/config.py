"""The settings of sampling: how a token is chosen, and all flags of the `sample` command.

Example: params = SamplingParams(temperature=0.8, top_k=40)
To add a sampling parameter, add a field to SamplingParams: that makes the flag and the keyword of `generate`.
Knows nothing of torch.
"""

from dataclasses import dataclass
from typing import Literal

from nanogpt.config import Dtype, at_least, check_seed
from nanogpt.errors import require
from nanogpt.settings import Settings

UnknownCharacters = Literal["error", "skip"]

MAX_COUNT = 10**9
"""Upper limit of a number of tokens or texts: two weeks of the fastest sampling."""


@dataclass(frozen=True)
class SamplingParams(Settings):
    """How the next token is chosen from the model's logits (inference/sampling.py applies them)."""

    temperature: float = 1.0
    """Higher is more random; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Choose among the k likeliest tokens only."""
    top_p: float | None = None
    """Choose among the likeliest tokens that together reach probability p."""
    context_overlap: int | None = None
    """Tokens that a full context leaves to the next; None: half of it. All of it: a sliding window, slow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.temperature >= 0,
            f"--temperature {self.temperature} is not 0 or a positive number: try 0.8",
        )
        at_least(self, "top_k", 1)
        at_least(self, "context_overlap", 1)
        at_most(self, "top_k", MAX_COUNT)
        require(
            self.top_p is None or 0 < self.top_p <= 1,
            f"--top_p {self.top_p} is outside (0, 1]: try 0.9",
        )


@dataclass(frozen=True)
class SampleConfig(SamplingParams):
    """Generate text from a checkpoint."""

    checkpoint: str = "out/ckpt.pt"
    """The checkpoint to load; everything needed is inside it."""
    prompt: str = "\\n"
    """Text to continue; \\n and \\t are understood."""
    prompt_file: str | None = None
    """File with the text to continue, as it is but for one line break at its end; -: standard input."""
    unknown: UnknownCharacters = "error"
    """What to do with characters of the prompt that the model has never seen: name them, or skip them."""
    num_tokens: int = 500
    """Tokens to generate."""
    num_samples: int = 1
    """How many texts to generate."""
    stop: tuple[str, ...] = ()
    """Stop before this string appears in the generated text; may be given several times."""
    seed: int | None = None
    """Makes the text repeatable; None: another text each time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps."""
    dtype: Dtype = "auto"
    """float32, bfloat16 or float16; auto: as in the training, where the device multiplies that fast."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "num_tokens", 0)
        at_least(self, "num_samples", 1)
        for name in ("num_tokens", "num_samples"):
            at_most(self, name, MAX_COUNT)
        at_least(self, "seed", 0)
        check_seed(self.seed)
        require(bool(self.prompt), '--prompt "" is empty: give at least one character')
        require(
            self.prompt_file is None or self.prompt == SampleConfig.prompt,
            f"--prompt and --prompt_file {self.prompt_file} are two prompts: leave one out",
        )
        require("" not in self.stop, '--stop "" would stop at once: give at least one character')


def at_most(config: object, name: str, most: int) -> None:
    """Raise UserError if the field `name` of `config` is a number above `most` (None passes)."""
    value = getattr(config, name)
    require(
        value is None or value <= most,
        f"--{name} {value} is too large: it must be at most {most:,}",
    )
