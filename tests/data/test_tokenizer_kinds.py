"""All kinds of tokenizers behind one interface: what holds for each, and what is refused."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest
from corpora import WORDS, read_documents, write_corpus

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.format.side_files import open_manifest
from ebwm_scale.data.format.verify import verify_dataset
from ebwm_scale.data.prepare.text import make_text_dataset
from ebwm_scale.data.tokenizer import open_tokenizer
from ebwm_scale.think import tokenizer_of

tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")

END = "<|endoftext|>"
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = [
    "",
    "plain energy",
    "  a\n\n\tb\r\n ",
    "日本語 😀 é e\u0301",
    "nul \0 x",
    f"a {END} b </s> <s>",
]


def byte_level(path, **changes):
    """A tokenizer like GPT-NeoX's: BPE of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END, "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS) * 3], trainer)
    values = json.loads(tokenizer.to_str()) | changes
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))
    return path


def lower_case(path):
    """Loses capitals and what is no ASCII letter: unknown words are one token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate([END, "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(path))
    return path


def ranks_of(words=(b"energy", b" energy")):
    ranks = {bytes([i]): i for i in range(256)}
    for word in words:  # every beginning, so that merges lead to the word
        for end in range(2, len(word) + 1):
            ranks.setdefault(word[:end], len(ranks))
    return ranks


def tiktoken_file(path):
    pytest.importorskip("tiktoken", reason="the package tiktoken is not installed")
    lines = [base64.b64encode(t) + b" %d" % rank for t, rank in ranks_of().items()]
    (path.parent / "own.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    description = {
        "ebwm_tokenizer": "tiktoken",
        "ranks": "own.tiktoken",
        "pattern": PATTERN,
        "special_tokens": {END: 300, "<|start|>": 301},
        "eos_token": END,
    }
    path.write_text(json.dumps(description))
    return path


KINDS = {
    "tokenizer.json": lambda folder: byte_level(folder / "tokenizer.json"),
    "tiktoken": lambda folder: tiktoken_file(folder / "own.json"),
    "bytes": lambda folder: "bytes",
}


@pytest.fixture(params=[*KINDS, "sentencepiece"])
def file(request, tmp_path, tokenizer_path):
    if request.param == "sentencepiece":
        return tokenizer_path
    return KINDS[request.param](tmp_path)


def test_texts_come_back_and_special_tokens_in_them_stay_letters(file):
    tokenizer = open_tokenizer(file)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eos_id not in ids and all(0 <= i < tokenizer.vocabulary_size for i in ids)
        assert tokenizer.decode([*ids, tokenizer.eos_id]) == text
        assert [i for part in tokenizer.parts(text) for i in tokenizer.encode(part)] == ids
    assert tokenizer.encode_many(TEXTS, num_threads=2) == list(map(tokenizer.encode, TEXTS))
    assert tokenizer.is_lossless()
    for token in range(tokenizer.vocabulary_size):
        assert tokenizer.piece(token).isprintable()
    with pytest.raises(DataError, match="not UTF-8 at character"):
        tokenizer.encode("\udcff")


def test_a_dataset_holds_its_tokenizer_and_everybody_opens_that(file, corpus, tmp_path):
    output = tmp_path / "out"
    said = []
    path = make_text_dataset(
        [corpus], output, tokenizer=file, context_length=16, report=said.append
    )
    assert not any("lossy" in line or "note" in line for line in said)
    manifest = open_manifest(path)
    original, copy = open_tokenizer(file), tokenizer_of(manifest)
    assert (copy.kind, copy.eos_id, copy.vocabulary_size, copy.sha256) == (
        original.kind,
        original.eos_id,
        original.vocabulary_size,
        original.sha256,
    )
    entry = manifest.values["tokenizer"]
    assert file_sha256(output / entry["path"]) == entry["sha256"] == copy.sha256
    if copy.kind != "sentencepiece":
        assert entry["kind"] == copy.kind and entry["lossless"] is True
    assert copy.encode(TEXTS[1]) == original.encode(TEXTS[1])
    split = open_split(path, "train", verify="hashes")
    stream = [int(t) for i in range(len(split)) for t in split.read(i)[:-1]]
    texts = {d.text for d in read_documents(corpus)}
    first_end = stream.index(copy.eos_id)
    assert copy.decode(stream[:first_end]) in texts
    assert verify_dataset(path)[0] == []
    make_text_dataset([corpus], output, tokenizer=file, context_length=16, report=said.append)
    assert f"already there: {path}" in said


def test_a_lossy_tokenizer_is_said_to_be(corpus, tmp_path):
    said = []
    file = lower_case(tmp_path / "tokenizer.json")
    path = make_text_dataset(
        [corpus], tmp_path / "out", tokenizer=file, context_length=16, report=said.append
    )
    assert "the tokenizer is lossy: 8 of 8 documents that were tried" in said[0]
    assert json.loads(path.read_text())["tokenizer"]["lossless"] is False


def test_letters_of_a_special_token_in_the_vocabulary_do_not_make_it(tmp_path):
    """A Unigram vocabulary holds "</s>" as a piece like any other."""
    from tokenizers import AddedToken, Tokenizer, decoders, models

    pieces = [("<unk>", 0.0), ("</s>", 0.0), *[(c, -5.0) for c in "</s> ab"]]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=False)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    opened = open_tokenizer(tmp_path / "tokenizer.json")
    assert opened.eos_id == 1
    ids = opened.encode("a </s></s> b")
    assert 1 not in ids and opened.decode(ids) == "a </s></s> b"


def test_the_end_of_sequence_is_what_is_said_beside_the_file(tmp_path):
    file = byte_level(tmp_path / "tokenizer.json")
    assert open_tokenizer(file).eos_id == 0
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<|padding|>"}}')
    assert open_tokenizer(tmp_path).eos_id == 1
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<none>"}')
    with pytest.raises(DataError, match="has no token '<none>', which tokenizer_config.json names"):
        open_tokenizer(file)
    assert open_tokenizer(file, eos_id=0).eos_id == 0
    with pytest.raises(DataError, match="has no token 4000, which the dataset says"):
        open_tokenizer(file, eos_id=4000)


def refused(path, **options):
    with pytest.raises(DataError) as error:
        open_tokenizer(path, **options)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def test_a_tokenizer_that_needs_code_is_refused(tmp_path):
    file = byte_level(tmp_path / "tokenizer.json")
    values = json.loads(file.read_text())
    values["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [values["pre_tokenizer"], {"type": "Custom"}],
    }
    (tmp_path / "custom.json").write_text(json.dumps(values))
    assert "its pre_tokenizer is a program of its own" in refused(tmp_path / "custom.json")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": "<|endoftext|>", "auto_map": {"AutoTokenizer": ["tokenization_x.X", null]}}'
    )
    assert "names a program of its own (auto_map: ['tokenization_x.X'" in refused(file)
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "tokenization_x.py").write_text("raise SystemExit")
    assert "a tokenizer that needs code of its own is not run" in refused(tmp_path / "code")


BEGIN = '{"ebwm_tokenizer": "tiktoken", "pattern": "x", "special_tokens": {"e": 3}, '


@pytest.mark.parametrize(
    "content, said",
    [
        ("{", "begins as JSON and is none"),
        ("{}", "no tokenizer.json that the package tokenizers reads"),
        ('{"ebwm_tokenizer": "runes"}', "a tokenizer of the kind 'runes'"),
        ('{"ebwm_tokenizer": "tiktoken"}', 'needs "pattern"'),
        (
            BEGIN + '"ranks": [["!", 1]], "eos_token": "e"}',
            'its "ranks" are no list of tokens in base64',
        ),
        (
            BEGIN + '"ranks": "absent", "eos_token": "e"}',
            "its ranks .*absent cannot be read",
        ),
        (
            BEGIN + '"ranks": [["YQ==", 0]], "eos_token": "f"}',
            "its eos_token 'f' is not among",
        ),
    ],
)
def test_descriptions_that_describe_nothing_are_refused(tmp_path, content, said):
    import re

    (tmp_path / "t.json").write_text(content)
    assert re.search(said, refused(tmp_path / "t.json"))


def test_public_ranks_are_known_by_name_and_hash(tmp_path):
    pytest.importorskip("tiktoken", reason="the package tiktoken is not installed")
    content = b"\n".join(base64.b64encode(t) + b" %d" % r for t, r in ranks_of().items())
    (tmp_path / "cl100k_base.tiktoken").write_bytes(content)
    assert "is not the public cl100k_base: sha256 is" in refused(tmp_path / "cl100k_base.tiktoken")
    (tmp_path / "mine.tiktoken").write_bytes(content)
    assert "whose pattern is not known" in refused(tmp_path / "mine.tiktoken")
    (tmp_path / "cl100k_base.tiktoken").write_bytes(b"YQ== 0\n***\n")
    assert "line 2 is not a token in base64" in refused(tmp_path / "cl100k_base.tiktoken")


def test_a_public_encoding_takes_pattern_and_special_tokens_from_the_package(tmp_path, monkeypatch):
    pytest.importorskip("tiktoken", reason="the package tiktoken is not installed")
    import tiktoken_ext.openai_public as public

    def tiny():
        ranks = load_tiktoken_bpe("https://nowhere/tiny.tiktoken", expected_hash=None)  # noqa: F821
        return {"pat_str": PATTERN, "mergeable_ranks": ranks, "special_tokens": {END: 300}}

    def unreachable(*arguments, **options):
        raise AssertionError("nothing is downloaded")

    monkeypatch.setattr(public, "load_tiktoken_bpe", unreachable)
    real = type(tiny)(tiny.__code__, {**vars(public), "PATTERN": PATTERN, "END": END})
    monkeypatch.setitem(public.ENCODING_CONSTRUCTORS, "tiny", real)
    content = b"\n".join(base64.b64encode(t) + b" %d" % r for t, r in ranks_of().items())
    (tmp_path / "tiny.tiktoken").write_bytes(content)
    tokenizer = open_tokenizer(tmp_path / "tiny.tiktoken")
    assert tokenizer.eos_id == 300 and tokenizer.vocabulary_size == 301
    assert tokenizer.encode(" energy") == [ranks_of()[b" energy"]]
    (tmp_path / "copy.json").write_bytes(tokenizer.file_content())
    copy = open_tokenizer(tmp_path / "copy.json")
    assert copy.sha256 == tokenizer.sha256 and copy.encode(TEXTS[3]) == tokenizer.encode(TEXTS[3])


def test_ids_with_threads_in_a_forked_process_after_threads_in_the_parent(tmp_path):
    """The package's threads do not survive a fork; the tools must not stand still for that."""
    file = byte_level(tmp_path / "tokenizer.json")
    write_corpus(tmp_path / "in", num_documents=8)
    program = (
        "import sys; from ebwm_scale.data.tokenizer import open_tokenizer;"
        "from ebwm_scale.data.prepare.text import make_text_dataset;"
        "open_tokenizer(sys.argv[1]).encode_many(['a b'] * 50, num_threads=2);"
        "make_text_dataset([sys.argv[2]], sys.argv[3], tokenizer=sys.argv[1], context_length=8)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, file, tmp_path / "in", tmp_path / "out"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "train: " in done.stdout, done
    assert (Path(tmp_path) / "out" / "tokenizer.json").read_bytes() == file.read_bytes()
