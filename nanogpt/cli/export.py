"""The `export` command: write a checkpoint in a format that other programs read.

Run:    nanogpt export --checkpoint out --format gguf --output my_model.gguf
The formats are in nanogpt/export. What the files say about the run comes from the checkpoint and, if they are
still there, from its metrics.jsonl and its data folder.
"""

from dataclasses import replace
from pathlib import Path

from nanogpt.checkpoint.format import load_checkpoint
from nanogpt.cli.sample import find_checkpoint, training_data
from nanogpt.errors import require
from nanogpt.export.config import ExportConfig
from nanogpt.export.registry import FORMATS, check_fits, check_request, default_dtype, export
from nanogpt.export.source import TrainedModel
from nanogpt.info.curve import evaluations
from nanogpt.machine.device import explain_out_of_memory
from nanogpt.terminal.console import escape_control_characters, late_progress_bar, say
from nanogpt.tokenizer.registry import from_dict


def main(config: ExportConfig) -> int:
    """Export a checkpoint. Returns the exit code."""
    require(
        bool(config.output), "--output is missing: give the file or folder to write, as --output my_model"
    )
    output = Path(config.output)
    check_request(config.format, output, dtype=config.dtype, overwrite=config.overwrite)
    path = find_checkpoint(Path(config.checkpoint), action="Exporting")
    with explain_out_of_memory():
        saved = replace(load_checkpoint(path), optimizers=[])  # most of its size
        source = TrainedModel(
            escape_control_characters(output.name.removesuffix(FORMATS[config.format].suffix)),
            saved,
            from_dict(saved.tokenizer),
            evaluations(path.with_name("metrics.jsonl"), saved.progress),
            training_data(saved),
        )
        check_fits(source, config.format)
        with late_progress_bar("Exporting", source.num_weights) as advance:
            export(
                source,
                config.format,
                output,
                dtype=config.dtype,
                overwrite=config.overwrite,
                advance=advance,
            )
    dtype = config.dtype or default_dtype(config.format)
    say(f"{output}: {source.num_weights:,} parameters in {dtype}, format {config.format}")
    return 0
