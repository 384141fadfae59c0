"""Upgrade the content of checkpoints in older formats to the current one.

Example: content = upgrade(torch.load(path, weights_only=True)); Checkpoint(**content)
Each function upgrades by one format, so a new format needs one more function. tests/test_golden.py has files
of every format. Nothing is validated here: malformed content stays as it is.
"""

from collections.abc import Mapping
from typing import Any, cast

from nanogpt.checkpoint import sharded


def upgrade(content: dict[str, Any]) -> dict[str, Any]:
    """Upgrade the content of a checkpoint from an older format to the current one.

    Format 1 has no EMA, only GPT-2's approximation of GELU, and in its first files one optimizer and no seal.
    Format 2 has other field names and, in its first files, no shards.
    Format 3 has GPT-2's names for the weights (wte, ln_f).
    Format 4 has hashed rows for pairs of tokens, and AdamW for the n-gram tables.
    """
    if content["format"] == 1 and isinstance(content.get("config"), dict):
        content = from_format_1(content)
    if content["format"] == 2:
        content = from_format_2(content)
    if content["format"] == 3:
        content = from_format_3(content)
    return from_format_4(content) if content["format"] == 4 else content


def from_format_1(content: Mapping[str, Any]) -> dict[str, Any]:
    """Upgrade the content of a checkpoint from format 1 to format 2."""
    content = {"average": {}, **content, "format": 2}
    if "optimizer" in content:
        content["optimizers"] = [content.pop("optimizer")]
    settings: dict[str, Any] = content["config"]
    approximate = settings.get("mlp", "gelu") == "gelu"
    content["config"] = {**settings, "mlp": "gelu_tanh"} if approximate else settings
    return content


FORMAT_2_NAMES = {"arithmetic": "precision", "parts": "shards"}
FORMAT_2_PROGRESS = {"order": "shuffle_id", "broken": "bad_steps", "broken_at": "furthest_bad_step"}


def from_format_2(content: Mapping[str, Any]) -> dict[str, Any]:
    """Upgrade the content of a checkpoint from format 2 to format 3. Malformed values stay as they are."""
    content = {FORMAT_2_NAMES.get(name, name): value for name, value in content.items()}
    content = {"shards": {}, **content, "format": 3}
    progress, precision = content.get("progress"), content.get("precision")
    if isinstance(progress, dict):
        items = cast(dict[str, Any], progress).items()
        content["progress"] = {FORMAT_2_PROGRESS.get(name, name): value for name, value in items}
    if isinstance(precision, dict):
        renamed = dict(cast(dict[str, Any], precision))
        count = renamed.pop("pieces", "")  # format 2 saved this number as a string
        if isinstance(count, str) and count.isdecimal():
            renamed["num_micro_batches"] = int(count)
        content["precision"] = renamed
    return content


def from_format_3(content: Mapping[str, Any]) -> dict[str, Any]:
    """Upgrade the content of a checkpoint from format 3 to format 4. Malformed values stay as they are."""
    content = {**content, "format": 4}
    for key in ("model", "average"):
        weights = content.get(key)
        if isinstance(weights, dict):
            items = cast(dict[object, Any], weights).items()
            content[key] = {
                sharded.current_name(name) if isinstance(name, str) else name: weight
                for name, weight in items
            }
    return content


def from_format_4(content: Mapping[str, Any]) -> dict[str, Any]:
    """Upgrade the content of a checkpoint from format 4 to format 5. Malformed values stay as they are."""
    settings: Any = content.get("config")
    if isinstance(settings, dict):
        settings = {**cast(dict[Any, Any], settings), "ngram_pairs": "hashed"}
    return {**content, "config": settings, "format": 5}
