"""Before anything is imported: without a GPU the Triton kernels run in Triton's interpreter.

And the order: what takes longest comes first.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as ebwm_scale does, before torch is loaded

import pytest
import torch
from kinds import ProcessGuard, kind_of

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# A module stays with one worker (--dist loadscope). So that none is left with a long one at the
# end, those that take minutes start first.
LONGEST = (
    "training/test_runs",
    "training/test_reliability",
    "training/test_zero",
    "cluster/test_sbatch",
    "training/test_weight_average",
    "training/test_text_stream_runs",
    "training/test_remote_checkpoints",
    "training/test_extending",
    "training/test_optimizer",
    "training/test_video_runs",
    "training/test_world_runs",
    "kernels/test_attention_compiled",
    "cluster/test_failures",
    "training/test_bad_input",
    "training/test_stop",
    "training/test_preflight",
    "training/test_ownership",
    "training/test_full_disk",
    "training/test_conversion",
    "training/test_one_rank",
    "training/test_suspension",
    "documentation/test_documented_commands",
)


guard = ProcessGuard()


@pytest.hookimpl(tryfirst=True)  # before -m selects by marks
def pytest_collection_modifyitems(items):
    for item in items:
        kind = kind_of(item)
        if kind is not None:
            item.add_marker(kind)
    place = {name: index for index, name in enumerate(LONGEST)}
    items.sort(
        key=lambda item: place.get("/".join(item.path.with_suffix("").parts[-2:]), len(place))
    )


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config, log):
    if config.option.dist != "loadscope":
        return None
    from lost_workers import Scheduling

    return Scheduling(config, log)


@pytest.fixture
def open_run_folder():
    """open_run_folder(path, config): the run folder of a run of one process, which owns it."""
    from ebwm_scale.core.faults import Faults
    from ebwm_scale.core.ownership import Ownership
    from ebwm_scale.core.world import World
    from ebwm_scale.training.run_folder import RunFolder

    opened = []

    def open_it(path, config):
        faults = Faults(None, 0)
        world = World(0, 1, 0, torch.device("cpu"))
        folder = RunFolder(path, config, world, faults, Ownership(path, faults))
        folder.take()
        opened.append(folder)
        return folder

    yield open_it
    for folder in opened:
        folder.ownership.release(unsaved=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A unit test, its fixtures included, starts no process."""
    guard.started.clear()
    # Only where units are asked for (-m unit): elsewhere the mark selects nothing.
    is_asked_for = item.config.option.markexpr.strip() == "unit"
    guard.watching = is_asked_for and item.get_closest_marker("unit") is not None
    try:
        return (yield)
    finally:
        guard.watching = False


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item):
    if item.get_closest_marker("unit") and guard.started:
        pytest.fail(
            f"a unit test started {guard.started[0]}; mark it with pytest.mark.multiprocess",
            pytrace=False,
        )
