"""A small corpus, tokenizer and dataset, made once; `dataset` gives each test its own copy to
damage.
"""

import random
import shutil
import tempfile
from pathlib import Path

import pytest

from ebwm_scale.core.progress import no_progress
from ebwm_scale.data.prepare.reading.inputs import find_sources
from ebwm_scale.data.prepare.reading.left_out import LeftOut
from ebwm_scale.data.prepare.reading.readers import TextInput, documents_of
from ebwm_scale.data.prepare.reading.selection import EVERYTHING
from ebwm_scale.data.prepare.scanning import scan
from ebwm_scale.data.prepare.text import NothingMaker, make_text_dataset
from ebwm_scale.data.prepare.tokenizer import train_tokenizer

CONTEXT_LENGTH = 16
WORDS = [
    "energy",
    "minimum",
    "step",
    "field",
    "query",
    "model",
    "token",
    "slow",
    "deep",
    "think",
    "gradient",
    "descent",
    "state",
    "block",
    "order",
    "shard",
    "paper",
    "river",
    "stone",
    "cloud",
    "window",
    "metal",
    "garden",
    "letter",
    "number",
    "signal",
]


def write_corpus(folder: Path, *, num_documents: int = 24, seed: int = 0) -> Path:
    draw = random.Random(seed)
    for i in range(num_documents):
        lines = [
            " ".join(draw.choices(WORDS, k=draw.randint(3, 12))) + "."
            for _ in range(draw.randint(4, 30))
        ]
        path = (
            folder
            / ("deep" if i % 3 else ".")
            / f"document_{i:02d}{('.txt', '.md', '.rst')[i % 3]}"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Document {i}\n\n\t" + "\n  ".join(lines) + "\n", encoding="utf-8")
    return folder


def read_documents(*inputs, selection=EVERYTHING):
    """All documents in this process; what is said of the others is not looked at."""
    sources = find_sources(inputs, LeftOut(), report=lambda line: None)
    return [d for s in sources for d in documents_of(s, selection, LeftOut())]


def found(*inputs, selection=EVERYTHING):
    """({name: text}, what is said); the saying, and the errors, are those of the tools."""
    said = []
    with tempfile.TemporaryDirectory() as work:
        scan(
            inputs,
            TextInput(selection),
            lambda num_threads: NothingMaker(),
            Path(work),
            seed=0,
            identity="test",
            dtype=NothingMaker.dtype,
            report=said.append,
            progress=no_progress,
        )
    return {d.name: d.text for d in read_documents(*inputs, selection=selection)}, said


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def tokenizer_path(corpus, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_tokenizer([corpus], path, 320)
    return path


@pytest.fixture(scope="session")
def pristine(corpus, tokenizer_path, tmp_path_factory) -> Path:
    """The manifest of a dataset that no test may change."""
    output = tmp_path_factory.mktemp("dataset") / "text"
    return make_text_dataset(
        [corpus],
        output,
        tokenizer=tokenizer_path,
        context_length=CONTEXT_LENGTH,
        validation_fraction=0.2,
        samples_per_shard=20,
        report=lambda line: None,
    )


@pytest.fixture
def dataset(pristine, tmp_path) -> Path:
    """The manifest of a copy."""
    shutil.copytree(pristine.parent, tmp_path / "text")
    return tmp_path / "text" / "manifest.json"
