"""Look-ups of several hops: a random permutation f of eight nodes, then questions for
f(f(..x)).

    ah bc cd de ef fg ga hb? a>>b c>>e ..

Each pair is a node and where it points to, in random order. A question is a node, one `>` per hop,
and the answer, which alone is scored. So more hops than in training need no new symbols. All
questions of an instance take the same number of hops, which is its difficulty.
"""

from __future__ import annotations

from ebwm_scale.data.prepare.reasoning.instance import Draws, Family, Instance

NODES = "abcdefgh"
QUESTIONS = 4


def draw(draws: Draws, size: int) -> Instance:
    """size: hops."""
    points_to = dict(zip(NODES, draws.shuffled(NODES)))
    pairs = [node + points_to[node] for node in draws.shuffled(NODES)]
    asked = draws.shuffled(NODES)[:QUESTIONS]
    solution, scored = "", ""
    for node in asked:
        question = f" {node}{'>' * size}"
        solution += question + followed(node, points_to, size)
        scored += "0" * len(question) + "1"
    return Instance(
        puzzle=" ".join(pairs) + "?",
        solution=solution,
        scored=scored + "0",  # the end is no answer
        difficulty=size,
        identity=f"{' '.join(sorted(pairs))}?{size}{''.join(sorted(asked))}",
    )


def followed(node: str, points_to: dict[str, str], hops: int) -> str:
    """Where so many hops lead."""
    for _ in range(hops):
        node = points_to[node]
    return node


FAMILY = Family(
    name="hops",
    symbols=f"{NODES}>?",
    sizes=range(1, 33),
    size_word="hops",
    draw=draw,
    longest=lambda size: 3 * len(NODES) + QUESTIONS * (3 + size),
)
