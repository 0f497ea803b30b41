"""A trace of some steps from inside a run (logging.profile: [first step, steps]).

    profile/steps_000010-000012_rank_0.trace.json.gz    torch.profiler: perfetto.dev, chrome://tracing
    profile/steps_000010-000012_rank_0.memory.pickle    on a GPU: pytorch.org/memory_viz
    profile/steps_000010-000012_rank_0.memory.json      on a CPU: {"unit", "points": [[ms, bytes]]}

Every process writes its own. Steps take longer while they are traced, and their numbers stay. A
process that resumes within these steps traces none of them; one that stops within them writes what
it has.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ebwm_scale.core.world import World

FOLDER = "profile"
MOST_ALLOCATIONS = 1_000_000  # that a memory snapshot of a GPU remembers


class StepProfile:
    """before(step) and after(step) stand around each step, counted from 1.

    wanted: (first step, steps), or None. tell, warn: of the files, or of why there are
    none.
    """

    def __init__(
        self,
        wanted: tuple[int, int] | None,
        run_dir: Path,
        world: World,
        tell: Callable[[str], None],
        warn: Callable[[str], None],
    ):
        self.first = self.last = 0
        if wanted is not None:
            self.first, self.last = wanted[0], wanted[0] + wanted[1] - 1
        self._folder = run_dir / FOLDER
        self._world = world
        self._tell, self._warn = tell, warn
        self._profile: profile | None = None
        self._done = 0  # the last step that was traced

    @property
    def _on_gpu(self) -> bool:
        return self._world.device.type == "cuda"

    def before(self, step: int) -> None:
        if step != self.first:
            return
        activities = [ProfilerActivity.CPU]
        if self._on_gpu:
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=MOST_ALLOCATIONS)
        self._profile = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._profile.start()

    def after(self, step: int) -> None:
        self._done = step
        if step == self.last:
            self.close()

    def close(self) -> None:
        """Write what was traced, if a trace is open. A disk that is full costs the trace alone."""
        if self._profile is None:
            return
        running, self._profile = self._profile, None
        running.stop()
        name = f"steps_{self.first:06d}-{self._done:06d}_rank_{self._world.rank}"
        try:
            if self._done >= self.first:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._write(running, name)
                self._tell(f"traced steps {self.first} to {self._done}: {self._folder / name}.*")
        except (OSError, RuntimeError) as error:
            self._warn(f"the trace could not be written to {self._folder}: {error}")
        finally:
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)

    def _write(self, running: profile, name: str) -> None:
        trace = self._folder / f"{name}.trace.json.gz"
        running.export_chrome_trace(str(trace))
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
            return
        with gzip.open(trace, "rt", encoding="utf-8") as file:
            timeline = memory_timeline(json.load(file))
        (self._folder / f"{name}.memory.json").write_text(json.dumps(timeline))


def memory_timeline(trace: dict[str, Any]) -> dict[str, Any]:
    """What tensors of the CPU take over the time of a trace, from the events of the allocator.

    {"unit": "bytes", "points": [[milliseconds since the first event, bytes], ...], "peak": bytes}:
    beyond what was allocated before the trace began, so it may be below 0.
    """
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    events = [event for event in events if event["args"]["Device Type"] == 0]
    events.sort(key=lambda event: event["ts"])
    points, total = [], 0
    for event in events:
        total += event["args"]["Bytes"]
        points.append([(event["ts"] - events[0]["ts"]) / 1000, total])
    return {"unit": "bytes", "points": points, "peak": max((p[1] for p in points), default=0)}
