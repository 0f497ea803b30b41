"""A result says which code it is from: a checkout's commit, also of a folder that another user
owns; an image's; never the commit of a repository that the package merely lies in.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ebwm_scale.core import code_version
from ebwm_scale.core.provenance import provenance

# Nobody's settings: an identity for commits, and no safe.directory of this machine.
QUIET = {
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_CONFIG_SYSTEM": os.devnull,
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.org",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.org",
}


def git(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of one commit, from which the package seems to run."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("EBWM_COMMIT", raising=False)
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "code.py").write_text("1")
    git(folder, "add", "code.py")
    git(folder, "commit", "--quiet", "--message", "a start")
    monkeypatch.setattr(code_version, "ROOT", folder.resolve())
    return folder


def test_a_checkout_says_its_commit_and_whether_files_differ(checkout):
    head = git(checkout, "describe", "--always")
    assert len(head) >= 7 and code_version.commit() == head
    assert provenance()["commit"] == head
    assert code_version.code_version().endswith(f" {head}")
    (checkout / "code.py").write_text("2")
    assert code_version.commit() == f"{head}-dirty"
    assert code_version.uncommitted() == [" M code.py"]


def test_a_checkout_of_another_user_says_its_commit(checkout, monkeypatch):
    head = git(checkout, "describe", "--always")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch for its tests
    refused = subprocess.run(["git", "describe", "--always"], cwd=checkout, capture_output=True)
    assert refused.returncode != 0 and b"ownership" in refused.stderr
    assert code_version.commit() == head


def test_a_package_inside_another_repository_is_not_of_its_commit(checkout, monkeypatch):
    inside = checkout / "venv" / "site-packages"
    inside.mkdir(parents=True)
    monkeypatch.setattr(code_version, "ROOT", inside.resolve())
    assert code_version.commit() == "" and code_version.uncommitted() == []
    assert code_version.code_version() == code_version.__version__


def test_an_image_says_the_commit_that_it_was_built_from(checkout, monkeypatch):
    monkeypatch.setenv("EBWM_COMMIT", "1a2b3c4")
    assert code_version.commit() == git(checkout, "describe", "--always")  # git knows better
    shutil.rmtree(checkout / ".git")
    assert code_version.commit() == "1a2b3c4"
    monkeypatch.setenv("PATH", str(checkout))  # no git, as in small images
    assert code_version.commit() == "1a2b3c4" and provenance()["commit"] == "1a2b3c4"
