"""Ways to break the engine for as long as they are entered: what a verification must notice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

from torch import Tensor

from meshwright.parallel import data, pipeline, tensor
from meshwright.schedule.actions import Action, Kind


@contextmanager
def no_gradient_reduction() -> Iterator[None]:
    """Of data parallel alone."""

    def reduce(bucket: data.FlatBucket) -> data.Reduction:
        bucket.clear_missing()
        return data.Reduction(None)

    with patch.object(data.FlatBucket, "reduce", reduce):
        yield


@contextmanager
def no_sum_of_row_parallel() -> Iterator[None]:
    with patch.object(tensor, "all_reduce_forward_identity_backward", lambda x, group: x):
        yield


@contextmanager
def no_sum_of_shared_latents() -> Iterator[None]:
    """In backward, of the narrow outputs that all heads read."""
    with patch.object(tensor, "identity_forward_all_reduce_backward", lambda x, group: x):
        yield


@contextmanager
def labels_of_another_micro_batch() -> Iterator[None]:
    """Where there is more than one stage."""
    run = pipeline.Pipeline.run

    def shifted(self: pipeline.Pipeline, given: Sequence[pipeline.MicroBatch], scale: Tensor) -> Tensor:
        if self.group.size > 1:
            given = [one._replace(labels=given[i - 1].labels) for i, one in enumerate(given)]
        return run(self, given, scale)

    with patch.object(pipeline.Pipeline, "run", shifted):
        yield


@contextmanager
def doubled_gradients_between_stages() -> Iterator[None]:
    """Of the hidden states, as they arrive."""
    arrive = pipeline.Step._arrive

    def doubled(self: pipeline.Step, receive: Action) -> None:
        arrive(self, receive)
        if receive.kind is Kind.RECV_BACKWARD:
            self.gradients[receive.micro_batch, receive.chunk].mul_(2)

    with patch.object(pipeline.Step, "_arrive", doubled):
        yield
