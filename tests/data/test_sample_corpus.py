import io
import subprocess
import tarfile

import pytest

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.data.prepare import fetching, sample_corpus
from ebwm_scale.data.prepare.sample_corpus import ARCHIVE_NAME, fetch_sample_corpus

GOOD = {
    "django-5.2.8/docs/index.txt": "welcome",
    "django-5.2.8/docs/ref/models.txt": "models",
    "django-5.2.8/docs/conf.py": "code",
    "django-5.2.8/django/other.txt": "not documentation",
    "django-5.2.8/LICENSE": "BSD",
    "django-5.2.8/docs/deep/er/x.txt": "deeper",
}


def make_archive(path, members, links=()):
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
        for name, target in links:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


def fetch(output, archive, said=None):
    path = archive / ARCHIVE_NAME if archive.is_dir() else archive
    return fetch_sample_corpus(
        output,
        archive=archive,
        archive_sha256=file_sha256(path),
        report=(said if said is not None else []).append,
    )


def contents(folder):
    return {
        str(p.relative_to(folder)): p.read_text()
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".")
    }


def test_only_documentation_text_and_the_licence_are_extracted(tmp_path):
    archive = make_archive(
        tmp_path / ARCHIVE_NAME, GOOD, links=[("django-5.2.8/docs/link.txt", "/etc/passwd")]
    )
    fetch(tmp_path / "corpus", archive)
    assert contents(tmp_path / "corpus") == {
        "docs/index.txt": "welcome",
        "docs/ref/models.txt": "models",
        "docs/deep/er/x.txt": "deeper",
        "LICENSE": "BSD",
    }


@pytest.mark.parametrize(
    "name",
    [
        "../evil.txt",
        "django-5.2.8/docs/../../../evil.txt",
        "/django-5.2.8/docs/evil.txt",
        "django-5.2.8/docs/..\\evil.txt",
    ],
)
def test_paths_that_leave_the_archive_are_refused_and_nothing_is_left(tmp_path, name):
    archive = make_archive(tmp_path / ARCHIVE_NAME, {**GOOD, name: "evil"})
    with pytest.raises(DataError, match="leads out of the archive"):
        fetch(tmp_path / "corpus", archive)
    assert [p.name for p in tmp_path.iterdir()] == [ARCHIVE_NAME] and not list(
        tmp_path.parent.glob("evil*")
    )


def test_second_run_needs_neither_network_nor_archive(tmp_path, monkeypatch):
    archive = make_archive(tmp_path / ARCHIVE_NAME, GOOD)
    digest, said = file_sha256(archive), []
    fetch(tmp_path / "corpus", tmp_path)  # the folder of the archive does as well
    archive.unlink()
    monkeypatch.setattr(
        fetching.subprocess, "run", lambda *a, **k: pytest.fail("went to the network")
    )
    assert (
        fetch_sample_corpus(tmp_path / "corpus", archive_sha256=digest, report=said.append)
        == tmp_path / "corpus"
    )
    assert "already there" in said[0]


def test_half_extracted_corpus_is_made_again(tmp_path):
    archive = make_archive(tmp_path / ARCHIVE_NAME, GOOD)
    fetch(tmp_path / "corpus", archive)
    (tmp_path / "corpus" / "docs" / "index.txt").unlink()
    fetch(tmp_path / "corpus", archive)
    assert len(contents(tmp_path / "corpus")) == 4


def test_other_content_than_the_pinned_is_refused(tmp_path):
    archive = make_archive(tmp_path / ARCHIVE_NAME, GOOD)
    with pytest.raises(
        DataError, match=f"{file_sha256(archive)}, not the pinned {sample_corpus.ARCHIVE_SHA256}"
    ):
        fetch_sample_corpus(tmp_path / "corpus", archive=archive)
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize(
    "content, expected", [(b"not an archive", "cannot be extracted"), (None, "no such file")]
)
def test_unusable_archive_is_one_clear_error(tmp_path, content, expected):
    path = tmp_path / ARCHIVE_NAME
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=expected):
        fetch_sample_corpus(
            tmp_path / "corpus",
            archive=path,
            archive_sha256="0" * 64 if content is None else file_sha256(path),
        )


def test_truncated_archive_leaves_nothing(tmp_path):
    archive = make_archive(
        tmp_path / ARCHIVE_NAME,
        {**GOOD, "django-5.2.8/docs/z.txt": "".join(chr(33 + i * i % 90) for i in range(50_000))},
    )
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(DataError, match="cannot be extracted"):
        fetch(tmp_path / "corpus", archive)
    assert not (tmp_path / "corpus").exists()


def test_archive_without_documentation_is_refused(tmp_path):
    with pytest.raises(DataError, match="no docs/"):
        fetch(
            tmp_path / "corpus",
            make_archive(tmp_path / ARCHIVE_NAME, {"django-5.2.8/setup.py": "code"}),
        )


def test_without_a_network_the_error_says_what_to_do_instead(tmp_path, monkeypatch):
    commands = []

    def no_network(command, **options):
        commands.append(command)
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: No matching distribution found\nlast words"
        )

    monkeypatch.setattr(fetching.subprocess, "run", no_network)
    with pytest.raises(
        DataError, match=r"No matching distribution found.*--archive.*any folder of text"
    ) as error:
        fetch_sample_corpus(tmp_path / "corpus")
    assert "\n" not in str(error.value) and "--require-hashes" in commands[0]
