"""Muon for matrices, AdamW for everything else (embedding, head, router, norms, biases).

Muon (Jordan et al. 2024) replaces a matrix's momentum by the nearest orthogonal matrix, found by a few Newton-Schulz
steps. Its update is scaled to the size AdamW's would have, 0.2 sqrt(max(rows, columns)) (Moonlight, arXiv 2502.16982,
2.2), so both take the same learning rate and weight decay.

That makes any gradient, however small, a full step. A matrix whose gradient is exactly zero, as of an expert to which
no token went, would go on at full length in the direction of its momentum. It has nothing to learn from and stays as it
is, without weight decay, which is there to balance updates; only its momentum decays, as with any gradient of zero.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from motley.model import native
from motley.model.products import wide

OptimizerName = Literal["muon", "adamw"]
State = dict[str, Tensor]
Moments = Literal["fp32", "bf16"]
MOMENTS: dict[Moments, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}
"""What momenta, and AdamW's first and second moments, are kept in between steps; all is computed in fp32."""


EMBEDDING = "embed_tokens.weight"
ITERATIONS = 5  # of Newton and Schulz
NUMBERS_AT_ONCE = 1 << 22
"""Orthogonalised together: Newton-Schulz holds about four copies of what it works on."""
LARGEST_OF_ONE_THREAD = 1 << 20  # numbers of a matrix; larger ones are worth the threads of a product each


def orthogonalize(matrices: Tensor, dtype: torch.dtype, iterations: int = ITERATIONS) -> Tensor:
    """Nearest (semi-)orthogonal matrices to `matrices` [n, rows, columns], roughly: singular values in about 0.7 … 1.2.

    The quintic's coefficients are Jordan's: they push small singular values up fast and need not converge to 1.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = wide(matrices.to(dtype))
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.flatten(1).float().norm(dim=1)[:, None, None].to(x.dtype) + 1e-7)
    for _ in range(iterations):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def learning(grads: Tensor) -> Tensor:
    """Which of the matrices [n, rows, columns] of a gradient are not all zero (NaN is not zero): bool [n, 1, 1]."""
    return grads.abs().amax(dim=(1, 2), keepdim=True) != 0


def update_scale(shape: Sequence[int]) -> float:
    """By what an orthogonal matrix is multiplied to be as large as AdamW's update (Moonlight, 2.2)."""
    return 0.2 * max(shape) ** 0.5


def as_matrices(name: str, tensor: Tensor) -> Tensor:
    """A weight as a stack of matrices [n, rows, columns]: experts one by one, gate and up apart."""
    if tensor.dim() == 2:
        return tensor[None]
    if name.endswith("gate_up_proj"):
        return tensor.unflatten(1, (2, -1)).flatten(0, 1)
    return tensor


def by_muon(kind: OptimizerName, name: str, dimensions: int) -> bool:
    """Whether Muon updates a parameter. Rows of embedding, head and router stand for tokens and experts."""
    apart = (EMBEDDING, "lm_head.weight", "mlp.gate.weight")
    return kind == "muon" and dimensions >= 2 and not name.endswith(apart)


def _groups(pieces: list[tuple[Tensor, ...]]) -> Iterator[list[tuple[Tensor, ...]]]:
    """Neighbours that are updated together: at most NUMBERS_AT_ONCE, or one."""
    group: list[tuple[Tensor, ...]] = []
    numbers = 0
    for piece in pieces:
        if group and numbers + piece[0].numel() > NUMBERS_AT_ONCE:
            yield group
            group, numbers = [], 0
        group.append(piece)
        numbers += piece[0].numel()
    if group:
        yield group


class Optimizer:
    """Steps all parameters of a model; its state is named after the parameters it belongs to.

    Args:
        parameters: (name, parameter) pairs.
        kind: "muon" (Muon and AdamW) or "adamw" (AdamW for all).
        weight_decay: decoupled, on everything with two dimensions or more.
        dtype: of Muon's matrix products.
        moments: what the optimizer's state is kept in (V3 report, 3.3.3: bf16 without loss).
        embedding_rate: of the learning rate beside Muon; the embedding then takes so many times that of the others. A
            row of it sees a gradient only when its token occurs, and what is normed next asks for no size of it.
    """

    MOMENTUM = 0.95
    BETAS = (0.9, 0.95)

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        kind: OptimizerName,
        weight_decay: float,
        dtype: torch.dtype,
        embedding_rate: float = 1.0,
        moments: Moments = "fp32",
    ) -> None:
        self.moments = MOMENTS[moments]
        named = [(name, p) for name, p in parameters if p.requires_grad]
        self.matrices = {name: p for name, p in named if by_muon(kind, name, p.dim())}
        self.others = {name: p for name, p in named if name not in self.matrices}
        self.momentum = {name: torch.zeros_like(p, dtype=self.moments) for name, p in self.matrices.items()}
        self.weight_decay, self.dtype = weight_decay, dtype
        apart = {name for name in self.others if kind == "muon" and name.endswith(EMBEDDING)}
        embedding = [self.others[name] for name in self.others if name in apart]
        rest = [p for name, p in self.others.items() if name not in apart]
        self.adamw = torch.optim.AdamW(
            [
                {"params": embedding, "weight_decay": weight_decay, "times": embedding_rate},
                {"params": [p for p in rest if p.dim() >= 2], "weight_decay": weight_decay, "times": 1.0},
                {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0, "times": 1.0},
            ],
            betas=self.BETAS,
            eps=1e-8,
            fused=True,
        )
        self._same_shape: dict[torch.Size, list[str]] = defaultdict(list)
        for name, parameter in self.matrices.items():
            self._same_shape[as_matrices(name, parameter).shape[1:]].append(name)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Apply one update from the gradients; parameters without a gradient stay as they are."""
        for group in self.adamw.param_groups:
            group["lr"] = learning_rate * group["times"]
        if self.moments == torch.float32:
            self.adamw.step()
        else:
            self._adamw_of_narrow_moments()
        by_kernel: list[str] = []
        for shape, names in self._same_shape.items():
            names = [name for name in names if self.matrices[name].grad is not None]
            apart = [name for name in names if self._fits_kernel(name)]
            by_kernel += apart
            if names := [name for name in names if name not in apart]:
                self._muon(names, learning_rate, update_scale(shape))
        if by_kernel:
            self._native_muon(by_kernel, learning_rate)

    def _muon(self, names: list[str], learning_rate: float, scale: float) -> None:
        """Matrices of one shape together, so that orthogonalising them is a few batched products; not too many."""
        pieces: list[tuple[Tensor, ...]] = []  # stacks of weights, gradients, momenta
        for name in names:
            weight, momentum = self.matrices[name], self.momentum[name]
            assert weight.grad is not None
            stacks = [as_matrices(name, tensor) for tensor in (weight, weight.grad, momentum)]
            most = max(1, NUMBERS_AT_ONCE // stacks[0][0].numel())
            pieces += zip(*(stack.split(most) for stack in stacks), strict=True)
        for group in _groups(pieces):
            looking_ahead = [
                torch.lerp(grad, self._remember(grad, momentum), self.MOMENTUM).to(self.dtype)
                for _, grad, momentum in group
            ]
            updates = orthogonalize(torch.cat(looking_ahead), self.dtype)
            for (weight, grad, _), update in zip(group, updates.split([len(m) for m in looking_ahead]), strict=True):
                learns = learning(grad)
                weight.mul_(torch.where(learns, 1 - learning_rate * self.weight_decay, 1.0))
                weight.add_(update.masked_fill(~learns, 0.0), alpha=-learning_rate * scale)

    def _remember(self, grad: Tensor, momentum: Tensor) -> Tensor:
        """Move a momentum towards a gradient; returns it in fp32."""
        now = momentum.float().lerp_(grad, 1 - self.MOMENTUM)  # itself, where it is fp32
        momentum.copy_(now)
        return now

    def _fits_kernel(self, name: str) -> bool:
        weight, momentum = self.matrices[name], self.momentum[name]
        shape = as_matrices(name, weight).shape[1:]
        if weight.device.type != "cpu" or shape.numel() > LARGEST_OF_ONE_THREAD:
            return False
        assert weight.grad is not None
        wide = weight.dtype == weight.grad.dtype == torch.float32
        return (
            wide and all(t.is_contiguous() for t in (weight, weight.grad, momentum)) and native.runs(self.dtype, *shape)
        )

    def _native_muon(self, names: list[str], learning_rate: float) -> None:
        """All matrices in one kernel, each by one thread, the largest first (`motley/model/native/muon.cpp`)."""
        rows: list[tuple[int, ...]] = []
        rates: list[float] = []
        for name in sorted(names, key=lambda name: -as_matrices(name, self.matrices[name]).shape[1:].numel()):
            weight, momentum = self.matrices[name], self.momentum[name]
            assert weight.grad is not None
            grads, momenta = as_matrices(name, weight.grad), as_matrices(name, momentum)
            _, *shape = grads.shape
            for index, learns in enumerate(learning(grads).flatten().tolist()):
                if not learns:
                    self._remember(grads[index], momenta[index])
                    continue
                first = index * shape[0] * shape[1]
                tensors = (weight.grad, momentum, weight)
                rows.append((*shape, *(tensor.data_ptr() + first * tensor.element_size() for tensor in tensors)))
                rates.append(learning_rate * update_scale(shape))
        if not rows:
            return
        sizes, *pointers = (
            torch.tensor(column) for column in ([r[:2] for r in rows], *zip(*(r[2:] for r in rows), strict=True))
        )
        kept = 1 - learning_rate * self.weight_decay
        narrow = int(self.moments == torch.bfloat16)
        native.call(
            "muon_step", self.dtype, len(rows), sizes, *pointers, torch.tensor(rates), self.MOMENTUM, kept, ITERATIONS,
            narrow,
        )  # fmt: skip

    def _adamw_of_narrow_moments(self) -> None:
        """What PyTorch's does, which keeps its moments in the parameters' own format; some rows at a time."""
        first, second = self.BETAS
        for group in self.adamw.param_groups:
            rate, kept = group["lr"], 1 - group["lr"] * group["weight_decay"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.adamw.state[parameter]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    for name in ("exp_avg", "exp_avg_sq"):
                        state[name] = torch.zeros_like(parameter, dtype=self.moments)
                state["step"] += 1
                of_mean, of_square = 1 - first ** state["step"], 1 - second ** state["step"]
                tensors = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
                flat = (tensor.view(-1).split(NUMBERS_AT_ONCE // 4) for tensor in tensors)
                for weight, grad, mean, square in zip(*flat, strict=True):
                    mean.copy_(now := mean.float().lerp_(grad, 1 - first))
                    square.copy_(length := square.float().lerp_(grad.square(), 1 - second))
                    length.div_(of_square).sqrt_().add_(self.adamw.defaults["eps"]).mul_(of_mean)
                    weight.mul_(kept).addcdiv_(now, length, value=-rate)

    def zero_grad(self) -> None:
        for parameter in (*self.matrices.values(), *self.others.values()):
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """Everything needed to go on exactly, by name."""
        state = {f"{name}:momentum": tensor for name, tensor in self.momentum.items()}
        for name, parameter in self.others.items():
            for key, value in self.adamw.state.get(parameter, {}).items():
                state[f"{name}:{key}"] = value
        return state

    def load_state_tensors(self, state: Iterable[tuple[str, Tensor]]) -> None:
        """The inverse of `state_tensors`: (name, tensor) one after the other, from any device.

        Raises KeyError when the state belongs to another set of parameters.
        """
        lacking = set(self.momentum)
        for key, tensor in state:
            name, kind = key.rsplit(":", 1)
            if kind == "momentum":
                self.momentum[name].copy_(tensor)
                lacking.discard(name)
            else:
                parameter = self.others[name]
                dtype = torch.float32 if kind == "step" else self.moments
                self.adamw.state[parameter][kind] = tensor.to(device=parameter.device, dtype=dtype, copy=True)
        if lacking:
            raise KeyError(f"{min(lacking)}:momentum")


def momentum_names(model: nn.Module, kind: OptimizerName) -> set[str]:
    """Parameters of a model that have a momentum: all that Muon updates."""
    return {name for name, parameter in model.named_parameters() if by_muon(kind, name, parameter.dim())}
