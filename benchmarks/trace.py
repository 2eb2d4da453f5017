"""Draws random legal layouts of the catalogue's models at their real size, and puts the estimate beside a dry run of the engine.

    python -m benchmarks.trace [count] [seed]

Every kind of stage is traced. Printed for each layout: lines of the program that differ from what was traced, by kind, and the error of the
estimated peak at the fullest stage; at the end the median and the worst.
"""

from __future__ import annotations

import random
import statistics
import sys
from collections import Counter

from meshwright.api import check
from meshwright.schedule.orders import check_micro_batches
from meshwright.spec.catalogue import catalogue_models
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import SCHEDULES, Layout
from meshwright.spec.legality import check_layout, micro_batches, refuse_unbuilt
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

CHUNKS = {"interleaved": 2, "zb-v": 2, "dualpipe-v": 2}
MOST_LAYERS, MOST_EXPERTS = 12, 160
"""Of a stage, and experts of a rank in all its layers: more would only take longer, one layer being like the next."""


def draw(generator: random.Random) -> tuple[Model, Layout, Workload] | None:
    pick = generator.choice
    model = load_model(pick(catalogue_models()))
    pp, tp, dp, cp = pick((1, 2, 4, 8, 16)), pick((1, 2, 4, 8)), pick((1, 2, 4, 8, 16, 64)), pick((1, 1, 1, 2, 4))
    schedule = pick(SCHEDULES) if pp > 1 else "1f1b"
    zero, sp = pick((0, 1, 1, 2, 3)), tp > 1 and pick((True, True, False))
    try:
        layout = Layout(
            dp=dp,
            tp=tp,
            pp=pp,
            cp=cp,
            ep=pick((1, 2, 4, 8, 16, 64)) if model.experts else 1,
            etp=pick((1, 1, 2)) if model.experts else 1,
            sp=sp,
            async_tp=sp and pick((True, False, False)),
            zero=zero,
            zero_shard=pick((None, 2)) if zero and dp > 2 else None,
            schedule=schedule,
            chunks=CHUNKS.get(schedule, 1),
            cp_ulysses=pick([part for part in (1, 2, 4) if cp % part == 0]),
            micro_batch=pick((1, 1, 2)),
            recompute=pick(("none", "none", "selective", "full")),
            precision=pick(("bf16", "bf16", "bf16", "fp32")),
        )
        seq = min(pick((2048, 4096)), model.max_positions)
        # As many micro-batches as a pipeline needs to come into its stride.
        workload = Workload(seq, layout.dp * layout.micro_batch * (layout.pp * pick((2, 3)) if pp > 1 else 4))
        check_layout(layout, model, workload)
        refuse_unbuilt(layout)
        check_micro_batches(layout.schedule, layout.pp, micro_batches(layout, workload))
    except UserError:
        return None
    held = model.experts.count // layout.ep if model.experts else 0
    layers = -(-model.layers // pp)
    return (model, layout, workload) if layers <= MOST_LAYERS and layers * held <= MOST_EXPERTS else None


def main() -> None:
    count, seed = (int(word) for word in (*sys.argv[1:], "200", "0")[:2]) if len(sys.argv) != 2 else (int(sys.argv[1]), 0)
    generator, errors, different = random.Random(seed), list[float](), Counter[str]()
    while len(errors) < count:
        if (drawn := draw(generator)) is None:
            continue
        model, layout, workload = drawn
        stages = check(model=model, layout=layout, seq=workload.seq, global_batch=workload.global_batch)
        fullest = max(stages, key=lambda stage: stage.peak_bytes)
        errors.append(fullest.peak_error)
        lines = Counter(line.what.split(" of chunk")[0] for stage in stages for line in stage.differences)
        different += Counter(lines.keys())
        differ = ", ".join(f"{number} of {what}" for what, number in lines.items()) or "none"
        print(f"{model.name:16} {layout!s:64} peak {fullest.peak_error:+7.2%}, lines that differ: {differ}", flush=True)
    off = sorted(abs(error) for error in errors)
    print(f"\n{count} layouts: peak off by {statistics.median(off):.2%} in the median, {off[-1]:.2%} at worst")
    print("layouts with lines that differ: " + (", ".join(f"{n} in {what}" for what, n in different.items()) or "none"))


if __name__ == "__main__":
    main()
