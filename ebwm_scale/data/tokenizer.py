"""Tokenizers: text to numbers and back, from a file of any of these kinds.

    tokenizer.model            SentencePiece, with byte fallback (tools/train_tokenizer.py)
    tokenizer.json             Hugging Face's package tokenizers: GPT-NeoX, Llama 3, Qwen, ...
    cl100k_base.tiktoken       ranks of the package tiktoken
    bytes                      no file: every byte is a token

What a text contains never becomes a special token: "<|endoftext|>" in a document is prose. A
dataset holds a copy of its tokenizer, and everything that reads the dataset opens that copy.
"""

from __future__ import annotations

from pathlib import Path

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable
from ebwm_scale.data.tokenizers.base import Tokenizer, check_text

__all__ = ["Tokenizer", "check_text", "open_tokenizer"]

BYTES = "bytes"  # in the place of a file


def open_tokenizer(path: str | Path, *, eos_id: int | None = None) -> Tokenizer:
    """The tokenizer in a file, or in a folder that holds tokenizer.json or tokenizer.model.

    eos_id: of a dataset that was made with it; else the tokenizer's own. Raises DataError for a
    file that is missing, damaged, of no known kind, or without an end of sequence.
    """
    if str(path) == BYTES:
        from ebwm_scale.data.tokenizers.byte_tokens import ByteTokenizer

        return ByteTokenizer(Path(BYTES))
    path = _in_folder(Path(path))
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{printable(path)}: cannot read the tokenizer: {error.strerror or error}; "
            "make one with tools/train_tokenizer.py"
        ) from None
    # Each kind's package is wanted only where a file of the kind is.
    if content.lstrip()[:1] == b"{":
        from ebwm_scale.data.tokenizers.described import open_described

        return open_described(path, content, eos_id)
    if path.suffix == ".tiktoken" or _are_ranks(content):
        from ebwm_scale.data.tokenizers.tiktoken_ranks import from_ranks

        return from_ranks(path, content)
    from ebwm_scale.data.tokenizers.sentence_piece import SentencePieceTokenizer

    return SentencePieceTokenizer(path)


def _in_folder(path: Path) -> Path:
    if not path.is_dir():
        return path
    for name in ("tokenizer.json", "tokenizer.model"):
        if (path / name).is_file():
            return path / name
    names = sorted(entry.name for entry in path.glob("*token*"))
    also = f" (it has {', '.join(map(printable, names[:5]))})" if names else ""
    raise DataError(
        f"{printable(path)}: a folder without tokenizer.json or tokenizer.model{also}: a tokenizer "
        "that needs code of its own is not run; save it as tokenizer.json"
    )


def _are_ranks(content: bytes) -> bool:
    """Whether a file begins as tiktoken's do: base64, a space, a number."""
    first = content[:4096].partition(b"\n")[0].split(b" ")
    return len(first) == 2 and first[1].strip().isdigit() and first[0].isascii()
