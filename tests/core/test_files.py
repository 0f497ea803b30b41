"""Small files are read whole if they are files: what would be waited for is refused at once."""

import os
import signal

import pytest

from ebwm_scale.checkpoint.files import check_files
from ebwm_scale.core.errors import CheckpointError, DataError
from ebwm_scale.core.files import read_small
from ebwm_scale.core.strict_json import other_version
from ebwm_scale.data.format.manifest import load_manifest


@pytest.fixture
def alarm():
    """Whoever waits for a pipe is ended."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits for a named pipe"))
    signal.alarm(5)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@pytest.mark.parametrize(
    "read, refusal", [(load_manifest, DataError), (check_files, CheckpointError)]
)
def test_a_manifest_that_is_a_named_pipe_is_refused_and_not_waited_for(
    tmp_path, alarm, read, refusal
):
    os.mkfifo(tmp_path / "manifest.json")
    with pytest.raises(refusal, match=r"manifest\.json.*not a regular file"):
        read(tmp_path)


def test_a_small_file_is_read_and_a_larger_one_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"abc")
    assert read_small(tmp_path / "file", 3) == b"abc"
    with pytest.raises(ValueError, match="it has 3 bytes, at most 2 are read"):
        read_small(tmp_path / "file", 2)


@pytest.mark.parametrize("values", [{}, {"version": 3}, {"version": True}, {"version": 2.0}, []])
def test_another_format_version_is_said_with_the_one_that_is_read(values):
    assert other_version({"version": 2}, "version", 2) is None
    assert "this release reads 2" in other_version(values, "version", 2)
