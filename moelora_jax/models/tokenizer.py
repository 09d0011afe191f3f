"""Reads the tokenizer of a checkpoint folder."""

from pathlib import Path

from tokenizers import Tokenizer

from moelora_jax.errors import CheckpointError


def read_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, or None if it has none.

    Raises:
        CheckpointError: its file is damaged.
    """
    path = folder / "tokenizer.json"
    if not path.exists():
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as cause:  # The package raises Exception itself.
        raise CheckpointError(f"{path}: not a readable tokenizer: {cause}") from cause
