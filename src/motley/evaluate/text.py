"""Bits per byte of held-out text."""

from functools import partial
from pathlib import Path
from typing import Any

from motley.data.stream import TokenStream
from motley.data.tokenizer import Tokenizer
from motley.model import Transformer
from motley.train.validation import summed_nats, validate

SEQ_LEN = 512


def bits_per_byte(model: Transformer, data: Path, rows: int = 512, confined: bool = False) -> dict[str, Any]:
    """Loss over the first `rows` rows of the held-out part of a folder made by `motley data`.

    confined: attention stays within each document of a row; otherwise it crosses them.

    Bits per byte compare across tokenizers: total nats of all tokens / ln 2 / bytes of the text they stand for.
    """
    stream = TokenStream(data, "valid", min(SEQ_LEN, model.config.max_position_embeddings), shuffle=False)
    result = validate(partial(summed_nats, model, confined=confined), stream, rows, Tokenizer.load(data).token_bytes())
    return {"nats_per_token": result.nats_per_token, "bits_per_byte": result.bits_per_byte, "tokens": result.tokens,
            "bytes": result.bytes, "rows": min(rows, stream.rows_per_epoch),
            "attention": "within documents" if confined else "across documents"}  # fmt: skip
