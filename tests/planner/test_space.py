"""The space is every legal layout, once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations, product

from hypothesis import given, settings
from hypothesis import strategies as st
from planner_cases import few_layers

from meshwright.planner.rules.reshape import order_has_price
from meshwright.planner.search import legal_layouts
from meshwright.planner.space import MIN_TOKENS, Relief, divisors, legal_space
from meshwright.schedule.orders import check_micro_batches
from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import DENSE_AXES, OFFLOADS, RECOMPUTE_PARTS, Layout
from meshwright.spec.legality import check_layout, check_world, micro_batches, refuse_unbuilt
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload


@settings(max_examples=25, deadline=None)
@given(
    model=st.sampled_from(("gpt2", "opt-1.3b", "llama-3-8b", "mixtral-8x7b")),
    gpus=st.integers(1, 8),
    batch=st.integers(1, 8),
    seq=st.sampled_from((96, 1024, 1000)),
    offloads=st.booleans(),
)
def test_the_space_is_every_legal_layout_once(model: str, gpus: int, batch: int, seq: int, offloads: bool) -> None:
    loaded, work = few_layers(load_model(model), 2), Workload(seq, batch)
    space = legal_space(loaded, work, gpus, "bf16", 2, offloads)
    found = list(legal_layouts(space))
    assert len(set(found)) == len(found) == space.size()
    for layout in found:
        check_layout(layout, loaded, work)
        check_world(layout, gpus)
        check_micro_batches(layout.schedule, layout.pp, micro_batches(layout, work))
        refuse_unbuilt(layout)
    assert set(found) == set(brute_force(loaded, work, gpus, offloads))


def brute_force(model: Model, work: Workload, gpus: int, offloads: bool) -> Iterator[Layout]:
    """Every combination of everything, of which the legal ones are kept."""
    pipelines = [("1f1b", 1), ("zb-h1", 1), ("zb-v", 2), ("dualpipe-v", 2), *(("interleaved", v) for v in range(2, 7))]
    experts = list(product(divisors(model.experts.count), divisors(8))) if model.experts else [(1, 1)]
    for dp, tp, pp, cp in product(divisors(gpus), repeat=4):
        if dp * tp * pp * cp != gpus or (cp > 1 and work.seq // cp < MIN_TOKENS):
            continue
        for ulysses, (ep, etp), mb in product(divisors(cp), experts, divisors(work.global_batch)):
            for sp, (zero, shard), (schedule, chunks) in product(
                (False, True), ((0, None), (1, None), (2, None), (3, None), (1, 2), (2, 2), (3, 2)), pipelines
            ):
                if (pp == 1 and schedule != "1f1b") or (shard and tp * cp != 1):
                    continue  # a pipeline's; groups of a domain of 2
                try:
                    layout = Layout(
                        dp=dp, tp=tp, pp=pp, cp=cp, cp_ulysses=ulysses, ep=ep, etp=etp, micro_batch=mb, sp=sp,
                        zero=zero, zero_shard=shard, schedule=schedule, chunks=chunks,  # type: ignore[arg-type]
                    )  # fmt: skip
                    check_layout(layout, model, work)
                    check_micro_batches(schedule, pp, micro_batches(layout, work))
                except UserError:
                    continue
                yield from relieved_by_force(layout, model, work, offloads)


def relieved_by_force(layout: Layout, model: Model, work: Workload, offloads: bool) -> Iterator[Layout]:
    held = -(-model.layers // (layout.pp * layout.chunks))
    lists = [parts for n in range(1, 5) for parts in combinations(RECOMPUTE_PARTS, n)]
    modes = [("full", ("core",)), *(("selective", parts) for parts in lists)]
    again = [(mode, parts, n) for mode, parts in modes for n in (*range(1, held), None)]
    for (recompute, parts, layers), offload, order in product(
        [("none", ("core",), None), *again], OFFLOADS if offloads else ("none",), permutations(DENSE_AXES)
    ):
        split = [axis for axis in order if layout.degree(axis) > 1]
        usual = [axis for axis in DENSE_AXES if axis in split]
        if order != DENSE_AXES and (split == usual or order != (*split, *(x for x in DENSE_AXES if x not in split))):
            continue
        try:
            found = replace(
                layout, recompute=recompute, recompute_parts=parts, recompute_layers=layers, offload=offload, order=order,  # type: ignore[arg-type]
            )  # fmt: skip
            check_layout(found, model, work)
        except UserError:
            continue
        if order == DENSE_AXES or order_has_price(found, 2):
            yield found


def test_a_relief_includes_what_gives_up_less() -> None:
    kept, norms = Relief(), Relief("selective", ("norms",))
    both, mlp, full = Relief("selective", ("norms", "activation")), Relief("selective", ("mlp",)), Relief("full")
    assert all(full.includes(less) for less in (kept, norms, both, mlp, full))
    assert both.includes(norms)
    assert not norms.includes(both)
    assert mlp.includes(Relief("selective", ("activation",)))
    assert not mlp.includes(norms)
    assert not mlp.includes(full)
    assert not kept.includes(norms)
    away = replace(norms, offload="optimizer")
    assert away.includes(norms)
    assert away.includes(Relief(offload="optimizer"))
    assert not norms.includes(away)
    assert not full.includes(Relief(offload="optimizer"))


@given(st.integers(1, 5000))
def test_divisors(n: int) -> None:
    assert list(divisors(n)) == [d for d in range(1, n + 1) if n % d == 0]
