"""tokenizer.json of the package tokenizers, as it is: data, and no code that is run.

The end of sequence is what tokenizer_config.json or special_tokens_map.json beside it says, else
the one well-known token among its special ones. A dataset keeps it as eos_id.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.plain_text import printable, shorten, shown
from ebwm_scale.data.tokenizers.base import Tokenizer, check_text

_WELL_KNOWN = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|end|>", "<|im_end|>")
_CONFIG = "tokenizer_config.json"
_SPECIAL_MAP = "special_tokens_map.json"


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json. eos_id: of the dataset it stands in, None to look for it."""

    kind = "tokenizer.json"
    file_name = "tokenizer.json"

    def __init__(self, path: Path, content: bytes, values: dict, eos_id: int | None = None):
        self.path = path
        self._content = content
        _refuse_code(path, values)
        self._tokenizer = _loaded(path, content)
        # A special token's letters in a text are letters.
        self._tokenizer.encode_special_tokens = True
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = {i: token.content for i, token in added.items() if token.special}
        # Ids may have holes, and a model's rows are counted to the largest.
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocabulary_size = 1 + max(vocabulary.values(), default=-1)
        self.eos_id = self._end_of_sequence(eos_id)
        # The end of sequence is nothing that a text holds, whether or not the file calls it so.
        self._special.setdefault(self.eos_id, self._tokenizer.id_to_token(self.eos_id))

    def file_content(self) -> bytes:
        return self._content

    def encode_many(self, texts: Sequence[str], *, num_threads: int = 1) -> list[list[int]]:
        for text in texts:
            check_text(text)
        if num_threads > 1 and len(texts) > 1:
            # read by the package when its threads begin, which a forked process does by itself
            os.environ.setdefault("RAYON_NUM_THREADS", str(num_threads))
            found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        else:
            found = [self._tokenizer.encode(text, add_special_tokens=False) for text in texts]
        encoded = [encoding.ids for encoding in found]
        for number, ids in enumerate(encoded):
            if not self._special.keys().isdisjoint(ids):
                encoded[number] = self._without_special(texts[number])
        return encoded

    def _without_special(self, text: str) -> list[int]:
        """The ids of a text in which a vocabulary holds the letters of a special token as a piece.

        The text is cut within the letters, so that the piece cannot be found.
        """
        names = [name for name in self._special.values() if len(name) > 1 and name in text]
        cuts = {0, len(text)}
        for name in names:
            at = text.find(name)
            while at >= 0:
                cuts.add(at + 1)
                at = text.find(name, at + 1)
        places = sorted(cuts)
        ids: list[int] = []
        for start, end in itertools.pairwise(places):
            ids += self._tokenizer.encode(text[start:end], add_special_tokens=False).ids
        wrong = self._special.keys() & set(ids)
        if wrong:
            name = self._special[min(wrong)]
            raise DataError(
                f"{printable(self.path)}: makes its special token {shown(name)} out of a text "
                f"({shorten(text, 40)}): documents could not be told apart; take another tokenizer"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        kept = [int(i) for i in ids if int(i) not in self._special]
        return self._tokenizer.decode(kept, skip_special_tokens=False)

    def piece(self, token_id: int) -> str:
        token_id = int(token_id)
        if token_id in self._special:
            return printable(self._special[token_id])
        text = self._tokenizer.decode([token_id], skip_special_tokens=False)
        if not text or "\ufffd" in text:
            text = self._tokenizer.id_to_token(token_id) or f"<{token_id}>"
        return printable(text.replace(" ", "·"))

    def _end_of_sequence(self, given: int | None) -> int:
        if given is not None:
            if given not in self._special and self._tokenizer.id_to_token(given) is None:
                raise DataError(
                    f"{printable(self.path)}: has no token {given}, which the dataset says is its "
                    "end of sequence: another tokenizer; copy the dataset again"
                )
            return given
        name = self._named_beside()
        if name is None:
            known = [n for n in _WELL_KNOWN if n in self._special.values()]
            if not known:
                names = ", ".join(shown(n) for n in list(self._special.values())[:8])
                raise DataError(
                    f"{printable(self.path)}: which token ends a document is not said; put its "
                    f'{_CONFIG} beside it, or write {{"eos_token": "..."}} into one (special '
                    f"tokens: {names or 'none'})"
                )
            name = known[0]
        token_id = self._tokenizer.token_to_id(name)
        if token_id is None:
            raise DataError(
                f"{printable(self.path)}: has no token {shown(name)}, which {_CONFIG} names as the "
                "end of sequence; copy both files from one place"
            )
        return int(token_id)

    def _named_beside(self) -> str | None:
        """eos_token of the files that Hugging Face writes beside a tokenizer.json."""
        for file in (_CONFIG, _SPECIAL_MAP):
            token = _json_beside(self.path, file).get("eos_token")
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str):
                return token
        return None


def _loaded(path: Path, content: bytes) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise DataError(
            f"{printable(path)}: a tokenizer.json needs the package tokenizers; install it with: "
            "python -m pip install tokenizers"
        ) from None
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except Exception as error:  # noqa: BLE001 (the package raises bare Exception)
        raise DataError(
            f"{printable(path)}: no tokenizer.json that the package tokenizers reads "
            f"({shorten(str(error))}); copy it again, or save it anew"
        ) from None


def _refuse_code(path: Path, values: dict) -> None:
    """DataError for a tokenizer that is only whole with a program of its own."""
    for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model"):
        part = values.get(name)
        if "Custom" in _types(part):
            raise DataError(
                f"{printable(path)}: its {name} is a program of its own (type Custom), which is "
                "not in the file and would not be run; save the tokenizer without it"
            )
    config = _json_beside(path, _CONFIG)
    automatic = config.get("auto_map")
    if isinstance(automatic, dict) and "AutoTokenizer" in automatic:
        raise DataError(
            f"{printable(path)}: {_CONFIG} beside it names a program of its own (auto_map: "
            f"{shown(automatic['AutoTokenizer'])}), which is not run; convert it to a "
            "tokenizer.json that needs none, and remove auto_map"
        )


def _types(part: Any) -> set[str]:
    """The values of "type" in a part of the file, and in the parts of it."""
    if isinstance(part, list):
        return {kind for item in part for kind in _types(item)}
    if not isinstance(part, dict):
        return set()
    own = {part["type"]} if isinstance(part.get("type"), str) else set()
    inner = {"pretokenizers", "normalizers", "processors", "decoders"} & part.keys()
    return own | {kind for name in inner for kind in _types(part[name])}


def _json_beside(path: Path, name: str) -> dict:
    try:
        values = json.loads((path.parent / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
