"""The stand-in for pycosat means what the original means."""

import importlib.util
import itertools
import random
from pathlib import Path

import pytest

FILE = Path(__file__).parents[1] / "stand_ins/pycosat/pycosat.py"


@pytest.fixture(scope="module")
def stand_in():
    specification = importlib.util.spec_from_file_location("pycosat_stand_in", FILE)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", range(40))
def test_it_finds_exactly_the_solutions_that_trying_everything_finds(stand_in, seed: int):
    draw = random.Random(seed)
    count = draw.randint(1, 7)
    variables = range(1, count + 1)
    clauses = [
        [draw.choice([-1, 1]) * variable for variable in draw.sample(variables, draw.randint(1, min(3, count)))]
        for _ in range(draw.randint(0, 12))
    ]
    expected = {
        assignment
        for assignment in itertools.product(*[(variable, -variable) for variable in variables])
        if all(set(clause) & set(assignment) for clause in clauses)
    }
    found = [tuple(solution) for solution in stand_in.itersolve(clauses, vars=count)]
    assert len(found) == len(set(found))
    assert set(found) == expected
    one = stand_in.solve(clauses, vars=count)
    assert tuple(one) in expected if expected else one == "UNSAT"


def test_it_solves_a_logic_puzzle_of_many_variables(stand_in):
    """Eight queens, in 64 variables: 92 solutions would take a while, the first one should not."""

    def square(row: int, column: int) -> int:
        return 8 * row + column + 1

    squares = list(itertools.product(range(8), range(8)))
    clauses = [[square(row, column) for column in range(8)] for row in range(8)]
    for (row, column), (other_row, other_column) in itertools.combinations(squares, 2):
        same_line = row == other_row or column == other_column
        if same_line or abs(row - other_row) == abs(column - other_column):
            clauses.append([-square(row, column), -square(other_row, other_column)])
    solution = stand_in.solve(clauses)
    assert sum(literal > 0 for literal in solution) == 8


def test_zero_is_no_literal(stand_in):
    with pytest.raises(ValueError, match="not 0"):
        stand_in.solve([[1, 0]])
