"""Optimizers and the learning rate: who updates which parameter, by how much, at which step."""

# torch writes its own optimizers with the functions on lists of tensors, but exports them with an underscore
# pyright: reportPrivateImportUsage=false

from typing import Any

import torch
from torch import Tensor, nn

from gemlet.config import TrainConfig
from gemlet.device import pick_precision
from gemlet.kernels import muon as kernel
from gemlet.kernels import train


def lr_at(step: int, config: TrainConfig) -> float:
    """The factor in [0, 1] on every peak learning rate at a step (0-based): a pure function, so resuming is exact.

    Rises over `warmup_steps`, stays at 1, and over the last `decay_fraction` of the other steps falls, along a
    half cosine or a line, to `min_lr / lr` at the last step.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    last = config.max_steps - 1
    decay_steps = max(1, round((last - config.warmup_steps) * config.decay_fraction))
    done = max(0.0, 1 - (last - step) / decay_steps)  # 0 until the decay begins, 1 at the last step
    remaining = (1 + torch.cos(torch.tensor(done * torch.pi)).item()) / 2 if config.schedule == "cosine" else 1 - done
    floor = config.min_lr / config.lr
    return floor + (1 - floor) * remaining


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """AdamW, and with `optimizer = "muon"` Muon before it for the matrices of the blocks.

    Decay groups: the blocks' matrices decay; embeddings and norms do not. Every group keeps its peak rate as
    `peak_lr`, which `set_lr` multiplies by the schedule.
    """
    matrices, rest = [], []
    for name, p in model.named_parameters():
        (matrices if ".layers." in name and p.ndim == 2 else rest).append(p)
    optimizers: list[torch.optim.Optimizer] = []
    groups = [{"params": rest, "weight_decay": 0.0}]
    if config.optimizer == "muon":
        optimizers.append(Muon(matrices, config.muon_lr, config.momentum, config.weight_decay))
    else:
        groups.append({"params": matrices, "weight_decay": config.weight_decay})
    betas = (config.beta1, config.beta2)
    optimizers.append(torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def set_lr(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Put every group at `factor` times its peak rate."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            rate = group["peak_lr"] * factor
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def clip(gradients: list[Tensor], most: float) -> Tensor:
    """Scale gradients down to the norm `most` (0: not at all), unless they are not finite; returns the norm before.

    Nothing here waits for a GPU. On a CPU the norm is known at once, and small gradients are left alone.
    """
    norm = (train.norm if train.norm_available(gradients) else torch.nn.utils.get_total_norm)(gradients)
    if most and (norm.device.type != "cpu" or norm > most):
        factor = (most / (norm + 1e-6)).clamp(max=1)
        torch._foreach_mul_(gradients, torch.where(norm.isfinite(), factor, 1.0))
    return norm


def update(optimizers: list[torch.optim.Optimizer]) -> None:
    """A step of each of them; it can be captured in a CUDA graph where the learning rates are tensors."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["capturable"] = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        optimizer.step()


def export_state(optimizers: list[torch.optim.Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """The optimizers' state as named tensors, `model.layers.0.mlp.up_proj.weight.exp_avg` and so on."""
    return {
        f"{name}.{key}": value.detach()
        for name, p in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(p, {}).items()
    }


def import_state(optimizers: list[torch.optim.Optimizer], model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Take up what `export_state` gave."""
    by_name: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(".")
        by_name.setdefault(parameter, {})[key] = tensor
    for optimizer in optimizers:
        mine = {p for group in optimizer.param_groups for p in group["params"]}
        for name, p in model.named_parameters():
            if p in mine:
                optimizer.state[p] = {key: value.to(p.device) for key, value in by_name[name].items()}


SQUARES = 0.95
"""How much of a mean square in Muon stays from one step to the next: about the last 20 steps count."""


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised (Jordan et al. 2024, kellerjordan.github.io/posts/muon), evened out: for matrices only.

    The update of a matrix is the nearest (semi-)orthogonal matrix to its Nesterov momentum, times
    sqrt(max(1, rows / columns)). The vectors of its longer side differ in length: each is divided by the root of its
    mean square over the last steps, and the matrix keeps its norm (NorMuon, arXiv 2510.05491, where it is always the
    rows).
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float, weight_decay: float):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None, "Muon takes no closure"
        for group in self.param_groups:
            in_cache: list[Any] = []
            by_shape: dict[torch.Size, list[Any]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
                if kernel.available(p):
                    in_cache.append(p)
                else:
                    by_shape.setdefault(p.shape, []).append(p)
            if in_cache:
                self._update(in_cache, group)
            for params in by_shape.values():
                self._update_stacked(params, group)

    def _update(self, params: list[Any], group: dict[str, Any]) -> None:
        """One matrix after another, in a kernel."""
        params = sorted(params, key=Tensor.numel, reverse=True)  # so that no thread is left alone with a large one
        fresh = ["squares" not in self.state[p] for p in params]
        for p in params:
            if "squares" not in self.state[p]:
                self.state[p]["squares"] = p.new_empty((len(p), 1) if len(p) >= p.shape[1] else (1, p.shape[1]))
        momenta, squares = ([self.state[p][key] for p in params] for key in ("momentum", "squares"))
        polynomials = [factor for polynomial in POLYNOMIALS for factor in polynomial]
        kernel.update(
            params, [p.grad for p in params], momenta, squares, fresh,
            group["lr"], group["momentum"], group["weight_decay"], SQUARES, polynomials,
        )  # fmt: skip

    def _update_stacked(self, params: list[Any], group: dict[str, Any]) -> None:
        """The same of matrices of one shape, in plain torch."""
        grads, momenta = [p.grad for p in params], [self.state[p]["momentum"] for p in params]
        torch._foreach_lerp_(momenta, grads, 1 - group["momentum"])
        rows, columns = params[0].shape
        nesterov = grads[0].new_empty(len(params), rows, columns)
        for grad, momentum, out in zip(grads, momenta, nesterov, strict=True):
            torch.lerp(grad, momentum, group["momentum"], out=out)
        updates = orthogonalise(nesterov).to(nesterov.dtype)
        updates.mul_(self.evened(params, updates) * -(group["lr"] * max(1.0, rows / columns) ** 0.5))
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(updates))

    def evened(self, params: list[Any], updates: Tensor) -> Tensor:
        """The factor that evens out updates [n, rows, columns]: [n, rows, 1], or [n, 1, columns] where these are more.

        What it needs the next time is kept in the state of `params`.
        """
        along = -1 if updates.shape[-2] >= updates.shape[-1] else -2
        now = updates.square().mean(along, keepdim=True)
        for p, new in zip(params, now, strict=True):
            if "squares" not in self.state[p]:
                self.state[p]["squares"] = new.clone()
        squares = [self.state[p]["squares"] for p in params]
        torch._foreach_lerp_(squares, list(now), 1 - SQUARES)
        usual = torch.stack(squares) + 1e-16
        total, divided = (x.sum((-2, -1), keepdim=True) for x in (now, now / usual))
        return (total / (usual * divided + 1e-30)).sqrt_()


def orthogonalise(x: Tensor) -> Tensor:
    """[n, rows, columns] -> about U V^T of each matrix U S V^T, computed in bfloat16 where that is fast.

    Singular values from 0.01 on, of a matrix of norm 1, come to between 0.71 and 1.29, smaller ones to less.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x  # the products are of the shorter side
    dtype = torch.bfloat16 if pick_precision("auto", x.device) == "bf16" else torch.float32
    x = x.to(dtype)
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    for a, b, c in POLYNOMIALS:
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


POLYNOMIALS = (8.0172, -22.941, 16.6113), (3.6184, -2.6588, 0.5137), (2.6799, -1.9656, 0.4401)
"""a x + b x^3 + c x^5, one after another, bring singular values near 1.

Each is the nearest to 1 of its kind (minimax) on the interval to which those before bring [0.01, 1], with a hundredth
on either side for rounding: Polar Express (arXiv 2505.16932). The polynomial that Muon began with, three times, brings
0.01 to 0.4 (docs/decisions.md).
"""
