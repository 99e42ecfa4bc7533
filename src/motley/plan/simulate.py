"""`motley plan simulate`: weeks of training replayed event by event, failures and stragglers included.

    events    chip or node fails | node leaves with notice, joins | a chip becomes slow, recovers | checkpoint
    on a failure the step in flight and everything since the last checkpoint is lost; the run restarts, and
      with a spare node     it takes over: the same speed
      without               the pool forms copies of the nodes it has left until the repair: the run goes on slower
    goodput   = useful seconds at full speed / seconds that passed

Failures are drawn per pool (exponential, the rate of all its chips together), so that the number of events grows with
failures, not with chips or steps: months on 16,000 chips take well under a second a run.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from motley.errors import InputError

CHECKPOINT_SECONDS = 60.0  # the run stands still while a snapshot is taken
RESTART_SECONDS = 600.0  # noticing, re-planning, starting, reading the checkpoint
REPLAN_SECONDS = 60.0  # announced changes of membership: shares again, states move
REPAIR_HOURS = 24.0
AWAY_HOURS = 12.0
STRAGGLER_HOURS = 2.0
STRAGGLERS_PER_FAILURE = 1.0  # slow chips are about as frequent as dead ones (Llama 3, 3.3.4)
STRAGGLER_SPEED = 0.7
MOST_DAYS = 20_000
MOST_EVENTS = 2_000_000
LOSSES = ("checkpoints", "work since the last checkpoint", "restarts", "re-plans", "missing and slow chips")


@dataclass(frozen=True)
class SimulateSettings:
    """Assumptions of a replay.

    Attributes:
        checkpoint_seconds: standstill while one is written.
        checkpoint_interval_seconds: between two; None: the optimum by Young and Daly.
        restart_seconds: from a failure to the next step.
        replan_seconds: standstill when a node joins, or leaves with notice.
        repair_hours: until the node of a failed chip is back.
        away_hours: mean absence of a node of a pool whose availability is below 1.
        spare_share: nodes kept aside, as a share of each pool.
        straggler_hours, stragglers_per_failure, straggler_speed: slow chips; shares adapt, so one costs what it lacks.
        runs: replays, with different seeds.
    """

    checkpoint_seconds: float = CHECKPOINT_SECONDS
    checkpoint_interval_seconds: float | None = None
    restart_seconds: float = RESTART_SECONDS
    replan_seconds: float = REPLAN_SECONDS
    repair_hours: float = REPAIR_HOURS
    away_hours: float = AWAY_HOURS
    spare_share: float = 0.0
    straggler_hours: float = STRAGGLER_HOURS
    stragglers_per_failure: float = STRAGGLERS_PER_FAILURE
    straggler_speed: float = STRAGGLER_SPEED
    runs: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("checkpoint_seconds", "restart_seconds", "repair_hours", "away_hours", "straggler_hours"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name):g}; it must be above 0")
        for name in ("spare_share", "stragglers_per_failure", "replan_seconds"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')} is {getattr(self, name):g}; it must be 0 or more")
        if not 0 < self.straggler_speed <= 1:
            raise InputError(f"--straggler-speed is {self.straggler_speed:g}; it must be above 0 and at most 1")
        if self.checkpoint_interval_seconds is not None and not self.checkpoint_interval_seconds > 0:
            raise InputError(
                f"--checkpoint-interval-seconds is {self.checkpoint_interval_seconds:g}; it must be above 0"
            )
        if self.runs < 1:
            raise InputError(f"--runs is {self.runs}; it must be at least 1")


def best_interval(hours_between_failures: float, checkpoint_seconds: float) -> float:
    """Seconds between checkpoints that lose least: sqrt(2 C M) - C (Young 1974, Daly 2006), at least C."""
    if math.isinf(hours_between_failures):
        return math.inf
    return max(
        math.sqrt(2 * checkpoint_seconds * hours_between_failures * 3600) - checkpoint_seconds, checkpoint_seconds
    )


def expected_goodput(
    hours_between_failures: float, checkpoint_seconds: float, restart_seconds: float, interval: float | None = None
) -> tuple[float, float]:
    """(goodput, interval) expected to first order: checkpoints, half an interval and a restart per failure."""
    interval = best_interval(hours_between_failures, checkpoint_seconds) if interval is None else interval
    if math.isinf(interval):
        return 1.0, interval
    lost = (restart_seconds + interval / 2) / (hours_between_failures * 3600)
    return 1 / ((1 + checkpoint_seconds / interval) * (1 + lost)), interval


@dataclass(frozen=True)
class PoolRate:
    """How a pool matters to a run.

    Attributes:
        chips: that the plan uses; of `nodes` with `per_node` chips each (nodes it leaves idle are spares).
        hours_between_failures: of one chip, its part of failures of whole nodes included.
        flops_share: its part of the work.
        replica_chips: chips of it in one copy of the model.
        availability: share of the time that its nodes are there at all.
    """

    name: str
    chips: int
    nodes: int
    per_node: int
    hours_between_failures: float
    flops_share: float
    replica_chips: int
    availability: float

    def lacking(self, missing_nodes: int, slow_chips: int, straggler_speed: float) -> float:
        """Share of the pool's speed that is lost: only whole copies count, a slow chip slows its copy alone."""
        present = min(self.chips, max(self.nodes - missing_nodes, 0) * self.per_node)
        working = present // self.replica_chips * self.replica_chips
        hindered = min(slow_chips * self.replica_chips, working) * (1 - straggler_speed)
        return 1 - (working - hindered) / self.chips


def pool_rates(plan: Mapping[str, Any]) -> list[PoolRate]:
    """From a plan file. Raises InputError where it is none."""
    try:
        rows = []
        for pool in plan["pools"]:
            if not pool["chips"]:
                continue
            teams = [team for team in plan["teams"] if pool["pool"] in team["pools"]]
            rows.append(
                PoolRate(
                    name=pool["pool"],
                    chips=pool["chips"],
                    nodes=pool["nodes"],
                    per_node=pool["chips_per_node"],
                    hours_between_failures=pool["hours_between_failures"],
                    flops_share=pool["flops_share"],
                    replica_chips=max(team["chips"][pool["pool"]] // team["dp"] for team in teams),
                    availability=pool["availability"],
                )
            )
    except (KeyError, TypeError, ValueError) as problem:
        raise InputError(f"this is no plan as `motley plan --out` writes it: {problem!r} is missing or wrong") from None
    if not rows:
        raise InputError("the plan uses no chips")
    return rows


def simulate_plan(plan: Mapping[str, Any], settings: SimulateSettings) -> dict[str, Any]:
    """Replay the plan `settings.runs` times."""
    pools = pool_rates(plan)
    hours = 1 / sum(pool.chips / pool.hours_between_failures for pool in pools)
    interval = settings.checkpoint_interval_seconds or best_interval(hours, settings.checkpoint_seconds)
    useful = float(plan["steps"]) * float(plan["step_seconds"])
    if not 0 < useful < MOST_DAYS * 86400:
        raise InputError(
            f"the plan takes {useful / 86400:,.0f} days without failures; the replay stops at {MOST_DAYS:,}"
        )
    runs = [
        replay(pools, useful, interval, settings, np.random.default_rng([settings.seed, number]))
        for number in range(settings.runs)
    ]
    days = np.array([run["days"] for run in runs])
    expected, _ = expected_goodput(hours, settings.checkpoint_seconds, settings.restart_seconds, interval)
    return {
        "model": plan["model"],
        "fleet": plan["fleet"],
        "chips": sum(pool.chips for pool in pools),
        "hours_between_failures": hours,
        "checkpoint_interval_seconds": interval,
        "suggested_interval_seconds": best_interval(hours, settings.checkpoint_seconds),
        "days_without_failures": useful / 86400,
        "expected_goodput": expected,
        "goodput": float(np.mean([run["goodput"] for run in runs])),
        "days_mean": float(days.mean()),
        "days_p5": float(np.quantile(days, 0.05)),
        "days_p50": float(np.quantile(days, 0.5)),
        "days_p95": float(np.quantile(days, 0.95)),
        "failures_mean": float(np.mean([run["failures"] for run in runs])),
        "lost_share": {name: float(np.mean([run["lost"][name] for run in runs])) for name in runs[0]["lost"]},
        "runs": [{key: run[key] for key in ("days", "goodput", "failures")} for run in runs],
        "timeline": runs[0]["timeline"],
        "intervals": interval_curve(hours, settings),
    }


def interval_curve(hours: float, settings: SimulateSettings) -> list[tuple[float, float]]:
    """(interval in seconds, expected goodput) around the optimum, to draw."""
    best = best_interval(hours, settings.checkpoint_seconds)
    if math.isinf(best):
        return []
    return [
        (
            best * factor,
            expected_goodput(hours, settings.checkpoint_seconds, settings.restart_seconds, best * factor)[0],
        )
        for factor in np.geomspace(0.1, 10, 41).tolist()
    ]


def replay(
    pools: Sequence[PoolRate], useful: float, interval: float, settings: SimulateSettings, random: np.random.Generator
) -> dict[str, Any]:
    """One run. Work is counted in seconds at full speed; `useful` of them are needed.

    Between events the run goes on at a constant speed and stops for `checkpoint_seconds` every `interval` of running.
    A failure throws back to the last checkpoint and takes its node out until the repair. Nodes that leave with notice
    or (re)join cost a re-plan. Of the nodes that are there, whole copies of the model are formed again.
    """
    spares = {pool.name: int(settings.spare_share * pool.nodes) for pool in pools}
    missing = {pool.name: 0 for pool in pools}
    slow = {pool.name: 0 for pool in pools}
    mean_seconds = {}  # until the next event of a kind on a pool
    for pool in pools:
        failing = pool.hours_between_failures * 3600 / pool.chips
        mean_seconds["failure", pool.name] = failing
        if settings.stragglers_per_failure:
            mean_seconds["straggler", pool.name] = failing / settings.stragglers_per_failure
        if pool.availability < 1:  # so often that on average this share of the nodes is away
            away = pool.nodes * (1 - pool.availability)
            mean_seconds["leaves", pool.name] = settings.away_hours * 3600 / away
    lost: dict[str, float] = dict.fromkeys(LOSSES, 0.0)
    events: list[tuple[float, int, str, str]] = []
    now, done, since = 0.0, 0.0, 0.0  # `since`: full-speed seconds not yet in a checkpoint
    failures, number = 0, 0
    timeline = [(0.0, 0.0)]

    def push(delay: float, kind: str, pool: str) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (now + delay, number, kind, pool))

    def pause(seconds: float, reason: str) -> None:
        nonlocal now
        now += seconds
        lost[reason] += seconds

    for (kind, name), mean in mean_seconds.items():
        push(random.exponential(mean), kind, name)
    running_share = 1 / (1 + settings.checkpoint_seconds / interval) if math.isfinite(interval) else 1.0
    while done < useful:
        speed = 1.0 - sum(
            pool.flops_share
            * pool.lacking(max(missing[pool.name] - spares[pool.name], 0), slow[pool.name], settings.straggler_speed)
            for pool in pools
        )
        speed = max(speed, 0.0)
        rate = speed * running_share
        finish = now + (useful - done) / rate if rate > 0 else math.inf
        at, _, kind, name = events[0]
        passed = max(min(at, finish) - now, 0.0)  # an event during a pause waits for its end
        lost["checkpoints"] += passed * (1 - running_share)
        lost["missing and slow chips"] += passed * running_share * (1 - speed)
        now, done = now + passed, done + passed * rate
        if finish <= at:
            break
        heapq.heappop(events)
        since += passed * rate
        if math.isfinite(interval) and speed > 0:
            since %= interval * speed
        if kind == "failure":
            failures += 1
            thrown = min(since, done)
            done, since = done - thrown, 0.0
            lost["work since the last checkpoint"] += thrown
            pause(settings.restart_seconds, "restarts")
            missing[name] += 1
            push(settings.repair_hours * 3600, "joins", name)
        elif kind == "leaves":
            pause(settings.replan_seconds, "re-plans")
            missing[name] += 1
            push(random.exponential(settings.away_hours * 3600), "joins", name)
        elif kind == "joins":
            pause(settings.replan_seconds, "re-plans")
            missing[name] -= 1
        elif kind == "straggler":
            slow[name] += 1
            push(settings.straggler_hours * 3600, "recovers", name)
        else:
            slow[name] -= 1
        if (kind, name) in mean_seconds:
            push(random.exponential(mean_seconds[kind, name]), kind, name)
        timeline.append((now / 86400, done / useful))
        if now > 10 * MOST_DAYS * 86400 or len(timeline) > MOST_EVENTS:
            raise InputError(
                "with these failures the run hardly ever ends: nearly as much is lost as gained; "
                "add spares, repair faster or checkpoint more often"
            )
    timeline.append((now / 86400, 1.0))
    each = max(1, len(timeline) // 400)
    return {
        "days": now / 86400,
        "goodput": useful / now,
        "failures": failures,
        "lost": {name: seconds / now for name, seconds in lost.items()},
        "timeline": [*timeline[::each], timeline[-1]],
    }
