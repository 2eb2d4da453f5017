"""Is a schedule right? Dependencies, completeness, and freedom from deadlock under rendezvous sends."""

from __future__ import annotations

from meshwright.schedule.actions import Action, Kind, Schedule
from meshwright.spec.errors import UserError


def check_schedule(schedule: Schedule) -> None:
    """Raise UserError naming the stages and actions when the lists cannot run as written."""
    for stage in range(schedule.stages):
        _check_stage(schedule, stage)
    _check_no_deadlock(schedule)


def batches(actions: tuple[Action, ...]) -> list[tuple[Action, ...]]:
    """The list cut into single computations and batches of communications that are posted together."""
    out: list[tuple[Action, ...]] = []
    for action in actions:
        if out and not action.kind.is_compute and not out[-1][0].kind.is_compute:
            out[-1] = (*out[-1], action)
        else:
            out.append((action,))
    return out


def _check_stage(schedule: Schedule, stage: int) -> None:
    seen: set[Action] = set()
    first, last = stage == 0, stage == schedule.stages - 1
    needs = {
        Kind.FORWARD: None if first else Kind.RECV_FORWARD,
        Kind.BACKWARD: None if last else Kind.RECV_BACKWARD,
        Kind.SEND_FORWARD: Kind.FORWARD,
        Kind.SEND_BACKWARD: Kind.BACKWARD,
    }
    for action in schedule.actions[stage]:
        if action in seen:
            raise UserError(f"schedule {schedule.name}: stage {stage} does {action} twice")
        before = needs.get(action.kind)
        if before and Action(before, action.micro_batch, action.chunk) not in seen:
            raise UserError(
                f"schedule {schedule.name}: stage {stage} does {action} before {before.value}{action.micro_batch}"
            )
        if action.kind is Kind.BACKWARD and Action(Kind.FORWARD, action.micro_batch, action.chunk) not in seen:
            raise UserError(f"schedule {schedule.name}: stage {stage} does {action} before its forward")
        seen.add(action)
    for kind in (Kind.FORWARD, Kind.BACKWARD):
        done = {action.micro_batch for action in seen if action.kind is kind}
        if wrong := sorted(done.symmetric_difference(range(schedule.micro_batches))):
            what = f"{'invents' if wrong[0] in done else 'lacks'} {kind.name.lower()} {wrong[0]}"
            raise UserError(f"schedule {schedule.name}: stage {stage} {what} of {schedule.micro_batches} micro-batches")


def _check_no_deadlock(schedule: Schedule) -> None:
    """Play the lists with sends that block until received (NCCL without buffering: the strictest reading)."""
    work = [batches(actions) for actions in schedule.actions]
    at = [0] * schedule.stages
    open_: list[set[Action]] = [set() for _ in work]

    def fill(stage: int) -> bool:
        """Advance over finished batches; True if the stage moved."""
        moved = False
        while not open_[stage] and at[stage] < len(work[stage]):
            batch = work[stage][at[stage]]
            at[stage] += 1
            open_[stage] = {a for a in batch if not a.kind.is_compute}
            moved = True
        return moved

    moved = True
    while moved:
        moved = False
        for stage in range(schedule.stages):
            moved |= fill(stage)
            for action in list(open_[stage]):
                peer = stage + action.kind.step
                other = Action(action.kind.match, action.micro_batch, action.chunk)
                if 0 <= peer < schedule.stages and other in open_[peer]:
                    open_[stage].discard(action)
                    open_[peer].discard(other)
                    moved = True
    stuck = {stage: min(open_[stage], key=str) for stage in range(schedule.stages) if open_[stage]}
    if stuck:
        where = "; ".join(f"stage {stage} waits in {stuck[stage]}" for stage in _at_the_root(stuck))
        raise UserError(f"schedule {schedule.name} deadlocks: {where}")


def _at_the_root(stuck: dict[int, Action]) -> list[int]:
    """The two neighbours that wait for each other, or the stage that waits for one that is through: others wait for these."""
    stage = min(stuck)
    while True:
        peer = stage + stuck[stage].kind.step
        if peer not in stuck:
            return [stage]
        if peer + stuck[peer].kind.step == stage:
            return sorted((stage, peer))
        stage = peer
