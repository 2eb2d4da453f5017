"""Zero-bubble orders: the weights' gradients, which nobody waits for, fill the time in which a stage would wait.

Both are for a forward, an input gradient and a weight gradient that take about the same time.
"""

from __future__ import annotations

from meshwright.schedule.actions import Action, Kind, act
from meshwright.schedule.turns import Turns


def zb_h1(stage: int, stages: int, m: int, chunks: int = 1) -> list[Action]:
    """ZB-H1 (Qi et al. 2023, arXiv 2401.10241, section 2): 1F1B in which stage s runs s weight gradients behind.

    A stage holds at most `stages` micro-batches, in flight or deferred: what the first stage of 1F1B holds. With m >= stages the
    first stage waits (stages - 1) (t_F + t_I - t_W), against (stages - 1) (t_F + t_I + t_W) under 1F1B (its table 2).
    """
    warm_up = min(m, stages - 1 - stage)
    out = [act(Kind.FORWARD, i) for i in range(warm_up)]
    for i in range(m):
        if warm_up + i < m:
            out.append(act(Kind.FORWARD, warm_up + i))
        out.append(act(Kind.BACKWARD_INPUT, i))
        if i >= stage:
            out.append(act(Kind.BACKWARD_WEIGHT, i - stage))
    return out + [act(Kind.BACKWARD_WEIGHT, i) for i in range(max(0, m - stage), m)]


def zb_v(stage: int, stages: int, m: int, chunks: int = 2) -> list[Action]:
    """ZB-V (arXiv 2401.10241, section 6; as a repeated building block, arXiv 2405.15362): the second chunk runs back
    through the stages, so that the first stage also ends the model.

    The order is the published one, built from its phases. A stage holds at most 2 * stages chunks in flight: what the first stage
    of 1F1B holds. With m >= 2 * stages - 1 and t_F = t_I = t_W of a chunk no stage waits between its first and its last
    action; stage s starts s * t_F late and ends as much later, which is what a step that ends for all at once still shows.
    """
    turns = Turns(m)
    for _ in range(2 * (stages - stage) - 1):
        turns.forward(0)
    for _ in range(stage):
        turns.forward(1)
        turns.forward(0)
    for _ in range(stages - stage):
        turns.forward(1)
        turns.backward_input(1)
        turns.backward_weight()
    while turns.forwards_left:
        for chunk in (0, 1):
            turns.forward(chunk)
            turns.backward_input(chunk)
            turns.backward_weight()
    for _ in range(stage):
        turns.backward_input(0)
        turns.backward_input(1)
    for _ in range(stages - stage):
        turns.backward_input(0)
        turns.backward_weight()
    return turns.finish()
