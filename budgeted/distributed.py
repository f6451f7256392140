"""Which of how many processes this is. We start none: torchrun and SLURM do, we read the environment."""

from __future__ import annotations

import gc
import os
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from budgeted.errors import UserError

_REASON = "budgeted/reason"  # a key of the processes' store


@dataclass(frozen=True)
class World:
    """`rank` of `size` processes; rank 0 alone writes the run's directory."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @classmethod
    def from_environment(cls) -> World:
        """torchrun's RANK, or SLURM_PROCID inside an srun step of several tasks; else one process."""
        env = os.environ
        try:
            if "RANK" in env and "WORLD_SIZE" in env:
                return cls(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", 0)))
            if int(env.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
                return cls(int(env["SLURM_PROCID"]), int(env["SLURM_STEP_NUM_TASKS"]), int(env["SLURM_LOCALID"]))
        except ValueError as error:
            raise UserError(f"RANK, WORLD_SIZE or SLURM_PROCID in the environment: {error}") from None
        return cls()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def join(self, device: torch.device) -> None:
        """Meet the other processes. Needs MASTER_ADDR and MASTER_PORT.

        Tensors on GPUs go by nccl, all else by gloo: it costs no GPU's time, and says at once that a peer is gone.
        """
        if self.size == 1 or dist.is_initialized():
            return
        if "MASTER_ADDR" not in os.environ:
            _address_from_slurm()
        os.environ.update(RANK=str(self.rank), WORLD_SIZE=str(self.size), LOCAL_RANK=str(self.local_rank))
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=self.rank, world_size=self.size, timeout=timedelta(minutes=10))

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """The mean of `value` over all ranks."""
        if self.size > 1:
            value = value.detach().clone()
            dist.all_reduce(value)
            value /= self.size
        return value

    def gather(self, value: object) -> list:
        """`value` of every rank, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value):
        """Rank 0's `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def confess(self, reason: str) -> None:
        """Tell the others why this process ends; whoever came first is heard."""
        if self.size > 1 and dist.is_initialized():
            with suppress(RuntimeError):  # the store is gone with the process that kept it
                dist.distributed_c10d._get_default_store().compare_set(_REASON, "", f"rank {self.rank}: {reason}")

    def confessed(self) -> str | None:
        """What another process that ended has told."""
        if self.size > 1 and dist.is_initialized():
            with suppress(RuntimeError):
                store = dist.distributed_c10d._get_default_store()
                if store.check([_REASON]):
                    return store.get(_REASON).decode(errors="replace")
        return None

    def leave(self) -> None:
        """Part from the other processes."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()
            gc.collect()  # a model in a cycle keeps its group, whose threads abort a process that ends with them


def synchronised(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with batch-norm statistics over the global batch: torch's SyncBatchNorm, which needs a GPU, or ours."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):  # and stays one of its kind, for who looks for that
            module.__class__ = type(f"Sync{type(module).__name__}", (_OverRanks, type(module)), {})
    return model


class _Sum(torch.autograd.Function):
    """The sum of a tensor over all ranks; gradients are summed likewise."""

    @staticmethod
    def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
        value = value.clone()
        dist.all_reduce(value)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return _Sum.forward(ctx, gradient)


class _OverRanks(nn.modules.batchnorm._BatchNorm):
    """Batch norm over all ranks through gloo. Input (N, C, ...); the same buffers as torch's own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return super().forward(input)
        axes = [d for d in range(input.dim()) if d != 1]
        count = input.new_tensor([input.numel() / input.shape[1]])
        # Statistics as sums over ranks; the second takes centred squares, which lose no digits.
        total = _Sum.apply(torch.cat([input.sum(axes), count]))
        n = total[-1].detach()
        mean = (total[:-1] / n).view(1, -1, *[1] * (input.dim() - 2))
        centred = input - mean
        var = _Sum.apply(centred.square().sum(axes)) / n
        self._track(mean.flatten().detach(), (var * n / (n - 1)).detach())
        scale = torch.rsqrt(var + self.eps) if self.weight is None else self.weight * torch.rsqrt(var + self.eps)
        out = centred * scale.view_as(mean)
        return out if self.bias is None else out + self.bias.view_as(mean)

    def _track(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(var, rate)


def _address_from_slurm() -> None:
    """MASTER_ADDR is the step's first node, MASTER_PORT a function of the job: every rank finds the same."""
    import subprocess

    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    hosts = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True).stdout.split()
    if not hosts:
        raise UserError("MASTER_ADDR is not set and SLURM names no nodes: start with torchrun or srun")
    os.environ["MASTER_ADDR"] = hosts[0]
    job = int(os.environ.get("SLURM_JOB_ID", "0")) * 31 + int(os.environ.get("SLURM_STEP_ID", "0"))
    os.environ["MASTER_PORT"] = str(15000 + job % 20000)
