"""Colours for the nodes of a graph, no two neighbours alike: the solver behind Sudoku and graph
colouring.

A node's candidates are the bits of a number. Per round all nodes with one candidate left are
filled in, and their neighbours lose it. Where no round helps any more, the values of a node with
the fewest candidates are tried one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ebwm_scale.data.prepare.reasoning.instance import Draws

Neighbours = Sequence[Sequence[int]]


class Search:
    """All solutions up to `limit`, and the steps it took to find them.

    neighbours: of each node. candidates: of each node, one bit per value. draws: tries values in
    random order; without, the lowest first. steps: rounds of filling in, over all values tried.
    """

    def __init__(
        self,
        neighbours: Neighbours,
        candidates: Sequence[int],
        *,
        limit: int = 1,
        draws: Draws | None = None,
    ):
        self.neighbours, self.limit, self.draws = neighbours, limit, draws
        self.solutions: list[list[int]] = []  # values 0, 1, .. of the nodes
        self.steps = 0
        self._run(list(candidates), set())

    def _run(self, candidates: list[int], filled: set[int]) -> None:
        if not self._fill_in(candidates, filled):
            return
        undecided = [node for node in range(len(candidates)) if node not in filled]
        if not undecided:
            self.solutions.append([bits.bit_length() - 1 for bits in candidates])
            return
        node = min(undecided, key=lambda n: (candidates[n].bit_count(), n))
        values = _single_bits(candidates[node])
        if self.draws is not None:
            values = self.draws.shuffled(values)
        for value in values:
            trial = list(candidates)
            trial[node] = value
            self._run(trial, set(filled))
            if len(self.solutions) == self.limit:
                return

    def _fill_in(self, candidates: list[int], filled: set[int]) -> bool:
        """Rounds until none helps; whether no node is left without a candidate."""
        while True:
            forced = [
                node
                for node, bits in enumerate(candidates)
                if bits & (bits - 1) == 0 and node not in filled
            ]
            if not forced:
                return True
            self.steps += 1
            for node in forced:
                if candidates[node] == 0:
                    return False
                filled.add(node)
                for other in self.neighbours[node]:
                    candidates[other] &= ~candidates[node]
                    if candidates[other] == 0:
                        return False


def thinned(
    given: Sequence[int], order: Sequence[int], open_value: int, unique: Callable[[list[int]], bool]
) -> list[int]:
    """`given` with as many of the nodes in `order` opened as leave the solution unique.

    Opened: set to open_value, all candidates. Nodes are tried together first, and by halves where
    that leaves several solutions, which asks the solver less often than one by one.
    """
    result = list(given)
    waiting = [list(order)]
    while waiting:
        part = waiting.pop()
        trial = list(result)
        for node in part:
            trial[node] = open_value
        if unique(trial):
            result = trial
        elif len(part) > 1:
            middle = len(part) // 2
            waiting += [part[middle:], part[:middle]]
    return result


def _single_bits(bits: int) -> list[int]:
    """Each bit of a number, the lowest first."""
    found = []
    while bits:
        lowest = bits & -bits
        found.append(lowest)
        bits ^= lowest
    return found
