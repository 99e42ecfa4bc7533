"""The best plan for a fleet: which pools form teams, how each team is laid out, who takes how much of the batch.

    islands   sites joined by slow links: one synchronous step over all, or an island each that meets every H steps
    teams     pools of an island, alone or as a pipeline together; chip types never share anything finer
    shares    for a step of T seconds each team says how many sequences it can take (options.py); the smallest T at
              which they take the whole batch is the plan's

For given options this is exact: teams do not disturb each other within a step, so a step can take T seconds if and only
if the best partition of the pools into teams takes the batch within T. What is searched grows with the number of pools,
not with the chips in them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from motley.errors import InputError
from motley.fleet.inventory import Fleet, Pool
from motley.fleet.units import size_text
from motley.plan.candidates import members_of
from motley.plan.job import Job
from motley.plan.layout import Ints
from motley.plan.options import Options
from motley.plan.team import options_of

TURNS = 60
CLOSE = 1e-7
LARGEST_TEAM = 3  # pools in one pipeline
MANY_POOLS = 4  # beyond, only pairs are tried, and only of pools that cannot hold the model alone with any other
INNER_STEPS = (10, 30, 100, 300)  # between two meetings of islands
OUTER_BYTES = 1.0  # per parameter: outer gradients travel as int8 (INTELLECT-1, arXiv 2412.01152)
OUTER_HIDDEN = 0.9  # of the exchange that runs behind inner steps (Streaming DiLoCo, arXiv 2501.18512)
MOST_EXPOSED = 0.02  # of a step: islands meet as often as this allows
ISLANDS_WORTH = 1.02  # islands learn a little less from a token, so they must be this much faster


@dataclass(frozen=True)
class Chosen:
    """One team of the plan: its options, the one taken, and its part of the batch."""

    team: frozenset[str]
    options: Options
    index: int
    sequences: int
    micro_batches: int
    island: int


@dataclass(frozen=True)
class Found:
    """A plan as the search knows it.

    Attributes:
        step_seconds: of one step over the whole batch.
        inner_steps: steps between two meetings of islands; 0: one synchronous step over all chips.
        outer_seconds: per step, what meeting costs.
    """

    job: Job
    fleet: Fleet
    teams: tuple[Chosen, ...]
    step_seconds: float
    inner_steps: int
    outer_seconds: float

    @property
    def tokens_per_second(self) -> float:
        return self.job.global_batch * self.job.seq_len / self.step_seconds

    @property
    def chips(self) -> int:
        return sum(int(team.options.chips[:, team.index].sum()) for team in self.teams)

    @property
    def price_per_hour(self) -> float:
        return sum(
            member.hardware.price_per_hour * int(count)
            for team in self.teams
            for member, count in zip(team.options.members, team.options.chips[:, team.index], strict=True)
        )

    @property
    def seconds(self) -> float:
        return self.step_seconds * self.job.steps

    @property
    def cost(self) -> float:
        return self.price_per_hour * self.seconds / 3600


class Searcher:
    """Costs the teams of a fleet once and answers for any of its pools.

    Raises InputError from `best` when no pool and no team can hold the model.
    """

    def __init__(
        self,
        fleet: Fleet,
        job: Job,
        progress: Callable[[str], None] | None = None,
        known: Mapping[frozenset[str], Options] | None = None,
    ) -> None:
        self.fleet, self.job = fleet, job
        peaks = {pool.name: pool.chips * pool.flops(pool.best_precision) for pool in fleet.pools}
        whole = sum(peaks.values())
        self._last_seconds = 1.0  # where the next search for T starts: plans of one fleet are alike
        self.options: dict[frozenset[str], Options] = dict(known or {})
        for size in range(1, LARGEST_TEAM + 1):
            for team in self._teams(size):
                if frozenset(pool.name for pool in team) in self.options:
                    continue
                if progress:
                    progress(" + ".join(pool.name for pool in team))
                share = sum(peaks[pool.name] for pool in team) / whole
                found = options_of(team, job, share)
                if found is not None and len(found):
                    self.options[frozenset(pool.name for pool in team)] = _pruned(found)

    def with_nodes(self, name: str, nodes: int) -> "Searcher":
        """The same fleet with so many nodes in one pool; other teams keep their options."""
        pools = tuple(
            pool.model_copy(update={"nodes": nodes}) if pool.name == name else pool for pool in self.fleet.pools
        )
        known = {team: options for team, options in self.options.items() if name not in team}
        return Searcher(self.fleet.model_copy(update={"pools": pools}), self.job, known=known)

    def _teams(self, size: int) -> list[tuple[Pool, ...]]:
        """Pools of one site that may form a pipeline; called after all smaller teams are costed."""
        pools = self.fleet.pools
        teams = [team for team in combinations(pools, size) if len({self.fleet.site_of(pool) for pool in team}) == 1]
        if size == 1 or len(pools) <= MANY_POOLS:
            return teams
        if size > 2:
            return []
        return [team for team in teams if any(frozenset([pool.name]) not in self.options for pool in team)]

    def best(self, names: Sequence[str] | None = None) -> Found | None:
        """The fastest plan that uses (some of) these pools; None where none can hold the model."""
        pools = frozenset(names if names is not None else [pool.name for pool in self.fleet.pools])
        plans = [self._synchronous(pools)]
        sites = {self.fleet.site_of(pool) for pool in self.fleet.pools if pool.name in pools}
        if len(sites) > 1:
            plans += [self._synchronous(frozenset(p for p in pools if self._site(p) == site)) for site in sites]
        known = [plan for plan in plans if plan is not None]
        best = min(known, key=lambda plan: plan.step_seconds, default=None)
        islands = self._islands(pools) if len(sites) > 1 else None
        if islands is not None and (best is None or islands.step_seconds * ISLANDS_WORTH < best.step_seconds):
            return islands
        return best

    def alone(self, name: str) -> Found | None:
        return self.best([name])

    def even(self) -> Found | None:
        """What an engine for equal chips does: every pool a plain copy, every chip the same part of the batch.

        None where a pool cannot hold the model alone.
        """
        pools = self.fleet.pools
        if any(frozenset([pool.name]) not in self.options for pool in pools):
            return None
        chips = [pool.chips for pool in pools]
        shares = apportion(self.job.global_batch, chips)
        crossing = len(pools) > 1
        slowest, teams = 0.0, []
        for pool, share in zip(pools, shares, strict=True):
            if share == 0:
                continue
            team = frozenset([pool.name])
            options = self.options[team]
            own = np.flatnonzero(options.own_states)
            if not len(own):
                return None
            micro = np.ceil(share / options.grain[own])
            times = options.seconds_of(own, micro, crossing)
            pick = int(np.argmin(times))
            slowest = max(slowest, float(times[pick]))
            teams.append(Chosen(team, options, int(own[pick]), share, int(micro[pick]), 0))
        slowest += self._slow_link_seconds(frozenset(pool.name for pool in pools))
        return Found(self.job, self.fleet, tuple(teams), slowest, 0, 0.0)

    # ------------------------------------------------------------------------------------------ the search

    def _site(self, name: str) -> str:
        return next(self.fleet.site_of(pool) for pool in self.fleet.pools if pool.name == name)

    def _synchronous(self, pools: frozenset[str]) -> Found | None:
        """One step over all pools: alone as one team, or several that exchange gradients; states at home or shared."""
        found: list[Found] = []
        slow = self._slow_link_seconds(pools)
        for team, options in self.options.items():
            if team <= pools:
                found += self._one_team(team, options)
        for shared in (False, True):
            below = min((plan.step_seconds for plan in found), default=None)
            several = self._several([(pools, slow)], shared, below)
            if several is not None:
                found.append(several)
        return min(found, key=lambda plan: plan.step_seconds) if found else None

    def _one_team(self, team: frozenset[str], options: Options) -> list[Found]:
        own = np.flatnonzero(options.own_states)
        if not len(own):
            return []
        micro = np.ceil(self.job.global_batch / options.grain[own]).astype(np.int64)
        times = options.seconds_of(own, micro, False)
        pick = int(np.argmin(times))
        chosen = Chosen(team, options, int(own[pick]), self.job.global_batch, int(micro[pick]), 0)
        return [Found(self.job, self.fleet, (chosen,), float(times[pick]), 0, 0.0)]

    def _islands(self, pools: frozenset[str]) -> Found | None:
        """Each site trains alone and meets the others every so many steps."""
        sites: dict[str, set[str]] = {}
        for name in pools:
            sites.setdefault(self._site(name), set()).add(name)
        sent = self.job.parameters * OUTER_BYTES * 2
        link = min(
            (self.fleet.link_between(a, b) for a, b in combinations(sorted(sites), 2)), key=lambda link: link.bandwidth
        )
        meeting = sent / link.bandwidth + 2 * link.latency
        groups = [(frozenset(names), 0.0) for names in sites.values()]
        plain = min(
            (plan for shared in (False, True) if (plan := self._several(groups, shared)) is not None),
            key=lambda plan: plan.step_seconds,
            default=None,
        )
        if plain is None:
            return None
        for inner in INNER_STEPS:
            window = OUTER_HIDDEN * inner * plain.step_seconds
            exposed = max(meeting - window, (1 - OUTER_HIDDEN) * meeting) / inner
            if exposed <= MOST_EXPOSED * plain.step_seconds or inner == INNER_STEPS[-1]:
                step = plain.step_seconds + exposed
                return Found(self.job, self.fleet, plain.teams, step, inner, exposed)
        return None

    def _several(
        self, islands: list[tuple[frozenset[str], float]], shared: bool, below: float | None = None
    ) -> Found | None:
        """Smallest T at which the islands' best partitions into teams take the batch; then the plan at that T.

        None if that is not under `below` seconds.
        """
        if not any(team <= pools for pools, _ in islands for team in self.options):
            return None

        def taken(seconds: float) -> list[_Point | None]:
            return [self._partition(pools, seconds - slow, shared) for pools, slow in islands]

        def enough(seconds: float) -> bool:
            points = taken(seconds)
            return sum(point.sequences for point in points if point) >= self.job.global_batch

        high = below or self._last_seconds
        if below and not enough(below):
            return None
        while not enough(high):
            high *= 1.5
            if high > 1e12:
                return None
        low = high / 1.5
        while enough(low):
            low, high = low / 1.5, low
        for _ in range(TURNS):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if enough(middle) else (middle, high)
            if high / low < 1 + CLOSE:
                break
        self._last_seconds = high
        points = taken(high)
        teams: list[Chosen] = []
        rest = self.job.global_batch
        worked = [(number, pick) for number, point in enumerate(points) if point for pick in point.picks]
        shares = apportion(rest, [sequences for _, (_, _, sequences) in worked], most=True)
        slowest = 0.0
        crossing = len(worked) > 1
        for (island, (team, index, _)), share in zip(worked, shares, strict=True):
            if share == 0:
                continue
            options = self.options[team]
            micro = -(-share // int(options.grain[index]))
            time = float(options.seconds_of(np.array([index]), np.array([micro]), crossing)[0]) + islands[island][1]
            slowest = max(slowest, time)
            teams.append(Chosen(team, options, index, share, micro, island if len(islands) > 1 else 0))
        return Found(self.job, self.fleet, tuple(teams), slowest, 0, 0.0)

    def _partition(self, pools: frozenset[str], seconds: float, shared: bool) -> "_Point | None":
        """Most sequences these pools can take within `seconds`, over all ways to form teams of them.

        With `shared`, optimizer states may lie on any chip of the island that has room; then the room counts too.
        """
        order = sorted(pools)
        teams = [(team, options) for team, options in self.options.items() if team <= pools]
        masks = {team: sum(1 << order.index(name) for name in team) for team, _ in teams}
        state = self._state_bytes() if shared else 0.0
        # Room is seldom what decides: look at the fastest options first, and weigh speed against room only if need be.
        for trade in (False, True) if shared else (False,):
            offers = {masks[team]: (team, self._offers(options, seconds, shared, trade)) for team, options in teams}
            best = _pack(len(order), offers, state if trade else 0.0)
            if best is not None and best.spare >= state:
                return best
        return None

    def _offers(self, options: Options, seconds: float, shared: bool, trade: bool) -> list[tuple[int, float, int]]:
        """(sequences, spare bytes, option): the fastest, and with `trade` every slower one that leaves more room."""
        sequences = options.sequences_within(seconds, True)
        if not shared:
            sequences = np.where(options.own_states, sequences, 0)
        if not trade:
            index = int(np.lexsort((options.spare, sequences))[-1])
            return [(int(sequences[index]), float(options.spare[index]), index)] if sequences[index] > 0 else []
        order: Ints = np.lexsort((-options.spare, -sequences))
        offers, room = [], -1.0
        for index in order:
            if sequences[index] <= 0:
                break
            if options.spare[index] > room * (1 + 1e-9):
                room = float(options.spare[index])
                offers.append((int(sequences[index]), room, int(index)))
        return offers

    def _state_bytes(self) -> float:
        engine = self.job.engine_for(self.fleet.pools[0])
        return self.job.parameters * engine.state_bytes["optimizer"]

    def _slow_link_seconds(self, pools: frozenset[str]) -> float:
        """Sending all gradients over the slowest link between the sites of these pools, both ways at once."""
        sites = sorted({self._site(name) for name in pools})
        if len(sites) < 2:
            return 0.0
        links = [self.fleet.link_between(one, other) for one, other in combinations(sites, 2)]
        engine = self.job.engine_for(self.fleet.pools[0])
        sent = 2 * self.job.parameters * engine.gradient_bytes
        return max(sent / link.bandwidth + 2 * link.latency for link in links)

    def refusal(self) -> InputError:
        """Why nothing fits, by how much, and what would make it fit."""
        engine = self.job.engine_for(self.fleet.pools[0])
        sizes = engine.state_bytes
        needed = self.job.parameters * (sizes["weight"] + sizes["gradient"] + sizes["optimizer"])
        there = sum(pool.chips * members_of([pool], self.job)[0].hardware.memory_bytes for pool in self.fleet.pools)
        model = self.job.shape.name
        if needed > there:
            pool = max(self.fleet.pools, key=lambda pool: members_of([pool], self.job)[0].hardware.memory_bytes)
            memory = members_of([pool], self.job)[0].hardware.memory_bytes
            more = math.ceil((needed - there) / memory * 1.2)
            return InputError(
                f"{model} cannot fit {self.fleet.name}: weights, gradients and optimizer states take "
                f"{size_text(needed)}, all {self.fleet.chips:,} chips together have {size_text(there)}, "
                f"{size_text(needed - there)} too little; "
                f"about {more:,} more {pool.sheet.name} would hold it, or choose a smaller model"
            )
        return InputError(
            f"{model} takes {size_text(needed)} of the {size_text(there)} that {self.fleet.name} has, but no layout of "
            f"one micro-batch of {self.job.seq_len:,} tokens fits any pool or pair of pools; try a shorter --seq-len, "
            f"more nodes in the largest pool, or a smaller model"
        )


@dataclass(frozen=True)
class _Point:
    sequences: int
    spare: float
    picks: tuple[tuple[frozenset[str], int, int], ...]


def _pack(
    pools: int, offers: Mapping[int, tuple[frozenset[str], list[tuple[int, float, int]]]], needed: float
) -> "_Point | None":
    """Most sequences over all ways to split the pools (bits of a mask) into teams or idleness.

    Of ways with enough spare bytes, if there are any; else of all ways.
    """
    points: dict[int, list[_Point]] = {0: [_Point(0, 0.0, ())]}
    best: list[_Point] = []
    for mask in range(1 << pools):
        for point in points.get(mask, ()):
            lowest = next((bit for bit in range(pools) if not mask >> bit & 1), None)
            if lowest is None:
                best.append(point)
                continue
            _keep(points, mask | 1 << lowest, point)  # this pool stays idle
            for own, (team, own_offers) in offers.items():
                if own >> lowest & 1 and not own & mask:
                    for sequences, spare, index in own_offers:
                        picks = (*point.picks, (team, index, sequences))
                        _keep(points, mask | own, _Point(point.sequences + sequences, point.spare + spare, picks))
    fitting = [point for point in best if point.spare >= needed]
    return max(fitting or best, key=lambda point: (point.sequences, point.spare), default=None)


def _keep(points: dict[int, list[_Point]], mask: int, new: _Point) -> None:
    """Add to a mask's points unless one is at least as good in both; drop those that it beats."""
    own = points.setdefault(mask, [])
    if any(point.sequences >= new.sequences and point.spare >= new.spare for point in own):
        return
    own[:] = [p for p in own if not (new.sequences >= p.sequences and new.spare >= p.spare)]
    own.append(new)


def _pruned(options: Options) -> Options:
    """Only options that some step length could choose: none is better in line, grain and room at once."""
    order = np.lexsort((options.grain, options.slow / options.grain))
    kept: list[int] = []
    columns = np.stack(
        [
            options.slow / options.grain,
            options.fixed,
            options.once,
            options.once + options.cross,
            options.grain,
            -options.spare,
            1.0 - options.own_states,
        ]
    )
    for index in order:
        if (
            kept
            and (columns[:, kept] <= columns[:, [index]] * (1 + 1e-12 * np.sign(columns[:, [index]]))).all(axis=0).any()
        ):
            continue
        kept.append(int(index))
    return options.take(np.array(kept))


def apportion(whole: int, weights: Sequence[int], most: bool = False) -> list[int]:
    """`whole` in parts proportional to `weights`, by largest remainder; with `most`, no part exceeds its weight."""
    total = sum(weights)
    if total == 0:
        return [0] * len(weights)
    exact = [whole * weight / total for weight in weights]
    parts = [math.floor(part) for part in exact]
    order = sorted(range(len(weights)), key=lambda i: (parts[i] - exact[i], i))
    for index in order[: whole - sum(parts)]:
        parts[index] += 1
    if most and any(part > weight for part, weight in zip(parts, weights, strict=True)):
        raise ValueError("the weights are too small for the whole")
    return parts
