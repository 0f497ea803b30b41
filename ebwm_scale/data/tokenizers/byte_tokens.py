"""Every byte of UTF-8 is a token; 256 is the end of sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ebwm_scale.core.plain_text import printable
from ebwm_scale.core.strict_json import canonical_json
from ebwm_scale.data.tokenizers.base import FORMAT, Tokenizer, check_text

_PART_CHARACTERS = 2**18


class ByteTokenizer(Tokenizer):
    """257 tokens, nothing to learn, and nothing that could be lost."""

    kind = "bytes"
    vocabulary_size = 257
    eos_id = 256
    file_name = "tokenizer.bytes.json"

    def __init__(self, path: Path):
        self.path = path

    def file_content(self) -> bytes:
        return canonical_json({FORMAT: self.kind}) + b"\n"

    def encode_many(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        for text in texts:
            check_text(text)
        return [list(text.encode("utf-8")) for text in texts]

    def parts(self, text: str) -> Iterator[str]:
        for start in range(0, max(len(text), 1), _PART_CHARACTERS):
            yield text[start : start + _PART_CHARACTERS]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(int(i) for i in ids if int(i) < 256).decode("utf-8", "replace")

    def piece(self, token_id: int) -> str:
        if token_id >= 256:
            return "<end>"
        if token_id == 32:
            return "·"
        if token_id < 128:
            return printable(chr(token_id))
        return f"<0x{token_id:02X}>"
