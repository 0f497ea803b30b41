"""What all kinds of tokenizers have in common."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable

FORMAT = "ebwm_tokenizer"  # the key of our own descriptions, with the name of the kind
# Normalisations, the handling of spaces and missing characters each change something in this.
PROBE = " a  b \t\r\n\n\u00a0\u3000ﬁ e\u0301 ½ Ａ İ ß\u200b 日本 \U0001f600 1234 don't  \x00\x7f\n "


class Tokenizer(ABC):
    """vocabulary_size: ids are below it; a model may have no use for some. eos_id: what stands
    behind each document. path: the file it was read from. file_name: of the copy in a dataset.
    """

    kind: str
    file_name: str
    path: Path
    vocabulary_size: int
    eos_id: int

    @abstractmethod
    def encode_many(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        """The token ids of each text, without special tokens; the threads change the time only."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens; bytes that are no UTF-8 as U+FFFD."""

    @abstractmethod
    def piece(self, token_id: int) -> str:
        """How a token looks, in printable characters, for example "·the" or "\\n"."""

    @abstractmethod
    def file_content(self) -> bytes:
        """The file that a dataset holds, from which the tokenizer can be opened again."""

    @property
    def sha256(self) -> str:
        """Of that file, hex."""
        return hashlib.sha256(self.file_content()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The token ids of a text, without an end-of-sequence id."""
        return self.encode_many([text])[0]

    def parts(self, text: str) -> Iterator[str]:
        """A long text in parts whose tokens, one after the other, are the tokens of the text."""
        yield text

    def is_lossless(self, text: str = PROBE) -> bool:
        """Whether a text comes back from its tokens as it was."""
        return self.decode(self.encode(text)) == text


def check_text(text: str, what: str = "the text") -> None:
    """DataError for a text that UTF-8 cannot write, as a byte that is not UTF-8 leaves behind."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        before = printable(text[max(error.start - 20, 0) : error.start])
        raise DataError(
            f"{what} is not UTF-8 at character {error.start} (after {before!r}): give it as UTF-8"
        ) from None
