"""How fast a device multiplies and copies, measured in bounded time on any device.

    climb       4, 8, 16 ... 2048         every format at each size, fp32 first: the next size is tried only if the time
                                          of the last one lets it end in time; formats slower than fp32 are left out
    turns       rounds until the time is up: every size that was reached, in turn; the result is the median of each
    deadline    a product that still runs shortly before twice the time is abandoned

Because sizes take turns, a busy moment of the machine slows all of them alike, so that comparisons (is bf16 faster
here?) stay fair; the median ignores the moment.
"""

import math
import statistics
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

SKINNY = (4096, 256, 1024)  # a batch of tokens through one small layer, the usual product of a small model
BURST_SECONDS = 0.005  # shorter measurements are repeated, because clocks and kernel launches take time
MOST_IN_BURST = 100
FIRST_SHARE = 0.01  # of the time: products that take less are run a few times at first
FIRST_RUNS = 5  # the best of them decides whether a format is left out, so that a busy moment does not
COPIES_SHARE = 0.25  # of the time, at most
LEAST_ROUNDS = 3  # that must still fit into the time after a size was reached
DEADLINE = 1.8  # of the seconds asked for: then a product is abandoned, so that the whole takes less than twice them
CAUTION = {"fp32": 4.0, "copy": 4.0}
CAUTION_ELSE = 32.0
"""A size is tried if it would end in time even when it is this many times slower than the previous size predicts.
Formats other than fp32 may be emulated from some size on."""
HOPELESS = 4.0  # times slower than fp32: emulated, whatever the size
HOPELESS_FROM = 64  # edge; below, a call costs more than its product
GLANCE_SECONDS = 0.1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}
FP8_CAPABILITY = (8, 9)  # of NVIDIA's chips, from which on they multiply in fp8
GIGA = 1e9

Action = Callable[[], object]
Shape = tuple[int, int, int, int]
"""groups, rows, inner, columns"""
MakeProduct = Callable[[torch.device, str, int, int, int, int], Action]
MakeCopy = Callable[[torch.device, int], Action]
Key = tuple[str, Shape]
"""A format and a shape; ("copy", (1, 1, 1, bytes)) for a copy."""


def most_seconds(seconds: float) -> float:
    """The longest that a probe or a glance of `seconds` takes; other ranks that wait for it must wait as long."""
    return 2 * seconds


@dataclass
class ProbeSamples:
    """Measurements so far.

    Attributes:
        samples: seconds of each run of every size that was reached, in formats that are not left out.
        left_out: formats that are not faster than fp32, and how many times slower they are (inf: they fail).
    """

    samples: dict[Key, list[float]] = field(default_factory=dict)
    left_out: dict[str, float] = field(default_factory=dict)

    def seconds(self) -> dict[Key, float]:
        """The median of each size."""
        return {key: statistics.median(samples) for key, samples in self.samples.items()}

    def copied(self) -> "ProbeSamples":
        """A snapshot that no other thread changes."""
        return ProbeSamples({key: list(samples) for key, samples in list(self.samples.items())}, dict(self.left_out))


def flops(shape: Shape) -> int:
    groups, rows, inner, columns = shape
    return 2 * groups * rows * inner * columns


@dataclass(frozen=True)
class Sizes:
    """Sizes to try on a kind of device, small to large.

    Attributes:
        squares: edges of the products that a format climbs.
        trial: the edge at which a format must be faster than fp32; smaller products are not reported.
        copies: bytes.
    """

    squares: Sequence[int]
    trial: int
    copies: Sequence[int]

    @property
    def side(self) -> int:
        return self.squares[-1]


def sizes_of(device: torch.device) -> Sizes:
    """The largest copy is larger than any cache."""
    if device.type == "cpu":
        return Sizes([2**k for k in range(2, 12)], 256, [2**k for k in range(20, 29, 2)])
    # Below 2048 launching a product on an accelerator takes as long as computing it.
    return Sizes([2**k for k in range(7, 14)], 2048, [2**k for k in range(20, 31, 2)])


def measure(
    device: torch.device,
    formats: Sequence[str],
    seconds: float,
    grid: bool = False,
    started: float | None = None,
    make: MakeProduct | None = None,
) -> ProbeSamples:
    """Rates of products and copies, in less than twice `seconds`.

    Args:
        device: what to measure.
        formats: number formats to try, fp32 first.
        seconds: to measure for.
        grid: curves (small to large, skinny, grouped) instead of squares and one skinny product.
        started: when the time began, of `time.perf_counter`; default now.
        make: makes the products; default those of PyTorch.
    """
    sizes = sizes_of(device)
    squares: list[Shape] = [(1, edge, edge, edge) for edge in sizes.squares]
    shown: list[Shape] = [(1, *SKINNY), *[shape for shape in squares if shape[1] >= sizes.trial]]
    if grid:
        shown += [shape for shape in grid_of(sizes.side) if shape not in shown]
    climb = Climb(device, seconds, sizes.trial, make=make or product, started=started)

    def work() -> None:
        climb.copies(sizes.copies)
        climb.products(formats, {*squares, *shown}, shown)
        climb.turns()

    return within_deadline(climb, work)


def glance(device: torch.device, dtype: str, seconds: float = GLANCE_SECONDS, make: MakeProduct | None = None) -> float:
    """GFLOP/s of the largest matrix product for which there is time: enough to share rows out at a start.

    dtype: number format; fp32 is measured where the device lacks it.
    """
    dtype = dtype if dtype in formats_of(device) else "fp32"
    make = make or product
    largest = 512 if device.type == "cpu" else 4096
    squares: list[Shape] = [(1, edge, edge, edge) for edge in sizes_of(device).squares if edge <= largest]
    make(device, dtype, *squares[0])()  # initializes libraries, which is not to be measured
    wait_for(device)
    climb = Climb(device, seconds, squares[0][1], make=make)

    def work() -> None:
        climb.products([dtype], squares, squares)
        climb.turns(only_largest=True)

    found = within_deadline(climb, work).seconds()
    key = max(found, key=lambda key: flops(key[1]))
    return flops(key[1]) / found[key] / GIGA


class Climb:
    """Tries sizes and formats from small to large, then repeats those that were reached.

    Args:
        device: what to measure.
        seconds: to measure for.
        trial: edge of the square at which a format must be faster than the first one.
        make: makes products.
        make_copy: makes copies.
        now: the clock.
        started: when the time began, by that clock; default now.
    """

    def __init__(
        self,
        device: torch.device,
        seconds: float,
        trial: int,
        make: MakeProduct,
        make_copy: MakeCopy | None = None,
        now: Callable[[], float] = time.perf_counter,
        started: float | None = None,
    ) -> None:
        self.device, self.seconds, self.trial = device, seconds, trial
        self.make, self.make_copy, self.now = make, make_copy or copy, now
        self.started = now() if started is None else started
        self.found = ProbeSamples()
        self.abandoned = False
        self._best: dict[Key, float] = {}  # seconds of the fastest first run of everything tried
        self._largest: dict[str, tuple[float, float]] = {}  # work and seconds of the last square, or copy, of a format
        self._kept: dict[Key, Action] = {}
        self._first = "fp32"
        self._stand_in: Key | None = None
        self._running: tuple[Key, float] = ("fp32", (0, 0, 0, 0)), self.started

    @property
    def reached(self) -> bool:
        """Whether any product was measured."""
        return any(name == self._first for name, _ in list(self.found.samples))

    @property
    def left(self) -> float:
        """Seconds left; negative when the time is over."""
        return self.started + self.seconds - self.now()

    def products(self, formats: Sequence[str], shapes: Collection[Shape], shown: Collection[Shape]) -> None:
        """Climb `shapes` in all formats, the first of which the others are compared with; keep those that are `shown`.

        A format that does not reach the trial is not kept, because it may be emulated.
        """
        first, climbing = formats[0], list(formats)
        self._first = first
        for shape in sorted(shapes, key=flops):
            for name in [name for name in formats if name in climbing]:
                if self.abandoned:
                    return
                if name != first and (first, shape) not in self._best:
                    continue
                action = self._product(name, shape, may_fail=name != first)
                if action is None:
                    if _is_square(shape):
                        climbing.remove(name)
                    continue
                if name != first and self._too_slow(name, first, shape, action):
                    self._leave_out(name, self._best[name, shape] / self._best[first, shape])
                    climbing.remove(name)
                elif shape in shown or (name == first and (self._stand_in or not self.reached)):
                    self._keep((name, shape), action, stand_in=shape not in shown)
        for name in set(formats[1:]) - self._tried():
            self._forget(name)

    def copies(self, sizes: Sequence[int]) -> None:
        """Climb copies of these sizes in bytes, small to large; the last that was reached is kept."""
        for size in sizes:
            action = self._first_runs(
                ("copy", (1, 1, 1, size)), size, lambda size=size: self.make_copy(self.device, size)
            )
            if action is None or self.abandoned:
                return
            self._forget("copy")
            self._keep(("copy", (1, 1, 1, size)), action)

    def given_up(self) -> ProbeSamples:
        """Measurements so far, for another thread that stops waiting because a product is slower than expected."""
        self.abandoned = True
        found, (key, begun) = self.found.copied(), self._running
        name, shape = key
        if name not in (self._first, "copy") and key not in found.samples:  # else only a later run was disturbed
            found.left_out[name] = (self.now() - begun) / self._best[self._first, shape]
        kept = {self._first, "copy", *self._tried()} - set(found.left_out)
        found.samples = {key: samples for key, samples in found.samples.items() if key[0] in kept}
        return found

    def _tried(self) -> set[str]:
        """Formats that reached the trial; others may be emulated."""
        return {name for name, shape in list(self._best) if _is_square(shape) and shape[1] == self.trial}

    def turns(self, only_largest: bool = False) -> None:
        """Run everything that was kept, in turn, until the time is up; leave out formats that were slower after all."""
        actions = dict(self._kept)
        if only_largest:
            key = max(actions, key=lambda key: flops(key[1]))
            actions = {key: actions[key]}
        ran = True
        while ran:
            ran = False
            for key, action in actions.items():
                times = min(MOST_IN_BURST, math.ceil(BURST_SECONDS / max(self._best[key], 1e-7)))
                if not self.abandoned and times * self._best[key] < self.left:
                    self._running = key, self.now()
                    self.found.samples[key].append(self._seconds_of(action, times))
                    ran = True
        self._compare_again()

    def _product(self, name: str, shape: Shape, may_fail: bool) -> Action | None:
        """As `_first_runs`; the device lacks a format that fails at its first product."""
        try:
            return self._first_runs((name, shape), flops(shape), lambda: self.make(self.device, name, *shape))
        except (RuntimeError, TypeError):
            if not may_fail or name in self._largest:
                raise
            self._leave_out(name, math.inf)
            return None

    def _first_runs(self, key: Key, work: float, make: Callable[[], Action]) -> Action | None:
        """Make an action and run it; None where it might not end in time."""
        name, shape = key
        if name in self._largest:
            before, seconds = self._largest[name]
            expected = seconds * work / before
            rounds = LEAST_ROUNDS * (expected + sum(self._best[kept] for kept in self._kept))
            worst = 2 * expected * CAUTION.get(name, CAUTION_ELSE)
            share = COPIES_SHARE if name == "copy" else 1.0
            if rounds > share * self.left or worst > self.left + (DEADLINE - 1) * self.seconds:
                return None
        self._running = key, self.now()
        try:
            action = make()
            best = self._seconds_of(action, 1)  # plans kernels and touches fresh memory
            if best < self.left:
                best = self._seconds_of(action, 1)
        except torch.OutOfMemoryError:
            if name not in self._largest:
                raise
            return None
        for _ in range(FIRST_RUNS - 1):
            if best < max(BURST_SECONDS, FIRST_SHARE * self.seconds):
                best = min(best, self._seconds_of(action, 1))
        self._best[key] = best
        if name == "copy" or _is_square(shape):
            self._largest[name] = work, best
        return action

    def _too_slow(self, name: str, first: str, shape: Shape, action: Action) -> bool:
        """Whether a format is too slow at a size, also when it is measured again."""
        if _is_square(shape) and shape[1] < HOPELESS_FROM:
            return False
        most = (1.0 if _is_square(shape) and shape[1] == self.trial else HOPELESS) * self._best[first, shape]
        if most < self._best[name, shape] < HOPELESS * most and self._best[name, shape] < self.left:
            self._best[name, shape] = min(self._best[name, shape], self._seconds_of(action, 1))
        return self._best[name, shape] > most

    def _compare_again(self) -> None:
        """Leave out formats whose median is slower than fp32's at the largest square that both reached."""
        found = self.found.seconds()
        for name in {name for name, _ in found} - {"fp32", "copy"}:
            both = [shape for other, shape in found if other == name and _is_square(shape) and ("fp32", shape) in found]
            if both:
                largest = max(both, key=flops)
                slower = found[name, largest] / found["fp32", largest]
                if slower >= 1:
                    self._leave_out(name, slower)

    def _keep(self, key: Key, action: Action, stand_in: bool = False) -> None:
        """stand_in: replaced once a larger one is kept; a result for the slowest machines."""
        if self._stand_in is not None and key[0] == self._stand_in[0]:
            del self._kept[self._stand_in], self.found.samples[self._stand_in]
            self._stand_in = None
        if stand_in:
            self._stand_in = key
        self._kept[key] = action
        self.found.samples[key] = [self._best[key]]

    def _forget(self, name: str) -> None:
        for key in [key for key in self._kept if key[0] == name]:
            del self._kept[key], self.found.samples[key]

    def _leave_out(self, name: str, slower: float) -> None:
        self.found.left_out[name] = slower
        self._forget(name)

    def _seconds_of(self, action: Action, times: int) -> float:
        """Mean seconds of a run."""
        wait_for(self.device)
        start = self.now()
        for _ in range(times):
            action()
        wait_for(self.device)
        return (self.now() - start) / times


def within_deadline(climb: Climb, work: Callable[[], None]) -> ProbeSamples:
    """What `climb` found when `work` is done or its deadline has passed; a product that still runs then is abandoned.

    A product cannot be interrupted, so `work` runs on a thread of its own. At least one size is always measured.
    """
    ended = threading.Event()
    failures: list[BaseException] = []
    index = torch.accelerator.current_device_index() if climb.device.type != "cpu" else None

    def run() -> None:
        try:
            if index is not None:  # the current device is set per thread
                torch.accelerator.set_device_index(index)
            work()
        except BaseException as error:
            failures.append(error)
        finally:
            ended.set()

    threading.Thread(target=run, name="measuring", daemon=True).start()
    rest = climb.started + DEADLINE * climb.seconds - climb.now()
    while not ended.wait(max(rest, 0.01)) and not climb.reached:
        rest = 0.01
    if failures:
        raise failures[0]
    return climb.found if ended.is_set() else climb.given_up()


def _is_square(shape: Shape) -> bool:
    return shape[0] == 1 and shape[1] == shape[2] == shape[3]


# ---------------------------------------------------------------------------------------------- what is measured


def formats_of(device: torch.device) -> list[str]:
    """Number formats to try, fp32 first; a CPU may only emulate bf16, which shows when it is measured."""
    if device.type == "cpu":
        return ["fp32", "bf16"]
    if device.type != "cuda":
        return ["fp32", "bf16", "fp16"]
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    fp8 = torch.version.hip is None and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    return ["fp32", *["bf16"] * bf16, "fp16", *["fp8"] * fp8]


def grid_of(side: int) -> list[Shape]:
    """Squares from small to large, layers of small models, stacks of experts."""
    squares = [(1, edge, edge, edge) for edge in (side // 16, side // 8, side // 4, side // 2)]
    skinny = [(1, 2 * side, inner, columns) for inner, columns in ((64, 256), (128, 512), (256, 256), (512, 2048))]
    few_rows = [(1, rows, 1024, 1024) for rows in (16, 128, 512)]
    grouped = [(8, side // 4, 192, 256), (16, side // 8, 256, 256), (16, side // 4, 512, 1024)]
    return squares + skinny + few_rows + grouped


def wait_for(device: torch.device) -> None:
    """Wait until an accelerator, which computes asynchronously, has finished."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def product(device: torch.device, dtype: str, groups: int, rows: int, inner: int, columns: int) -> Action:
    """Multiplies [rows, inner] by [inner, columns], `groups` of them at once. Random numbers are its own."""
    chance = torch.Generator(device).manual_seed(0)
    if dtype == "fp8":
        return fp8_product(device, groups, rows, inner, columns, chance)
    left = torch.randn(groups, rows, inner, device=device, generator=chance).to(DTYPES[dtype])
    right = torch.randn(groups, inner, columns, device=device, generator=chance).to(DTYPES[dtype])
    result = torch.empty(groups, rows, columns, device=device, dtype=DTYPES[dtype])
    if groups == 1:
        return lambda: torch.mm(left[0], right[0], out=result[0])
    return lambda: torch.bmm(left, right, out=result)


def fp8_product(
    device: torch.device, groups: int, rows: int, inner: int, columns: int, chance: torch.Generator | None = None
) -> Callable[[], list[torch.Tensor]]:
    """With one scale for each matrix and fp32 accumulation; the right matrix is column-major, as hardware needs it."""
    scale = torch.ones((), device=device)
    left = torch.randn(groups, rows, inner, device=device, generator=chance).to(DTYPES["fp8"])
    right = torch.randn(groups, columns, inner, device=device, generator=chance).to(DTYPES["fp8"]).transpose(1, 2)

    def multiply() -> list[torch.Tensor]:
        return [
            torch._scaled_mm(one, other, scale, scale, out_dtype=torch.bfloat16)  # type: ignore[attr-defined]
            for one, other in zip(left, right, strict=True)
        ]

    return multiply


def copy(device: torch.device, size: int) -> Action:
    """Reads and writes `size` bytes."""
    source = torch.zeros(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)
