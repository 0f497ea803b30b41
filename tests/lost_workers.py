"""What a worker of pytest-xdist leaves undone when it dies is run by the others.

pytest-xdist 3.8 runs the test it died of again, which the next worker dies of, and then may hang.
A worker starts a test once it knows which one comes next, and asks for more only when a test has
ended. So one that gets a single test, or a module whose tests have all been run, waits for ever.
At the start of a session each worker gets two modules; the one in a dead one's place gets one.
"""

from __future__ import annotations

from xdist.scheduler import LoadScopeScheduling
from xdist.workermanage import WorkerController


class Scheduling(LoadScopeScheduling):
    """--dist loadscope that outlives its workers."""

    def remove_node(self, node: WorkerController) -> str | None:
        """The test that the worker died of; what it had not begun is to be run. None: it had
        nothing left to do.
        """
        modules = self.assigned_work.pop(node)
        left = [
            (tests, name)
            for tests in modules.values()
            for name, has_run in tests.items()
            if not has_run
        ]
        if not left:
            return None
        tests, died_of = left[0]
        tests[died_of] = True
        self.workqueue.update(
            {module: tests for module, tests in modules.items() if not all(tests.values())}
        )
        for other in self.assigned_work:
            self._reschedule(other)
        return died_of

    def _reschedule(self, node: WorkerController) -> None:
        """Every worker has two tests to run, or is told that there are no more."""
        super()._reschedule(node)
        # each time a module more, or the end
        while not node.shutting_down and self._pending_of(self.assigned_work[node]) < 2:
            super()._reschedule(node)
