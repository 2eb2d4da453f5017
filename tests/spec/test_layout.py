"""A Layout survives its one-line form, keeps both world equations, and refuses what cannot be in the user's words."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshwright.spec.errors import UserError
from meshwright.spec.layout import DENSE_AXES, OFFLOAD_PLACES, PAIRING, PRECISIONS, RECOMPUTES, SCHEDULES, Layout
from meshwright.spec.notation import EXAMPLE, GRAMMAR, format_layout, parse_layout

DEGREES = st.sampled_from((1, 2, 3, 4, 6, 8, 20))


def divisors(n: int) -> st.SearchStrategy[int]:
    return st.sampled_from([d for d in range(1, n + 1) if n % d == 0])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Every kind of legal layout, whether this version can run it or not."""
    dp, tp, pp, cp = (draw(DEGREES) for _ in range(4))
    ep = draw(divisors(dp * cp * tp))
    zero = draw(st.integers(0, 3)) if dp * cp > 1 else 0
    proper = [d for d in range(2, dp) if dp % d == 0]
    schedule = draw(st.sampled_from(SCHEDULES)) if pp > 1 else "1f1b"
    chunks = {"interleaved": draw(st.integers(2, 4)), "zb-v": 2, "dualpipe-v": 2}.get(schedule, 1)
    recompute = draw(st.sampled_from(RECOMPUTES))
    parts = draw(st.sampled_from([("core",), ("norms", "activation"), ("core", "norms", "mlp")]))
    precision = draw(st.sampled_from(PRECISIONS))
    dtypes = st.sampled_from([None, precision] if precision == "fp64" else [None, precision, "fp32"])
    parameter_dtype = draw(dtypes)
    sp = tp > 1 and draw(st.booleans())
    offload = draw(st.sampled_from(["none", "optimizer", *(["all"] if zero == 3 else [])]))
    return Layout(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        etp=draw(divisors(dp * cp * tp // ep)),
        async_ep=ep > 1
        and schedule in PAIRING
        and zero < 3
        and parameter_dtype in (None, precision)
        and draw(st.booleans()),
        sp=sp,
        async_tp=sp and draw(st.booleans()),
        zero=zero,
        zero_shard=draw(st.sampled_from([None, *proper])) if zero else None,
        chunks=chunks,
        schedule=schedule,  # type: ignore[arg-type]
        cp_ulysses=draw(divisors(cp)),
        micro_batch=draw(st.integers(1, 64)),
        recompute=recompute,  # type: ignore[arg-type]
        recompute_parts=parts if recompute == "selective" else ("core",),  # type: ignore[arg-type]
        recompute_layers=draw(st.sampled_from([None, 1, 7])) if recompute != "none" else None,
        precision=precision,  # type: ignore[arg-type]
        parameter_dtype=parameter_dtype,  # type: ignore[arg-type]
        gradient_dtype=draw(dtypes),  # type: ignore[arg-type]
        offload=offload,  # type: ignore[arg-type]
        offload_to=draw(st.sampled_from(OFFLOAD_PLACES)) if offload != "none" else "cpu",  # type: ignore[arg-type]
        stage_layers=draw(st.sampled_from([None, tuple(range(1, pp * chunks + 1))])) if pp > 1 else None,
        order=tuple(draw(st.permutations(DENSE_AXES))),
    )


# --- the one-line form


@settings(max_examples=400, deadline=None)
@given(layouts())
def test_every_layout_survives_its_one_line_form(layout: Layout) -> None:
    text = format_layout(layout)
    assert "\n" not in text
    assert parse_layout(text) == layout
    assert str(layout) == text
    assert hash(parse_layout(text)) == hash(layout)


@settings(deadline=None)
@given(layouts(), st.randoms(use_true_random=False))
def test_tokens_stand_in_any_order_and_spacing(layout: Layout, random: Any) -> None:
    tokens = format_layout(layout).split()
    random.shuffle(tokens)
    assert parse_layout("  " + " \t ".join(tokens)) == layout


CANONICAL = [
    "dp20:zero1 tp8:sp pp4x2:interleaved cp2:ring ep8 mb1 ac:selective bf16",
    "mb1 bf16",
    "dp2 mb3 fp32",
    "dp8:zero3x4 mb1 bf16",
    "dp1:zero2 cp4:ulysses mb1 bf16",
    "tp4 pp2:gpipe mb1 ac:full fp64",
    "pp4x2:zb-v mb1 fp8",
    "pp4x2:dualpipe-v mb1 fp16",
    "pp4:zb-h1 mb1 bf16",
    "cp8:ring2xulysses4 mb1 bf16",
    "tp8 etp2 mb1 bf16",
    "dp2 tp2:sp pp2:1f1b mb1 bf16 order:pp-dp-cp-tp",
    "tp4:async mb1 bf16",
    "dp8:zero1 pp4x2:dualpipe-v ep8:async mb1 bf16",
    "tp4 pp2x2:dualpipe-v ep2:async etp2 mb1 bf16",
    "mb1 ac:core+norms+activation:3 bf16",
    "mb1 ac:full:2 bf16",
    "dp4:zero3 mb1 bf16 params:fp32 grads:bf16 offload:all@file",
    "pp4:1f1b mb1 bf16 offload:optimizer stages:7-8-8-7",
]


@pytest.mark.parametrize("text", CANONICAL)
def test_the_canonical_form_is_written_back_as_it_was_read(text: str) -> None:
    assert format_layout(parse_layout(text)) == text


def test_the_example_of_the_notation_means_what_it_says() -> None:
    assert parse_layout(CANONICAL[0]) == Layout(
        dp=20, zero=1, tp=8, sp=True, pp=4, chunks=2, schedule="interleaved", cp=2, ep=8, recompute="selective"
    )
    assert parse_layout(EXAMPLE) == Layout(dp=20, zero=1, tp=8, sp=True, pp=4)


@pytest.mark.parametrize(
    ("short", "whole"),
    [
        ("dp1", Layout()),
        ("mb1", Layout()),
        ("pp4", Layout(pp=4, schedule="1f1b")),
        ("pp4x1:gpipe", Layout(pp=4, schedule="gpipe")),
        ("cp4", Layout(cp=4)),
        ("cp4:ring", Layout(cp=4)),
        ("cp4:ulysses", Layout(cp=4, cp_ulysses=4)),
        ("cp4:ring1xulysses4", Layout(cp=4, cp_ulysses=4)),
        ("dp2:zero0", Layout(dp=2)),
        ("dp2 ac:none", Layout(dp=2)),
        ("order:tp-cp-dp-pp fp32", Layout(precision="fp32")),
    ],
)
def test_what_is_left_out_has_its_default(short: str, whole: Layout) -> None:
    assert parse_layout(short) == whole


# --- the equations


@settings(deadline=None)
@given(layouts())
def test_both_world_equations_hold(layout: Layout) -> None:
    assert layout.world == layout.pp * layout.dp * layout.cp * layout.tp
    assert layout.world == layout.pp * layout.edp * layout.ep * layout.etp
    assert layout.cp_ring * layout.cp_ulysses == layout.cp
    assert layout.data_ranks % layout.state_shards == 0
    assert layout.edp % layout.expert_state_shards == 0
    assert (layout.state_shards == 1) == (layout.zero == 0)


@settings(deadline=None)
@given(layouts())
def test_strides_grow_outwards_and_end_at_the_world(layout: Layout) -> None:
    stride = 1
    for axis in layout.order:
        assert layout.stride(axis) == stride
        stride *= layout.degree(axis)
    assert stride == layout.world


# --- refusals: the value given, and what is legal, in one line

PAIRED = {"dp": 2, "ep": 2, "async_ep": True, "pp": 4, "chunks": 2, "schedule": "dualpipe-v"}
FIELDS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *[({name: 0}, (name, "at least 1", "got 0")) for name in ("dp", "tp", "pp", "cp", "ep", "etp", "chunks", "cp_ulysses")],
    ({"micro_batch": -3}, ("micro_batch", "at least 1", "got -3")),
    ({"schedule": "gpip", "pp": 2}, ("'gpip'", "did you mean gpipe?", *SCHEDULES)),
    ({"recompute": "some"}, ("'some'", *RECOMPUTES)),
    ({"precision": "bf61"}, ("'bf61'", *PRECISIONS)),
    ({"recompute_parts": ("norms",)}, ("parts", "ac:none")),
    ({"recompute": "selective", "recompute_parts": ("mlp", "core")}, ("'mlp+core'", "core, norms, activation, mlp")),
    ({"recompute": "selective", "recompute_parts": ("activation", "mlp")}, ("leave activation out",)),
    ({"recompute_layers": 2}, ("recompute of 2 layers", "ac:full:2")),
    ({"parameter_dtype": "fp64"}, ("parameter dtype fp64 with bf16", "legal: bf16, fp32")),
    ({"gradient_dtype": "fp16"}, ("gradient dtype fp16 with bf16", "bf16, fp32")),
    ({"gradient_dtype": "fp32", "precision": "fp64"}, ("fp32 is narrower than the fp64",)),
    ({"offload_to": "file"}, ("offload:optimizer@file",)),
    ({"offload": "all", "zero": 2, "dp": 2}, ("ZeRO-3", "got zero2", "offload:optimizer")),
    ({"stage_layers": (4, 4)}, ("stages:4-4", "1 chunks")),
    ({"stage_layers": (4,)}, ("pp of 2 or more", "pp1")),
    ({"stage_layers": (4, 0), "pp": 2}, ("stages:4-0", "1 or more layers", "2 chunks")),
    ({"zero": 4, "dp": 2}, ("0, 1, 2 or 3", "got 4")),
    ({"zero": -1, "dp": 2}, ("0, 1, 2 or 3", "got -1")),
    ({"order": ("tp", "dp", "pp")}, ("tp-dp-pp", *DENSE_AXES)),
    ({"order": ("tp", "tp", "dp", "pp")}, ("tp-tp-dp-pp", *DENSE_AXES)),
    ({"sp": True}, ("sp", "tp of 2 or more", "got tp1")),
    ({"tp": 4, "async_tp": True}, ("async tensor parallel", "needs sp", "tp4:async")),
    ({"async_ep": True, "pp": 2, "chunks": 2, "schedule": "dualpipe-v"}, ("ep:async", "ep of 2 or more", "got ep1")),
    ({"dp": 4, "ep": 4, "async_ep": True}, ("ep4:async", "1f1b on pp1", "pp2x2:dualpipe-v", "or ep4")),
    ({**PAIRED, "schedule": "zb-v"}, ("ep2:async", "zb-v on pp4", "pp4x2:dualpipe-v", "or ep2")),
    ({**PAIRED, "zero": 3}, ("ep2:async with zero3", "zero1 or zero2, or ep2")),
    ({**PAIRED, "parameter_dtype": "fp32"}, ("ep2:async with params:fp32", "params:bf16, or ep2")),
    ({"zero": 2}, ("zero2", "dp of 2 or more", "got dp1")),
    ({"schedule": "gpipe"}, ("schedule", "pp of 2 or more", "got pp1")),
    ({"chunks": 2, "schedule": "interleaved"}, ("chunks", "pp of 2 or more", "got pp1")),
    ({"pp": 4, "chunks": 3}, ("1f1b", "3 chunk", "pp4x2:interleaved")),
    ({"pp": 4, "schedule": "interleaved"}, ("interleaved", "1 chunk", "pp4x2:interleaved")),
    ({"pp": 4, "schedule": "zb-h1", "chunks": 2}, ("zb-h1", "2 chunk", "'interleaved'")),
    ({"pp": 4, "schedule": "zb-v"}, ("zb-v", "two chunks", "pp4x2:zb-v")),
    ({"pp": 4, "schedule": "dualpipe-v", "chunks": 3}, ("dualpipe-v", "two chunks", "pp4x2:dualpipe-v")),
    ({"cp": 4, "cp_ulysses": 3}, ("cp 4", "ring x ulysses", "3 does not divide 4")),
    *[({"dp": 8, "zero": 1, "zero_shard": n}, (f"zero1x{n}", "proper divisor of dp 8 above 1")) for n in (1, 3, 8, 16)],
    ({"dp": 8, "zero_shard": 2}, ("zero0x2", "ZeRO stage 1 or more")),
    ({"dp": 2, "tp": 2, "pp": 3, "ep": 3}, ("pp * edp * ep * etp", "ep 3 x etp 1 = 3", "dp x cp x tp = 4")),
    ({"dp": 2, "ep": 2, "etp": 2}, ("ep 2 x etp 2 = 4", "dp x cp x tp = 2")),
]


@pytest.mark.parametrize(("fields", "said"), FIELDS, ids=[str(fields) for fields, _ in FIELDS])
def test_a_layout_that_cannot_be_is_refused_with_its_values_and_the_legal_ones(
    fields: dict[str, Any], said: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as refused:
        Layout(**fields)
    message = str(refused.value)
    assert "\n" not in message
    for part in said:
        assert part in message


LEGAL_TOKENS = ("dpN", "tpN", "ppN", "cpN", "epN[:async]", "mbN", "ac:MODE[:N]", "order:A-B-C-D")
TEXTS: list[tuple[str, tuple[str, ...]]] = [
    *[(text, ("empty", EXAMPLE, "'dp1'")) for text in ("", "  \t")],
    *[
        (token, (repr(token), EXAMPLE, *LEGAL_TOKENS))
        for token in ("foo", "dp", "dp-1", "dp2.5", "xp4", "fp12", "dp2x2", "tp2x2", "mb1:sp", "ep2:ring", "DP2")
    ],
    *[
        (token, (repr(token), EXAMPLE, *LEGAL_TOKENS))
        for token in ("dp2:sp", "dp2:zero4", "dp2:zero", "tp2:zero1", "cp2:zigzag", "cp4:ulysses2")
    ],
    ("dp2 tp2 dp4", ("gives dp twice", "'dp4'", "'dp2 tp2 dp4'")),
    ("bf16 fp32", ("gives precision twice", "'fp32'")),
    ("mb1 mb1", ("gives micro_batch twice", "'mb1'")),
    ("pp4:foo", ("'foo'", *SCHEDULES)),
    ("ac:som", ("'som'", *RECOMPUTES)),
    *[(token, (repr(token), *LEGAL_TOKENS)) for token in ("ac:full:x", "params:fp31", "stages:4-", "stages:a")],
    ("offload:everything", ("'everything'", "optimizer", "all")),
    ("offload:optimizer@disk", ("'disk'", "cpu", "file")),
    ("order:tp-dp", ("tp-dp", *DENSE_AXES)),
    ("cp4:ring2xulysses3", ("cp4:ring2xulysses3", "ring 2 x ulysses 3 = 6", "not 4")),
    ("dp0", ("dp must be at least 1", "got 0")),
    ("pp4x0", ("chunks must be at least 1", "got 0")),
    ("tp1:sp", ("tp of 2 or more", "tp1")),
]


@pytest.mark.parametrize(("text", "said"), TEXTS, ids=[text for text, _ in TEXTS])
def test_a_line_that_cannot_be_read_is_refused_with_the_token_and_the_legal_ones(text: str, said: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refused:
        parse_layout(text)
    message = str(refused.value)
    assert "\n" not in message
    for part in said:
        assert part in message


def test_an_unknown_token_is_answered_with_every_kind_of_token() -> None:
    with pytest.raises(UserError) as refused:
        parse_layout("foo")
    for kind in ("epN", "etpN", *PRECISIONS):
        assert re.search(rf"\b{kind}\b", str(refused.value)), kind
    assert "epN,;" not in str(refused.value)


def test_a_degree_too_long_for_a_number_is_refused() -> None:
    with pytest.raises(UserError, match="dp99999"):
        parse_layout("dp" + "9" * 5000)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="dtpcemb0123456789:x-zro ring", max_size=24))
def test_no_text_does_worse_than_a_refusal_in_one_line(text: str) -> None:
    try:
        layout = parse_layout(text)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert parse_layout(format_layout(layout)) == layout


def test_the_grammar_names_every_mode() -> None:
    for name in (*SCHEDULES, *RECOMPUTES, *PRECISIONS, *DENSE_AXES, "etp"):
        assert name in GRAMMAR
