import random

import pytest
import sentencepiece
from corpora import read_documents

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.prepare.splitting import split_documents
from ebwm_scale.data.prepare.tokenizer import train_tokenizer
from ebwm_scale.data.tokenizer import open_tokenizer
from ebwm_scale.data.tokenizers import sentence_piece as tokenizer_module

TEXTS = [
    "",
    "plain",
    "  two leading, two trailing  ",
    "a\nb\n\n\tc\r\n",
    "\n",
    " ",
    "日本語 😀 naïve ﬁ Ω",
    "</s> <unk> <0x41> <s>",
    "nul \0 inside",
    "\ufeffmark",
    "literal \u2581 and \u2581\u2581",
    "a\u00a0b\u2028c",
    "x" * 9000,
    "e\u0301 is not é",
]


@pytest.mark.parametrize("text", TEXTS, ids=[repr(t)[:24] for t in TEXTS])
def test_text_survives_a_round_trip(tokenizer_path, text):
    tokenizer = open_tokenizer(tokenizer_path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocabulary_size for i in ids) and tokenizer.eos_id not in ids
    assert tokenizer.encode_many([text, "b", text], num_threads=2) == [
        ids,
        tokenizer.encode("b"),
        ids,
    ]


def test_whole_documents_survive_a_round_trip(tokenizer_path, corpus):
    tokenizer = open_tokenizer(tokenizer_path)
    for document in read_documents(corpus):
        assert tokenizer.decode(tokenizer.encode(document.text)) == document.text


def test_frequent_words_become_pieces_and_pieces_are_printable(tokenizer_path):
    tokenizer = open_tokenizer(tokenizer_path)
    assert len(tokenizer.encode("energy minimum gradient")) < len("energy minimum gradient") / 1.5
    assert all(tokenizer.piece(i).isprintable() for i in range(tokenizer.vocabulary_size))
    assert (
        tokenizer.piece(tokenizer.encode("\n")[0]) == "\\n"
        and tokenizer.piece(tokenizer.encode(" ")[0]) == "·"
    )


def test_training_is_deterministic_and_ignores_where_the_text_lies(
    corpus, tokenizer_path, tmp_path
):
    (tmp_path / "elsewhere").symlink_to(corpus)
    train_tokenizer([tmp_path / "elsewhere"], tmp_path / "again.model", 320)
    assert (tmp_path / "again.model").read_bytes() == tokenizer_path.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_validation_text_is_not_trained_on(tmp_path):
    (tmp_path / "in").mkdir()
    for i in range(12):  # each document has a letter of its own
        (tmp_path / "in" / f"{i}.txt").write_text(
            f"number {i} " + chr(0x4E00 + i) * 400, encoding="utf-8"
        )
    split = split_documents(read_documents(tmp_path / "in"), validation_fraction=0.3, seed=1)
    tokenizer = train_tokenizer(
        [tmp_path / "in"], tmp_path / "m.model", 290, validation_fraction=0.3, seed=1
    )
    pieces = "".join(tokenizer.piece(i) for i in range(tokenizer.vocabulary_size))
    assert all(d.text[-1] in pieces for d in split["train"]) and split["train"]
    assert not any(d.text[-1] in pieces for d in split["validation"]) and split["validation"]


def test_too_large_vocabulary_names_the_largest_and_that_one_works(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"a few words only {i}")
    with pytest.raises(
        DataError, match=r"20000 is too large for this corpus: at most (\d+) pieces"
    ) as error:
        train_tokenizer([tmp_path], tmp_path / "m.model", 20000)
    assert not (tmp_path / "m.model").exists()
    largest = int(str(error.value).split("at most ")[1].split()[0])
    assert train_tokenizer([tmp_path], tmp_path / "m.model", largest).vocabulary_size == largest


@pytest.mark.parametrize("size", [-1, 0, 260])
def test_too_small_vocabulary_is_refused(corpus, tmp_path, size):
    with pytest.raises(DataError, match="at least"):
        train_tokenizer([corpus], tmp_path / "m.model", size)


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_a_file_that_is_no_model_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "m.model").write_bytes(content)
    with pytest.raises(DataError, match="m.model: .*tools/train_tokenizer.py") as error:
        open_tokenizer(tmp_path / "m.model")
    assert "\n" not in str(error.value)


def place_of_a_piece(model):
    """Where the text of a piece that was learnt begins in a model file, behind its space mark."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    piece = next(p for p in pieces if len(p) > 1 and p.startswith("▁"))
    return model.index(piece.encode()) + len("▁".encode())


def damaged_models(model, count):
    """Copies of a model in which a byte of a piece, or any byte, is another one."""
    place = place_of_a_piece(model)
    yield model[:place] + b"\xff" + model[place + 1 :]
    generator = random.Random(0)
    for _ in range(count):
        place = generator.randrange(min(len(model), 6000))
        yield model[:place] + bytes([generator.randrange(256)]) + model[place + 1 :]


def test_a_damaged_model_is_refused_when_it_is_opened_or_works(tokenizer_path, tmp_path):
    refused = []
    for content in damaged_models(tokenizer_path.read_bytes(), 400):
        (tmp_path / "m.model").write_bytes(content)
        try:
            tokenizer = open_tokenizer(tmp_path / "m.model")
        except DataError as error:
            refused.append(str(error))
            continue
        for token_id in range(tokenizer.vocabulary_size):
            tokenizer.piece(token_id)
            tokenizer.decode([token_id])
        tokenizer.decode(tokenizer.encode("energy minimum 日本 \n"))
    assert "m.model" in refused[0] and "damaged" in refused[0] and "\n" not in refused[0]
    assert len(refused) > 50


def test_pieces_that_are_not_text_are_refused_though_sentencepiece_opens_them(
    tokenizer_path, tmp_path
):
    model = tokenizer_path.read_bytes()
    place = place_of_a_piece(model)
    content = model[:place] + b"\xe4" + model[place + 1 :]
    sentencepiece.SentencePieceProcessor(model_proto=content)
    (tmp_path / "m.model").write_bytes(content)
    with pytest.raises(DataError, match=r"m.model: piece \d+ of the tokenizer is not UTF-8"):
        open_tokenizer(tmp_path / "m.model")


@pytest.mark.parametrize("text", ["\udcff", "a b\ud800c"])
def test_text_that_is_not_utf8_is_refused(tokenizer_path, text):
    with pytest.raises(DataError, match="not UTF-8 at character") as error:
        open_tokenizer(tokenizer_path).encode(text)
    assert "\n" not in str(error.value) and str(error.value).encode("utf-8")


def long_texts():
    generator = random.Random(0)
    words = [
        "energy",
        "minimum",
        "gradient",
        "日本語",
        "naïve",
        "▁",
        "\u2581x",
        "😀",
        "12345",
        "ab",
    ]
    spaces = [" ", "  ", "\n", "\n\n\t", "\t", ", ", ""]
    for _ in range(30):
        yield "".join(generator.choice(words) + generator.choice(spaces) for _ in range(300))
    letters = "aeginrty mu"  # of the vocabulary's own words: merges wherever one looks
    for _ in range(20):
        yield "".join(generator.choice(letters) for _ in range(1000))
    yield " " * 500 + "x" + " " * 500
    yield "energy" * 200
    yield "\n" * 500


@pytest.mark.parametrize("size", [1, 7, 64])
def test_parts_of_a_text_have_the_tokens_of_the_text(tokenizer_path, monkeypatch, size):
    monkeypatch.setattr(tokenizer_module, "_PART_CHARACTERS", size)
    tokenizer, num_parts = open_tokenizer(tokenizer_path), 0
    for text in long_texts():
        parts = list(tokenizer.parts(text))
        num_parts += len(parts)
        assert "".join(parts) == text
        ids = [i for part in tokenizer.encode_many(parts) for i in part]
        assert ids == tokenizer.encode(text)
    assert num_parts > 400


def test_a_text_without_a_safe_place_is_cut_all_the_same(tokenizer_path, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_PART_CHARACTERS", 10)
    monkeypatch.setattr(tokenizer_module, "_LONGEST_PART", 30)
    tokenizer = open_tokenizer(tokenizer_path)
    text = "en" * 100
    assert {"en", "ne"} <= tokenizer._neighbours
    parts = list(tokenizer.parts(text))
    assert [len(part) for part in parts] == [30] * 6 + [20]
    ids = [i for part in parts for i in tokenizer.encode(part)]
    assert tokenizer.decode(ids) == text


def test_short_texts_and_foreign_models_are_not_cut(tokenizer_path, corpus, tmp_path):
    assert list(open_tokenizer(tokenizer_path).parts("a b c")) == ["a b c"]
    sentencepiece.SentencePieceTrainer.train(
        input=str(next(corpus.glob("*.txt"))),
        model_prefix=str(tmp_path / "foreign"),
        vocab_size=290,
        byte_fallback=True,
        minloglevel=2,
    )  # normalises, and adds a space in front
    text = "energy minimum " * 20_000
    assert list(open_tokenizer(tmp_path / "foreign.model").parts(text)) == [text]
