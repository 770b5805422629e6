"""A vocabulary that was resized: rows carried by token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from warmstart import MapRows


class Tokenizer(Protocol):
    """Anything that knows its tokens: a tokenizer of transformers or of tokenizers."""

    def get_vocab(self) -> Mapping[str, int]: ...


def vocab_map(
    old_tokenizer: Tokenizer,
    new_tokenizer: Tokenizer,
    *,
    new_rows: float | Literal["mean", "keep"] = "mean",
    allow_drop: bool = False,
    freeze_old: bool = False,
) -> MapRows:
    """The adapter that carries embedding rows from one vocabulary to another, each token's row to where it is now.

    It serves the embedding (V, d), an output head (V, d) and its bias (V,). Rows of padding have no token: the model's
    count as new, the checkpoint's as dropped.

    Args:
        old_tokenizer: The checkpoint's.
        new_tokenizer: The model's, added tokens included.
        new_rows: What tokens without an old row get: `"mean"` of the carried rows, `"keep"` their own initialisation, or
            a number.
        allow_drop: Old tokens may be gone.
        freeze_old: Train the new rows only.

    Example::

        model.resize_token_embeddings(len(new))
        WarmStartCallback("bert.safetensors", adapt={"*word_embeddings": vocab_map(old, new)})
    """
    old: dict[str | bytes | int, int] = dict(old_tokenizer.get_vocab().items())
    new: dict[str | bytes | int, int] = dict(new_tokenizer.get_vocab().items())
    return MapRows(old=old, new=new, new_rows=new_rows, allow_drop=allow_drop, freeze_old=freeze_old)
