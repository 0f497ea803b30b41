"""A SentencePiece BPE model with byte fallback that gives every text back unchanged.

Nothing is normalised and no space is added in front. Newline and tab are pieces of their own, runs
of spaces can become pieces, and a character outside the vocabulary falls back to its UTF-8 bytes.
End-of-sequence is an own piece that no text can produce; there is no padding id.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable
from ebwm_scale.data.tokenizers.base import Tokenizer, check_text

EOS = "</s>"
# SentencePiece's mark for a space; a text that holds the character itself needs care
_SPACE = "\u2581"
_PART_CHARACTERS = 2**16  # of a long text, encoded at a time
_LONGEST_PART = 2**20  # characters; a text without any safe place is cut here all the same
# Built-in normalisations and the handling of spaces each change something in this.
_PROBE = " a  b \t\r\n\u00a0\u3000ﬁ e\u0301 ½ Ａ "


class SentencePieceTokenizer(Tokenizer):
    """A trained model file. DataError when it is missing, damaged, or has no end piece."""

    kind = "sentencepiece"
    file_name = "tokenizer.model"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
        except OSError as error:
            raise DataError(
                f"{path}: cannot read the tokenizer: {error.strerror or error}; "
                "make one with tools/train_tokenizer.py"
            ) from None
        try:
            if not model:
                raise RuntimeError
            self._processor = load_sentencepiece().SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError):  # ValueError: a message that quotes a damaged piece
            raise DataError(
                f"{path}: not a SentencePiece model, or a damaged one; copy it again, or make one "
                "with tools/train_tokenizer.py"
            ) from None
        self._model = model
        self.vocabulary_size = int(self._processor.vocab_size())
        self.eos_id = int(self._processor.eos_id())
        if self.eos_id < 0:
            raise DataError(
                f"{path}: the model has no end-of-sequence piece, which packing puts after each "
                "document; train one with eos_id set"
            )
        self._pieces = self._read_pieces()
        self._space_bytes = [
            int(self._processor.piece_to_id(f"<0x{byte:02X}>")) for byte in _SPACE.encode("utf-8")
        ]
        self._has_bytes = all(self._processor.is_byte(i) for i in self._space_bytes)

    def _read_pieces(self) -> list[str]:
        """All pieces as SentencePiece writes them; it opens models whose pieces are no text."""
        pieces = []
        for token_id in range(self.vocabulary_size):
            try:
                pieces.append(self._processor.id_to_piece(token_id))
            except UnicodeDecodeError:
                raise DataError(
                    f"{self.path}: piece {token_id} of the tokenizer is not UTF-8: damaged; copy "
                    "it again, or make one with tools/train_tokenizer.py"
                ) from None
        return pieces

    def file_content(self) -> bytes:
        return self._model

    def encode_many(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        for text in texts:
            check_text(text)
        if not self._has_bytes or not any(_SPACE in text for text in texts):
            return self._processor.encode(list(texts), num_threads=num_threads)
        result = []
        for text in texts:
            parts = self._processor.encode(text.split(_SPACE), num_threads=num_threads)
            ids = list(parts[0])
            for part in parts[1:]:
                ids += self._space_bytes + part
            result.append(ids)
        return result

    def parts(self, text: str) -> Iterator[str]:
        """A long text in parts whose tokens, one after the other, are the tokens of the text.

        Encoding takes about 60 times the size of what it is given, so a part is about 65,536
        characters. A cut is exact between two characters that no piece of the vocabulary holds
        side by side: no piece, and no merge on the way to one, could reach across. Where there is
        no such place within 2**20 characters, it is cut there (the text still decodes to itself).
        A model that changes its input, or has no byte pieces, gets every text whole.
        """
        start = 0
        while self._can_cut and len(text) - start > _PART_CHARACTERS:
            end = self._safe_cut(text, start)
            yield text[start:end]
            start = end
        if start < len(text) or not text:
            yield text[start:]

    def _safe_cut(self, text: str, start: int) -> int:
        """Where a part that begins at `start` may end, near _PART_CHARACTERS behind it."""
        near, last = start + _PART_CHARACTERS, min(start + _LONGEST_PART, len(text))
        for place in range(near, start, -1):
            if text[place - 1 : place + 1] not in self._neighbours:
                return place
        for place in range(near + 1, last):
            if text[place - 1 : place + 1] not in self._neighbours:
                return place
        return last

    @functools.cached_property
    def _neighbours(self) -> frozenset[str]:
        """The pairs of characters that stand side by side in some piece that text can give."""
        pairs = set()
        for token_id, piece in enumerate(self._pieces):
            if self._processor.is_byte(token_id) or self._processor.is_control(token_id):
                continue
            text = piece.replace(_SPACE, " ")
            pairs.update(text[i : i + 2] for i in range(len(text) - 1))
        return frozenset(pairs)

    @functools.cached_property
    def _can_cut(self) -> bool:
        """Whether the model takes text as it is, and unknown characters one by one (as bytes)."""
        unchanged = self._processor.normalize(_PROBE) == _PROBE.replace(" ", _SPACE)
        return self._has_bytes and unchanged

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.decode([int(i) for i in ids])

    def piece(self, token_id: int) -> str:
        return printable(self._pieces[int(token_id)].replace(_SPACE, "·"))


def load_sentencepiece():
    try:
        import sentencepiece
    except ImportError:
        raise DataError(
            "the tokenizer needs the package sentencepiece; install it with: python -m pip "
            "install sentencepiece"
        ) from None
    return sentencepiece
