"""torch.compile: tried before the clock starts, and done without where it fails.

Example: compile_model(run, forward_backward)           a function of trainer.py, which imports this file
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.compiler import config as compiler_cache

from nanogpt.config import Switch
from nanogpt.distributed import parallelize
from nanogpt.distributed.parallelize import is_sharded
from nanogpt.machine.device import autocast, is_out_of_memory, kind_of
from nanogpt.model.gpt import GPT
from nanogpt.terminal.console import say, warn
from nanogpt.training.run import Run

MIN_COMPILE_OPERATIONS = 1e16
"""FLOPs of a training above which torch.compile saves more time than it takes (bench/RESULTS.md)."""


def pick_compile(switch: Switch, device: torch.device, work: float) -> bool:
    """Whether to use torch.compile. "auto": in a long training on Linux with CUDA.

    work: FLOPs of the whole training.
    """
    if switch == "auto":
        return kind_of(device).compiles_by_default and work >= MIN_COMPILE_OPERATIONS
    return switch == "on"


def compile_model(run: Run, forward_backward: Callable[..., Tensor]) -> None:
    """Compile the loss by computing one gradient, which is thrown away; if that fails, go on without.

    With FSDP each block is compiled separately: between blocks, weights are gathered and freed. Everything is
    compiled here, before the clock starts, for the fixed shapes of the micro-batches.
    """
    set_up_compiler()
    uncompiled = run.loss_fn
    problem = try_compile(run, forward_backward)
    problems = run.world.all_gather([problem] if problem else [])
    if problems:
        warn(f"torch.compile failed, going on without it: {problems[0]}")
        run.loss_fn = uncompiled
    elif is_sharded(run.model):
        for block in run.model.blocks:  # as try_block has, on every process
            block.compile(dynamic=False)
        forward_backward(run)
    parallelize.zero_grad(run.model, run.loss_fn)
    run.kind.release_memory()


def set_up_compiler() -> None:
    """Announce the compilation, and configure torch.compile."""
    import torch._dynamo as dynamo  # takes half a second

    say("Compiling the model (about a minute the first time)...")
    torch.compiler.reset()  # else an earlier training of this process counts towards the recompilation limit
    # PyTorch's cache ignores vector instructions: code made for another processor gives NaN, or crashes.
    compiler_cache.cache_key_tag = torch.backends.cpu.get_cpu_capability()
    if hasattr(dynamo.config, "trace_autograd_ops"):  # else a large vocabulary's loss runs uncompiled
        dynamo.config.trace_autograd_ops = True


def compiled_loss(model: GPT) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a model, compiled at its first call as a training on one device compiles it."""
    set_up_compiler()
    return torch.compile(model.loss, dynamic=False)


def try_compile(run: Run, forward_backward: Callable[..., Tensor]) -> str | None:
    """Compile and run once, without the other processes. Returns the reason for a failure, or None.

    With FSDP no process has all weights, so a new block is compiled and tried instead.
    """
    try:
        if is_sharded(run.model):
            try_block(run)
        else:
            run.loss_fn = torch.compile(run.loss_fn, dynamic=False)
            forward_backward(run, sync=False)
    except Exception as error:  # no C compiler, an unsupported GPU, a bug in the compiler, ...
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return None  # the first update halves its micro-batches
        return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return None


def try_block(run: Run) -> None:
    """Compile the block of a model with one layer and a vocabulary of one; run it forward and backward."""
    model = GPT(replace(run.model.config, n_layer=1, vocab_size=1, ngram_vocab=0)).to(run.device)
    model.blocks[0].compile(dynamic=False)
    idx = torch.zeros(1, run.config.block_size, dtype=torch.int64, device=run.device)
    with autocast(run.device, run.dtype):
        x = model.trunk(idx)
    x.sum().backward()


def recompile(run: Run, forward_backward: Callable[..., Tensor]) -> None:
    """Compile for micro-batches of a new size, without counting the time as training."""
    if not parallelize.is_compiled(run.loss_fn):
        return
    try:
        forward_backward(run, sync=False)
    except RuntimeError as error:
        if not is_out_of_memory(error):  # the next update will handle it
            raise
    parallelize.zero_grad(run.model, run.loss_fn)
    run.clock.restart_lap()
