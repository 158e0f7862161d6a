"""Which rank this process is, on which device, and the few collectives that stages need besides the engine's."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks of a stage."""

    rank: int
    num_ranks: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes files and metrics."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all ranks; a collective."""
        if self.num_ranks == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total]

    def gather(self, values: list[int]) -> list[list[int]]:
        """Every rank's values, by rank; as many from each; a collective."""
        if self.num_ranks == 1:
            return [values]
        mine = torch.tensor(values, dtype=torch.int64, device=self.device)
        found = [torch.empty_like(mine) for _ in range(self.num_ranks)]
        dist.all_gather(found, mine)
        return [[int(value) for value in each] for each in found]

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The sum of a tensor over all ranks, which is of one shape on all of them; a collective."""
        if self.num_ranks == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total

    def gather_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """All ranks' rows, in the order of ranks, which may hold unlike numbers of them; a collective."""
        if self.num_ranks == 1:
            return rows
        counts = torch.zeros(self.num_ranks, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        dist.all_reduce(counts)
        sizes: list[int] = counts.tolist()
        padded = torch.cat([rows, rows.new_zeros(max(sizes) - len(rows), *rows.shape[1:])])
        found = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(found, padded)
        return torch.cat([part[:size] for part, size in zip(found, sizes, strict=True)])

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.num_ranks > 1:
            dist.barrier()


def current_ranks(num_threads: int) -> Ranks:
    """The ranks of the running process group, which Ray Train (or a test) has initialised."""
    torch.set_num_threads(num_threads)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    return Ranks(dist.get_rank(), dist.get_world_size(), device)
