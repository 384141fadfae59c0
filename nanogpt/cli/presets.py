"""The `presets` command: print a table of the presets: size, measured loss and time, purpose.

Run:    nanogpt presets
"""

from rich.table import Table

from nanogpt.cli.config import PresetsConfig
from nanogpt.config import model_config
from nanogpt.model.size import meta_model
from nanogpt.presets import MEASURED_ON, PRESETS
from nanogpt.terminal.console import say, terminal


def main(_: PresetsConfig) -> int:
    """Print a table of the presets. Returns the exit code."""
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
    say("steps: updates x tokens in each. loss: nats per character over the full validation split of")
    say(f"Tiny Shakespeare. training: time of the updates on {MEASURED_ON}. -: not measured.")
    say("Use a preset with: nanogpt train --preset NAME (other flags override its values)")
    return 0
