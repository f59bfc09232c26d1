"""Optimizers: AdamW, also with 8-bit moments, and Muon for hidden matrices.

A hidden matrix is a 2-D parameter that is not a table. A table is a parameter whose rows are
independent, such as one row per token. Tables are the weights of `nn.Embedding`, parameters with
the attribute `is_table = True`, and all parameters of modules with this attribute (for example
heads). Muon orthogonalizes the update of each hidden matrix. All other parameters are trained with
AdamW: the rows of tables are used with very different frequencies, and AdamW scales each entry
separately.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddiff.errors import ArgumentError, DataError
from ddiff.training.protocols import ConditionalOptimizer, Optimizer

# Columns per row from which iterations on the Gram matrix are cheaper. Measured on a CPU thread:
# 256 x 1024 took 10 ms instead of 18 ms, 256 x 768 9 ms instead of 13 ms.
GRAM_RATIO = 1.5
INSTALL_8BIT = 'pip install "discrete-diffusion[8bit]"'

Betas = tuple[float, float]
Parameters = dict[str, nn.Parameter]
Decay = Literal["matrices", "all"]


def to_local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a DTensor, without a copy.

    Other tensors are returned unchanged.
    """
    return tensor.to_local() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _is_sharded(tensor: Tensor) -> bool:
    # Importing torch.distributed.tensor takes most of a second. If nothing has imported the module,
    # no DTensor exists.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def step_if(finite: Tensor, optimizer: Optimizer) -> None:
    """Take a step of `optimizer` if the 0-d bool tensor `finite` is True.

    If the optimizer has a method `step_if`, or is a fused optimizer of torch (which supports
    `found_inf`), the condition is evaluated on the device. For all other optimizers the host waits
    for the device.
    """
    if isinstance(optimizer, ConditionalOptimizer):
        optimizer.step_if(finite)
    elif all(group.get("fused") for group in optimizer.param_groups):
        vars(optimizer).update(grad_scale=None, found_inf=(~finite).float())
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    elif bool(finite):
        optimizer.step()


def split_parameters(module: nn.Module) -> tuple[Parameters, Parameters]:
    """Return two dictionaries of trained parameters by name: hidden matrices and all others.

    Embeddings and matrices with `is_table = True`, such as the output matrix of a head, are not
    hidden matrices.
    """
    tables: set[int] = set()
    for owner in module.modules():
        if isinstance(owner, nn.Embedding) or _is_marked(owner):
            tables |= {id(parameter) for parameter in owner.parameters()}
    hidden: Parameters = {}
    others: Parameters = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        is_table = id(parameter) in tables or _is_marked(parameter)
        if parameter.ndim == 2 and not is_table:
            hidden[name] = parameter
        else:
            others[name] = parameter
    return hidden, others


def _is_marked(owner: nn.Module | nn.Parameter) -> bool:
    # `is_table` may be absent: it is set on modules and parameters of any library.
    return getattr(owner, "is_table", False)


def adamw(
    module: nn.Module,
    lr: float = 3e-3,
    betas: Betas = (0.9, 0.98),
    weight_decay: float = 0.01,
    eps: float = 1e-8,
    decay: Decay = "matrices",
) -> torch.optim.AdamW:
    """Build AdamW (arXiv 1711.05101) for all trained parameters of a module.

    `decay` selects the parameters with weight decay: "matrices" (hidden matrices only) or "all".
    """
    return _adamw(_decay_groups(module, weight_decay, decay), lr, betas, eps)


def adamw_8bit(
    module: nn.Module,
    lr: float = 3e-3,
    betas: Betas = (0.9, 0.98),
    weight_decay: float = 0.01,
    eps: float = 1e-8,
    decay: Decay = "matrices",
) -> Optimizer:
    """Build AdamW with 8-bit moments (arXiv 2110.02861), of the package bitsandbytes.

    The moments have 2 bytes per parameter instead of 8. Parameters with fewer than 4096 numbers
    keep moments in float32. The arguments are those of `adamw`. Raises DataError if bitsandbytes is
    not installed, and ArgumentError for sharded parameters.
    """
    groups = _decay_groups(module, weight_decay, decay)
    # bitsandbytes reads the memory of a whole tensor, which a DTensor does not have.
    if any(_is_sharded(parameter) for group in groups for parameter in group["params"]):
        raise ArgumentError(
            "adamw_8bit: expected whole parameters; got sharded ones, which bitsandbytes cannot "
            'update. Set [backend] kind = "ddp" or "single", or [train] optimizer = "adamw".'
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise DataError(
            "adamw_8bit: 8-bit moments need the package bitsandbytes, which is not installed "
            f'({error}). Run `{INSTALL_8BIT}`, or set [train] optimizer = "adamw".'
        ) from error
    return AdamW8bit(groups, lr=lr, betas=betas, eps=eps)


def muon(
    module: nn.Module,
    lr: float = 0.02,
    momentum: float = 0.95,
    weight_decay: float = 0.01,
    table_lr: float = 3e-3,
    table_betas: Betas = (0.9, 0.98),
    precision: torch.dtype | None = None,
) -> JointOptimizer:
    """Build Muon (arXiv 2502.16982) for hidden matrices and AdamW for all other parameters.

    Muon's update is scaled by sqrt(max(1, rows/columns)).

    Args:
        lr: Muon's learning rate. It is the spectral norm of one update of a hidden matrix that has
            at most as many rows as columns.
        table_lr: AdamW's learning rate for embeddings, output matrices, norms and biases, which
            have no weight decay.
        precision: dtype of the orthogonalization. None: bfloat16 on a GPU, and the dtype of the
            gradient on a CPU.
    """
    hidden, others = split_parameters(module)
    parts: dict[str, Optimizer] = {}
    if hidden:
        parts["muon"] = Muon(
            list(hidden.values()),
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            precision=precision,
        )
    if others:
        parts["adamw"] = _adamw([_group(others, 0.0)], table_lr, table_betas)
    return JointOptimizer(parts)


def _decay_groups(module: nn.Module, weight_decay: float, decay: Decay) -> list[dict[str, Any]]:
    """Return the parameter groups of AdamW: hidden matrices, and all other parameters."""
    hidden, others = split_parameters(module)
    other_decay = weight_decay if decay == "all" else 0.0
    groups = [_group(hidden, weight_decay), _group(others, other_decay)]
    return [group for group in groups if group["params"]]


def _group(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> dict[str, Any]:
    return {"params": list(parameters.values()), "weight_decay": weight_decay}


def _adamw(
    groups: Iterable[dict[str, Any]],
    lr: float,
    betas: Betas,
    eps: float = 1e-8,
) -> torch.optim.AdamW:
    # Fused is faster: a step for 2.4 M parameters on one CPU core took 1.8 ms instead of 12 ms.
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


@final
class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with a choice of precision and support for sharded matrices.

    `precision` is the dtype of the orthogonalization. None means bfloat16 on a GPU, as in torch,
    and the dtype of the gradient on a CPU: on a CPU without bfloat16 units, a step for 2.4 M
    parameters took 2.8 s in bfloat16 and 0.12 s in float32.

    A sharded matrix is gathered on one rank, which orthogonalizes the whole matrix. Successive
    matrices are assigned to successive ranks.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        precision: torch.dtype | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(params, **settings)
        self.precision = precision

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        device = self.param_groups[0]["params"][0].device
        self.step_if(torch.ones((), dtype=torch.bool, device=device))

    @torch.no_grad()
    def step_if(self, finite: Tensor) -> None:
        """Take a step if the 0-d bool tensor `finite` is True.

        Otherwise parameters and optimizer state remain unchanged.
        """
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            for turn, parameter in enumerate(trained):
                self._update(parameter, group, turn, finite)

    def _update(
        self,
        parameter: Tensor,
        group: dict[str, Any],
        turn: int,
        finite: Tensor,
    ) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        weights = to_local(parameter)
        gradient = to_local(parameter.grad)
        average = to_local(state["momentum_buffer"])
        # In a skipped step all changes are multiplied by 0. Since 0 * NaN is NaN, the gradient is
        # first replaced by 0.
        taken = finite.to(gradient.dtype)
        gradient = torch.where(finite, gradient, 0.0)
        share = taken * (1.0 - group["momentum"])
        average.lerp_(gradient, share.to(average.dtype))
        direction = average
        if group["nesterov"]:
            direction = gradient.lerp(average, group["momentum"])
        weights.mul_(1.0 - taken * group["lr"] * group["weight_decay"])
        update = self._orthogonalize(direction, parameter, group, turn)
        rows, columns = parameter.shape
        scale = taken * group["lr"] * max(1.0, rows / columns) ** 0.5
        weights.sub_(update.mul_(scale))

    def _orthogonalize(
        self,
        direction: Tensor,
        parameter: Tensor,
        group: dict[str, Any],
        turn: int,
    ) -> Tensor:
        """Orthogonalize the update of one matrix and return this rank's shard of the result.

        `direction` is this rank's shard of the update of `parameter`. Rank `turn` (modulo the
        number of ranks) orthogonalizes the whole matrix and broadcasts the result. `group` contains
        the settings of the Newton-Schulz iterations.
        """
        if not _is_sharded(parameter):
            return self._orthogonalize_whole(direction, group)
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        mesh, placements = parameter.device_mesh, parameter.placements
        shard = DTensor.from_local(
            direction, mesh, placements, shape=parameter.shape, stride=parameter.stride()
        )
        whole = shard.full_tensor()
        owner = turn % mesh.size()
        if mesh.get_local_rank() == owner:
            whole = self._orthogonalize_whole(whole, group).contiguous()
        else:
            whole = torch.empty_like(whole)
        dist.broadcast(whole, group=mesh.get_group(), group_src=owner)
        # Every rank has the whole matrix now. src_data_rank=None: no communication is needed.
        shards = distribute_tensor(whole, mesh, placements, src_data_rank=None)
        return shards.to_local().clone()

    def _orthogonalize_whole(self, matrix: Tensor, group: dict[str, Any]) -> Tensor:
        dtype = self.precision
        if dtype is None:
            dtype = matrix.dtype if matrix.device.type == "cpu" else torch.bfloat16
        update = orthogonalize(
            matrix.to(dtype), group["ns_coefficients"], group["ns_steps"], group["eps"]
        )
        return update.to(matrix.dtype)


def orthogonalize(
    matrix: Tensor,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
) -> Tensor:
    """Replace the singular values of a matrix by values near 1, by Newton-Schulz iterations.

    If U S V^T is the singular value decomposition of `matrix`, the result is U S' V^T with S' near
    1. The matrix is first divided by its norm, or by `eps` if the norm is smaller. Each iteration
    then computes X <- p(A) X, where A = X X^T and p(A) = a I + b A + c A A. The numbers a, b, c are
    the `coefficients`, and `steps` is the number of iterations.
    """
    is_wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if is_wide else matrix.T  # so that A = X X^T has the smaller size
    x = x / x.norm().clamp(min=eps)
    rows, columns = x.shape
    # Two of the three products of an iteration contain X. `_iterate_gram` multiplies by X only
    # twice in all, but more often by A. It therefore pays if X is much larger than A. In half
    # precision it is not used: A has the squares of the singular values, and its rounding errors
    # would become errors of order 1 in the result.
    if columns >= GRAM_RATIO * rows and x.dtype in (torch.float32, torch.float64):
        x = _iterate_gram(x, coefficients, steps)
    else:
        x = _iterate_matrix(x, coefficients, steps)
    return x if is_wide else x.T


def _iterate_matrix(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Run Newton-Schulz iterations on a wide matrix X; see `orthogonalize`."""
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.T
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x


def _iterate_gram(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Run Newton-Schulz iterations on a wide matrix X, through its Gram matrix A = X X^T.

    An iteration multiplies X by p(A), and therefore A by p(A) from both sides. So the iterations
    need only A, and X is multiplied once by the product of all p(A).
    """
    a, b, c = coefficients
    gram = x @ x.T
    product = None
    for step in range(steps):
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal().add_(a)
        product = polynomial if product is None else polynomial @ product
        if step < steps - 1:
            gram = polynomial @ gram @ polynomial
    return x if product is None else product @ x


@final
class JointOptimizer:
    """Combination of optimizers for disjoint parameters, with the interface of one optimizer."""

    def __init__(self, parts: Mapping[str, Optimizer]) -> None:
        self.parts = dict(parts)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self) -> None:
        for part in self.parts.values():
            part.step()

    def step_if(self, finite: Tensor) -> None:
        for part in self.parts.values():
            step_if(finite, part)

    def zero_grad(self) -> None:
        for part in self.parts.values():
            part.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
