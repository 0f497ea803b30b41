"""Training a SentencePiece tokenizer on the training documents."""

from __future__ import annotations

import heapq
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ebwm_scale.core.disk import replacement
from ebwm_scale.core.errors import DataError
from ebwm_scale.core.progress import Progress, no_progress
from ebwm_scale.data.prepare.reading.readers import TextInput
from ebwm_scale.data.prepare.reading.selection import EVERYTHING, Selection
from ebwm_scale.data.prepare.reading.taking import Document
from ebwm_scale.data.prepare.scanning import Scan, scan, work_folder
from ebwm_scale.data.prepare.splitting import SplitRule, draws_of, threshold_of
from ebwm_scale.data.tokenizer import Tokenizer
from ebwm_scale.data.tokenizers.sentence_piece import (
    EOS,
    SentencePieceTokenizer,
    load_sentencepiece,
)
from ebwm_scale.data.walking import Report

_SMALLEST = 2 + 2 + 256 + 1  # unknown and end, newline and tab, bytes, and something to learn
_PIECE_BYTES = 2000  # training text is cut to this: SentencePiece skips sentences above 4192 bytes


def train_tokenizer(
    inputs: Sequence[str | Path],
    output: str | Path,
    vocabulary_size: int,
    *,
    validation_fraction: float = 0.05,
    seed: int = 0,
    max_bytes: int = 64 * 2**20,
    selection: Selection = EVERYTHING,
    report: Report = print,
    progress: Progress = no_progress,
) -> Tokenizer:
    """Train on the training documents of the inputs and write the model to `output` (replaced as a
    whole).

    The split is that of tools/make_text_shards.py with the same fraction and seed: validation text
    is never seen. The documents come in the split's shuffled order until max_bytes of text. The
    same documents and arguments give the same file, byte for byte. Raises DataError when the corpus
    cannot fill the vocabulary, naming the largest possible size.
    """
    if vocabulary_size < _SMALLEST:
        raise DataError(
            f"vocabulary size is {vocabulary_size}: must be at least {_SMALLEST} (256 bytes, "
            "newline, tab, unknown, end, and pieces to learn)"
        )
    threshold_of(validation_fraction)
    output = Path(output)
    with work_folder(output) as work:
        found = scan(
            inputs,
            TextInput(selection),
            lambda num_threads: FirstTexts(validation_fraction, seed, max_bytes),
            work,
            seed=seed,
            identity=f"texts {validation_fraction} {max_bytes}",
            dtype=FirstTexts.dtype,
            report=report,
            progress=progress,
        )
        rule = SplitRule.of(validation_fraction, *found.places())
        content = _trained(found, rule, vocabulary_size, max_bytes, progress)
        with replacement(output) as temporary:
            temporary.write_bytes(content)
    return SentencePieceTokenizer(output)


def _trained(
    found: Scan, rule: SplitRule, vocabulary_size: int, max_bytes: int, progress: Progress
) -> bytes:
    """The model's file."""
    model = io.BytesIO()
    try:
        load_sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=_training_text(found, rule, max_bytes, progress),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocabulary_size,
            byte_fallback=True,
            character_coverage=0.9995,
            unk_id=0,
            eos_id=1,
            eos_piece=EOS,
            bos_id=-1,
            pad_id=-1,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
            user_defined_symbols=["\n", "\t"],
            num_threads=1,
            minloglevel=2,
        )  # the file records num_threads
    except RuntimeError as error:
        raise DataError(_why_training_failed(str(error), vocabulary_size)) from None
    return model.getvalue()


class FirstTexts:
    """The texts of a task that may be among the first training documents, UTF-8 as payload.

    Kept are those of the lowest orders until max_bytes and the largest document are reached, and
    the two extreme draws, which may have to change their split. So memory is bounded.
    """

    dtype = np.dtype("u1")

    def __init__(self, validation_fraction: float, seed: int, max_bytes: int):
        self.threshold, self.seed = threshold_of(validation_fraction), seed
        self.max_bytes = max_bytes

    def __call__(self, documents: Iterator[Document]) -> Iterator[tuple[Document, np.ndarray]]:
        kept: list[tuple[int, int, Document]] = []  # a heap: the largest order first
        extremes: dict[str, tuple[int, Document]] = {}
        num_bytes = largest = 0
        for number, document in enumerate(documents):
            draw, order = draws_of(document.digest, self.seed)
            if not extremes or draw < extremes["lowest"][0]:
                extremes["lowest"] = draw, document
            if "highest" not in extremes or draw > extremes["highest"][0]:
                extremes["highest"] = draw, document
            if draw < self.threshold:
                continue
            heapq.heappush(kept, (-order, number, document))
            num_bytes += document.num_bytes
            largest = max(largest, document.num_bytes)
            # A document that turns out to validate leaves a gap of at most the largest size.
            while num_bytes - kept[0][2].num_bytes - largest >= self.max_bytes:
                num_bytes -= heapq.heappop(kept)[2].num_bytes
        chosen = [document for _, _, document in kept]
        names = {id(document) for document in chosen}
        others = {id(document): document for _, document in extremes.values()}
        chosen += [document for key, document in others.items() if key not in names]
        for document in chosen:
            yield document, np.frombuffer(document.text.encode("utf-8"), dtype=self.dtype)

    def facts(self) -> dict[str, Any]:
        return {}


def _training_text(
    found: Scan, rule: SplitRule, max_bytes: int, progress: Progress
) -> Iterator[str]:
    """Pieces of the documents until max_bytes. What SentencePiece does then takes longer than to
    read them, and it says nothing of itself.
    """
    num_bytes = 0
    for number, text in enumerate(found.runs.documents(rule, "train"), start=1):
        for line in text.tobytes().decode("utf-8").splitlines(keepends=True):
            for start in range(0, len(line), _PIECE_BYTES // 4):
                piece = line[start : start + _PIECE_BYTES // 4].replace(
                    "\0", ""
                )  # SentencePiece ends a sentence at NUL
                num_bytes += len(piece.encode("utf-8"))
                yield piece
        progress("documents read", number, None)
        if num_bytes >= max_bytes:
            break
    progress("merging pieces", 0, None)


def _why_training_failed(message: str, vocabulary_size: int) -> str:
    too_large = re.search(r"Please set it to a value <= (\d+)", message)
    if too_large:
        return (
            f"vocabulary size {vocabulary_size} is too large for this corpus: at most "
            f"{too_large.group(1)} pieces can be made of it; take that, or give more text"
        )
    too_small = re.search(r"smaller than required_chars. \d+ vs (\d+)", message)
    if too_small:
        return (
            f"vocabulary size {vocabulary_size} is too small for this corpus: its characters and "
            f"the 256 bytes alone need {too_small.group(1)}; take more"
        )
    return f"the tokenizer cannot be trained on this text: {' '.join(message.split())}"
