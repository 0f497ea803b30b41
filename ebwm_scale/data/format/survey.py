"""What is in a dataset of text: documents read back from its blocks, counted and described.

Whole documents only, from the first shards on and up to a limit: those that a block or the end of
the looked-at part cuts are left out. The blocks hold them in a shuffled order, so the first ones
are a fair sample.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.progress import Progress, no_progress
from ebwm_scale.data.format.content import TextContent
from ebwm_scale.data.format.manifest import Manifest
from ebwm_scale.data.format.scored import plain_tokens
from ebwm_scale.data.format.shards import ShardedSplit, open_split
from ebwm_scale.data.tokenizer import Tokenizer, open_tokenizer

_SHOWN = 6  # documents of a split
_SHOWN_CHARACTERS = 600
_PROGRESS_EVERY = 256
NO_LETTERS = "no letters"


@dataclass
class Survey:
    """Of the documents of a split that were looked at.

    num_tokens: of each, without its end of sequence. num_copies: documents whose text had been met
    before. scripts: letters of each script. main_scripts: documents by the script of most of their
    letters. samples: the beginnings of some. digests: of all, to compare splits.
    """

    num_documents: int = 0
    num_tokens: list[int] = field(default_factory=list)
    num_bytes: int = 0
    num_copies: int = 0
    scripts: Counter[str] = field(default_factory=Counter)
    main_scripts: Counter[str] = field(default_factory=Counter)
    samples: list[str] = field(default_factory=list)
    digests: set[bytes] = field(default_factory=set)
    is_whole: bool = True  # whether the split was read to its end

    def add(self, text: str, num_tokens: int) -> None:
        encoded = text.encode("utf-8", "replace")
        self.num_documents += 1
        self.num_tokens.append(num_tokens)
        self.num_bytes += len(encoded)
        digest = hashlib.sha256(encoded).digest()
        self.num_copies += digest in self.digests
        self.digests.add(digest)
        scripts = scripts_of(text)
        self.scripts += scripts
        main = max(scripts, key=lambda name: (scripts[name], name)) if scripts else NO_LETTERS
        self.main_scripts[main] += 1
        if len(self.samples) < _SHOWN:
            rest = len(text) - _SHOWN_CHARACTERS
            tail = f" … ({rest:,} more characters)" if rest > 0 else ""
            self.samples.append(text[:_SHOWN_CHARACTERS] + tail)


def survey(
    manifest: Manifest, split: str, *, max_documents: int, progress: Progress = no_progress
) -> Survey:
    """Look at the first documents of a split.

    Raises DataError for a dataset of something else than documents, and for damage.
    """
    content = manifest.content
    if not isinstance(content, TextContent) or content.group_size > 1 or content.members:
        raise DataError(
            f"{manifest.path}: holds no documents of text; this is for what "
            "tools/make_text_shards.py wrote"
        )
    tokenizer = open_tokenizer(content.tokenizer_path, eos_id=content.eos_id)
    reader = open_split(manifest, split, verify="sizes")
    found = Survey()
    try:
        for tokens in _documents(reader, content):
            if found.num_documents == max_documents:
                found.is_whole = False
                break
            found.add(_text(tokenizer, tokens), len(tokens))
            if found.num_documents % _PROGRESS_EVERY == 0:
                progress(f"{split}: documents", found.num_documents, max_documents)
    finally:
        reader.close()
    return found


def _text(tokenizer: Tokenizer, tokens: np.ndarray) -> str:
    return tokenizer.decode(tokens.tolist())


def _documents(reader: ShardedSplit, content: TextContent) -> Iterator[np.ndarray]:
    """The tokens of whole documents, without their ends of sequence."""
    begun: list[np.ndarray] | None = None  # parts of a document; None behind a cut
    for sample_id in range(len(reader)):
        block = plain_tokens(reader.read(sample_id)).astype(np.int64)
        if content.is_padded and reader.split == "train":
            begun = [] if block[0] == content.eos_id else None
            block = block[1:]
        elif sample_id:
            block = block[1:]
        else:
            begun = []
        ends = np.flatnonzero(block == content.eos_id)
        pieces = np.split(block, ends + 1)
        for piece in pieces[: len(ends)]:
            if begun is not None:
                tokens = np.concatenate([*begun, piece[:-1]])
                if len(tokens):  # of padding there is none
                    yield tokens
            begun = []
        if begun is not None:
            begun.append(pieces[-1])


def scripts_of(text: str) -> Counter[str]:
    """How many letters of a text are of each script: latin, cyrillic, cjk, hiragana, ..."""
    found: Counter[str] = Counter()
    for character, count in Counter(text).items():
        script = _script(character)
        if script is not None:
            found[script] += count
    return found


@lru_cache(maxsize=2**16)
def _script(character: str) -> str | None:
    """The script of a letter, the first word of its name in Unicode; None for other characters."""
    if not character.isalpha():
        return None
    first = unicodedata.name(character, "other").split()[0]
    return {"IDEOGRAPHIC": "cjk", "KANGXI": "cjk"}.get(first, first.lower())
