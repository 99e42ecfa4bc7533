"""The best plan for a fleet: which pools form pipeline groups, how each is laid out, how the batch is divided.

    islands   sites joined by slow links: one synchronous step over all, or an island each with an outer step (DiLoCo)
              every H steps; islands take steps of equally many sequences, faster islands more of them
    groups    pools of an island, alone or as one pipeline; chip types never share a tensor or expert parallel group
    shares    for a step of T seconds each group has a number of sequences that it can take (step_lines.py); the plan's
              T is the smallest at which they add up to the batch

For given options this is exact: groups do not slow each other within a step, so a step can take T seconds if and only
if the best partition of the pools into groups takes the batch within T. The effort grows with the number of pools, not
with the chips in them. Where states are sharded over an island, its groups end their update together; the search takes
the update of the groups that would be best with all pools, and times the plan that it finds with the plan's own.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from motley.apportion import apportion
from motley.errors import InputError
from motley.fleet.inventory import Fleet, Pool
from motley.fleet.units import size_text
from motley.plan.cost_model.configs import Ints
from motley.plan.search.candidates import members_of
from motley.plan.search.group_options import group_options
from motley.plan.search.pool_packing import GroupOffer, Packing, divide_update, pack
from motley.plan.search.solution import ChosenGroup, FoundPlan
from motley.plan.search.step_lines import GroupOptions
from motley.plan.workload import Workload

TURNS = 60
CLOSE = 1e-7
LARGEST_GROUP = 3  # pools in one pipeline
USUAL_NODES = (1, 2, 4, 8, 16)  # chips in a node that degrees of parallelism divide
CORE = 4  # strongest pools of a site, of which every group is tried
SPREAD_WORTH = 1.01  # states spread by free memory must make the step so much faster
INNER_STEPS = (10, 30, 100, 300)  # between two outer steps of islands
OUTER_BYTES = 1.0  # per parameter: outer gradients travel as int8 (INTELLECT-1, arXiv 2412.01152)
OUTER_HIDDEN = 0.9  # of the exchange that runs behind inner steps (Streaming DiLoCo, arXiv 2501.18512)
MOST_EXPOSED = 0.02  # of a step: outer steps are as frequent as this allows
ISLANDS_WORTH = 1.02  # islands learn a little less from a token, so they must be this much faster


class Searcher:
    """Costs the pipeline groups of a fleet once and finds the best plan for any of its pools.

    With `all_chips`, only plans in which no chip is idle: for ranks that were started already.

    Raises InputError from `best` when no pool and no group can hold the model.
    """

    def __init__(
        self,
        fleet: Fleet,
        workload: Workload,
        progress: Callable[[str], None] | None = None,
        known: Mapping[frozenset[str], tuple[GroupOptions, ...]] | None = None,
        all_chips: bool = False,
    ) -> None:
        self.fleet, self.workload, self.all_chips = fleet, workload, all_chips
        self._frameworks = {pool.name: workload.framework_for(pool) for pool in fleet.pools}
        self._over_island = any(framework.zero_over == "island" for framework in self._frameworks.values())
        peaks = {pool.name: pool.chips * pool.flops(pool.best_precision) for pool in fleet.pools}
        whole = sum(peaks.values())
        self._last_seconds = 1.0  # where the next search for T starts: plans of one fleet are alike
        self.options: dict[frozenset[str], tuple[GroupOptions, ...]] = dict(known or {})
        for size in range(1, LARGEST_GROUP + 1):
            for group in self._groups(size):
                if frozenset(pool.name for pool in group) in self.options:
                    continue
                if progress:
                    progress(" + ".join(pool.name for pool in group))
                share = sum(peaks[pool.name] for pool in group) / whole
                usages, beaten = [group] if all_chips else _usages(group), self._without_this_group(group)
                ways = [group_options(used, workload, share, beaten, all_chips) for used in usages]
                if kept := tuple(_pruned(found) for found in ways if found is not None and len(found)):
                    self.options[frozenset(pool.name for pool in group)] = kept

    def _without_this_group(self, group: Sequence[Pool]) -> Callable[[int], float]:
        """Sequences → seconds that the pools of a group need for them as the smaller groups known so far."""
        names = frozenset(pool.name for pool in group)
        if len(group) == 1:
            return lambda sequences: math.inf
        return lambda sequences: self._least_seconds(names, self._levels[0], sequences) or math.inf

    def with_nodes(self, name: str, nodes: int) -> "Searcher":
        """The same fleet with so many nodes in one pool; other groups keep their options."""
        pools = tuple(
            pool.model_copy(update={"nodes": nodes}) if pool.name == name else pool for pool in self.fleet.pools
        )
        known = {group: options for group, options in self.options.items() if name not in group}
        fleet = self.fleet.model_copy(update={"pools": pools})
        return Searcher(fleet, self.workload, known=known, all_chips=self.all_chips)

    def _groups(self, size: int) -> list[tuple[Pool, ...]]:
        """Pools of one site that may form a pipeline; called after all smaller groups are costed.

        Of a site's strongest pools every group, of the others the pairs that one of them needs to hold the model.
        Weaker pools do not change which pools are the strongest, so more pools never make a plan worse.
        """
        pools = self.fleet.pools
        groups = [
            group for group in combinations(pools, size) if len({self.fleet.site_of(pool) for pool in group}) == 1
        ]
        if size == 1:
            return groups
        core = self._core()
        needed = [group for group in groups if all(pool.name in core for pool in group)]
        if size == 2:
            needed += [
                group
                for group in groups
                if group not in needed and any(frozenset([pool.name]) not in self.options for pool in group)
            ]
        return needed

    def _core(self) -> set[str]:
        """The strongest pools of each site."""
        core: set[str] = set()
        for site in self.fleet.site_names:
            here = [pool for pool in self.fleet.pools if self.fleet.site_of(pool) == site]
            here.sort(key=lambda pool: -pool.chips * pool.flops(pool.best_precision))
            core |= {pool.name for pool in here[:CORE]}
        return core

    def best(self, names: Sequence[str] | None = None) -> FoundPlan | None:
        """The fastest plan that uses (some of) these pools; None where none can hold the model."""
        pools = frozenset(names if names is not None else [pool.name for pool in self.fleet.pools])
        batch = self.workload.global_batch
        plans = [self._synchronous(pools, batch)]
        sites = {self.fleet.site_of(pool) for pool in self.fleet.pools if pool.name in pools}
        if len(sites) > 1:
            plans += [self._synchronous(frozenset(p for p in pools if self._site(p) == site), batch) for site in sites]
        known = [plan for plan in plans if plan is not None]
        best = min(known, key=lambda plan: plan.step_seconds, default=None)
        islands = self._islands(pools) if len(sites) > 1 else None
        if islands is not None and (best is None or islands.step_seconds * ISLANDS_WORTH < best.step_seconds):
            return islands
        return best

    def alone(self, name: str) -> FoundPlan | None:
        return self.best([name])

    def even_split(self) -> FoundPlan | None:
        """What a framework for equal chips does: data parallelism over pools, every chip the same share of the batch.

        None where a pool cannot hold the model alone.
        """
        pools = self.fleet.pools
        if any(frozenset([pool.name]) not in self.options for pool in pools):
            return None
        chips = [pool.chips for pool in pools]
        shares = apportion(self.workload.global_batch, chips)
        crossing = len(pools) > 1
        slowest, groups = 0.0, []
        for pool, share in zip(pools, shares, strict=True):
            if share == 0:
                continue
            group = frozenset([pool.name])
            chosen = self._as_one_group(group, share, crossing)
            if chosen is None:
                return None
            slowest = max(slowest, chosen.seconds)
            groups.append(chosen)
        names = frozenset(pool.name for pool in pools)
        slow = self._slow_link_seconds(names)
        if slow:  # DiLoCo over sites is open to a framework for equal chips too
            inner, exposed = self._outer_step(names, slowest)
            if exposed < slow:
                return FoundPlan(self.workload, self.fleet, tuple(groups), slowest + exposed, inner, exposed)
        return FoundPlan(self.workload, self.fleet, tuple(groups), slowest + slow, 0, 0.0)

    # ------------------------------------------------------------------------------------------ the search

    def _site(self, name: str) -> str:
        return next(self.fleet.site_of(pool) for pool in self.fleet.pools if pool.name == name)

    @property
    def _levels(self) -> tuple[int, ...]:
        """What groups shard together: a ZeRO stage of the island; else 0 nothing, 1 states by free memory."""
        return (1, 2, 3) if self._over_island else (0, 1)

    def _synchronous(self, pools: frozenset[str], sequences: int) -> FoundPlan | None:
        """One step over all pools, as one group or several that exchange gradients; states on own chips or spread."""
        found: list[FoundPlan] = []
        slow = self._slow_link_seconds(pools)
        for group in self.options:
            fits = group == pools if self.all_chips else group <= pools
            if fits and (chosen := self._as_one_group(group, sequences, False)) is not None:
                found.append(self._found([chosen]))
        for level in self._levels:
            below = min((plan.step_seconds for plan in found), default=None)
            if below and level and not self._over_island:
                below /= SPREAD_WORTH
            several = self._as_several_groups(pools, slow, sequences, level, below)
            if several is not None:
                found.append(several)
        return min(found, key=lambda plan: plan.step_seconds) if found else None

    def _found(self, groups: Sequence[ChosenGroup], slow: float = 0.0) -> FoundPlan:
        """One synchronous step of groups, `slow` seconds of it for links between sites."""
        seconds = max(group.seconds for group in groups)
        if len(groups) > 1:
            seconds *= 1 + max(self._frameworks[pool].waiting for group in groups for pool in group.pools)
        return FoundPlan(self.workload, self.fleet, tuple(groups), seconds + slow, 0, 0.0)

    def _as_one_group(self, group: frozenset[str], sequences: int, crossing: bool) -> ChosenGroup | None:
        """The fastest way for a group to take so many sequences with states on its own chips; None if none fits."""
        best: ChosenGroup | None = None
        for options in self.options[group]:
            own = np.flatnonzero(options.own_states)
            if not len(own):
                continue
            micro = np.ceil(sequences / options.grain[own]).astype(np.int64)
            times = options.seconds_of(own, micro, crossing)
            pick = int(np.argmin(times))
            if best is None or times[pick] < best.seconds:
                best = ChosenGroup(group, options, int(own[pick]), sequences, int(micro[pick]), float(times[pick]))
        return best

    def _islands(self, pools: frozenset[str]) -> FoundPlan | None:
        """Sites as islands of DiLoCo: all that can hold the model, or the fastest of them."""
        sites: dict[str, set[str]] = {}
        for name in pools:
            sites.setdefault(self._site(name), set()).add(name)

        def alone(site: str, count: int) -> FoundPlan | None:
            return self._synchronous(frozenset(sites[site]), -(-self.workload.global_batch // count))

        known = {site: plan.step_seconds for site in sorted(sites) if (plan := alone(site, len(sites)))}
        order = sorted(known, key=lambda site: known[site])
        found = []
        for count in range(2, len(order) + 1):
            plans = [plan for site in order[:count] if (plan := alone(site, count))]
            if len(plans) == count and (islands := self._diloco_islands(plans)):
                found.append(islands)
        return min(found, key=lambda plan: plan.step_seconds, default=None)

    def _diloco_islands(self, islands: Sequence[FoundPlan]) -> FoundPlan | None:
        """One run of islands, each at its own speed; None where a group would get no rows."""
        step = len(islands) / sum(
            1 / plan.step_seconds for plan in islands
        )  # of the run: islands reach the outer step together
        worked = [
            replace(group, island=number, steps=step / plan.step_seconds)
            for number, plan in enumerate(islands)
            for group in plan.groups
        ]
        shares = apportion(self.workload.global_batch, [group.sequences * group.steps for group in worked])
        if min(shares) == 0:
            return None
        groups = tuple(replace(group, sequences=share) for group, share in zip(worked, shares, strict=True))
        inner, exposed = self._outer_step(frozenset().union(*(group.pools for group in groups)), step)
        return FoundPlan(self.workload, self.fleet, groups, step + exposed, inner, exposed)

    def _outer_step(self, pools: frozenset[str], step_seconds: float) -> tuple[int, float]:
        """(steps between two outer steps of these pools' sites, seconds that an outer step adds to each step)."""
        sites = sorted({self._site(name) for name in pools})
        link = min(
            (self.fleet.link_between(one, other) for one, other in combinations(sites, 2)),
            key=lambda link: link.bandwidth,
        )
        sent_seconds = self.workload.parameters * OUTER_BYTES * 2 / link.bandwidth + 2 * link.latency
        inner, exposed = 1, sent_seconds
        for inner in INNER_STEPS:
            window = OUTER_HIDDEN * inner * step_seconds
            exposed = max(sent_seconds - window, (1 - OUTER_HIDDEN) * sent_seconds) / inner
            if exposed <= MOST_EXPOSED * step_seconds:
                break
        return inner, exposed

    def _as_several_groups(
        self, pools: frozenset[str], slow: float, sequences: int, level: int, below: float | None = None
    ) -> FoundPlan | None:
        """Smallest T at which the best partition of the pools takes the batch; then the plan at that T.

        slow: seconds of a step for links between sites. None if that is not under `below` seconds.
        """
        high = self._least_seconds(pools, level, sequences, below, slow)
        point = None if high is None else self._partition(pools, high - slow, level)
        if point is None:
            return None
        shares = apportion(sequences, [pick.sequences for pick in point.picks], most=True)
        worked = [(pick, share) for pick, share in zip(point.picks, shares, strict=True) if share]
        micros = [-(-share // int(pick.options.grain[pick.index])) for pick, share in worked]
        if self._over_island and sum(pick.spare for pick, _ in worked) < self._state_bytes(pools, level):
            return None  # the memory of groups without rows would be needed
        update, kept = self._update([pick for pick, _ in worked], level)
        groups = []
        for (pick, share), micro, part in zip(worked, micros, kept, strict=True):
            index = np.array([pick.index])
            seconds = float(pick.options.seconds_of(index, np.array([micro]), len(worked) > 1, update)[0])
            # With every micro-batch of any group all of them exchange (ZeRO 2 and 3).
            exchange = float((pick.options.each + pick.options.cross_each)[pick.index]) if self._over_island else 0.0
            seconds += (max(micros) - micro) * exchange
            groups.append(ChosenGroup(pick.pools, pick.options, pick.index, share, micro, seconds, update, part))
        return self._found(groups, slow)

    def _update(self, picks: Sequence[GroupOffer], level: int) -> tuple[float | None, list[float]]:
        """(seconds of the island's update, share of states of each group); None: each group updates its own."""
        if not self._over_island:
            return None, [1.0] * len(picks)
        whole = self._state_bytes({name for pick in picks for name in pick.pools}, level)
        rates = [float(pick.options.rate[pick.index]) for pick in picks]
        return divide_update(rates, [pick.spare / whole for pick in picks])

    def _least_seconds(
        self, pools: frozenset[str], level: int, sequences: int, below: float | None = None, slow: float = 0.0
    ) -> float | None:
        """The shortest step in which the pools take so many sequences; None if that is not under `below` seconds."""
        if not any(group <= pools for group in self.options):
            return None

        def enough(seconds: float) -> bool:
            point = self._partition(pools, seconds - slow, level)
            return point is not None and point.sequences >= sequences

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
        return high

    def _partition(self, pools: frozenset[str], seconds: float, level: int) -> Packing | None:
        """The most sequences these pools can take within `seconds`, over all ways to form groups of them.

        With a level above 0, sharded states may be held by any chip of the island; then free memory counts too.
        """
        order = sorted(pools)
        groups = [group for group in self.options if group <= pools]
        masks = {group: sum(1 << order.index(name) for name in group) for group in groups}
        state = self._state_bytes(pools, level) if level else 0.0
        update = self._fastest_update(pools) if self._over_island else None
        for turn in range(2 if self._over_island else 1):
            # Memory seldom decides: take the fastest options first, and trade speed for memory only if they do not fit.
            for trade in (False, True) if level else (False,):
                offers = {masks[group]: self._offers(group, seconds, level, trade, update) for group in groups}
                best = pack(len(order), offers, state if trade else 0.0, idle=not self.all_chips)
                if best is not None and best.picks and best.spare >= state:
                    break
            else:
                return None
            if not self._over_island or turn:
                return best
            update, _ = self._update(best.picks, level)
        return None

    def _fastest_update(self, pools: frozenset[str]) -> float:
        """Seconds of an update of the model by all chips of these pools together."""
        rates = {name: 0.0 for name in pools}
        for group, found in self.options.items():
            if len(group) == 1 and group <= pools:
                (name,) = group
                rates[name] = max(float(options.rate.max()) for options in found)
        return 1 / sum(rates.values()) if any(rates.values()) else 0.0

    def _offers(
        self, group: frozenset[str], seconds: float, level: int, trade: bool, update: float | None
    ) -> list[GroupOffer]:
        """What a group could take: the most, and with `trade` also less with more memory free."""
        offers: list[GroupOffer] = []
        for options in self.options[group]:
            sequences = options.sequences_within(seconds, True, update)
            if self._over_island:
                sequences = np.where(options.zero == level, sequences, 0)
            elif not level:
                sequences = np.where(options.own_states, sequences, 0)
            order: Ints = np.lexsort((-options.spare, -sequences))
            room = -1.0
            for index in order if trade else order[:1]:
                if sequences[index] <= 0:
                    break
                if options.spare[index] > room * (1 + 1e-9):
                    room = float(options.spare[index])
                    offers.append(GroupOffer(group, options, int(index), int(sequences[index]), room))
        return offers

    def _state_bytes(self, names: Collection[str], level: int) -> float:
        """Of all sharded states, at the most bytes a parameter of any framework among these pools."""
        return self.workload.parameters * max(self._frameworks[name].sharded_bytes(level) for name in names)

    def _slow_link_seconds(self, pools: frozenset[str]) -> float:
        """An exchange of all gradients over the slowest link between the sites of these pools, both ways at once."""
        sites = sorted({self._site(name) for name in pools})
        if len(sites) < 2:
            return 0.0
        links = [self.fleet.link_between(one, other) for one, other in combinations(sites, 2)]
        sent = 2 * self.workload.parameters * max(self._frameworks[name].gradient_bytes for name in pools)
        return max(sent / link.bandwidth + 2 * link.latency for link in links)

    def refusal(self) -> InputError:
        """Why nothing fits, how much is missing, and what would help."""
        needed = self.workload.parameters * max(
            sum(self.workload.framework_for(pool).state_bytes.values()) for pool in self.fleet.pools
        )
        there = sum(
            pool.chips * members_of([pool], self.workload)[0].hardware.memory_bytes for pool in self.fleet.pools
        )
        model = self.workload.shape.name
        if needed > there:
            pool = max(self.fleet.pools, key=lambda pool: members_of([pool], self.workload)[0].hardware.memory_bytes)
            memory = members_of([pool], self.workload)[0].hardware.memory_bytes
            more = math.ceil((needed - there) / memory * 1.2)
            return InputError(
                f"{model} cannot fit {self.fleet.name}: weights, gradients and optimizer states take "
                f"{size_text(needed)}, all {self.fleet.chips:,} chips together have {size_text(there)}, "
                f"{size_text(needed - there)} too little; "
                f"about {more:,} more {pool.sheet.name} would hold it, or choose a smaller model"
            )
        every = f" in which all {self.fleet.chips:,} chips work" * self.all_chips
        return InputError(
            f"{model} takes {size_text(needed)} of the {size_text(there)} that {self.fleet.name} has, but no layout of "
            f"one micro-batch of {self.workload.seq_len:,} tokens{every} fits any pool or pair of pools; try a shorter "
            f"--seq-len, more nodes in the largest pool, or a smaller model"
        )


def _usages(group: Sequence[Pool]) -> list[tuple[Pool, ...]]:
    """The group as it is and, where a pool's nodes hold an odd number of chips, with some chips of each left idle.

    A ninth chip in a node shares its network, and degrees do not divide it; it must never make the other eight slower.
    """
    usages = [tuple(group)]
    for fewer in (lambda count: count - 1, lambda count: 1 << count.bit_length() - 1):
        counts = [pool.per_node if pool.per_node in USUAL_NODES else fewer(pool.per_node) for pool in group]
        used = tuple(
            pool.model_copy(update={"chips_per_node": count}) for pool, count in zip(group, counts, strict=True)
        )
        if used not in usages and [pool.per_node for pool in used] != [pool.per_node for pool in group]:
            usages.append(used)
    return usages


def _pruned(options: GroupOptions) -> GroupOptions:
    """Only options that some step length could choose: none is better in line, grain and free memory at once.

    Where states are sharded over an island, only options of one ZeRO stage replace each other.
    """
    over_island = options.members[0].framework.zero_over == "island"
    stages = options.zero if over_island else np.zeros(len(options), np.int64)
    order = np.lexsort((options.grain, options.slow / options.grain))
    columns = np.stack(
        [
            options.slow / options.grain,
            (options.slow + options.cross_each) / options.grain,
            options.fixed,
            options.fixed - options.update if over_island else options.fixed,
            options.once,
            options.once + options.cross,
            options.grain,
            -options.spare,
            -options.rate if over_island else np.zeros(len(options)),
            1.0 - options.own_states,
        ]
    )
    kept: list[int] = []
    for stage in np.unique(stages):
        better: list[int] = []
        for index in order[stages[order] == stage]:
            most = columns[:, [index]] * (1 + 1e-12 * np.sign(columns[:, [index]]))
            if better and (columns[:, better] <= most).all(axis=0).any():
                continue
            better.append(int(index))
        kept += better
    return options.take(np.array(kept))
