"""Tokenizers whose file is JSON: Hugging Face's, and our own descriptions of bytes and ranks."""

from __future__ import annotations

import json
from pathlib import Path

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable, shown
from ebwm_scale.data.tokenizers.base import FORMAT, Tokenizer


def open_described(path: Path, content: bytes, eos_id: int | None) -> Tokenizer:
    """The tokenizer that a JSON file describes; DataError for what describes none."""
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        raise DataError(
            f"{printable(path)}: begins as JSON and is none: damaged; copy the tokenizer again"
        ) from None
    kind = values.get(FORMAT)
    if kind == "bytes":
        from ebwm_scale.data.tokenizers.byte_tokens import ByteTokenizer

        return ByteTokenizer(path)
    if kind == "tiktoken":
        from ebwm_scale.data.tokenizers.tiktoken_ranks import from_description

        return from_description(path, values)
    if kind is not None:
        raise DataError(
            f"{printable(path)}: a tokenizer of the kind {shown(kind)}; this release knows bytes "
            "and tiktoken"
        )
    from ebwm_scale.data.tokenizers.hugging_face import HuggingFaceTokenizer

    return HuggingFaceTokenizer(path, content, values, eos_id)
