"""The training loss of a step, summed over its micro-batches, and that of each corpus of a mixture.

Shapes: B rows, C corpora, none without a mixture.
"""

import torch
from torch import Tensor


class LossSums:
    """The sums over the rows of one rank."""

    def __init__(self, corpus_count: int, device: torch.device) -> None:
        self._nats = torch.zeros((), dtype=torch.float64, device=device)
        self._of_corpora_2C = torch.zeros(2, corpus_count, dtype=torch.float64, device=device)
        """nats, and rows"""

    def add(
        self, loss: Tensor, losses_B: Tensor | None = None, corpora_B: Tensor | None = None
    ) -> None:
        """Adds a micro-batch: its loss in nats, and of a mixture that of each row, and the number
        of the corpus that each row comes from."""
        self._nats += loss.detach()
        if losses_B is not None and corpora_B is not None:
            nats_B = losses_B.to(self._nats.dtype)
            of_rows_2B = torch.stack([nats_B, torch.ones_like(nats_B)])
            self._of_corpora_2C.index_add_(1, corpora_B, of_rows_2B)

    def with_norm(self, grad_norm: Tensor) -> Tensor:
        """What the ranks add up: nats, gradient norm, nats of each corpus, rows of each corpus."""
        return torch.cat(
            [torch.stack([self._nats, grad_norm.double()]), self._of_corpora_2C.flatten()]
        )


def corpus_losses(sums: list[float], block_size: int) -> tuple[float | None, ...]:
    """Nats per token of each corpus, None for one without rows in the step, from the sums of all
    ranks: nats of all corpora, then rows."""
    count = len(sums) // 2
    return tuple(
        nats / (rows * block_size) if rows else None
        for nats, rows in zip(sums[:count], sums[count:], strict=True)
    )
