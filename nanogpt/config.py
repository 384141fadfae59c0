"""GPTConfig and TrainConfig: the settings of a model and of its training, each default written once.

Example: config = TrainConfig(n_layer=4, max_iters=200); replace(config, seed=2)
cli/parse.py turns each field into a flag of the same name; the text under a field is the help of its flag.
The settings of other commands are in their packages (data/config.py, inference/config.py, cli/config.py).
This file knows nothing of torch, of files, or of how flags are parsed.
"""

from collections.abc import Mapping, Sequence
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
NgramPairs = Literal["exact", "hashed"]
OptimizerName = Literal["adamw", "muon"]
Schedule = Literal["cosine", "trapezoid", "constant"]
SINK_NAMES = ("jsonl", "tensorboard", "wandb")
"""Names of the metric sinks, as `--log_to` takes them (the table SINKS in training/sinks.py)."""
MIN_KEPT = 3
"""Least number of kept checkpoints: the first, the best and the newest."""


@dataclass(frozen=True)
class Architecture(Settings):
    """The shape of the model, which a checkpoint fixes for good, plus dropout and the attention kernel."""

    block_size: int = 256
    """Context length T, in tokens."""
    n_layer: int = 6
    """Number of transformer blocks."""
    n_head: int = 6
    """Attention heads in each block; must divide n_embd, unless head_dim is given."""
    n_embd: int = 384
    """Embedding dimension C: the size of a token's vector."""
    dropout: float = 0.2
    """Dropout probability of embeddings and of the outputs of attention and MLP, in [0, 1)."""
    attn_dropout: float = 0.0
    """Dropout probability of attention weights, in [0, 1); above 0, attention is slower."""
    flash_attn: bool = True
    """Use Flash Attention (PyTorch SDPA); off: plain matrix products, which compute the same but slower."""

    n_kv_head: int | None = None
    """Key-value heads, each shared by a group of query heads (GQA); None: as many as n_head."""
    head_dim: int | None = None
    """Width of an attention head; None: n_embd / n_head."""
    norm: Norm = "layernorm"
    """Normalization: layernorm (GPT-2) or rmsnorm."""
    positions: Positions = "learned"
    """Position embedding: learned (GPT-2) or rope (rotary)."""
    rope_base: float = 10_000.0
    """RoPE's base, at least 1: the larger, the slower its slowest rotations, for longer contexts."""
    mlp: MLPKind = "gelu"
    """Activation of the MLP: gelu, gelu_tanh (as in GPT-2), relu2 (squared ReLU) or swiglu (gated)."""
    mlp_width: int | None = None
    """Hidden dimension of the MLP; None: 4 n_embd, or for swiglu 8/3 n_embd, which costs about the same."""
    bias: bool = True
    """Use biases in linear layers and layer norms (GPT-2)."""
    qk_norm: bool = False
    """Normalize queries and keys in each head."""
    tied: bool = True
    """Use the token embedding as the output layer too: weight tying (GPT-2)."""
    zero_init: bool = False
    """Initialize the last matrix of every attention and MLP, and an untied output layer, to zero."""
    logit_cap: float = 0.0
    """Limit logits smoothly to (-cap, cap), with tanh; 0: no limit."""
    ngram_vocab: int = 0
    """Rows in each of two embedding tables, for pairs and triples of tokens (n-grams); 0: no tables."""
    ngram_pairs: NgramPairs = "exact"
    """Give each pair of tokens its own row, if ngram_vocab is enough for all; hashed: as earlier versions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("block_size", "n_layer", "n_head", "n_embd", "n_kv_head", "head_dim", "mlp_width"):
            at_least(self, name, 1)
        at_least(self, "rope_base", 1)
        for name in ("logit_cap", "ngram_vocab"):
            at_least(self, name, 0)
        kv = self.n_kv_head or self.n_head
        require(
            self.n_head % kv == 0,
            f"--n_kv_head {kv} does not divide --n_head {self.n_head}: try --n_kv_head 1",
        )
        require(
            self.positions == "learned" or self.head_width % 2 == 0,
            f"--positions rope needs heads of even width, not {self.head_width}: "
            f"change {'--n_head or --n_embd' if self.head_dim is None else '--head_dim'}",
        )
        require(
            self.head_dim is not None or self.n_embd % self.n_head == 0,
            f"--n_embd {self.n_embd} is not a multiple of --n_head {self.n_head}: "
            f"try --n_embd {max(1, round(self.n_embd / self.n_head)) * self.n_head}",
        )
        for name in ("dropout", "attn_dropout"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} {value} is outside [0, 1): try 0.2, or 0 for none")

    @property
    def head_width(self) -> int:
        """Width D of an attention head."""
        return self.head_dim or self.n_embd // self.n_head


FREE_FIELDS = ("dropout", "attn_dropout", "flash_attn")
"""Fields of Architecture that a resumed run may change, since the weights mean the same with any value."""

SHAPE_FIELDS = tuple(field.name for field in fields(Architecture) if field.name not in FREE_FIELDS)
"""Fields of Architecture that decide what the weights mean; a resumed run may not change them."""


@dataclass(frozen=True)
class GPTConfig(Architecture):
    """The configuration of a model: its architecture and the size of its vocabulary."""

    vocab_size: int = 65
    """Number of different tokens (65 characters in Tiny Shakespeare)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, "vocab_size", 1)


@dataclass(frozen=True)
class TrainConfig(Architecture):
    """Train a GPT on a prepared data folder.

    --minutes 5 fits everything to your machine and text, --preset NAME takes a proven configuration, and
    --resume continues a run. docs/training.md explains every flag.
    """

    preset: str | None = None
    """Named configuration to start from (`nanogpt presets` lists them); other flags override its values."""
    data_dir: str = "data"
    """Data folder, prepared by `python data.py`."""
    out_dir: str = "out"
    """Run folder, for checkpoints, metrics and plots."""
    resume: bool = False
    """Continue the run in out_dir exactly where it stopped."""
    overwrite: bool = False
    """Delete the earlier run in out_dir instead of keeping it in out_dir/previous."""

    init_from: str | None = None
    """Start from a trained model: a checkpoint, a transformers or litgpt folder, a Hugging Face name."""
    lora_rank: int = 0
    """Train only adapters of this rank beside the linear layers of the blocks (LoRA); 0: all weights."""
    lora_alpha: float | None = None
    """Scale of the adapters' outputs, times their rank; None: 2 lora_rank."""
    lora_dropout: float = 0.0
    """Dropout probability of the adapters' inputs, in [0, 1)."""

    minutes: float | None = None
    """Choose the model and its training so that everything is done in this time on this machine."""
    fixed: tuple[str, ...] = ()
    """Names of settings that --minutes must not change, besides those of the given flags."""

    batch_size: int = 64
    """Sequences in one update, over all micro-batches and processes."""
    gradient_accumulation_steps: int = 1
    """Micro-batches in one update, over all processes: more of them need less memory for the same update."""
    micro_batch: MicroBatch = "auto"
    """Sequences in a micro-batch; auto: batch_size / gradient_accumulation_steps, or fewer to fit memory."""
    grad_checkpoint: GradCheckpoint = "off"
    """Recompute activations instead of keeping them: in blocks, or in all but matrix products (selective)."""
    parallel: ParallelKind = "ddp"
    """Split the batch over processes (ddp), or also shard weights, gradients and optimizer state (fsdp)."""
    max_iters: int = 5000
    """Number of updates."""
    max_seconds: float | None = None
    """Stop after this many seconds of training; evaluation and saving do not count."""
    optimizer: OptimizerName = "adamw"
    """adamw, or muon (orthogonalized momentum) for the matrices in the blocks and AdamW for the rest."""
    learning_rate: float = 3e-4
    """Maximum learning rate of AdamW."""
    muon_lr: float = 0.02
    """Maximum learning rate of Muon."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up: cosine, trapezoid (constant, then linear decay) or constant."""
    warmup_iters: int = 100
    """Updates of linear warm-up; the first has 1/warmup_iters of the maximum learning rate."""
    cooldown: float = 0.4
    """Fraction of the updates in which the learning rate of a trapezoid decays."""
    min_lr: float = 0.1
    """Minimum learning rate, at the end, as a fraction of the maximum."""
    decays: tuple[str, ...] = ()
    """Linear decays of a constant learning rate, START:END in updates; each replaces the rest of the last."""
    weight_decay: float = 0.1
    """Weight decay of matrices and embeddings; biases and norms have none."""
    beta1: float = 0.9
    """AdamW: decay of the first moment."""
    beta2: float = 0.99
    """AdamW: decay of the second moment."""
    grad_clip: float = 1.0
    """Maximum norm of the gradient over all parameters; 0: no clipping."""
    ema_decay: float = 0.0
    """Decay of the moving average of the weights (EMA) that is evaluated and sampled instead; 0: no EMA."""

    eval_interval: int = 250
    """Updates between evaluations."""
    eval_iters: int | None = None
    """Maximum number of batches in an evaluation, spread evenly; None: the full validation split."""
    patience: int | None = None
    """Stop after this many evaluations in a row without a better validation loss; None: never."""
    log_interval: int = 10
    """Updates between log lines."""
    save_seconds: float = 60.0
    """Seconds between saves of last.pt, or up to ten times that if saving is slow; 0: after every update."""
    keep_checkpoints: int = 0
    """Number of evaluated models to keep in out_dir/checkpoints, spread over the training; 0: none."""
    tensorboard: bool = False
    """Write TensorBoard events to out_dir/runs: the same as --log_to tensorboard."""
    log_to: tuple[str, ...] = ("jsonl",)
    """Metric sinks, one or several: jsonl (metrics.jsonl, which is always written), tensorboard, wandb."""

    seed: int = 1337
    """Seed of the initial weights, the data order and dropout."""
    device: str = "auto"
    """auto, cpu, cuda (NVIDIA, or AMD with ROCm), cuda:1 or mps."""
    dtype: Dtype = "auto"
    """Data type of matrix products; auto: one that is fast on this device."""
    compile: Switch = "auto"
    """Use torch.compile; auto: for long runs on Linux with CUDA or ROCm."""
    cuda_graph: Switch = "auto"
    """Capture the update as a CUDA graph, launched as one; auto: for small models on one NVIDIA GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("batch_size", "gradient_accumulation_steps", "max_iters"):
            at_least(self, name, 1)
        if self.micro_batch != "auto":
            at_least(self, "micro_batch", 1)
        for name in ("eval_interval", "eval_iters", "patience", "log_interval"):
            at_least(self, name, 1)
        for name in ("warmup_iters", "weight_decay", "grad_clip", "seed", "save_seconds", "lora_rank"):
            at_least(self, name, 0)
        at_least(self, "keep_checkpoints", 0)
        require(
            self.keep_checkpoints == 0 or self.keep_checkpoints >= MIN_KEPT,
            f"--keep_checkpoints {self.keep_checkpoints} is too few: the first, the best and the newest are "
            f"always among them, so give {MIN_KEPT} or more",
        )
        check_fine_tuning(self)
        check_seed(self.seed)
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
        require(self.minutes is None or self.minutes > 0, f"--minutes {self.minutes} is not positive: try 5")
        names = {item.name for item in fields(self)}
        for name in self.fixed:
            require(name in names, f"--fixed {name} is no setting: give names as n_layer")
        decay_spans(self.decays)
        for name, usual in (("beta1", 0.9), ("beta2", 0.99), ("ema_decay", 0.99)):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} {value} is outside [0, 1): try {usual}")
        require(
            self.max_seconds is None or self.max_seconds > 0,
            f"--max_seconds {self.max_seconds} is not positive: leave it out for no limit",
        )

    @property
    def sinks(self) -> tuple[str, ...]:
        """Names of the metric sinks, each once; jsonl is always among them: loss.png is drawn from it."""
        named = ("jsonl", *self.log_to, "tensorboard") if self.tensorboard else ("jsonl", *self.log_to)
        return tuple(dict.fromkeys(named))


def check_fine_tuning(config: TrainConfig) -> None:
    """Check --init_from and the flags of LoRA. Raises: UserError."""
    alpha, dropout = config.lora_alpha, config.lora_dropout
    require(
        not (config.init_from and config.minutes),
        "--minutes chooses a model, and --init_from has one: give --max_seconds instead",
    )
    require(
        not config.lora_rank or config.init_from is not None,
        f"--lora_rank {config.lora_rank} trains beside weights that stay as they are: give --init_from",
    )
    for name in ("lora_alpha", "lora_dropout"):
        require(
            bool(config.lora_rank) or not getattr(config, name),
            f"--{name} {getattr(config, name)} is for LoRA: give --lora_rank too, as 8",
        )
    require(alpha is None or alpha > 0, f"--lora_alpha {alpha} is not positive: try 2 lora_rank")
    require(0 <= dropout < 1, f"--lora_dropout {dropout} is outside [0, 1): try 0.05, or 0 for none")


def model_config(config: Architecture, vocab_size: int) -> GPTConfig:
    """The GPTConfig with the architecture of `config`, such as a TrainConfig, and this vocabulary."""
    shape = {item.name: getattr(config, item.name) for item in fields(Architecture)}
    return GPTConfig(**shape, vocab_size=vocab_size)


def decay_spans(decays: Sequence[str]) -> list[tuple[int, int]]:
    """The first and the last step of each decay of the learning rate. Raises: UserError if one is none."""
    spans: list[tuple[int, int]] = []
    for text in decays:
        start, _, end = text.partition(":")
        valid = start.isdecimal() and end.isdecimal() and int(start) < int(end)
        require(valid, f"--decays {text} is no decay: give its first and last update, as 300:1000")
        spans.append((int(start), int(end)))
    require(spans == sorted(spans), f"--decays {' '.join(decays)} are not in the order of their beginnings")
    return spans


def at_least(config: object, name: str, least: int) -> None:
    """Raise UserError if the field `name` of `config` is a number below `least` (None passes)."""
    value = getattr(config, name)
    require(
        value is None or value >= least,
        f"--{name} {value} is too small: it must be at least {least}",
    )


def check_seed(seed: int | None) -> None:
    """Raise UserError if a seed is too large for the random-number generators."""
    require(seed is None or seed < 2**62, f"--seed {seed} is too large: it must be below 2**62")


Config = TypeVar("Config", GPTConfig, TrainConfig)


def to_dict(config: GPTConfig | TrainConfig) -> dict[str, Any]:
    """Convert a config to a dictionary of plain types, for a checkpoint."""
    return asdict(config)


def from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    """Convert a dictionary of to_dict back to a config. A field that `values` lacks keeps its default.

    Raises: UserError if `values` has a field that this version does not know.
    """
    unknown = sorted(set(values) - {field.name for field in fields(cls)})
    require(
        not unknown,
        f"the checkpoint was saved by another version of NanoGPT (unknown settings: "
        f"{', '.join(unknown)}): update NanoGPT",
    )
    return cls(**values)
