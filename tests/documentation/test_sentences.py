"""Sentences of the documents have at most 30 words: prose only, no tables, lists or code."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_WORDS = 30
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "kernels" / "README.md"])


def paragraphs(text: str) -> list[str]:
    """The prose of a page, a string per paragraph."""
    text = re.sub(r"^(```|~~~).*?^\1", "\n", text, flags=re.M | re.S)
    text = re.sub(r"<!--.*?-->|<(picture|div|p)\b.*?</\1>", "\n", text, flags=re.S)
    found = []
    for block in re.split(r"\n\s*\n", text):
        lines = block.strip("\n").split("\n")
        kept = []
        in_list = False
        for line in lines:
            if re.match(r"\s*([*+-]|\d+\.)\s", line):
                in_list = True  # with the lines that go on below it
            elif not in_list and not re.match(r"\s{2,}|\||#|!\[|:::|!!!", line):
                kept.append(line)
        if kept:
            found.append(" ".join(kept))
    return found


def sentences(paragraph: str) -> list[str]:
    """A paragraph cut at full stops, question and exclamation marks that end a sentence."""
    plain = re.sub(r"`[^`]*`", "code", paragraph)
    plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", plain)
    plain = plain.replace("**", "")
    return re.split(r"(?<=[.!?])[\")\]]*\s+(?=[\"(\[A-Z0-9c])", plain)


def words(sentence: str) -> list[str]:
    return [word for word in sentence.split() if re.search(r"\w", word)]


def long_sentences(text: str) -> list[str]:
    found = []
    for paragraph in paragraphs(text):
        for sentence in sentences(paragraph):
            count = len(words(sentence))
            if count > MOST_WORDS:
                found.append(f"{count} words: {sentence}")
    return found


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_sentences_are_short(page):
    found = long_sentences(page.read_text(encoding="utf-8"))
    assert not found, "\n".join([f"{page_id(page)}: at most {MOST_WORDS} words", *found])


def test_what_is_prose_and_what_is_not():
    long = " ".join(["word"] * 31)
    assert len(long_sentences(f"{long}.")) == 1
    assert len(long_sentences(f"A start. {long}\nand more")) == 1
    assert long_sentences(" ".join(["word"] * 30) + ". Next sentence.") == []
    assert (
        long_sentences(f"```\n{long}\n```\n\n    {long}\n\n* {long}\n  {long}\n\n| {long} |") == []
    )
    assert long_sentences(f"`{long}` is [one thing]({'x' * 9}).") == []
