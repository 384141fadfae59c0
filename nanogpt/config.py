"""The settings of the model and of a training: frozen dataclasses, each default written once.

Example: config = TrainConfig(n_layer=4, max_iters=200); replace(config, seed=2)
cli/parse.py turns each field into a flag of the same name; the text under a field is its help. The settings
of other commands are in their packages (data/config.py, inference/config.py, cli/config.py).
Knows nothing of torch, of files, or of how a flag is typed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, TypeVar

from nanogpt.errors import require
from nanogpt.settings import Settings

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Switch = Literal["auto", "on", "off"]
GradCheckpoint = Literal["off", "blocks", "selective"]
ParallelKind = Literal["ddp", "fsdp"]
MicroBatch = int | Literal["auto"]
Norm = Literal["layernorm", "rmsnorm"]
Positions = Literal["learned", "rope"]
MLPKind = Literal["gelu", "gelu_tanh", "relu2", "swiglu"]
OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "trapezoid"]
SINK_NAMES = ("jsonl", "tensorboard", "wandb")
"""Metric sinks that `--log_to` takes (the table SINKS in training/sinks.py)."""


@dataclass(frozen=True)
class Architecture(Settings):
    """The shape of the model: what a checkpoint fixes for good, plus dropout and the attention kernel."""

    block_size: int = 256
    """Context length T, in tokens."""
    n_layer: int = 6
    """Number of transformer blocks."""
    n_head: int = 6
    """Attention heads in each block; must divide n_embd."""
    n_embd: int = 384
    """Width of the model C, the size of a token's vector."""
    dropout: float = 0.2
    """Probability of dropping an activation of a branch or an embedding in training, in [0, 1)."""
    attn_dropout: float = 0.0
    """Probability of dropping an attention weight. 0 keeps attention in its fast kernels."""
    flash_attn: bool = True
    """Fused attention (PyTorch SDPA). Off: the same numbers from plain matrix products, slower."""

    n_kv_head: int | None = None
    """Heads for keys and values, shared by groups of query heads (GQA); None: as many as n_head."""
    norm: Norm = "layernorm"
    """Normalisation: layernorm (GPT-2) or rmsnorm."""
    positions: Positions = "learned"
    """How the model knows where a token is: learned vectors (GPT-2) or rotation (rope)."""
    mlp: MLPKind = "gelu"
    """MLP: gelu, gelu_tanh (GPT-2's approximation of it), relu2 (squared ReLU) or swiglu (gated)."""
    mlp_width: int | None = None
    """Width inside the MLP; None: 4 n_embd, or 8/3 n_embd rounded up to 64 for swiglu, as costly."""
    bias: bool = True
    """Biases in linear layers (GPT-2)."""
    qk_norm: bool = False
    """Normalise queries and keys in each head."""
    tied: bool = True
    """Use the token embedding as the output layer too (GPT-2)."""
    zero_init: bool = False
    """Start every branch at zero, so that the untrained model is its embedding and its head."""
    logit_cap: float = 0.0
    """Squash logits softly into (-cap, cap); 0: not at all."""
    ngram_vocab: int = 0
    """Rows in each table of hashed pairs and triples of tokens, added to the embedding; 0: none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "mlp_width"):
            at_least(self, name, 1)
        for name in ("logit_cap", "ngram_vocab"):
            at_least(self, name, 0)
        kv = self.n_kv_head or self.n_head
        require(
            self.n_head % kv == 0,
            f"--n_kv_head {kv} does not divide --n_head {self.n_head}: try --n_kv_head 1",
        )
        require(
            self.positions == "learned" or (self.n_embd // self.n_head) % 2 == 0,
            f"--positions rope needs heads of even width, not {self.n_embd // self.n_head}: "
            "change --n_head or --n_embd",
        )
        require(
            self.n_embd % self.n_head == 0,
            f"--n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}: "
            f"try --n_embd {max(1, round(self.n_embd / self.n_head)) * self.n_head}",
        )
        for name in ("dropout", "attn_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} {value} is outside [0, 1): try 0.2, or 0 for none")


FREE_FIELDS = ("dropout", "attn_dropout", "flash_attn")
"""Fields of an Architecture that a resumed run may change: the weights mean the same."""

SHAPE_FIELDS = tuple(field.name for field in fields(Architecture) if field.name not in FREE_FIELDS)
"""The fields that say what the weights mean: a resumed run may not change them."""


@dataclass(frozen=True)
class GPTConfig(Architecture):
    """A complete model: the architecture and the size of the vocabulary."""

    vocab_size: int = 65
    """Number of different tokens (65 characters in Tiny Shakespeare)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "vocab_size", 1)


@dataclass(frozen=True)
class TrainConfig(Architecture):
    """Train a GPT on a prepared data folder."""

    preset: str | None = None
    """A complete recipe to start from (`nanogpt presets` lists them); other flags change it."""
    data_dir: str = "data"
    """Folder that `python data.py` prepared."""
    out_dir: str = "out"
    """Folder for checkpoints, metrics and plots."""
    resume: bool = False
    """Continue the run in out_dir exactly where it stopped."""
    overwrite: bool = False
    """Delete the earlier run in out_dir instead of keeping it in out_dir/previous."""

    batch_size: int = 64
    """Sequences in one update, over all its micro-batches."""
    gradient_accumulation_steps: int = 1
    """Micro-batches the batch is cut into, over all processes, to fit in memory; the update is the same."""
    micro_batch: MicroBatch = "auto"
    """Sequences that a process takes at once; auto: as many as fit, found out in the first updates."""
    grad_checkpoint: GradCheckpoint = "off"
    """Compute activations twice instead of keeping them: in whole blocks, or selective, all but products."""
    parallel: ParallelKind = "ddp"
    """What several processes share: the batch, or (fsdp) also weights, gradients and moments."""
    max_iters: int = 5000
    """Number of updates."""
    max_seconds: float | None = None
    """Stop after this much training time, in seconds (evaluation and saving not counted)."""
    optimizer: OptimizerName = "adamw"
    """adamw, or muon: orthogonalised momentum for the matrices of the blocks, AdamW for the rest."""
    learning_rate: float = 3e-4
    """Highest learning rate (of AdamW)."""
    muon_lr: float = 0.02
    """Highest learning rate of Muon."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: cosine, or trapezoid (constant, then a straight line down)."""
    warmup_iters: int = 100
    """Updates of the warm-up: the learning rate rises in equal steps, from 1/warmup_iters of the highest."""
    cooldown: float = 0.4
    """Fraction of the updates in which a trapezoid goes down."""
    min_lr: float = 0.1
    """Learning rate at the end, as a fraction of the highest."""
    weight_decay: float = 0.1
    """Weight decay, on matrices and embeddings alone."""
    beta1: float = 0.9
    """AdamW decay of the first moment."""
    beta2: float = 0.99
    """AdamW decay of the second moment."""
    grad_clip: float = 1.0
    """Largest norm of the whole gradient; 0 for no limit."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights, which is evaluated and sampled in their place; 0: none."""

    eval_interval: int = 250
    """Updates between evaluations."""
    eval_iters: int | None = None
    """Most batches in one evaluation, spread evenly; None for the whole validation split."""
    patience: int | None = None
    """Stop after this many evaluations without a better validation loss; None for never."""
    log_interval: int = 10
    """Updates between lines of metrics."""
    save_seconds: float = 60.0
    """Seconds between saves of last.pt (evaluations and the end save it too)."""
    tensorboard: bool = False
    """Write TensorBoard events under out_dir/runs: the same as `tensorboard` in log_to."""
    log_to: tuple[str, ...] = ("jsonl",)
    """Metric sinks: jsonl (metrics.jsonl, which is always written), tensorboard, wandb; one or several."""

    seed: int = 1337
    """Fixes initial weights, data order and dropout."""
    device: str = "auto"
    """auto, cpu, cuda (NVIDIA, or AMD with ROCm), cuda:1 or mps."""
    dtype: Dtype = "auto"
    """Arithmetic of the matrix products; auto: the fastest that is native to the device."""
    compile: Switch = "auto"
    """torch.compile; auto: on Linux with CUDA."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "gradient_accumulation_steps", "max_iters"):
            at_least(self, name, 1)
        if self.micro_batch != "auto":
            at_least(self, "micro_batch", 1)
        for name in ("eval_interval", "eval_iters", "patience", "log_interval"):
            at_least(self, name, 1)
        for name in ("warmup_iters", "weight_decay", "grad_clip", "seed", "save_seconds"):
            at_least(self, name, 0)
        small_seed(self.seed)
        require(
            not (self.resume and self.overwrite),
            "--overwrite would delete the run that --resume continues: give one of them",
        )
        require(
            self.gradient_accumulation_steps <= self.batch_size,
            f"--gradient_accumulation_steps {self.gradient_accumulation_steps} is more than "
            f"--batch_size {self.batch_size}: a micro-batch holds at least one sequence",
        )
        require(
            self.learning_rate > 0,
            f"--learning_rate {self.learning_rate} is not positive: try 3e-4",
        )
        for name in self.log_to:
            require(name in SINK_NAMES, f"--log_to {name} is unknown: use {', '.join(SINK_NAMES)}")
        require(0 <= self.min_lr <= 1, f"--min_lr {self.min_lr} is outside [0, 1]: try 0.1")
        for name, usual in (("beta1", 0.9), ("beta2", 0.99), ("ema_decay", 0.99)):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} {value} is outside [0, 1): try {usual}")
        require(
            self.max_seconds is None or self.max_seconds > 0,
            f"--max_seconds {self.max_seconds} is not positive: leave it out for no limit",
        )

    @property
    def sinks(self) -> tuple[str, ...]:
        """Metric sinks by name, each once. metrics.jsonl is always one: loss.png is drawn from it."""
        named = ("jsonl", *self.log_to, "tensorboard") if self.tensorboard else ("jsonl", *self.log_to)
        return tuple(dict.fromkeys(named))


def model_config(config: TrainConfig, vocab_size: int) -> GPTConfig:
    """The architecture in `config`, for a vocabulary of `vocab_size`."""
    names = {item.name for item in fields(GPTConfig)} - {"vocab_size"}
    return GPTConfig(**{name: getattr(config, name) for name in names}, vocab_size=vocab_size)


def at_least(config: object, name: str, least: int) -> None:
    """Raise UserError if the field `name` of `config` is a number below `least` (None passes)."""
    value = getattr(config, name)
    require(
        value is None or value >= least,
        f"--{name} {value} is too small: it must be at least {least}",
    )


def small_seed(seed: int | None) -> None:
    """Raise UserError if a seed is too large for the random-number generators."""
    require(seed is None or seed < 2**62, f"--seed {seed} is too large: it must be below 2**62")


Config = TypeVar("Config", GPTConfig, TrainConfig)


def to_dict(config: GPTConfig | TrainConfig) -> dict[str, Any]:
    """The fields as plain types, for a checkpoint."""
    return asdict(config)


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Inverse of to_dict. A field that `values` lacks keeps its default.

    Errors: UserError if `values` has a field that this version does not know.
    """
    unknown = sorted(set(values) - {field.name for field in fields(cls)})
    require(
        not unknown,
        f"the checkpoint was saved by another version of NanoGPT (unknown settings: "
        f"{', '.join(unknown)}): update NanoGPT",
    )
    return cls(**values)
