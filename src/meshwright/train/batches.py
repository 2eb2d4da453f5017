"""From one flat array of tokens to micro-batches, in an order that no layout changes.

Shapes: mb = sequences per micro-batch, seq = tokens per sequence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from meshwright.spec.errors import UserError
from meshwright.train.tokenizer import Tokenizer


class PackedTokens:
    """Windows of seq + 1 tokens with stride seq: window i's last token is window i+1's first.

    A window's first seq tokens are the input and its last seq the labels, so every token but the first is a label once.
    `path` is a 1-D .npy array; it is mapped, not read.
    """

    def __init__(self, path: Path, seq: int) -> None:
        if seq < 1:
            raise UserError(f"seq must be at least 1, got {seq}")
        self.seq = seq
        self._tokens = np.load(path, mmap_mode="r")

    @property
    def tokens(self) -> int:
        """Tokens in the file."""
        return len(self._tokens)

    def __len__(self) -> int:
        return max(0, self.tokens - 1) // self.seq

    def __getitem__(self, window: int) -> np.ndarray:
        """int64 [seq + 1]."""
        if not 0 <= window < len(self):
            raise IndexError(f"window {window} of {len(self)}")
        start = window * self.seq
        return self._tokens[start : start + self.seq + 1].astype(np.int64)


class Batches:
    """The global batch of every step: a function of the data, `global_batch`, `seed` and the step, and of nothing else.

    Epoch e visits every window once, in a permutation seeded by (seed, e). The permutations follow one another
    without a gap, so that a batch which an epoch cannot fill takes its last sequences from the next epoch.
    Raises UserError if the corpus is shorter than one global batch.
    """

    def __init__(self, data: PackedTokens, global_batch: int, seed: int = 0) -> None:
        if global_batch < 1:
            raise UserError(f"global_batch must be at least 1, got {global_batch}")
        if seed < 0:
            raise UserError(f"seed must be at least 0, got {seed}")
        if len(data) < global_batch:
            raise _too_short(data, global_batch)
        self.data = data
        self.global_batch = global_batch
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def windows(self, step: int) -> list[int]:
        """The windows of step `step` (0-based), in order [global_batch]."""
        first = step * self.global_batch
        places = (divmod(place, len(self.data)) for place in range(first, first + self.global_batch))
        return [int(self._order(epoch)[i]) for epoch, i in places]

    def micro_batches(self, step: int, dp_rank: int, dp: int, micro_batch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """One data-parallel rank's share of a step: (tokens, labels) per micro-batch, both int64 [mb, seq], contiguous.

        Sequence j of the global batch belongs to rank j // (global_batch / dp), so that the ranks' shares in order,
        and their micro-batches in order, are the global batch.
        Raises UserError unless global_batch = dp * micro_batch * micro_batches.
        """
        assert step >= 0, step
        assert 0 <= dp_rank < dp, (dp_rank, dp)
        if micro_batch < 1 or self.global_batch % (dp * micro_batch):
            raise UserError(
                f"global_batch = dp * micro_batch * micro_batches does not hold: global_batch {self.global_batch}, "
                f"dp {dp}, micro_batch {micro_batch}; make the global batch a multiple of dp * micro_batch"
            )
        share = self.global_batch // dp
        windows = self.windows(step)[dp_rank * share : (dp_rank + 1) * share]
        sequences = torch.from_numpy(np.stack([self.data[window] for window in windows]))  # [share, seq + 1]
        return [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in sequences.split(micro_batch)]

    def _order(self, epoch: int) -> np.ndarray:
        """The permutation of epoch `epoch` [windows]."""
        if epoch not in self._orders:
            # A corpus holds at least one batch, so that a batch touches two epochs at most: keep two.
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            # Sorting raw bits, because NumPy promises the same bits in every release but not the same `permutation`
            # (NEP 19), and a run must resume in the same order after an upgrade.
            bits = np.random.PCG64((self.seed, epoch)).random_raw(len(self.data))
            self._orders[epoch] = np.argsort(bits, kind="stable")
        return self._orders[epoch]


def check_vocabulary(tokenizer: Tokenizer, model_vocab: int) -> None:
    """Raise UserError if the tokenizer has ids that the model has no embedding for. A larger model vocabulary is fine."""
    if tokenizer.vocab_size > model_vocab:
        raise UserError(
            f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} tokens, the model's vocabulary only {model_vocab}: "
            f"take a model with a vocabulary of at least {tokenizer.vocab_size}, or a smaller tokenizer"
        )


def _too_short(data: PackedTokens, global_batch: int) -> UserError:
    fits = f" (up to {len(data)} fits)" if len(data) else ""
    return UserError(
        f"the corpus is shorter than one global batch: {global_batch} sequences of {data.seq} tokens need "
        f"{global_batch * data.seq + 1} tokens, found {data.tokens}; "
        f"try a smaller --seq, a smaller --global-batch{fits}, or more data"
    )
