"""The module that the group and router stages train: the merged base, routers, user vectors, and the loss.

Shapes: X texts, T tokens, R rows, M adapted modules, N experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from proper_ds.distributed.expert_parallel import TokenExchange
from proper_ds.distributed.recent_shares import RecentShares
from proper_ds.model.adapted import PersonalModel
from proper_ds.model.experts import NoExchange
from proper_ds.model.gate_stats import GateStats
from proper_ds.model.groups import GroupLevel
from proper_ds.model.routing import at_least_float, constraint, entropy, imbalance, mean_by_text, mean_gates
from proper_ds.training.rank_batch import RankBatch, numbers_of

Tensor = torch.Tensor


class GroupModule(nn.Module):
    """The merged base with routers and user vectors; experts and user tables are no submodules of it.

    Loss: mean cross-entropy per target token, plus PROPER's constraint and, in preset `proper`, a balance term; each
    a sum over the texts of the micro-batch, divided by what the global batch holds.

    Attributes:
        stats: where what the gates do is counted, if anywhere.
    """

    def __init__(
        self,
        model: PersonalModel,
        level: GroupLevel,
        dropout: float,
        constraint_weight: float,
        balance_weight: float,
        *,
        table: Callable[[Tensor], Tensor] | None = None,
        exchange: TokenExchange | None = None,
        shares: RecentShares | None = None,
    ) -> None:
        """`table` gives user vectors by line where the level has no table of its own."""
        super().__init__()
        self.encoder, self.mixtures = level.encoder, level.mixtures
        self.model = model
        self._preset, self._table = level.preset, table if table is not None else level.user_table
        self._exchange, self._shares = exchange, shares
        self.stats: GateStats | None = None
        self._constraint_weight, self._balance_weight = constraint_weight, balance_weight
        by_module = level.by_module()
        model.attach_groups(by_module, dropout)
        for mixture in by_module.values():
            mixture.exchange = exchange if exchange is not None else NoExchange()

    def forward(self, inputs: RankBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss, numbers to log)."""
        batch, rows = inputs.batch, inputs.rows
        if self._exchange is not None:
            self._exchange.begin(batch.ids_RT.numel(), batch.ids_RT.device)
        if self.encoder is not None:
            rows.user_RU = self.encoder(inputs.features_RF, inputs.known_R, inputs.block_R)
        else:
            rows.user_RU = self._from_table(inputs)
        rows.gates = {}
        self.model.set_rows(rows)
        losses_K = self.model.target_losses(
            batch.ids_RT, batch.row_K, batch.position_K, batch.target_K, batch.place_RT, batch.text_RT
        )
        ce = losses_K.sum() * inputs.weight
        gates = [at_least_float(gates_RTN) for gates_RTN in rows.gates.values()]
        weight_X = torch.full((len(batch.examples),), inputs.weight, device=ce.device)
        mean_MXN = torch.stack([self._by_text(gates_RTN, inputs) for gates_RTN in gates])
        share_MN = (mean_MXN * weight_X[:, None]).sum(1)
        constrained_X = constraint(mean_MXN).mean(0) * weight_X
        loss = ce / inputs.num_targets
        if self._preset.constraint_gradient:
            recent_MN = self._recent(share_MN, weight_X.sum())
            uneven_X = torch.stack([imbalance(*pair) for pair in zip(mean_MXN, recent_MN, strict=True)]).mean(0)
            loss = loss + self._constraint_weight * constrained_X.sum() / inputs.num_rows
            loss = loss + self._balance_weight * (uneven_X * weight_X).sum() / inputs.num_rows
        else:  # released: the constraint is a constant in the loss, with weight 1
            loss = loss + (constrained_X.sum() / inputs.num_rows).detach()
        spread_RT = torch.stack([entropy(gates_RTN) for gates_RTN in gates]).mean(0)
        spread_X = self._by_text(spread_RT.unsqueeze(-1), inputs).squeeze(-1) * weight_X
        if self.stats is not None and inputs.weight:
            self.stats.add(mean_MXN, spread_X, [example.user for example in inputs.examples])
        tokens = batch.length_R.sum() * inputs.weight
        about = numbers_of(ce=ce, tokens=tokens, constraint=constrained_X.sum(), gate_entropy=spread_X.sum())
        return loss, about

    def _from_table(self, inputs: RankBatch) -> Tensor:
        """User vectors [X, W]. A stand-in that weighs nothing asks for no line: a lookup counts as a step of it."""
        assert self._table is not None and inputs.line_R is not None, "table presets have a table"
        if inputs.weight:
            return self._table(inputs.line_R)
        none_0W = self._table(inputs.line_R[:0])  # a collective all the same
        return none_0W.new_zeros(len(inputs.line_R), none_0W.shape[1])

    @staticmethod
    def _by_text(values_RTN: Tensor, inputs: RankBatch) -> Tensor:
        """Means [X, N] over each text's tokens."""
        if inputs.rows.text_RT is None:
            return mean_gates(values_RTN, inputs.batch.mask_RT)
        return mean_by_text(values_RTN, inputs.rows.text_RT, len(inputs.examples))

    def _recent(self, share_MN: Tensor, num_texts: Tensor) -> Tensor:
        """Shares of the steps before; uniform where nobody keeps them."""
        if self._shares is None:
            return torch.full_like(share_MN, 1 / share_MN.shape[1])
        self._shares.add(share_MN, num_texts)
        return self._shares.mean_MN
