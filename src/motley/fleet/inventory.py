"""The user's fleet as a file: pools of equal chips, their sites, the links between sites.

    name: lab
    pools:
      - name: a100s
        chip: A100-80GB-SXM        # from the chip sheet (`motley fleet chips`)
        nodes: 1
        chips_per_node: 2
        link_inside: 300 GB/s      # per chip and direction; default: the sheet's
        link_outside: 100 Gb/s     # per NODE and direction; default: the sheet's
        price_per_hour: 1.40       # of one chip; default: the sheet's
        emulated: {speed: 0.25}    # with --emulate: speed, memory, precision, link, fails_after
    sites: [...]  links: [...]     # only where some links are slow

Errors name the line. Rates and sizes carry their units.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from motley.errors import InputError
from motley.fleet.chips import PRECISIONS, Chip, Precision, find_chip
from motley.fleet.units import Duration, Memory, Moment, Rate, rate_text, size_text

HOURS_BETWEEN_FAILURES = 50_000.0
"""Of one chip: Llama 3 (arXiv 2407.21783, 3.3.4) lost 419 times in 54 days on 16,384 H100: 50,700 chip-hours each."""
FP16_GAIN = 1.3  # over bf16, to be worth loss scaling
MOST_CHIPS = 1_000_000
MOST_OF_MEMORY = 1.1  # measured values of a GPU beyond this multiple of the sheet's are a wrong unit or another chip
MOST_OF_RATES = 1.5
LATENCY = {"inside a site": 5e-6, "between sites": 20e-3}  # where the file does not say

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, strict=True)]
Name = Annotated[str, Field(min_length=1, max_length=60, pattern=r"^[A-Za-z0-9][\w .+-]*$")]
MatmulPoint = Annotated[tuple[Count, Count, Count, Count, Positive], Field()]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeasuredChip(_Entry):
    """Values of a chip that a probe measured; each replaces the data sheet's."""

    device: str = ""
    """The chip's own name."""
    memory: Memory | None = None
    """Memory of a chip that a process may use."""
    memory_bandwidth: Rate | None = None
    matmul: dict[Precision, tuple[MatmulPoint, ...]] = {}
    """Per number format: [groups, rows, inner, columns, GFLOP/s] of each product measured."""


class EmulatedLink(_Entry):
    """The emulated link between a rank of this pool and ranks of other pools, the same in both directions."""

    bandwidth: Rate | None = None
    latency: Duration = 0.0


class Emulated(_Entry):
    """A chip that a rank of this machine emulates (`--emulate`)."""

    speed: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the speed of the emulating machine."""
    memory: Memory | None = None
    """Memory that each rank may use."""
    precision: Precision | None = None
    """Format that the emulated chip trains in: bf16 or fp16, fp32 where it has neither, or fp8."""
    link: EmulatedLink = EmulatedLink()
    fails_after: tuple[Moment, ...] = ()
    """When the first chip of the pool fails, the second, ...: `8 steps` or `60 s`; further chips do not fail."""


class Pool(_Entry):
    """Equal chips in equal nodes at one site."""

    name: Name
    chip: str
    nodes: Count = 1
    chips_per_node: Count | None = None
    site: Name | None = None
    link_inside: Rate | None = None
    link_outside: Rate | None = None
    latency_outside: Duration | None = None
    bridged_pairs: bool = False
    price_per_hour: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    availability: Annotated[float, Field(gt=0, le=1)] = 1.0
    hours_between_failures: Positive = HOURS_BETWEEN_FAILURES
    hours_between_node_failures: Positive | None = None
    precision: Precision | None = None
    measured: MeasuredChip = MeasuredChip()
    emulated: Emulated | None = None

    @property
    def speed(self) -> float:
        """Share of the chip's own speed: below 1 where a slower chip is emulated."""
        return self.emulated.speed if self.emulated else 1.0

    @property
    def memory_known(self) -> float | None:
        """Bytes of a chip that a process may use, where they are emulated or measured; None: see the sheet."""
        return (self.emulated and self.emulated.memory) or self.measured.memory

    @property
    def network_known(self) -> float | None:
        """Bytes/s of a node to other nodes, likewise."""
        emulated = self.emulated and self.emulated.link.bandwidth
        return emulated * self.per_node if emulated else self.link_outside

    @property
    def sheet(self) -> Chip:
        return find_chip(self.chip)

    @property
    def per_node(self) -> int:
        return self.chips_per_node or self.sheet.chips_per_node

    @property
    def chips(self) -> int:
        return self.nodes * self.per_node

    @property
    def best_precision(self) -> str:
        """Format to train in by default: the fastest that was measured, or bf16, fp16, fp32 by the sheet.

        fp8 is used on request only; fp16 needs loss scaling and must be clearly faster than bf16 to be chosen.
        An emulated format costs what it costs on this machine: the time of fp32 where it lacks the format.
        """
        if self.precision:
            return self.precision
        if self.emulated and self.emulated.precision:
            return self.emulated.precision if self.emulated.precision in self.precisions else "fp32"
        measured = {name: self.flops(name) for name in self.measured.matmul if name != "fp8"}
        if not measured:
            return self.sheet.best_precision()
        fastest = max(measured, key=lambda name: measured[name])
        near = fastest == "fp16" and FP16_GAIN * measured.get("bf16", 0.0) > measured["fp16"]
        return "bf16" if near else fastest

    @property
    def precisions(self) -> tuple[str, ...]:
        """Number formats it can compute in: those measured, or those of the sheet."""
        return tuple(self.measured.matmul) or tuple(self.sheet.flops)

    def flops(self, precision: str) -> float:
        """FLOP/s of one chip: the best product measured, or the sheet's dense rate."""
        if points := self.measured.matmul.get(precision):  # type: ignore[call-overload]
            return max(point[4] for point in points) * 1e9 * self.speed
        return self.sheet.flops[precision] * self.speed

    @property
    def price(self) -> float:
        """$ per chip and hour."""
        return self.sheet.price_per_hour if self.price_per_hour is None else self.price_per_hour


class Link(_Entry):
    """A slow link between two sites; its bandwidth is that of one direction."""

    sites: Annotated[tuple[Name, Name], Field()]
    bandwidth: Rate
    latency: Duration = LATENCY["between sites"]


class Site(_Entry):
    name: Name


class Fleet(_Entry):
    """All pools, sites and links."""

    name: Name = "fleet"
    pools: Annotated[tuple[Pool, ...], Field(min_length=1)]
    sites: tuple[Site, ...] = ()
    links: tuple[Link, ...] = ()
    currency: str = "$"

    @property
    def chips(self) -> int:
        return sum(pool.chips for pool in self.pools)

    def site_of(self, pool: Pool) -> str:
        return pool.site or (self.sites[0].name if self.sites else "here")

    @property
    def site_names(self) -> list[str]:
        return list(dict.fromkeys(self.site_of(pool) for pool in self.pools))

    def link_between(self, one: str, other: str) -> Link:
        """The slow link between two sites. Raises InputError where there is none."""
        for link in self.links:
            if set(link.sites) == {one, other}:
                return link
        raise InputError(f"fleet {self.name}: no link between the sites {one!r} and {other!r}")

    def without(self, names: Sequence[str]) -> "Fleet":
        """The fleet without some of its pools."""
        return self.model_copy(update={"pools": tuple(pool for pool in self.pools if pool.name not in names)})


def load_fleet(path: Path) -> Fleet:
    """Read and check a fleet file.

    Raises InputError naming file, line, field and what is allowed there.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(
            f"{path} does not exist; `motley fleet probe --out {path}` writes one for this machine"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as text: {error}") from None
    return parse_fleet(text, str(path))


def parse_fleet(text: str, where: str) -> Fleet:
    """`load_fleet` on a text."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        _no_key_twice(node, where)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{where}{line}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(values, dict):
        raise InputError(f"{where}: a fleet file is a mapping with `pools:`, see examples/fleets/")
    try:
        fleet = Fleet.model_validate(values)
    except ValidationError as failed:
        raise InputError(_sentence(failed, node, where)) from None
    _check(fleet, node, where)
    return fleet


def _check(fleet: Fleet, node: yaml.Node | None, where: str) -> None:
    """Check entries against each other."""
    names = [pool.name for pool in fleet.pools]
    for index, pool in enumerate(fleet.pools):
        at = f"{where}, line {_line(node, ('pools', index, 'chip'))}"
        if names.index(pool.name) != index:
            raise InputError(f"{where}, line {_line(node, ('pools', index))}: there are two pools called {pool.name!r}")
        try:
            chip = find_chip(pool.chip)
        except InputError as error:
            raise InputError(f"{at}: {error}") from None
        if pool.emulated and len(pool.emulated.fails_after) > pool.chips:
            line = _line(node, ("pools", index, "emulated", "fails_after"))
            raise InputError(
                f"{where}, line {line}: fails_after has {len(pool.emulated.fails_after)} times, the pool has "
                f"{pool.chips} chips; give one for each chip that shall fail, in the order of chips"
            )
        if pool.precision and pool.precision not in chip.flops:
            line = _line(node, ("pools", index, "precision"))
            has = ", ".join(name for name in PRECISIONS if name in chip.flops)
            raise InputError(f"{where}, line {line}: {chip.name} has no {pool.precision}; it has {has}")
        if chip.kind == "gpu":  # of a CPU the sheet lists one core, a probe measures the machine
            for what, path in beyond_the_sheet(pool.measured, chip):
                line = _line(node, ("pools", index, "measured", *path))
                raise InputError(f"{where}, line {line}: measured {what}; check the unit and the chip's name")
    if fleet.chips > MOST_CHIPS:
        largest = max(range(len(fleet.pools)), key=lambda index: fleet.pools[index].chips)
        line = _line(node, ("pools", largest, "nodes"))
        raise InputError(
            f"{where}, line {line}: {fleet.chips:,} chips are too many; there may be {MOST_CHIPS:,} in all"
        )
    if fleet.sites:
        known = [site.name for site in fleet.sites]
        for index, pool in enumerate(fleet.pools):
            if fleet.site_of(pool) not in known:
                line = _line(node, ("pools", index, "site"))
                raise InputError(f"{where}, line {line}: there is no site {pool.site!r}; sites: {', '.join(known)}")
    sites = set(fleet.site_names) | {site.name for site in fleet.sites}
    for index, link in enumerate(fleet.links):
        line = _line(node, ("links", index))
        if link.sites[0] == link.sites[1]:
            raise InputError(
                f"{where}, line {line}: a link joins two different sites, not {link.sites[0]!r} with itself"
            )
        for site in link.sites:
            if site not in sites:
                raise InputError(f"{where}, line {line}: there is no site {site!r}; sites: {', '.join(sorted(sites))}")
    joined = [set(link.sites) for link in fleet.links]
    for one, other in combinations(sorted(fleet.site_names), 2):
        if {one, other} not in joined:
            raise InputError(
                f"{where}: no link between the sites {one!r} and {other!r}; add one under `links:` with its bandwidth"
            )


def beyond_the_sheet(measured: MeasuredChip, chip: Chip) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Measured values that the chip cannot reach: (both values for people, path within `measured`)."""
    if measured.memory and measured.memory > MOST_OF_MEMORY * chip.memory_bytes:
        yield f"memory is {size_text(measured.memory)}, {chip.name} has {size_text(chip.memory_bytes)}", ("memory",)
    if measured.memory_bandwidth and measured.memory_bandwidth > MOST_OF_RATES * chip.memory_bandwidth:
        own, sheets = rate_text(measured.memory_bandwidth), rate_text(chip.memory_bandwidth)
        yield f"memory bandwidth is {own}, {chip.name} has {sheets}", ("memory_bandwidth",)
    for name, points in measured.matmul.items():
        most = chip.flops.get(name, max(chip.flops.values())) / 1e9
        for number, (*_, gflops) in enumerate(points):
            if gflops > MOST_OF_RATES * most:
                words = f"a rate in {name} is {gflops:,.0f} GFLOP/s, {chip.name} computes at {most:,.0f} GFLOP/s"
                yield words, ("matmul", name, number)


def _sentence(failed: ValidationError, node: yaml.Node | None, where: str) -> str:
    """The first error, for people."""
    error = failed.errors()[0]
    path = [part for part in error["loc"] if isinstance(part, int) or part not in ("tuple", "function-before")]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    kind, given = error["type"], error.get("input")
    if kind == "missing":
        problem = f"{field} is missing"
    elif kind == "extra_forbidden":
        problem = f"there is no field {field}; known here: {', '.join(_entry_at(path[:-1]).model_fields)}"
    else:
        message = error["msg"].removeprefix("Value error, ")
        message = message[0].lower() + message[1:]
        problem = f"{field} is {given!r}: {message}"
    return f"{where}, line {_line(node, path)}: {problem}"


def _entry_at(path: Sequence[Any]) -> type[_Entry]:
    """The class of the entry at `path` of a fleet file."""
    entry: type[_Entry] = Fleet
    for name in path:
        if name in entry.model_fields:
            entry = next(_entries_in(entry.model_fields[name].annotation), entry)
    return entry


def _entries_in(annotation: Any) -> Iterator[type[_Entry]]:
    """The entry classes in the type of a field: `tuple[Pool, ...]` → Pool."""
    if isinstance(annotation, type) and issubclass(annotation, _Entry):
        yield annotation
    for part in get_args(annotation):
        yield from _entries_in(part)


def _line(node: yaml.Node | None, path: Sequence[Any]) -> int:
    """Line (from 1) of the entry at `path`, or of the nearest entry around it."""
    line = 1
    for part in path:
        if node is None:
            break
        line = node.start_mark.line + 1
        child = None
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.value == part:
                    line, child = key.start_mark.line + 1, value
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            child = node.value[part]
            line = child.start_mark.line + 1
        if child is None:
            break
        node = child
    return line


def _no_key_twice(node: yaml.Node | None, where: str) -> None:
    """Raises InputError for a key that is given twice, of which YAML would silently take the last."""
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            if key.value in seen:
                raise InputError(f"{where}, line {key.start_mark.line + 1}: {key.value!r} is given twice")
            seen.add(key.value)
            _no_key_twice(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _no_key_twice(value, where)
