"""`motley plan simulate`: weeks of training replayed event by event, failures and stragglers included.

    a node fails     work since the last checkpoint is lost, the run restarts, the node is missing until its repair
      a spare node     takes over: the same speed
      no spare         re-plan, then continue on the chips left in the pipeline group, the faster of:
                         whole replicas   [replica][replica][ x  ]  2/3 of the speed; the rest of the lost one idles
                         a new layout     [  one replica over 7/8 ]  0.9 x 7/8: no layout uses all chips perfectly
                       if they cannot hold the model's state, the group stops until the repair
    a node leaves    (a pool whose availability is below 1) with notice: no work is lost, re-plan as above
    a node is back   re-plan if it was needed
    a chip is slow   slows its replica alone, for some hours; the batch is divided anew

    speed of the run = sum over pipeline groups of share of the batch x speed of the group
    goodput          = useful seconds at full speed / seconds that passed

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
RESTART_SECONDS = 600.0  # detect the failure, start, read the checkpoint
REPLAN_SECONDS = 60.0  # when nodes leave or return: rows are divided anew, states move
REPLANNED_SPEED = 0.9  # the planner itself finds 0.87 to 0.99 of what a missing pool's part leaves (docs/plan.md)
REPAIR_HOURS = 24.0
AWAY_HOURS = 12.0
STRAGGLER_HOURS = 2.0
STRAGGLERS_PER_FAILURE = 1.0  # slow chips are about as frequent as dead ones (Llama 3, 3.3.4)
STRAGGLER_SPEED = 0.7
MOST_DAYS = 20_000
MOST_EVENTS = 2_000_000
MOST_BINS = 150  # in the picture of a run
SHARDED_FROM = {"optimizer": 1, "gradients": 2, "weights": 3}  # the ZeRO stage from which it is sharded
LOSSES = ("checkpoints", "work since the last checkpoint", "restarts", "re-plans", "missing and slow chips")


@dataclass(frozen=True)
class SimulateSettings:
    """Assumptions of a replay.

    Attributes:
        checkpoint_seconds: the run stops so long while one is written.
        checkpoint_interval_seconds: between two; None: the optimum by Young and Daly.
        restart_seconds: from a failure to the next step.
        replan_seconds: the run stops so long when a node leaves or returns.
        replanned_speed: of a group with a new layout on its remaining chips, against their share of its work.
        repair_hours: until the node of a failed chip is back.
        away_hours: mean absence of a node of a pool whose availability is below 1.
        spare_share: nodes kept aside, as a share of each pool.
        straggler_hours: how long a chip is slow.
        stragglers_per_failure: chips that become slow for each one that fails.
        straggler_speed: of a slow chip's replica, against its full speed; others take more rows and do not wait.
        runs: replays, with different seeds.
        seed: of the first replay.
    """

    checkpoint_seconds: float = CHECKPOINT_SECONDS
    checkpoint_interval_seconds: float | None = None
    restart_seconds: float = RESTART_SECONDS
    replan_seconds: float = REPLAN_SECONDS
    replanned_speed: float = REPLANNED_SPEED
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
        for name in ("straggler_speed", "replanned_speed"):
            if not 0 < getattr(self, name) <= 1:
                value = f"{getattr(self, name):g}"
                raise InputError(f"--{name.replace('_', '-')} is {value}; it must be above 0 and at most 1")
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
class SimulatedPool:
    """A pool's chips in a pipeline group.

    Attributes:
        pool: its name.
        chips: of it in the group.
        replica_chips: of it in one replica of the model.
        nodes: that the group may use, with `per_node` chips each; those beyond its need are spares.
        hours_between_failures: of one chip, its part of failures of whole nodes included.
        availability: share of the time that its nodes are there at all.
        work: its part of the group's work.
        memory_bytes: of one chip.
    """

    pool: str
    chips: int
    replica_chips: int
    nodes: int
    per_node: int
    hours_between_failures: float
    availability: float
    work: float
    memory_bytes: float

    def present(self, missing_nodes: int) -> int:
        """Chips that can work; the others lack their node."""
        return min(self.chips, max(self.nodes - missing_nodes, 0) * self.per_node)


@dataclass(frozen=True)
class SimulatedGroup:
    """Pools that run replicas of the model together, as pipelines.

    Attributes:
        share: of the batch.
        replicas: of the model (data parallelism).
        state_bytes: weights, gradients and optimizer states as the plan's smallest complete set of chips holds them:
            one expert-parallel group through all stages.
        parts: one for each pool.
    """

    share: float
    replicas: int
    state_bytes: float
    parts: tuple[SimulatedPool, ...]

    def speed(self, present: Sequence[int], slow_chips: int, settings: SimulateSettings) -> float:
        """Share of the full speed with only `present` chips of each part, some of them slow."""
        held = sum(part.memory_bytes * count for part, count in zip(self.parts, present, strict=True))
        if held < self.state_bytes:
            return 0.0
        slowdown = 1 - settings.straggler_speed
        replicas = min(count // part.replica_chips for part, count in zip(self.parts, present, strict=True))
        whole = (replicas - slowdown * min(slow_chips, replicas)) / self.replicas
        left = sum(part.work * count / part.chips for part, count in zip(self.parts, present, strict=True))
        anew = settings.replanned_speed * left * (settings.straggler_speed if slow_chips else 1.0)
        return max(whole, anew)


def simulated_groups(plan: Mapping[str, Any]) -> list[SimulatedGroup]:
    """From a plan file. Raises InputError where it is none."""
    try:
        pools = {pool["pool"]: pool for pool in plan["pools"]}
        groups = [_simulated_group(group, [pools[name] for name in group["pools"]]) for group in plan["groups"]]
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as problem:
        raise InputError(f"this is no plan as `motley plan --out` writes it: {problem!r} is missing or wrong") from None
    if not groups:
        raise InputError("the plan uses no chips")
    return groups


def _simulated_group(group: Mapping[str, Any], pools: Sequence[Mapping[str, Any]]) -> SimulatedGroup:
    ranks = group["dp"] * group["cp"]
    work = sum(pool["flops_share"] for pool in pools)
    parts = []
    for pool in pools:
        chips = group["chips"][pool["pool"]]
        parts.append(
            SimulatedPool(
                pool=pool["pool"],
                chips=chips,
                replica_chips=chips // group["dp"],
                nodes=max(pool["nodes"] * chips // pool["chips"], -(-chips // pool["chips_per_node"])),
                per_node=pool["chips_per_node"],
                hours_between_failures=pool["hours_between_failures"],
                availability=pool["availability"],
                work=pool["flops_share"] / work,
                memory_bytes=pool["memory_limit_bytes"],
            )
        )
    state = sum(
        stage["chips"] * stage["memory_bytes"][what] * (1 if group["zero"] >= level else group["ep"] / ranks)
        for stage in group["stages"]
        for what, level in SHARDED_FROM.items()
    )
    return SimulatedGroup(group["share"], group["dp"], state, tuple(parts))


def simulate_plan(plan: Mapping[str, Any], settings: SimulateSettings) -> dict[str, Any]:
    """Replay the plan `settings.runs` times."""
    groups = simulated_groups(plan)
    parts = [part for group in groups for part in group.parts]
    hours = 1 / sum(part.chips / part.hours_between_failures for part in parts)
    interval = settings.checkpoint_interval_seconds or best_interval(hours, settings.checkpoint_seconds)
    useful = float(plan["steps"]) * float(plan["step_seconds"])
    if not 0 < useful < MOST_DAYS * 86400:
        raise InputError(
            f"the plan takes {useful / 86400:,.0f} days without failures; the replay stops at {MOST_DAYS:,}"
        )
    runs = [
        replay(groups, useful, interval, settings, np.random.default_rng([settings.seed, number]))
        for number in range(settings.runs)
    ]
    days = np.array([run["days"] for run in runs])
    expected, _ = expected_goodput(hours, settings.checkpoint_seconds, settings.restart_seconds, interval)
    middle = runs[int(np.argsort(days, kind="stable")[len(days) // 2])]
    return {
        "model": plan["model"],
        "fleet": plan["fleet"],
        "chips": sum(part.chips for part in parts),
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
        "lost_share": {name: float(np.mean([run["lost"][name] for run in runs])) for name in LOSSES},
        "runs": [{key: run[key] for key in ("days", "goodput", "failures")} for run in runs],
        "timeline": by_day(middle, useful),
        "intervals": interval_curve(hours, settings),
    }


def by_day(run: Mapping[str, Any], useful: float) -> dict[str, Any]:
    """A run to draw, in whole days (a twentieth of a short run): `edges` in days and, between two of them,
    `work` done for good and `speed` of the chips that were there, both as a share of full speed; `failures` in days.
    """
    times, done, speed = (np.array(values) for values in zip(*run["timeline"], strict=True))
    each = math.ceil(run["days"] / MOST_BINS) if run["days"] >= 20 else run["days"] / 20
    edges = np.append(np.arange(0, run["days"] - 1e-9, each), run["days"])
    at_speed = np.append(0.0, np.cumsum(speed[:-1] * np.diff(times)))
    width = np.diff(edges)
    return {
        "edges": edges.tolist(),
        "work": (np.diff(np.interp(edges, times, done)) * useful / 86400 / width).tolist(),
        "speed": (np.diff(np.interp(edges, times, at_speed)) / width).tolist(),
        "failures": run["failed"],
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
    groups: Sequence[SimulatedGroup],
    useful: float,
    interval: float,
    settings: SimulateSettings,
    random: np.random.Generator,
) -> dict[str, Any]:
    """One run. Work is counted in seconds at full speed; `useful` of them are needed.

    Between events the run goes on at a constant speed and stops for `checkpoint_seconds` every `interval` of running.
    `timeline` holds (days passed, share done, speed from here on), `failed` the days of the failures.
    """
    parts = [(number, part) for number, group in enumerate(groups) for part in group.parts]
    spares = [int(settings.spare_share * part.nodes) for _, part in parts]
    missing, slow = [0] * len(parts), [0] * len(groups)
    mean_seconds: dict[tuple[str, int], float] = {}  # until the next event of a kind on a part
    for index, (_, part) in enumerate(parts):
        failing = part.hours_between_failures * 3600 / part.chips
        mean_seconds["failure", index] = failing
        if settings.stragglers_per_failure:
            mean_seconds["straggler", index] = failing / settings.stragglers_per_failure
        if part.availability < 1:  # so often that on average this share of the nodes is away
            away = part.nodes * (1 - part.availability)
            mean_seconds["leaves", index] = settings.away_hours * 3600 / away
    lost: dict[str, float] = dict.fromkeys(LOSSES, 0.0)
    events: list[tuple[float, int, str, int]] = []
    now, done, since = 0.0, 0.0, 0.0  # `since`: full-speed seconds not yet in a checkpoint
    number = 0
    failed: list[float] = []
    timeline = [(0.0, 0.0, 1.0)]

    def push(delay: float, kind: str, index: int) -> None:
        nonlocal number
        number += 1
        heapq.heappush(events, (now + delay, number, kind, index))

    def pause(seconds: float, reason: str) -> None:
        nonlocal now
        now += seconds
        lost[reason] += seconds

    def present(index: int) -> int:
        return parts[index][1].present(max(missing[index] - spares[index], 0))

    def own_speed(number: int) -> float:
        here = [present(index) for index, (group, _) in enumerate(parts) if group == number]
        return groups[number].share * groups[number].speed(here, slow[number], settings)

    def change(index: int, nodes: int) -> None:
        """So many nodes are missing more; a re-plan if that changes what can work."""
        before = present(index)
        missing[index] += nodes
        if present(index) != before:
            pause(settings.replan_seconds, "re-plans")

    for (kind, index), mean in mean_seconds.items():
        push(random.exponential(mean), kind, index)
    running_share = 1 / (1 + settings.checkpoint_seconds / interval) if math.isfinite(interval) else 1.0
    full = sum(group.share for group in groups)
    speeds = [own_speed(number) / full for number in range(len(groups))]
    while done < useful:
        speed = sum(speeds)
        rate = speed * running_share
        finish = now + (useful - done) / rate if rate > 0 else math.inf
        at, _, kind, index = events[0]
        passed = max(min(at, finish) - now, 0.0)  # an event during a pause waits for its end
        lost["checkpoints"] += passed * (1 - running_share)
        lost["missing and slow chips"] += passed * running_share * (1 - speed)
        now, done = now + passed, done + passed * rate
        if finish <= at:
            break
        heapq.heappop(events)
        timeline.append((now / 86400, done / useful, speed))
        since += passed * rate
        if math.isfinite(interval) and speed > 0:
            since %= interval * speed
        group, part = parts[index]
        if kind == "failure":
            if random.random() * part.chips < present(index):  # what is not there cannot fail
                failed.append(now / 86400)
                thrown = min(since, done)
                done, since = done - thrown, 0.0
                lost["work since the last checkpoint"] += thrown
                pause(settings.restart_seconds, "restarts")
                change(index, 1)
                push(settings.repair_hours * 3600, "joins", index)
        elif kind == "leaves":
            change(index, 1)
            push(random.exponential(settings.away_hours * 3600), "joins", index)
        elif kind == "joins":
            change(index, -1)
        elif kind == "straggler":
            slow[group] += 1
            push(settings.straggler_hours * 3600, "recovers", index)
        else:
            slow[group] -= 1
        if (kind, index) in mean_seconds:
            push(random.exponential(mean_seconds[kind, index]), kind, index)
        speeds[group] = own_speed(group) / full
        timeline.append((now / 86400, done / useful, sum(speeds)))
        if now > 10 * MOST_DAYS * 86400 or len(timeline) > MOST_EVENTS:
            raise InputError(
                "with these failures the run hardly ever ends: nearly as much is lost as gained; "
                "add spares, repair faster or checkpoint more often"
            )
    timeline.append((now / 86400, 1.0, sum(speeds)))
    return {
        "days": now / 86400,
        "goodput": useful / now,
        "failures": len(failed),
        "failed": failed,
        "lost": {name: seconds / now for name, seconds in lost.items()},
        "timeline": timeline,
    }
