"""The `presets` command: a table of the purpose, size, measured loss and time of each preset.

Run:    nanogpt presets
"""

from rich.table import Table

from nanogpt.cli.config import PresetsConfig
from nanogpt.config import model_config
from nanogpt.console import say, terminal
from nanogpt.model.gpt import meta_model
from nanogpt.presets import MEASURED_ON, PRESETS


def main(_: PresetsConfig) -> int:
    """Print the table. Returns the exit code."""
    table = Table("preset", "layers", "context", "parameters", "steps", "loss", "training", box=None)
    for name, preset in PRESETS.items():
        config = preset.make()
        parameters = meta_model(model_config(config, preset.vocab_size)).num_parameters()
        table.add_row(
            name,
            f"{config.n_layer} x {config.n_embd}",
            f"{config.block_size:,}",
            f"{parameters / 1e6:,.1f} M",
            f"{config.max_iters:,} x {config.batch_size * config.block_size:,}",
            preset.measured.loss if preset.measured else "-",
            preset.measured.time if preset.measured else "-",
        )
    terminal().print(table)
    say()
    for name, preset in PRESETS.items():
        say(f"  {name:12} {preset.purpose}")
    say()
    say("steps: updates x tokens in each. loss: nats a character over Tiny Shakespeare's whole")
    say(f"validation split. training: time in updates on {MEASURED_ON}.")
    say("-: not measured yet.")
    say("Use one with: nanogpt train --preset NAME (other flags change what it says)")
    return 0
