"""Training a SentencePiece tokenizer on the training documents."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ebwm_scale.core.disk import replacement
from ebwm_scale.core.errors import DataError
from ebwm_scale.core.progress import Progress, no_progress
from ebwm_scale.data.prepare.documents import Document, Report, find_documents, split_documents
from ebwm_scale.data.tokenizer import EOS, Tokenizer, _sentencepiece

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
    documents = split_documents(
        find_documents(inputs, report=report), validation_fraction=validation_fraction, seed=seed
    )["train"]
    model = io.BytesIO()
    try:
        _sentencepiece().SentencePieceTrainer.train(
            sentence_iterator=_training_text(documents, max_bytes, progress),
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
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacement(output) as temporary:
        temporary.write_bytes(model.getvalue())
    return Tokenizer(output)


def _training_text(
    documents: Sequence[Document], max_bytes: int, progress: Progress
) -> Iterator[str]:
    """Pieces of the documents until max_bytes. What SentencePiece does then takes longer than to
    read them, and it says nothing of itself.
    """
    num_bytes = 0
    for number, document in enumerate(documents, start=1):
        for line in document.read().splitlines(keepends=True):
            for start in range(0, len(line), _PIECE_BYTES // 4):
                piece = line[start : start + _PIECE_BYTES // 4].replace(
                    "\0", ""
                )  # SentencePiece ends a sentence at NUL
                num_bytes += len(piece.encode("utf-8"))
                yield piece
        progress("documents read", number, len(documents))
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
