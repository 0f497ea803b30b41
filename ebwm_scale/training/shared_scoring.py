"""Scoring texts on all ranks: each scores its share, and every rank gets all scores.

    all ranks       SharedScorer.score(pairs)                the same pairs everywhere
    rank 0 alone    with shared.led() as score: ...          the others serve until it is done

The second form is for lm-evaluation-harness, which runs on rank 0 and asks when it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ebwm_scale.core.world import World
from ebwm_scale.inference.scoring import ContinuationScore, Scorer

Pairs = Sequence[tuple[str, str]]


class SharedScorer:
    """scorer: of this rank, with the whole model. heartbeat: before each share."""

    def __init__(self, scorer: Scorer, world: World, heartbeat: Callable[[], None]):
        self.scorer = scorer
        self.world = world
        self.heartbeat = heartbeat

    def score(self, pairs: Pairs) -> list[ContinuationScore]:
        """Every rank must call it, with the same pairs; the scores in their order."""
        self.heartbeat()
        mine = self.scorer.score(list(pairs)[self.world.rank :: self.world.size])
        scores: list[ContinuationScore | None] = [None] * len(pairs)
        for rank, of_rank in enumerate(self.world.all_gather_object(mine)):
            scores[rank :: self.world.size] = of_rank
        assert None not in scores, "each pair is some rank's"
        return [score for score in scores if score is not None]

    def lead(self, function: Callable[[Callable[[Pairs], list[ContinuationScore]]], object]):
        """function(score) on rank 0 while the other ranks score their shares; its result on every
        rank. What it raises, each rank raises as a RuntimeError. Every rank must call it.
        """
        if not self.world.is_main:
            while (asked := self.world.broadcast_object(None)) is not None:
                self.score(asked)
            result, problem = self.world.broadcast_object(None)
        else:
            result, problem = None, None
            try:
                result = function(self._asked_by_rank_0)
            except Exception as error:  # noqa: BLE001  a task's own code; the others wait
                problem = f"{type(error).__name__}: {error}"
            self.world.broadcast_object(None)
            self.world.broadcast_object((result, problem))
        if problem is not None:
            raise RuntimeError(problem)
        return result

    def _asked_by_rank_0(self, pairs: Pairs) -> list[ContinuationScore]:
        pairs = list(pairs)
        if not pairs:
            return []
        self.world.broadcast_object(pairs)
        return self.score(pairs)
