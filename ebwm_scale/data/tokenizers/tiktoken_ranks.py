"""Ranks of the package tiktoken, from a local file; nothing is downloaded.

    cl100k_base.tiktoken   a public encoding: pattern and special tokens are the package's, and the
                           file must be the one it knows by its hash
    qwen.json              any other: {"ebwm_tokenizer": "tiktoken", "ranks": "qwen.tiktoken",
                           "pattern": "...", "special_tokens": {"<|endoftext|>": 151643},
                           "eos_token": "<|endoftext|>"}

A dataset holds the second form with the ranks in it, so that it needs no other file.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable, shorten, shown
from ebwm_scale.core.strict_json import canonical_json
from ebwm_scale.data.tokenizers.base import FORMAT, Tokenizer, check_text

_EOS = ("<|endoftext|>", "<|end_of_text|>")


class TiktokenTokenizer(Tokenizer):
    """ranks: {bytes of a token: id}. special: {name: id}, of which eos is one."""

    kind = "tiktoken"
    file_name = "tokenizer.tiktoken.json"

    def __init__(
        self, path: Path, ranks: dict[bytes, int], pattern: str, special: dict[str, int], eos: str
    ):
        self.path = path
        self._ranks, self._pattern, self._special, self._eos = ranks, pattern, special, eos
        try:
            self._encoding = _package(path).Encoding(
                path.stem, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
        except Exception as error:  # noqa: BLE001 (its Rust part raises what it likes)
            raise DataError(
                f"{printable(path)}: no encoding that tiktoken takes ({shorten(str(error))}); mend "
                "its pattern or ranks"
            ) from None
        self.vocabulary_size = int(self._encoding.max_token_value) + 1
        self.eos_id = special[eos]

    def file_content(self) -> bytes:
        """The description with all ranks in it, in the order of their ids."""
        ordered = sorted(self._ranks.items(), key=lambda item: item[1])
        return canonical_json(
            {
                FORMAT: self.kind,
                "eos_token": self._eos,
                "pattern": self._pattern,
                "ranks": [[base64.b64encode(token).decode(), rank] for token, rank in ordered],
                "special_tokens": self._special,
            }
        )

    def encode_many(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        for text in texts:
            check_text(text)
        if num_threads > 1 and len(texts) > 1:
            return self._encoding.encode_ordinary_batch(list(texts), num_threads=num_threads)
        return [self._encoding.encode_ordinary(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        special = set(self._special.values())
        kept = [int(i) for i in ids if int(i) not in special]
        try:
            return self._encoding.decode(kept, errors="replace")
        except (KeyError, OverflowError):
            raise DataError(
                f"{printable(self.path)}: has no token for one of the ids {shown(kept)}"
            ) from None

    def piece(self, token_id: int) -> str:
        try:
            content = self._encoding.decode_single_token_bytes(int(token_id))
        except KeyError:
            return f"<{token_id}>"  # a number between the ranks and the special tokens
        try:
            return printable(content.decode("utf-8").replace(" ", "·"))
        except UnicodeDecodeError:
            return "".join(f"<0x{byte:02X}>" for byte in content)


def from_ranks(path: Path, content: bytes) -> TiktokenTokenizer:
    """A public encoding, known by the name of its file; DataError for another one."""
    _package(path)
    name = path.name.partition(".")[0]
    try:
        import tiktoken_ext.openai_public as public

        constructor = public.ENCODING_CONSTRUCTORS[name]
    except (ImportError, KeyError):
        raise DataError(
            f"{printable(path)}: ranks of tiktoken whose pattern is not known: the public ones are "
            "called like cl100k_base.tiktoken; for others give a JSON file with pattern, "
            "special_tokens and eos_token, as docs/data.md says"
        ) from None
    ranks = _parsed_ranks(path, content)

    def local(url: str, expected_hash: str | None = None) -> dict[bytes, int]:
        found = hashlib.sha256(content).hexdigest()
        if expected_hash is not None and found != expected_hash:
            raise DataError(
                f"{printable(path)}: is not the public {name}: sha256 is {found[:16]}..., must be "
                f"{expected_hash[:16]}...; copy it again, or call it otherwise"
            )
        return ranks

    # The package's own description of the encoding, with this file in the place of its download.
    described = types.FunctionType(
        constructor.__code__, {**constructor.__globals__, "load_tiktoken_bpe": local}
    )()
    special = described["special_tokens"]
    return TiktokenTokenizer(
        path, described["mergeable_ranks"], described["pat_str"], special, _end(path, special)
    )


def from_description(path: Path, values: dict[str, Any]) -> TiktokenTokenizer:
    """An encoding that a JSON file describes; its ranks in it, or in a file beside it."""
    pattern, special = values.get("pattern"), values.get("special_tokens")
    if not isinstance(pattern, str) or not _are_ids(special):
        raise DataError(
            f'{printable(path)}: a description of tiktoken needs "pattern", a text, and '
            '"special_tokens", an object of names and ids'
        )
    assert isinstance(special, dict), "checked above"
    ranks = values.get("ranks")
    if isinstance(ranks, str):
        beside = path.parent / ranks
        try:
            parsed = _parsed_ranks(beside, beside.read_bytes())
        except OSError as error:
            raise DataError(
                f"{printable(path)}: its ranks {printable(beside)} cannot be read "
                f"({error.strerror or error})"
            ) from None
    else:
        parsed = _listed_ranks(path, ranks)
    eos = values.get("eos_token")
    if eos is None:
        eos = _end(path, special)
    if eos not in special:
        raise DataError(
            f"{printable(path)}: its eos_token {shown(eos)} is not among its special_tokens"
        )
    return TiktokenTokenizer(path, parsed, pattern, special, eos)


def _end(path: Path, special: dict[str, int]) -> str:
    for name in _EOS:
        if name in special:
            return name
    raise DataError(
        f"{printable(path)}: which of its special tokens ends a document is not said; name it as "
        "eos_token"
    )


def _are_ids(values: Any) -> bool:
    return isinstance(values, dict) and all(
        isinstance(value, int) and value >= 0 for value in values.values()
    )


def _parsed_ranks(path: Path, content: bytes) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(
                f"{printable(path)}: line {number} is not a token in base64 and its rank: damaged; "
                "copy it again"
            ) from None
    return ranks


def _listed_ranks(path: Path, ranks: Any) -> dict[bytes, int]:
    try:
        return {base64.b64decode(token, validate=True): int(rank) for token, rank in ranks}
    except (TypeError, ValueError, binascii.Error):
        raise DataError(
            f'{printable(path)}: its "ranks" are no list of tokens in base64 with their ranks: '
            "damaged; copy it again"
        ) from None


def _package(path: Path) -> Any:
    try:
        import tiktoken
    except ImportError:
        raise DataError(
            f"{printable(path)}: ranks of tiktoken need the package tiktoken; install it with: "
            "python -m pip install tiktoken"
        ) from None
    return tiktoken
