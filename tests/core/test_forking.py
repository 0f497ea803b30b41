"""What a forked process does with its parent's garbage: nothing."""

import contextlib
import gc
import multiprocessing
import os

import pytest

from ebwm_scale.core.forking import parents_objects_kept

pytestmark = pytest.mark.multiprocess


class Frame:
    """Says so when another process than its own destroys it; only a garbage collector finds it."""

    def __init__(self, sender):
        self.sender = sender
        self.home = os.getpid()
        self.itself = self

    def __del__(self):
        if os.getpid() != self.home:
            self.sender.send("destroyed")


def destroyed_in_a_fork(around_start) -> bool:
    """Whether a fork destroys a frame that its parent has left to its own garbage collector."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    frame = Frame(sender)
    process = multiprocessing.get_context("fork").Process(target=gc.collect)
    with around_start:
        del frame  # garbage from here on, after what the parent collects by itself
        process.start()
    process.join(30)
    assert process.exitcode == 0
    return receiver.poll()


def test_a_fork_destroys_nothing_of_its_parents():
    gc.disable()
    try:
        assert destroyed_in_a_fork(contextlib.nullcontext())  # as it would be
        assert not destroyed_in_a_fork(parents_objects_kept())
        assert gc.get_freeze_count() == 0
    finally:
        gc.enable()
