"""Chips of one kind and the links between them, as the cost model sees them: rates in bytes/s and FLOP/s.

ring all-reduce of n ranks    2 (n-1)/n x bytes / rate  + latency x log2(n)
over nodes                    k ranks of a node reduce inside, then each node's network carries k shares at once
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from motley.fleet.chips import GIGA, Chip
from motley.fleet.inventory import LATENCY, Pool
from motley.plan.cost_model.configs import Floats, Ints
from motley.plan.cost_model.framework import Framework

CONTEXT_BYTES = 1.5 * 2**30  # of an accelerator: driver context, libraries, communicators
PRECISION_ORDER = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Hardware:
    """Equal chips in equal nodes.

    Attributes:
        flops: FLOP/s per number format.
        memory_bytes: what a process may use of a chip's memory.
        memory_bandwidth: bytes/s.
        link: bytes/s per direction and chip inside a node.
        pair: the same between two neighbours, where chips are bridged in pairs.
        network: bytes/s per direction and NODE to other nodes.
        latency: seconds of the network, one way.
        peak: FLOP/s per number format that shares of the peak are stated of (the sheet's, or the best measured).
        curves: per number format, measured (matrices, rows, inner, columns, FLOP/s); empty: the framework's hold.
    """

    chip: str
    flops: Mapping[str, float]
    memory_bytes: float
    memory_bandwidth: float
    link: float
    pair: float
    network: float
    chips_per_node: int
    latency: float = 0.0
    power_watts: float = 0.0
    price_per_hour: float = 0.0
    peak: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[str, tuple[tuple[float, ...], ...]] = field(default_factory=dict)

    def wide(self, precision: str) -> str:
        """The 16- or 32-bit format beside `precision`: what is not done in fp8 is done in this."""
        if precision != "fp8" and precision in self.flops:
            return precision
        return next(name for name in PRECISION_ORDER if name in self.flops)

    @classmethod
    def of_chip(cls, chip: Chip, chips_per_node: int | None = None, network: float | None = None) -> "Hardware":
        """The data sheet's figures; rates are reduced to what the chip sustains under its power limit."""
        return cls(
            chip=chip.name,
            flops={precision: rate * chip.sustained for precision, rate in chip.flops.items()},
            memory_bytes=chip.memory_bytes - (CONTEXT_BYTES if chip.kind == "gpu" else 0),
            peak=dict(chip.flops),
            memory_bandwidth=chip.memory_bandwidth,
            link=chip.link_bandwidth * (1.0 if chip.peer_to_peer else 0.5),
            pair=chip.link_bandwidth * (1.0 if chip.peer_to_peer else 0.5),  # bridges are sold apart
            network=network or chip.node_network,
            chips_per_node=chips_per_node or chip.chips_per_node,
            power_watts=chip.power_watts,
            price_per_hour=chip.price_per_hour,
        )

    @classmethod
    def of_pool(cls, pool: Pool) -> "Hardware":
        """The pool's chips: emulated figures go before measured ones, and those before the sheet's."""
        chip, measured, emulated = pool.sheet, pool.measured, pool.emulated
        sheet = cls.of_chip(chip)
        curves = {
            precision: tuple((*point[:4], point[4] * GIGA * pool.speed) for point in points)
            for precision, points in measured.matmul.items()
        }
        link = pool.link_inside or sheet.link
        latency = LATENCY["inside a site"] if pool.latency_outside is None else pool.latency_outside
        rates = {name: rate * pool.speed for name, rate in sheet.flops.items()}
        return replace(
            sheet,
            flops={name: max(p[4] for p in points) for name, points in curves.items()} if curves else rates,
            peak={name: pool.flops(name) for name in pool.precisions},
            memory_bytes=pool.memory_known or sheet.memory_bytes,
            memory_bandwidth=(measured.memory_bandwidth or sheet.memory_bandwidth) * pool.speed,
            link=link,
            pair=(chip.pair_bandwidth or link) if pool.bridged_pairs else link,
            network=pool.network_known or sheet.network,
            chips_per_node=pool.per_node,
            latency=max(latency, emulated.link.latency) if emulated else latency,
            price_per_hour=pool.price,
            curves=curves,
        )

    def curve_factor(
        self, precision: str, matrices: float, rows: Floats, inner: Floats | float, outer: Floats | float
    ) -> Floats | None:
        """Share of `flops` that products of this size reach, from measured ones nearby; None where none were measured.

        Between measured sizes the logarithm of the rate is averaged, near ones (in octaves) counting most.
        """
        if precision not in self.curves:
            return None
        points = np.asarray(self.curves[precision])
        known = np.log2(points[:, 1:4])
        asked = np.stack(
            [np.log2(np.maximum(np.broadcast_to(x, rows.shape), 1.0)) for x in (rows, inner, outer)], axis=-1
        )
        distance = ((asked[..., None, :] - known) ** 2).sum(axis=-1) + ((points[:, 0] > 1) != (matrices > 1)) * 1.0
        weight = 1 / (0.05 + distance) ** 2
        share = np.log2(points[:, 4] / self.flops[precision])
        return 2 ** ((weight * share).sum(axis=-1) / weight.sum(axis=-1))

    @property
    def network_per_chip(self) -> float:
        return self.network / self.chips_per_node

    def in_node(self, degree: Ints, inside: Ints) -> Ints:
        """How many ranks of a group share a node; `inside` = chips taken by one step from rank to rank x its degree.

        A group whose `degree` ranks are `stride` chips apart; `inside` is stride for nested groups.
        """
        return np.minimum(degree, np.maximum(self.chips_per_node // np.maximum(inside, 1), 1))

    def all_reduce(self, degree: Ints, span: Ints, sent: Floats, framework: Framework) -> Floats:
        """Seconds to sum `sent` bytes over `degree` ranks that together span `span` chips."""
        return 2 * self.all_gather(degree, span, sent, framework)

    def all_gather(self, degree: Ints, span: Ints, whole: Floats, framework: Framework) -> Floats:
        """Seconds until every rank has `whole` bytes, of which each held one part (a reduce-scatter costs the same)."""
        local = self.in_node(degree, span // np.maximum(degree, 1))
        nodes = np.maximum(degree // local, 1)
        link = np.where(span == 2, self.pair, self.link)
        inside = (local - 1) / local * whole / (link * framework.link_efficiency)
        share = self.network_per_chip * local * framework.network_efficiency
        between = (nodes - 1) / nodes * whole / share
        latency = (local - 1) * framework.collective_seconds / 2
        far = np.log2(np.maximum(nodes, 1)) * (framework.network_seconds + self.latency) / 2
        return np.where(nodes > 1, inside / np.maximum(nodes, 1) + between, inside) + latency + far

    def all_to_all(
        self, degree: Ints, stride: Ints, sent: Floats, copies: Ints, most_nodes: int, framework: Framework
    ) -> Floats:
        """Seconds until each rank has sent `sent` bytes times the `copies` that its tokens need, to ranks of its group.

        Over the network a token goes to a node once (to at most `most_nodes` nodes if that is above 0).
        """
        local = self.in_node(degree, stride)
        nodes = np.maximum(degree // local, 1)
        # Expected nodes hit by `copies` even draws, its own node not counted.
        hit = nodes * (1 - (1 - 1 / nodes) ** copies)
        if most_nodes:
            hit = np.minimum(hit, most_nodes)
        over_network = sent * hit * (nodes - 1) / nodes / (self.network_per_chip * framework.network_efficiency)
        inside = sent * copies * (local - 1) / local / (self.link * framework.link_efficiency)
        messages = 4 * (
            np.log2(np.maximum(degree, 1)) * framework.collective_seconds
            + (nodes > 1) * (framework.network_seconds + self.latency)
        )
        return np.maximum(over_network, inside) + messages

    def send(self, sent: Floats, outside: object, framework: Framework) -> Floats:
        """Seconds of one message to a neighbour; `outside` (array of truth values) says whether it leaves the node."""
        inside = sent / (self.link * framework.link_efficiency)
        over = sent / (self.network_per_chip * framework.network_efficiency) + self.latency
        return framework.message_seconds + np.where(np.asarray(outside), over, inside)
