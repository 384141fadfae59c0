"""Whether memory is counted as a GPU allocates it. Skipped where there is none (conftest.py)."""

from dataclasses import replace

import pytest
import torch

from nanogpt.config import TrainConfig, model_config
from nanogpt.distributed import parallelize
from nanogpt.machine import device
from nanogpt.model.gpt import GPT
from nanogpt.training import memory_estimate
from nanogpt.training.optimizer import build_optimizers

CONFIG = TrainConfig(n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=8, dropout=0.1)


def measured(config: TrainConfig, vocab_size: int, place: torch.device) -> int:
    """Bytes at the peak of two updates of two micro-batches, without what was there before."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = GPT(model_config(config, vocab_size)).to(place)
    parallelize.checkpoint_activations(model, config.grad_checkpoint)
    optimizers = build_optimizers(model, config, torch.bfloat16)
    x, y = torch.randint(vocab_size, (2, config.batch_size, config.block_size), device=place)
    for _ in range(2):
        for _ in range(2):
            with device.autocast(place, torch.bfloat16):
                loss = model.loss(x, y)
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("mode", ["off", "selective", "blocks"])
@pytest.mark.parametrize("vocab_size", [65, 50_304])
def test_what_is_predicted_is_what_is_allocated(gpu_alone, mode, vocab_size):
    config = replace(CONFIG, grad_checkpoint=mode)
    model = model_config(config, vocab_size)
    predicted = memory_estimate.predict(model, config, gpu_alone, torch.bfloat16, config.batch_size).total
    assert predicted == pytest.approx(measured(config, vocab_size, gpu_alone), rel=0.1)
    with device.simulated(device.KINDS["cuda"]):  # a plan for a GPU, made where there is none
        cpu = torch.device("cpu")
        elsewhere = memory_estimate.predict(model, config, cpu, torch.bfloat16, config.batch_size).total
    assert elsewhere == pytest.approx(predicted, rel=0.1)
