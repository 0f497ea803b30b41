"""Reasoning tasks: the answers are right and the only ones, difficulties and splits are what they
are said to be, and the same arguments give the same bytes.
"""

import hashlib
import itertools

import pytest

from ebwm_scale.core.errors import DataError
from ebwm_scale.data.format.shards import open_split
from ebwm_scale.data.format.verify import verify_dataset
from ebwm_scale.data.prepare.reasoning import colouring, hops, mazes, multiplication, sudoku
from ebwm_scale.data.prepare.reasoning.dataset import (
    HARDER,
    Request,
    drawn,
    make_reasoning_dataset,
)
from ebwm_scale.data.prepare.reasoning.families import FAMILIES
from ebwm_scale.data.prepare.reasoning.instance import Draws, Family, Instance
from ebwm_scale.data.prepare.reasoning.search import Search, thinned
from ebwm_scale.data.prepare.reasoning.surroundings import inside
from ebwm_scale.data.tokenizer import open_tokenizer

SMALL = {
    "reachability": 5,
    "shortest-path": 5,
    "sudoku": 4,
    "colouring": 6,
    "multiplication": 2,
    "hops": 2,
}


PINNED = {  # sha256 of the first four instances
    "reachability": "81075a6e15b5",
    "shortest-path": "6e7c3b08d84e",
    "sudoku": "87ed759f98c2",
    "colouring": "a31d4c844187",
    "multiplication": "751d80d26d3e",
    "hops": "d32cffe6c1f6",
}


def instances(name, size, count=25):
    return [FAMILIES[name].draw(Draws("test", name, i), size) for i in range(count)]


def all_colourings(neighbours, candidates):
    """Every right assignment of three values, by trying all of them."""
    found = []
    for values in itertools.product(range(3), repeat=len(neighbours)):
        allowed = all(candidates[node] >> value & 1 for node, value in enumerate(values))
        different = all(
            values[node] != values[other]
            for node, others in enumerate(neighbours)
            for other in others
        )
        if allowed and different:
            found.append(list(values))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_the_search_finds_what_trying_everything_finds(seed):
    draws = Draws("graph", seed)
    neighbours = [[] for _ in range(6)]
    for a, b in itertools.combinations(range(6), 2):
        if draws.chance(0.4):
            neighbours[a].append(b)
            neighbours[b].append(a)
    candidates = [draws.between(1, 7) for _ in range(6)]
    found = Search(neighbours, candidates, limit=10**6).solutions
    assert sorted(found) == all_colourings(neighbours, candidates)
    if found:
        assert Search(neighbours, candidates).solutions[0] in found


def test_thinning_opens_nodes_only_while_the_solution_stays_unique():
    # Node 1 may be opened alone, node 0 alone too, but not both.
    opened = thinned([1, 2, 4], [0, 1], 7, lambda given: given[:2] != [7, 7])
    assert opened.count(7) == 1 and opened[2] == 4


def walked(walls, start, size):
    """Distances by relaxing every edge until nothing changes, and the number of shortest paths by
    walking all of them.
    """
    distance = {start: 0}
    for _ in range(size * size):
        for cell in list(distance):
            for other in mazes.neighbours(cell, size):
                if not walls[other]:
                    distance[other] = min(distance.get(other, 10**6), distance[cell] + 1)

    def ways(cell):
        if cell == start:
            return 1
        before = [
            other
            for other in mazes.neighbours(cell, size)
            if distance.get(other) == distance[cell] - 1
        ]
        return sum(ways(other) for other in before)

    return distance, {cell: ways(cell) for cell in distance}


@pytest.mark.parametrize("seed", range(5))
def test_distances_and_numbers_of_shortest_paths_are_those_of_walking(seed):
    draws, size = Draws("maze", seed), 4
    walls = [draws.chance(0.3) for _ in range(size * size)]
    walls[5] = False
    paths = mazes.paths_from(5, walls, size)
    distance, ways = walked(walls, 5, size)
    for cell in range(size * size):
        assert paths.distance[cell] == distance.get(cell, -1)
        assert paths.ways[cell] == ways.get(cell, 0)


def test_reachable_cells_are_marked_and_the_farthest_is_the_difficulty():
    for instance in instances("reachability", 5):
        walls = [cell == "#" for cell in instance.puzzle]
        distance, _ = walked(walls, instance.puzzle.index("S"), 5)
        assert {i for i, cell in enumerate(instance.solution) if cell == "+"} == set(distance)
        assert instance.difficulty == max(distance.values()) > 0
        assert instance.scored == "".join("0" if wall else "1" for wall in walls)


def test_the_path_is_the_only_shortest_one():
    for instance in instances("shortest-path", 5):
        walls = [cell == "#" for cell in instance.puzzle]
        start, goal = instance.puzzle.index("S"), instance.puzzle.index("G")
        distance, ways = walked(walls, start, 5)
        path = [i for i, cell in enumerate(instance.solution) if cell == "*"]
        assert ways[goal] == 1 and instance.difficulty == distance[goal] == len(path) - 1
        assert {start, goal} <= set(path)
        assert sorted(distance[cell] for cell in path) == list(range(len(path)))


def all_sudokus_of_4():
    rows = list(itertools.permutations("1234"))
    for grid in itertools.product(rows, repeat=4):
        columns = all(len(set(column)) == 4 for column in zip(*grid))
        if columns and all(
            len({*grid[r][c : c + 2], *grid[r + 1][c : c + 2]}) == 4 for r in (0, 2) for c in (0, 2)
        ):
            yield "".join("".join(row) for row in grid)


def test_of_all_small_sudokus_one_fits_each_puzzle():
    grids = list(all_sudokus_of_4())
    assert len(grids) == 288
    for instance in instances("sudoku", 4, 40):
        fitting = [
            grid
            for grid in grids
            if all(given in (".", cell) for given, cell in zip(instance.puzzle, grid))
        ]
        assert fitting == [instance.solution]
        assert instance.scored == "".join("1" if c == "." else "0" for c in instance.puzzle)


@pytest.mark.parametrize("size", [6, 9])
def test_larger_sudokus_are_right_unique_and_some_are_hard(size):
    drawn_ones = instances("sudoku", size, 6)
    for instance in drawn_ones:
        for cell, others in enumerate(sudoku.peers(size)):
            assert all(instance.solution[cell] != instance.solution[other] for other in others)
        everything = (1 << size) - 1
        given = [everything if c == "." else 1 << int(c) - 1 for c in instance.puzzle]
        found = Search(sudoku.peers(size), given, limit=2).solutions
        assert ["".join(str(v + 1) for v in values) for values in found] == [instance.solution]
    assert len({instance.difficulty for instance in drawn_ones}) > 2
    assert all(len(others) == {6: 12, 9: 20}[size] for others in sudoku.peers(size))


def test_one_colouring_fits_each_graph():
    for instance in instances("colouring", 6):
        rows = [instance.puzzle[i * 6 : i * 6 + 6] for i in range(6)]
        neighbours = [[j for j in range(6) if j != i and rows[i][j] == "1"] for i in range(6)]
        given = [
            7 if rows[i][i] == "?" else 1 << colouring.COLOURS.index(rows[i][i]) for i in range(6)
        ]
        colours = [colouring.COLOURS.index(instance.solution[i * 7]) for i in range(6)]
        assert all_colourings(neighbours, given) == [colours]
        assert [i for i, mark in enumerate(instance.scored) if mark == "1"] == [
            i * 7 for i in range(6) if rows[i][i] == "?"
        ]


def test_products_are_right_and_carries_are_counted():
    for instance in instances("multiplication", 3):
        a, b = map(int, instance.puzzle[:-1].split("*"))
        assert 100 <= a <= 999 and 100 <= b <= 999 and int(instance.solution) == a * b
        assert instance.scored == "1" * (len(instance.solution) + 1)
        assert len(instance.puzzle + instance.solution) <= multiplication.FAMILY.longest(3)
    assert multiplication.carries(11, 11) == 0
    assert multiplication.carries(9, 9) == 1
    # 67 * 54: rows 268 (28, 26: two carries) and 3350 (35, 33: two), their sum carries once.
    assert multiplication.carries(67, 54) == 5


@pytest.mark.parametrize("size", [1, 3])
def test_questions_are_answered_by_following_the_pairs(size):
    for instance in instances("hops", size):
        points_to = {pair[0]: pair[1] for pair in instance.puzzle[:-1].split(" ")}
        assert sorted(points_to) == sorted(points_to.values()) == list(hops.NODES)
        for question in instance.solution.split():
            node, answer = question[0], question[-1]
            assert question[1:-1] == ">" * size
            for _ in range(size):
                node = points_to[node]
            assert node == answer
        scored = [c for c, mark in zip(instance.solution, instance.scored) if mark == "1"]
        assert scored == [question[-1] for question in instance.solution.split()]
        assert instance.scored[-1] == "0" and len(instance.scored) == len(instance.solution) + 1
        assert instance.difficulty == size


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_are_pinned_so_that_a_dataset_can_be_made_again_anywhere(name):
    text = "|".join(
        i.puzzle + i.solution + str(i.difficulty) for i in instances(name, SMALL[name], 4)
    )
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == PINNED[name], text


def make(folder, name="sudoku", **changes):
    options = dict(
        sizes=[SMALL[name]],
        num_train=60,
        num_validation=20,
        samples_per_shard=25,
        report=lambda line: None,
    )
    return make_reasoning_dataset(name, folder, **{**options, **changes})


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_the_same_arguments_give_the_same_bytes_and_another_seed_gives_others(tmp_path):
    make(tmp_path / "a", larger=[6])
    make(tmp_path / "b", larger=[6])
    make(tmp_path / "c", seed=1)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a-larger-6") == digests(tmp_path / "b-larger-6")
    assert (
        digests(tmp_path / "a")["train-000000.tar"] != digests(tmp_path / "c")["train-000000.tar"]
    )
    lines = []
    make(tmp_path / "a", report=lines.append)
    assert lines[0].startswith("already there")
    with pytest.raises(DataError, match="differs in settings"):
        make(tmp_path / "a", num_train=61)


@pytest.mark.parametrize("name", ["sudoku", "multiplication", "shortest-path"])
def test_no_instance_is_in_two_splits_or_twice_and_harder_ones_are_held_out(name):
    family, limit = FAMILIES[name], 4
    counts = {"train": 60, "validation": 20, HARDER: 20}
    request = Request(family, (SMALL[name],), counts, limit, 0, 25)
    found = {split: [] for split in counts}
    for split, instance in drawn(request):
        found[split].append(instance)
    assert {split: len(part) for split, part in found.items()} == counts
    identities = [instance.identity for part in found.values() for instance in part]
    assert len(set(identities)) == len(identities)
    assert all(instance.difficulty >= limit for instance in found[HARDER])
    for split in ("train", "validation"):
        assert all(instance.difficulty < limit for instance in found[split])


def test_the_side_of_an_instance_is_its_own_whatever_else_is_drawn():
    family, sides = FAMILIES["multiplication"], []
    # Of one digit there are 45 products, so that both requests draw nearly all of them.
    for sizes, share in (((1,), 1), ((1, 2), 4)):
        counts = {"train": 28 * share, "validation": 7 * share}
        side = {}
        for split, instance in drawn(Request(family, sizes, counts, None, 0, 25)):
            assert instance.identity not in side  # none twice
            side[instance.identity] = split
        sides.append(side)
    both = sides[0].keys() & sides[1].keys()
    assert len(both) > 20 and len({sides[0][identity] for identity in both}) == 2
    assert all(sides[0][identity] == sides[1][identity] for identity in both)


@pytest.mark.parametrize(
    "name, size, same",
    [
        ("multiplication", 2, lambda puzzle: "*".join(puzzle[:-1].split("*")[::-1])),
        ("reachability", 3, lambda puzzle: puzzle[::-1]),  # half a turn
    ],
)
def test_the_same_instance_seen_differently_has_the_same_identity(name, size, same):
    by_puzzle = {}
    for number in range(3000):
        instance = FAMILIES[name].draw(Draws("identity", number), size)
        by_puzzle[instance.puzzle.rstrip("=")] = instance.identity
    pairs = [(p, same(p + "=" if "*" in p else p)) for p in by_puzzle]
    checked = [(p, q) for p, q in pairs if q in by_puzzle and p != q]
    assert len(checked) > 20
    assert all(by_puzzle[p] == by_puzzle[q] for p, q in checked)
    assert sudoku._renumbered("2.1") == sudoku._renumbered("4.3") != sudoku._renumbered("22.")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_dataset_is_sound_and_reads_back_as_the_instances(name, tmp_path):
    (manifest,) = make(tmp_path / "data", name)
    problems, count = verify_dataset(manifest)
    assert problems == [] and count == 80
    split = open_split(manifest, "validation", verify="hashes")
    tokenizer = open_tokenizer(split.manifest.content.tokenizer_path)
    family = FAMILIES[name]
    request = Request(family, (SMALL[name],), {"train": 60, "validation": 20}, None, 0, 25)
    expected = [instance for where, instance in drawn(request) if where == "validation"]
    for sample_id, instance in enumerate(expected):
        marked = split.read(sample_id)
        tokens = [int(t) if t >= 0 else -1 - int(t) for t in marked]
        assert tokenizer.decode(tokens) == instance.puzzle + instance.solution
        scored = [int(t >= 0) for t in marked[split.manifest.content.group_size :]]
        given = [int(mark) for mark in instance.scored]
        if family.grid is None:
            given = [0] * len(instance.puzzle) + given
        assert scored == given + [0] * (len(scored) - len(given))
    assert split.manifest.content.grid == (family.grid(SMALL[name]) if family.grid else None)


def test_mazes_of_several_sizes_stand_anywhere_inside_one_square(tmp_path):
    manifests = make(tmp_path / "data", "reachability", sizes=[3, 4], larger=[5], inside=5)
    places = set()
    for manifest, sizes in zip(manifests, ((3, 4), (5,))):
        assert verify_dataset(manifest)[0] == []
        split = open_split(manifest, "validation", verify="hashes")
        assert split.manifest.content.grid == (5, 5)
        tokenizer = open_tokenizer(split.manifest.content.tokenizer_path)
        for sample_id in range(len(split)):
            tokens = [int(t) if t >= 0 else -1 - int(t) for t in split.read(sample_id)]
            cells = tokenizer.decode(tokens)
            puzzle, solution = cells[:25], cells[25:]
            open_cells = {divmod(i, 5) for i, cell in enumerate(puzzle) if cell != "#"}
            scored = {divmod(i, 5) for i, t in enumerate(split.read(sample_id)[25:]) if t >= 0}
            assert scored == open_cells  # nothing of what stands around is scored
            for axis in (0, 1):
                reach = [cell[axis] for cell in open_cells]
                assert max(reach) - min(reach) < max(sizes)
            # The walls around change no answer: found again in the whole square.
            walls = [cell == "#" for cell in puzzle]
            paths = mazes.paths_from(puzzle.index("S"), walls, 5)
            assert [d >= 0 for d in paths.distance] == [cell == "+" for cell in solution]
            places.add(min(open_cells))
    assert len(places) > 6


def test_a_maze_at_another_place_is_the_same_one():
    family = inside(FAMILIES["reachability"], 7)
    by_identity = {}
    for number in range(400):
        instance = family.draw(Draws("place", number), 3)
        by_identity.setdefault(instance.identity, set()).add(instance.puzzle)
    assert max(map(len, by_identity.values())) > 1
    plain = {FAMILIES["reachability"].draw(Draws("place", n), 3).identity for n in range(400)}
    assert by_identity.keys() == plain


@pytest.mark.parametrize(
    "name, changes, part",
    [
        ("chess", {"sizes": [8]}, "family is chess: must be one of reachability, "),
        ("sudoku", {"sizes": [5]}, "size 5 of sudoku: must be 4, 6, 9 .cells a side"),
        ("sudoku", {"sizes": [4, 6]}, "all grids of a dataset have one size"),
        ("hops", {"sizes": [1, 1]}, "name at least one size, and each once"),
        ("hops", {"sizes": [2], "larger": [2]}, "each once"),
        ("multiplication", {"sizes": [13]}, "size 13 of multiplication: must be 1 to 12"),
        ("multiplication", {"sizes": [1], "num_train": 0}, "training instances is 0"),
        (
            "multiplication",
            {"sizes": [1], "num_train": 99},
            "draws without a new one; ask for fewer",
        ),
        ("hops", {"sizes": [1], "harder_from": 5}, "still missing .*'harder': 20"),
        ("sudoku", {"sizes": [4], "inside": 6}, "inside is 6: nothing can stand around .*sudoku"),
        ("hops", {"sizes": [1], "inside": 6}, "inside is 6: nothing can stand around"),
        (
            "shortest-path",
            {"sizes": [3], "larger": [5], "inside": 4},
            "inside is 4: must be 5, the largest size, to 64",
        ),
        ("shortest-path", {"sizes": [3], "inside": 65}, "inside is 65: must be 3"),
    ],
)
def test_what_cannot_be_made_is_one_line(name, changes, part, tmp_path):
    with pytest.raises(DataError, match=part) as error:
        make(tmp_path / "data", **{"name": name, **changes}) if name in SMALL else (
            make_reasoning_dataset(name, tmp_path, num_train=1, num_validation=1, **changes)
        )
    assert "\n" not in str(error.value) and not (tmp_path / "data").exists()


def family(grid=None, symbols="ab", longest=None, **instance):
    """A family of one's own, all of whose instances are the same but for what they are like."""
    given = {"puzzle": "ab", "solution": "ba", "scored": "10", "difficulty": 1} | instance

    def draw(draws, size):
        return Instance(**given, identity=str(draws.below(10**9)))

    return Family("own", symbols, range(1, 9), "characters", draw, grid=grid, longest=longest)


def flat(size):
    return 1, 2


@pytest.mark.parametrize(
    "own, part",
    [
        (family(), "give grid .* or longest"),
        (family(grid=flat, longest=len), "and not both"),
        (family(grid=flat, symbols="aab"), "different characters"),
        (family(grid=flat, symbols="a b"), "symbols hold ' ': must be printable and no blanks"),
        (family(grid=flat, puzzle="abb"), "puzzle has 3 characters, must .* each of 1 x 2 cells"),
        (family(grid=flat, solution="b"), "solution has 1 characters"),
        (family(grid=flat, scored="1"), "scored has 1 characters"),
        (family(grid=flat, solution="ac"), "'c' is not among the symbols ab"),
        (family(grid=flat, solution="a "), "' ' is not among the symbols ab"),
        (family(grid=flat, scored="00"), "scored is '00': must be of 0 and 1, with a 1 at least"),
        (family(grid=flat, scored="12"), "scored is '12'"),
        (family(grid=flat, difficulty=-1), "difficulty is -1: must be a whole number"),
        (family(grid=flat, difficulty=0.5), "difficulty is 0.5"),
        (family(longest=lambda size: 4), "scored has 2 characters, must have 3: .* the end after"),
        (family(longest=lambda size: 3, scored="101"), "both together at most longest.4. = 3"),
        (family(longest=lambda size: 4, scored="101", puzzle=""), "the puzzle needs one at least"),
    ],
)
def test_a_family_of_ones_own_that_does_not_fit_is_refused_in_one_line(own, part, tmp_path):
    with pytest.raises(DataError, match=part) as error:
        make_reasoning_dataset(
            own, tmp_path / "d", sizes=[4], num_train=1, num_validation=1, report=lambda line: None
        )
    assert "\n" not in str(error.value) and not (tmp_path / "d").exists()
