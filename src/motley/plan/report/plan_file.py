"""A plan as plain values: what each chip holds and computes, seconds of each part of a step, price.

The plan file that the runtime takes, the table, the JSON and the page are all made from them.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from motley.fleet.inventory import Pool
from motley.plan.cost_model.configs import RECOMPUTES, SCHEDULES, ParallelConfigs
from motley.plan.cost_model.memory import FRAGMENTATION, SHARDED_FROM, stage_bytes
from motley.plan.cost_model.step_time import HeldParameters, NetworkPieces, PieceKind, network_pieces, update_seconds
from motley.plan.read_plan import PLAN_VERSION
from motley.plan.search.candidates import GroupMember
from motley.plan.search.search import Searcher
from motley.plan.search.solution import ChosenGroup, FoundPlan, hours_between_failures
from motley.plan.search.step_lines import GroupOptions, bubbles, busiest, held_at, stage_sums

JOULES_PER_KWH = 3.6e6
SPREAD = "spread by free memory"


def plan_values(found: FoundPlan) -> dict[str, Any]:
    """The plan as plain values."""
    workload, fleet = found.workload, found.fleet
    groups = [_group(found, group) for group in found.groups]
    _spread_states(found, groups)
    pools = _pools(found, groups)
    split = _split(found, groups)
    goodput, interval = found.goodput
    seconds = found.expected_seconds
    watts = sum(pool["chips"] * pool["power_watts"] for pool in pools)
    return {
        "plan_version": PLAN_VERSION,
        "model": workload.shape.name,
        "model_source": workload.shape.source,
        "fleet": fleet.name,
        "currency": fleet.currency,
        "framework": workload.framework,
        "tokens": workload.tokens,
        "seq_len": workload.seq_len,
        "global_batch": workload.global_batch,
        "steps": workload.steps,
        "step_seconds": found.step_seconds,
        "step_split_seconds": split,
        "tokens_per_second": found.tokens_per_second,
        "days": seconds / 86400,
        "days_without_failures": found.seconds / 86400,
        "goodput": goodput,
        "checkpoint_interval_seconds": interval,
        "chips": found.chips,
        "chips_rented": sum(found.rented.values()),
        "chip_hours": sum(found.rented.values()) * seconds / 3600,
        "cost": found.cost,
        "energy_kwh": watts * seconds / JOULES_PER_KWH,
        "inner_steps": found.inner_steps,
        "outer_seconds_per_step": found.outer_seconds,
        "pools": pools,
        "groups": groups,
        "notes": _notes(found, groups),
    }


def plan_comparison(searcher: Searcher, found: FoundPlan) -> dict[str, Any]:
    """`mixed_efficiency`, and `comparison`: the even split, each pool alone, what each pool is worth.

    The mixed efficiency divides the plan's speed by what the pools it uses reach alone, added up. A pool that cannot
    hold the model alone counts with the best share of its peak that any pool reaches (alone, or else in the plan).
    """
    pools = searcher.fleet.pools
    names = [pool.name for pool in pools]
    alone = {name: searcher.alone(name) for name in names}
    known = {name: plan for name, plan in alone.items() if plan is not None}
    even = searcher.even_split() if len(names) > 1 else None
    fastest = min(known, key=lambda name: known[name].step_seconds, default=None)
    worth = []
    for name in names if len(names) > 1 else ():
        rest = searcher.best([other for other in names if other != name])
        entry: dict[str, Any] = {
            "pool": name,
            "alone_tokens_per_second": known[name].tokens_per_second if name in known else None,
        }
        if rest is None:
            entry |= {"needed": True, "slower": None, "cheaper": None}
        else:
            entry |= {
                "needed": False,
                "slower": rest.step_seconds / found.step_seconds - 1,
                "cheaper": 1 - rest.cost / found.cost if found.cost else 0.0,
            }
        worth.append(entry)
    used = [pool for pool in pools if found.used[pool.name]]
    comparison = {
        "even_split": None if even is None else _brief(even, found),
        "fastest_pool": None if fastest is None else {"pool": fastest, **_brief(known[fastest], found)},
        "alone": {name: _brief(plan, found) for name, plan in known.items()},
        "pools_that_cannot_alone": [pool.name for pool in used if pool.name not in known],
        "marginal_value": worth,
    }
    return {"mixed_efficiency": _mixed_efficiency(searcher, found, used, known), "comparison": comparison}


def _mixed_efficiency(
    searcher: Searcher, found: FoundPlan, used: Sequence[Pool], known: Mapping[str, FoundPlan]
) -> float:
    """The plan's speed over what the pools it uses reach alone, added up."""
    workload = searcher.workload
    peaks = {
        pool.name: pool.chips * pool.flops(workload.precision_for(pool)) / workload.flops_per_token for pool in used
    }
    shares = [known[pool.name].tokens_per_second / peaks[pool.name] for pool in used if pool.name in known]
    share = max(shares, default=found.tokens_per_second / sum(peaks.values()))
    total = sum(known[pool.name].tokens_per_second if pool.name in known else share * peaks[pool.name] for pool in used)
    return found.tokens_per_second / total


def _brief(plan: FoundPlan, found: FoundPlan) -> dict[str, Any]:
    return {
        "step_seconds": plan.step_seconds,
        "tokens_per_second": plan.tokens_per_second,
        "days": plan.expected_seconds / 86400,
        "cost": plan.cost,
        "chips": plan.chips,
        "relative_speed": plan.tokens_per_second / found.tokens_per_second,
    }


def _spread_states(found: FoundPlan, groups: Sequence[dict[str, Any]]) -> None:
    """Where some group's chips cannot hold its states, all states of its island are spread by free memory."""
    for island in {group["island"] for group in groups}:
        together = [group for group in groups if group["island"] == island]
        names = {name for group in together for name in group["pools"]}
        frameworks = [found.workload.framework_for(pool) for pool in found.fleet.pools if pool.name in names]
        if not any(group["states"] == SPREAD for group in together):
            continue
        room = sum(group["spare_bytes"] for group in together)
        filled = found.workload.parameters * max(framework.state_bytes["optimizer"] for framework in frameworks) / room
        for group in together:
            group["states"] = SPREAD
            group["state_share"] = group["spare_bytes"] / room
            for stage in group["stages"]:
                parts = stage["memory_bytes"]
                parts["optimizer"] = 0.0
                parts["fragmentation"] = FRAGMENTATION * (sum(parts.values()) - parts["fragmentation"])
                parts["optimizer"] = filled * max(stage["memory_limit_bytes"] - sum(parts.values()), 0.0)


# ------------------------------------------------------------------------------------------------- parts


def _group(found: FoundPlan, chosen: ChosenGroup) -> dict[str, Any]:
    """One pipeline group: its layout, its stages, its share of the batch and the parts of its step."""
    options, workload = chosen.options.take(np.array([chosen.index])), found.workload
    configs = options.configs
    first = configs[0]
    pp = int(first.pp[0])
    costed = [
        network_pieces(workload.shape, own, workload.seq_len, member.hardware, member.framework, member.precision)
        for own, member in zip(configs, options.members, strict=True)
    ]
    seconds, held = stage_sums(costed, options.stage_of, options.pool_of)
    line = float(busiest(first, seconds.total)[0])
    m = chosen.micro_batches
    slowest = int(np.argmax(seconds.total[:pp, 0]))
    factor = line / float(seconds.total[slowest, 0])  # DualPipe: a chip shares a slow and a fast stage
    compute = m * factor * float(seconds.forward[slowest, 0] + seconds.backward[slowest, 0])
    bubble = float(bubbles(first, seconds, first.pp)[0])
    bubble += max(int(first.least_micro_batches[0]) - m, 0) * line  # too few micro-batches for the schedule
    optimizer = _update(options, held, chosen)
    stages = [_stage(found, chosen, options, costed, held_at(held, stage), stage) for stage in range(pp)]
    steps = chosen.steps
    return {
        "pools": [member.pool.name for member in options.members],
        "island": chosen.island,
        "dp": int(first.dp[0]),
        "pp": pp,
        "cp": int(first.cp[0]),
        "ep": int(first.ep[0]),
        "tp": {m_.pool.name: int(own.tp[0]) for m_, own in zip(options.members, configs, strict=True)},
        "precision": {member.pool.name: member.precision for member in options.members},
        "zero": int(first.zero[0]) if options.chips.sum() > 1 or chosen.update is not None else 0,
        "states": _states(chosen),
        "schedule": SCHEDULES[int(first.schedule[0])],
        "recompute": RECOMPUTES[int(first.recompute[0])],
        "micro_batch": int(first.micro_batch[0]),
        "micro_batches": m,
        "sequences": chosen.sequences,
        "share": chosen.sequences / workload.global_batch,
        "chips": {m_.pool.name: int(count) for m_, count in zip(options.members, options.chips[:, 0], strict=True)},
        "state_share": chosen.kept,
        "spare_bytes": float(options.spare[0]),
        "seconds": {
            "compute": compute * steps,
            "bubble": bubble * steps,
            "optimizer": optimizer * steps,
            "communication": max(chosen.seconds - compute - bubble - optimizer, 0.0) * steps,
            "waiting": max(found.step_seconds - chosen.seconds * steps, 0.0),
        },
        "stages": stages,
    }


def _states(chosen: ChosenGroup) -> str:
    """Which chips hold the group's optimizer states."""
    if chosen.update is not None:
        return "sharded over the island"
    return "own chips" if chosen.options.own_states[chosen.index] else SPREAD


def _stage(
    found: FoundPlan,
    chosen: ChosenGroup,
    options: GroupOptions,
    costed: Sequence[NetworkPieces],
    held: HeldParameters,
    stage: int,
) -> dict[str, Any]:
    """What one stage holds, with the memory of one of its chips."""
    number = int(options.pool_of[stage, 0])
    member, configs = options.members[number], options.configs[number]
    pieces = [piece for piece in range(len(options.stage_of)) if options.stage_of[piece, 0] == stage]
    kinds = [costed[number].kinds[piece] for piece in pieces]
    layers = [piece - 1 for piece, (what, _) in zip(pieces, kinds, strict=True) if what == "layer"]
    seconds = sum(float(costed[number].seconds[piece].total[0]) for piece in pieces)
    routed = found.workload.shape.experts
    return {
        "pool": member.pool.name,
        "chip": member.hardware.chip,
        "chips": int((configs.tp * configs.cp * configs.dp)[0]),
        "layers": [layers[0], layers[-1]] if layers else None,
        "embedding": any(what == "embedding" for what, _ in kinds),
        "mtp": sum(1 for what, _ in kinds if what == "mtp"),
        "head": any(what == "head" for what, _ in kinds),
        "experts_per_chip": routed // int(configs.ep[0]) if routed else 0,
        "seconds_per_micro_batch": seconds,
        "parameters_per_chip": float(np.squeeze(held.dense / configs.tp + held.experts / (configs.tp * configs.ep))),
        "memory_bytes": memory_parts(found, chosen, member, configs, kinds, held, stage),
        "memory_limit_bytes": member.hardware.memory_bytes,
    }


def memory_parts(
    found: FoundPlan,
    chosen: ChosenGroup,
    member: GroupMember,
    configs: ParallelConfigs,
    kinds: Sequence[PieceKind],
    held: HeldParameters,
    stage: int,
) -> dict[str, float]:
    """Bytes on one chip of a stage by what they are for."""
    bytes_ = stage_bytes(kinds, held, stage, found.workload.shape, configs, member.framework, found.workload.seq_len)
    states = {"weights": bytes_.weights, "gradients": bytes_.gradients, "optimizer": bytes_.optimizer}
    if chosen.update is not None:  # sharded over the island: this group keeps its part
        for (name, size), level in zip(states.items(), SHARDED_FROM, strict=True):
            states[name] = size * np.where(configs.zero >= level, chosen.kept, 1.0)
    elif _states(chosen) == SPREAD:
        states["optimizer"] = np.zeros(1)
    parts = {name: float(size[0]) for name, size in states.items()}
    parts |= {"activations": float(bytes_.activations[0]), "buffers": float(bytes_.buffers[0])}
    parts["fragmentation"] = FRAGMENTATION * sum(parts.values())
    return parts


def _update(options: GroupOptions, held: HeldParameters, chosen: ChosenGroup) -> float:
    """Seconds the optimizer takes on the busiest chip."""
    step = max(member.framework.step_seconds for member in options.members)
    if chosen.update is not None:
        return chosen.update + step
    first = options.configs[0]
    each = np.zeros((options.pool_of.shape[0], 1))
    for stage in range(int(first.pp[0])):
        number = int(options.pool_of[stage, 0])
        member, own = options.members[number], options.configs[number]
        each[stage] = update_seconds(held_at(held, stage), own, member.hardware, member.framework)
    return float(busiest(first, each)[0]) + step


def _pools(found: FoundPlan, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each pool's part: chips, tokens, share of its peak, the parts of its step."""
    workload = found.workload
    rows = []
    for pool in found.fleet.pools:
        own = [group for group in groups if pool.name in group["pools"]]
        used = sum(group["chips"][pool.name] for group in own)
        row: dict[str, Any] = {
            "pool": pool.name,
            "chip": pool.sheet.name,
            "site": found.fleet.site_of(pool),
            "chips": used,
            "chips_idle": pool.chips - used,
            "price_per_hour": pool.price,
            "power_watts": pool.sheet.power_watts,
            "hours_between_failures": hours_between_failures(pool),
            "nodes": pool.nodes,
            "chips_per_node": pool.per_node,
            "availability": pool.availability,
        }
        if own:
            flops = sum(_flops_on(found, group, pool.name) for group in own)
            precision = own[0]["precision"][pool.name]
            wide = precision if precision != "fp8" else pool.sheet.best_precision()
            row |= {
                "precision": precision,
                "mfu": flops / (used * pool.flops(wide) * found.step_seconds),
                "flops_share": flops / (workload.flops_per_token * workload.seq_len * workload.global_batch),
                "memory_bytes": max(
                    sum(stage["memory_bytes"].values())
                    for group in own
                    for stage in group["stages"]
                    if stage["pool"] == pool.name
                ),
                "memory_limit_bytes": own[0]["stages"][0]["memory_limit_bytes"]
                if len(own[0]["pools"]) == 1
                else next(s["memory_limit_bytes"] for s in own[0]["stages"] if s["pool"] == pool.name),
            }
        rows.append(row)
    return rows


def _flops_on(found: FoundPlan, group: dict[str, Any], pool: str) -> float:
    """FLOPs of the mathematics that a pool's stages of a group do in one step."""
    workload = found.workload
    shape, seq = workload.shape, workload.seq_len
    head = 2 * shape.head.active
    total = 0.0
    for stage in group["stages"]:
        if stage["pool"] != pool:
            continue
        if stage["layers"]:
            first, last = stage["layers"]
            total += sum(block.forward_flops(seq) for block in shape.blocks[first : last + 1])
        for block in shape.mtp[: stage["mtp"]]:
            total += block.forward_flops(seq) + 2 * shape.mtp_projection().active + head
        total += head * stage["head"]
    return 3 * total * group["sequences"] * seq


def _split(found: FoundPlan, groups: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The parts of a step of the group that is busy the longest; they add up to the step."""
    longest = min(groups, key=lambda group: group["seconds"]["waiting"])
    parts = dict(longest["seconds"])
    parts["communication"] += parts.pop("waiting")
    return parts


def _notes(found: FoundPlan, groups: Sequence[dict[str, Any]]) -> list[str]:
    notes = []
    frameworks = {member.framework.name: member.framework for group in found.groups for member in group.options.members}
    for framework in frameworks.values():
        if any("assumed" in line for line in framework.fitted):
            notes.append(f"framework {framework.name}: {framework.fitted[0]}")
    if found.inner_steps:
        notes.append(
            f"an outer step every {found.inner_steps} steps: published losses of doing so are "
            "+0.3 to +2 % at 4 islands, less at larger models (DiLoCo scaling laws)"
        )
    if any(group["states"] == SPREAD for group in groups):
        notes.append("optimizer states are spread over the fleet in proportion to free memory")
    if any(pool.availability < 1 for pool in found.fleet.pools):
        notes.append("availability below 1 is not in these figures: `motley plan simulate` replays it")
    idle = [pool.name for pool in found.fleet.pools if not any(pool.name in group["pools"] for group in groups)]
    if idle:
        notes.append(f"left out, because the plan is better at what was asked for without them: {', '.join(idle)}")
    return notes
