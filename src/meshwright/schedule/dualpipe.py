"""DualPipe-V: forwards and backwards of two chunks in pairs, so that the communication of one can run under the other's work."""

from __future__ import annotations

from meshwright.schedule.actions import Action
from meshwright.schedule.turns import Turns


def dualpipe_v(stage: int, stages: int, m: int, chunks: int = 2) -> list[Action]:
    """One half of DualPipe (DeepSeek-AI 2024, arXiv 2412.19437, section 3.2.1, figure 5), folded into a V ("cut in half").

    DualPipe feeds micro-batches from both ends of 2 * stages ranks that hold two chunks each; by symmetry one half of the ranks
    does everything, and the micro-batches that came from the other end are those that come back through the fold. The order is
    the published one, built from its phases; it needs m >= 2 * stages.

    DualPipe's bubble is (PP/2 - 1) (F&B + B - 3W) on PP = 2 * stages chunks, F&B being a forward and a whole backward that run as
    one (its table 2). Here the two run one after the other: F&B = F + B, and with B = I + W that is (stages - 1) (F + 2I - W).
    The V has that bubble when both results of a pair leave at its end, as long as W <= F <= I. Taken one by one, as by
    `cost/timeline.py`, each leaves when it is there, and the bubble is less: (stages - 1) (F + I - W) at F = I = W.
    A stage holds at most 2 * stages + 1 chunks in flight (its "PP + 1").
    """
    warm_up = stages - 1 - stage
    turns = Turns(m)
    for _ in range(2 * warm_up):
        turns.forward(0)
    for _ in range(stage + 1):
        turns.forward(0)
        turns.forward(1)
    for _ in range(warm_up):
        turns.backward_input(1)
        turns.backward_weight()
        turns.forward(1)
    for _ in range(m - 2 * stages + stage + 1):
        turns.forward(0)
        turns.backward(1)
        turns.forward(1)
        turns.backward(0)
    for _ in range(warm_up):
        turns.backward(1)
        turns.forward(1)
        turns.backward(0)
    # Half of the last 2 (stage + 1) are whole, half leave their weight gradients for the wait that follows.
    for i in range(2 * (stage + 1)):
        backward = turns.backward if i <= stage else turns.backward_input
        backward(1 - i % 2)
    for _ in range(warm_up):
        turns.backward_weight()
        turns.backward_input(0)
    return turns.finish()
