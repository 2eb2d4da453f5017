"""What a verification feeds to a model: its first weights and its batch, in kinds that each make something uneven."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from meshwright.models.init import initial_value
from meshwright.spec.errors import choices
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.shards import Shard
from meshwright.spec.workload import Workload

Feed = Literal["packed", "whole", "lopsided", "hot"]
"""`packed`: two documents a sequence, padded to very different lengths, so ranks count different numbers of tokens. `whole`: one
document a sequence, no padding. `lopsided`: of all tokens only a few of the first sequence count, so most ranks have no loss at
all. `hot`: packed, and the router sends every token to the same few experts; the others, and the ranks that hold them, get none."""

FEEDS: tuple[Feed, ...] = get_args(Feed)

COUNTED = 3
"""Tokens that a lopsided batch counts."""
LARGER = 10.0
"""What first embeddings are multiplied by. With the 0.02 of training every layer of a narrow model adds more than it is given, and
what rounding changes in the first grows from layer to layer to more than 1e-5 in fp32."""
MARK, PULL = 0.6, 1.0
"""What all embeddings have in common, in one feature, and how strongly hot experts are drawn to it: a few times what the other features
have, so that no token goes elsewhere and rounding stays what it is."""


def feeds(model: Model) -> tuple[Feed, ...]:
    """The kinds that `model` can have."""
    return FEEDS if model.experts is not None else tuple(feed for feed in FEEDS if feed != "hot")


def check_feed(feed: str, model: Model) -> Feed:
    """`feed`. Raises UserError for a kind that is none, or that needs experts which `model` does not have."""
    if feed not in feeds(model):
        raise choices(feed, feeds(model), f"batch of {model.name}")
    return feed


def initial_weight(model: Model, shard: Shard, feed: Feed = "packed") -> Tensor:
    """As in training, but with larger embeddings, and with biases and norms off 0 and 1, where mistakes in them would not show."""
    value = initial_value(model, shard.name, shard.global_shape, seed=0)
    if value.ndim == 1:
        return value + initial_value(model, shard.name, (1, *shard.global_shape), seed=1)[0]
    if shard.name == "embedding.tokens.weight":
        value *= LARGER
        if feed == "hot":
            value[:, 0] = MARK
    if feed == "hot" and shard.name.endswith("router.weight"):
        assert model.experts is not None
        value[:, 0] = 0.0
        value[: model.experts.top_k, 0] = PULL
    return value


def global_batch(model: Model, workload: Workload, feed: Feed = "packed") -> list[tuple[Tensor, ...]]:
    """(tokens, labels, documents) of each sequence [1, seq]; without documents where each sequence is one."""
    generator = torch.Generator().manual_seed(1000)
    out: list[tuple[Tensor, ...]] = []
    for i in range(workload.global_batch):
        tokens, labels = (torch.randint(0, model.vocab, (1, workload.seq), generator=generator) for _ in range(2))
        documents = (torch.arange(workload.seq) >= (3 + 7 * i) % workload.seq).long().unsqueeze(0)
        if feed == "lopsided":
            labels[:, COUNTED if i == 0 else 0 :] = -100
        elif feed != "whole":
            labels[:, workload.seq - (i * 5) % workload.seq :] = -100
        out.append((tokens, labels) if feed == "whole" else (tokens, labels, documents))
    return out


def rank_batch(
    model: Model, workload: Workload, layout: Layout, dp_index: int, feed: Feed = "packed"
) -> list[tuple[Tensor, ...]]:
    """The micro-batches of one dp rank."""
    per_rank, size = workload.global_batch // layout.dp, layout.micro_batch
    mine = global_batch(model, workload, feed)[dp_index * per_rank :][:per_rank]
    return [tuple(torch.cat(parts) for parts in zip(*mine[i : i + size], strict=True)) for i in range(0, per_rank, size)]
