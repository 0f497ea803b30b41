import pytest

from ebwm_scale.data.documents import find_documents, split_documents
from ebwm_scale.data.tokenizer import Tokenizer, train_tokenizer
from ebwm_scale.errors import DataError

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
    tokenizer = Tokenizer(tokenizer_path)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocabulary_size for i in ids) and tokenizer.eos_id not in ids
    assert tokenizer.encode_many([text, "b", text], num_threads=2) == [
        ids,
        tokenizer.encode("b"),
        ids,
    ]


def test_whole_documents_survive_a_round_trip(tokenizer_path, corpus):
    tokenizer = Tokenizer(tokenizer_path)
    for document in find_documents([corpus]):
        assert tokenizer.decode(tokenizer.encode(document.read())) == document.read()


def test_frequent_words_become_pieces_and_pieces_are_printable(tokenizer_path):
    tokenizer = Tokenizer(tokenizer_path)
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
    split = split_documents(find_documents([tmp_path / "in"]), validation_fraction=0.3, seed=1)
    tokenizer = train_tokenizer(
        [tmp_path / "in"], tmp_path / "m.model", 290, validation_fraction=0.3, seed=1
    )
    pieces = "".join(tokenizer.piece(i) for i in range(tokenizer.vocabulary_size))
    assert all(d.read()[-1] in pieces for d in split["train"]) and split["train"]
    assert not any(d.read()[-1] in pieces for d in split["validation"]) and split["validation"]


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
        Tokenizer(tmp_path / "m.model")
    assert "\n" not in str(error.value)
