"""Is a schedule right? Dependencies, completeness, memory, order of messages, and freedom from deadlock under rendezvous sends."""

from __future__ import annotations

from meshwright.schedule.actions import Action, Kind, Schedule
from meshwright.schedule.clock import deadlock
from meshwright.spec.errors import UserError


def check_schedule(schedule: Schedule, most_in_flight: int | None = None) -> None:
    """Raise UserError naming the stages and actions when the lists cannot run as written.

    `most_in_flight`: activations, in chunks, that a stage may hold at once.
    """
    for stage in range(schedule.stages):
        _check_stage(schedule, stage)
    check_complete(schedule)
    for stage in range(schedule.stages):
        if most_in_flight is not None and (held := schedule.in_flight(stage)) > most_in_flight:
            raise UserError(
                f"schedule {schedule.name}: stage {stage} holds the activations of {held} forwards at once, "
                f"more than {most_in_flight}"
            )
    _check_no_deadlock(schedule)
    _check_message_order(schedule)


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
    for action in schedule.actions[stage]:
        where = f"schedule {schedule.name}: stage {stage} does {action}"
        if not 0 <= action.chunk < schedule.chunks:
            raise UserError(f"{where}, but its chunks are 0 to {schedule.chunks - 1}")
        if action in seen:
            raise UserError(f"{where} twice")
        if not action.kind.is_compute and (other := schedule.counterpart(stage, action)) and other[0] == stage:
            raise UserError(f"{where}, but hands that tensor over to itself: leave it out")
        for before in _needs(schedule, stage, action):
            if not any(one in seen for one in before):
                raise UserError(f"{where} before {' or '.join(map(str, before))}")
        seen.add(action)


def _needs(schedule: Schedule, stage: int, action: Action) -> list[tuple[Action, ...]]:
    """What must stand before `action` in its stage's list: of each tuple, one."""
    gradient = (action.of(Kind.BACKWARD), action.of(Kind.BACKWARD_INPUT))
    match action.kind:
        case Kind.FORWARD:
            before = schedule.before(stage, action.chunk)
            if before is None:
                return []
            here = before[0] == stage
            return [(action.of(Kind.FORWARD, before[1]),) if here else (action.of(Kind.RECV_FORWARD),)]
        case Kind.BACKWARD | Kind.BACKWARD_INPUT:
            needs: list[tuple[Action, ...]] = [(action.of(Kind.FORWARD),)]
            after = schedule.after(stage, action.chunk)
            if after is not None and after[0] == stage:
                needs.append(tuple(one.of(one.kind, after[1]) for one in gradient))
            elif after is not None:
                needs.append((action.of(Kind.RECV_BACKWARD),))
            return needs
        case Kind.BACKWARD_WEIGHT:
            return [(action.of(Kind.BACKWARD_INPUT),)]
        case Kind.SEND_FORWARD:
            return [(action.of(Kind.FORWARD),)]
        case Kind.SEND_BACKWARD:
            return [gradient]
        case _:
            return []


def check_complete(schedule: Schedule) -> None:
    """Raise UserError unless every chunk runs every micro-batch forward, and back either whole or in both halves."""
    for stage, actions in enumerate(schedule.actions):
        done: dict[tuple[Kind, int], set[int]] = {}
        for action in actions:
            done.setdefault((action.kind, action.chunk), set()).add(action.micro_batch)
        for chunk in range(schedule.chunks):
            its = {kind: done.get((kind, chunk), set()) for kind in Kind if kind.is_compute}
            _check_chunk(schedule, stage, chunk, its)


def _check_chunk(schedule: Schedule, stage: int, chunk: int, done: dict[Kind, set[int]]) -> None:
    """`done`: the micro-batches of each kind of computation."""
    on = f" on chunk {chunk}" if schedule.chunks > 1 else ""
    whole, split = done[Kind.BACKWARD], done[Kind.BACKWARD_INPUT]
    if both := whole & split:
        raise UserError(f"schedule {schedule.name}: stage {stage} runs backward {min(both)}{on} both whole and split")
    wanted = set(range(schedule.micro_batches))
    for kind, its, expected in (
        (Kind.FORWARD, done[Kind.FORWARD], wanted),
        (Kind.BACKWARD, whole | split, wanted),
        (Kind.BACKWARD_WEIGHT, done[Kind.BACKWARD_WEIGHT], split),
    ):
        if wrong := sorted(its ^ expected):
            what = f"{'invents' if wrong[0] in its else 'lacks'} {kind.name.lower().replace('_', ' ')} {wrong[0]}{on}"
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
                other = schedule.counterpart(stage, action)
                if other is not None and other[1] in open_[other[0]]:
                    open_[stage].discard(action)
                    open_[other[0]].discard(other[1])
                    moved = True
    stuck = {stage: min(open_[stage], key=str) for stage in range(schedule.stages) if open_[stage]}
    if stuck:
        raise deadlock(schedule, {stage: (action, schedule.counterpart(stage, action)) for stage, action in stuck.items()})


def _check_message_order(schedule: Schedule) -> None:
    """Messages carry no names: the first receive that a stage posts for a peer takes what the peer sends it first."""
    messages: dict[tuple[int, int, bool], list[Action]] = {}
    for stage, actions in enumerate(schedule.actions):
        for action in actions:
            if not action.kind.is_compute:
                messages.setdefault((stage, schedule.peer(stage, action), action.kind.is_send), []).append(action)
    for (stage, peer, is_send), sends in messages.items():
        if not is_send:
            continue
        for send, receive in zip(sends, messages[peer, stage, False], strict=True):
            if schedule.counterpart(stage, send) != (peer, receive):
                raise UserError(
                    f"schedule {schedule.name}: stage {stage} sends {send} to stage {peer}, which has {receive} as its next "
                    "receive: messages between two stages are matched in order"
                )
