"""What a plan is chosen by: time, cost, cost under a deadline, or fewest chips under one.

Cheaper plans leave pools out, or rent fewer nodes of one. Subsets of up to six pools are all tried; of more, pools are
dropped one at a time as long as that helps (and every pool alone is tried).
"""

from collections.abc import Callable
from itertools import combinations
from typing import Literal

from motley.errors import InputError
from motley.plan.search.search import Searcher
from motley.plan.search.solution import FoundPlan

Objective = Literal["time", "cost", "chips"]
ALL_SUBSETS = 6  # pools


def best_plan(searcher: Searcher, objective: Objective, deadline_seconds: float | None) -> tuple[Searcher, FoundPlan]:
    """(the searcher of the fleet to rent, the plan).

    Raises InputError when nothing fits, or nothing meets the deadline.
    """
    fastest = searcher.best()
    if fastest is None:
        raise searcher.refusal()
    if objective == "chips" and deadline_seconds is None:
        raise InputError(
            "--objective chips needs --deadline-days: without one, the fewest chips that hold the model win"
        )
    if deadline_seconds is not None and fastest.expected_seconds > deadline_seconds:
        raise InputError(
            f"--deadline-days {deadline_seconds / 86400:g} cannot be met: all chips together need "
            f"{fastest.expected_seconds / 86400:,.1f} days with failures; allow more days, fewer tokens or more chips"
        )
    if objective == "time":
        return searcher, fastest

    def worth(plan: FoundPlan) -> float:
        return plan.cost if objective == "cost" else float(plan.chips)

    def allowed(plan: FoundPlan | None) -> bool:
        return plan is not None and (deadline_seconds is None or plan.expected_seconds <= deadline_seconds)

    best = min(_subsets(searcher, fastest, worth, allowed), key=worth)
    if deadline_seconds is None:
        return searcher, best
    return _fewer_nodes(searcher, best, worth, allowed)


def _subsets(
    searcher: Searcher,
    fastest: FoundPlan,
    worth: Callable[[FoundPlan], float],
    allowed: Callable[[FoundPlan | None], bool],
) -> list[FoundPlan]:
    names = [pool.name for pool in searcher.fleet.pools]
    if len(names) <= ALL_SUBSETS:
        chosen = [subset for size in range(1, len(names) + 1) for subset in combinations(names, size)]
        plans = [searcher.best(subset) for subset in chosen]
        return [plan for plan in plans if plan is not None and allowed(plan)]
    found = [fastest]
    kept = list(names)
    while len(kept) > 1:
        plans = [(searcher.best([name for name in kept if name != left]), left) for left in kept]
        better = [(plan, left) for plan, left in plans if plan is not None and allowed(plan)]
        if not better:
            break
        plan, left = min(better, key=lambda pair: worth(pair[0]))
        if worth(plan) >= worth(found[-1]):
            break
        found.append(plan)
        kept.remove(left)
    return found + [plan for name in names if (plan := searcher.alone(name)) is not None and allowed(plan)]


def _fewer_nodes(
    searcher: Searcher,
    best: FoundPlan,
    worth: Callable[[FoundPlan], float],
    allowed: Callable[[FoundPlan | None], bool],
) -> tuple[Searcher, FoundPlan]:
    """Rent fewer nodes of each pool in turn, where the deadline leaves time: the slowest per $ first."""
    used = {name for group in best.groups for name in group.pools}
    for pool in searcher.fleet.pools:
        if pool.name not in used:
            searcher = _without(searcher, pool.name)
    order = sorted(
        (pool for pool in searcher.fleet.pools),
        key=lambda pool: pool.flops(pool.best_precision) / max(pool.price, 1e-9),
    )
    for pool in order:
        low, high = 0, pool.nodes  # the deadline is met with `high`
        kept: tuple[Searcher, FoundPlan] | None = None
        while high - low > 1:
            middle = (low + high) // 2
            trial = searcher.with_nodes(pool.name, middle)
            plan = trial.best()
            if plan is not None and allowed(plan) and worth(plan) <= worth(best):
                high, kept = middle, (trial, plan)
            else:
                low = middle
        if kept is not None:
            searcher, best = kept
    return searcher, best


def _without(searcher: Searcher, name: str) -> Searcher:
    known = {group: options for group, options in searcher.options.items() if name not in group}
    return Searcher(searcher.fleet.without([name]), searcher.workload, known=known)
