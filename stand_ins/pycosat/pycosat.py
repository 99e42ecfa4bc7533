"""A stand-in for the package pycosat on machines without a C compiler.

reasoning-gym needs pycosat to be importable; pycosat is published only as C source. Only its logic-grid
puzzles call it, motley's problem families never do. `make` installs this one where C cannot be compiled, and
says so. Same functions, same meaning, slow: it tries, simplifies and goes back (Davis, Putnam, Logemann and
Loveland, 1962).
"""

from collections.abc import Iterable, Iterator

__version__ = "0.6.6+pure.python"

Clause = frozenset[int]


def solve(clauses: Iterable[Iterable[int]], vars: int = -1) -> list[int] | str:
    """One solution as signed variables 1..n, or "UNSAT"."""
    return next(itersolve(clauses, vars), "UNSAT")


def itersolve(clauses: Iterable[Iterable[int]], vars: int = -1) -> Iterator[list[int]]:
    """Every assignment of the variables 1..n (n: the largest named, or `vars`) that fulfils all clauses."""
    formula = [frozenset(clause) for clause in clauses]
    if any(literal == 0 for clause in formula for literal in clause):
        raise ValueError("a literal is a variable's number, positive or negative, not 0")
    count = max([vars, *(abs(literal) for clause in formula for literal in clause)])
    for chosen in _solutions(formula, frozenset()):
        free = [variable for variable in range(1, count + 1) if variable not in map(abs, chosen)]
        for choice in range(2 ** len(free)):  # variables no clause depends on any more
            signs = {variable: variable if choice >> i & 1 else -variable for i, variable in enumerate(free)}
            signs |= {abs(literal): literal for literal in chosen}
            yield [signs[variable] for variable in range(1, count + 1)]


def _solutions(formula: list[Clause], chosen: Clause) -> Iterator[Clause]:
    """Sets of literals that fulfil `formula`, no assignment in two of them; `chosen` is already decided."""
    while units := [clause for clause in formula if len(clause) < 2]:
        if not all(units):
            return  # a clause with nothing left to fulfil it
        (literal,) = units[0]
        formula, chosen = _given(formula, literal), chosen | {literal}
    if not formula:
        yield chosen
        return
    literal = next(iter(min(formula, key=len)))
    for choice in (literal, -literal):
        yield from _solutions(_given(formula, choice), chosen | {choice})


def _given(formula: list[Clause], literal: int) -> list[Clause]:
    """What remains of `formula` once `literal` is true."""
    return [clause - {-literal} for clause in formula if literal not in clause]
