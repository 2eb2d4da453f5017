"""The rules of thumb of the field, each beside its arithmetic and this package's figure.

    python benchmarks/rules_of_thumb.py docs/rules-of-thumb.md

Every figure is computed here from the catalogue and the cost model; nothing is typed in but the claims. What the search chooses by
model size is in `thumb_sizes.py`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

from meshwright.cost.economics import DAY, daly_interval, effective_time_ratio, energy, young_interval
from meshwright.cost.economics import mean_time_between_failures as between_failures
from meshwright.cost.estimate import Estimator
from meshwright.cost.ops import Collective, Op, Under
from meshwright.cost.parts import Shapes
from meshwright.cost.pieces import layer_piece
from meshwright.cost.practice import OWN, Practice
from meshwright.cost.result import Estimate
from meshwright.cost.timeline import ChunkSeconds, Timeline, lockstep_utilisation, play
from meshwright.planner.lint import lint
from meshwright.schedule.orders import make_order
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.economics import load_economic_constants
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import Layout
from meshwright.spec.notation import parse_layout
from meshwright.spec.parameters import count_parameters
from meshwright.spec.precision import StateBytes
from meshwright.spec.workload import Workload

GIB = 2**30
WIRE = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}


@dataclass(frozen=True)
class Thumb:
    """A claim, what becomes of it in a word, and the arithmetic in Markdown."""

    claim: str
    verdict: str
    arithmetic: str


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


@cache
def estimator(model: str, cluster: str, seq: int, batch: int, practice: Practice = OWN) -> Estimator:
    return Estimator(load_model(model), load_cluster(cluster), Workload(seq, batch), practice)


def priced(model: str, cluster: str, seq: int, batch: int, layout: str, practice: Practice = OWN) -> Estimate:
    return estimator(model, cluster, seq, batch, practice).estimate(parse_layout(layout))


def memory(e: Estimate) -> str:
    limit = "" if e.fits else f", more than the {e.memory_limit_bytes / GIB:.0f} there are"
    return f"{e.peak_bytes / GIB:.0f} GiB{limit}"


def lockstep() -> Thumb:
    schedule = make_order("1f1b", 4, 4, 1)
    shown = [f"{share:.0%}" for share in lockstep_utilisation(schedule)]
    timeline = play(schedule, [[ChunkSeconds(1.0, 2.0)]] * 4, 0.0)
    true = [f"{share:.0%}" for share in _utilisation(timeline)]
    return Thumb(
        "4 stages, 4 micro-batches: 25, 50, 75, 100, 75, 75, 100, 75, 50, 25 % of the pipeline is used",
        "right in its convention, which no device follows",
        f"A forward and a backward of one stage in the same time step: {', '.join(shown)}. A device does one thing at a time, and a "
        f"backward takes about two forwards. Then, for each forward's worth of time: {', '.join(true)}; the bubble is "
        f"{timeline.bubble:.1%} = (p - 1) / (m + p - 1) = 3 / 7.",
    )


def _utilisation(timeline: Timeline) -> Iterator[float]:
    for step in range(int(timeline.end)):
        busy = sum(min(s.end, step + 1) - max(s.start, step) for s in timeline.spans if s.start < step + 1 and s.end > step)
        yield busy / timeline.stages


def power() -> Thumb:
    drawn, node = energy(50_000, 350.0, 60 * DAY, 0.10), load_cluster("h100-superpod").node
    assert node.power_watts is not None
    return Thumb(
        "50,000 GPUs x 350 W for 60 days = 17.5 MW, 25.2 GWh, 2.52 M USD at 0.10 USD/kWh",
        "right",
        f"50,000 x 350 W = {drawn.watts / 1e6:.1f} MW; x 1,440 h = {drawn.kwh / 1e6:.1f} GWh; x 0.10 USD/kWh = "
        f"{drawn.usd / 1e6:.2f} M USD. The accelerators alone: a node draws more ({node.power_watts / 1e3:.1f} kW for "
        f"{node.accelerators} H100), and the building more again.",
    )


def zero() -> Thumb:
    sixteen, eighteen = StateBytes.of(Layout(gradient_dtype="bf16")), StateBytes.of(Layout())
    rows = []
    for ranks in (8, 64, 1024):
        for name, b in (("bf16 gradients", sixteen), ("fp32 gradients", eighteen)):
            whole = b.parameter + b.gradient + b.optimizer
            held = (
                b.parameter + b.gradient + b.optimizer / ranks,
                b.parameter + (b.gradient + b.optimizer) / ranks,
                whole / ranks,
            )
            rows.append((f"{ranks:,}", f"{name}: {whole} B", *(f"{whole / each:.2f}x" for each in held)))
    names = ("data-parallel ranks", "state of a parameter", "ZeRO-1", "ZeRO-2", "ZeRO-3")
    return Thumb(
        "ZeRO 1 / 2 / 3 saves 4x / 8x / N x of model state",
        "right for many ranks and 16-bit gradients",
        "Parameters 2 B, gradients 2 B (or 4 B when they are summed in fp32), master and moments 12 B. ZeRO-1 cuts the 12, ZeRO-2 the "
        "gradients too, ZeRO-3 everything. 4x and 8x are the limits of 16 / (4 + 12/N) and 16 / (2 + 14/N); with fp32 gradients they "
        "are 3x and 9x. Only ZeRO-3 goes on saving with more ranks.\n\n" + table(names, rows),
    )


def weights() -> Thumb:
    model = load_model("gpt3-175b")
    nbytes = 2 * count_parameters(model).total
    token = 2 * model.layers * model.kv_heads * model.head_dim * 2
    plain, seq = Layout(), 2048
    flash = layer_piece(model, plain, seq, None).saved_bytes * model.layers
    paper = model.layers * seq * model.hidden * (34 + 5 * model.heads * seq / model.hidden)
    return Thumb(
        "GPT-3 175B in FP16: 350 GB of weights; TP 4: 87.5 GB each",
        "right",
        f"{nbytes / 2e9:.1f} B parameters x 2 B = {nbytes / 1e9:.1f} GB, {nbytes / 4e9:.1f} GB each at TP 4. KV cache: 2 x "
        f"{model.layers} layers x {model.hidden:,} x 2 B = {token / 1e6:.2f} MB a token, {token * seq / 1e9:.2f} GB for a sequence "
        f"of {seq:,}. Activations of one such sequence in training: {flash / 1e9:.0f} GB with flash attention; with scores written "
        f"out s b h (34 + 5 a s / h) of arXiv 2205.05198 gives {paper / 1e9:.0f} GB.",
    )


def _tp_calls(ops: Sequence[Op]) -> Iterator[Collective]:
    for op in ops:
        if isinstance(op, Collective) and op.axis == "tp":
            yield op
        elif isinstance(op, Under) and op.collective.axis == "tp":
            yield from (op.collective,) * op.calls


def tensor_bytes() -> Thumb:
    model = load_model("gpt3-175b")
    calls = list(_tp_calls(layer_piece(model, parse_layout("tp8 mb1"), 2048, None).forward))
    total = sum(c.bytes for c in calls) * model.layers
    each, d2 = calls[0].bytes, 8 * model.hidden**2 * model.layers
    return Thumb(
        'TP all-reduce "4 d^2 elements, 8 d^2 per layer, 115 GB per forward pass"',
        "wrong",
        f"8 d^2 x {model.layers} layers = 8 x {model.hidden:,}^2 x {model.layers} = {d2 / 1e9:.1f} G elements: that has the size of "
        f"weights, and weights are not sent. A layer's forward has {len(calls)} all-reduces of batch x sequence x d: 1 x 2,048 x "
        f"{model.hidden:,} x 2 B = {each / 1e6:.1f} MB each, {total / 1e9:.2f} GB over {model.layers} layers for one sequence; twice "
        "that with the backward, and it grows with the tokens, not with d^2.",
    )


def tensor_efficiency() -> Thumb:
    rows = []
    for model, cluster in product(
        ("llama-3-8b", "llama-3-70b", "gpt3-175b"), ("a100-superpod", "h100-superpod", "b200-superpod")
    ):
        alone = _layer_seconds(model, cluster, "mb1")
        shares = [alone / (tp * _layer_seconds(model, cluster, f"tp{tp}:sp mb1")) for tp in (2, 4, 8)]
        rows.append((model, cluster, *(f"{share:.0%}" for share in shares)))
    return Thumb(
        "TP efficiency 95 / 90 / 85 % at 2 / 4 / 8 on NVLink",
        "depends on the model and on the accelerator",
        "Seconds of a layer (forward and backward, 4,096 tokens, sequence parallel) on one accelerator, over tp times those on tp. The "
        "faster the accelerator and the narrower the model, the worse:\n\n"
        + table(("model", "cluster", "TP 2", "TP 4", "TP 8"), rows),
    )


def _layer_seconds(model: str, cluster: str, text: str) -> float:
    layout, its = parse_layout(text), estimator(model, cluster, 4096, 64)
    d = its.durations(((layer_piece(its.model, layout, 4096, None), 1),), layout, shared=False)
    return d.forward + d.backward


def sequence_parallel() -> Thumb:
    model, seq, tp = load_model("llama-3-70b"), 4096, 8

    def wire(text: str) -> float:
        forward = layer_piece(model, parse_layout(text), seq, None).forward
        return sum(WIRE[c.op] * c.bytes for c in _tp_calls(forward)) * (tp - 1) / tp

    plain, cut = (4 * model.layers * Shapes(model, parse_layout(f"{t} mb1"), seq).residual_bytes for t in ("tp8", "tp8:sp"))
    saved = [layer_piece(model, parse_layout(f"{t} mb1"), seq, None).saved_bytes * model.layers for t in ("tp8", "tp8:sp")]
    return Thumb(
        "Sequence parallelism: the same bytes as plain TP; 20 GB of norm regions become 2.5 to 3 GB at TP 8 (70B, 4k tokens)",
        "right",
        f"A layer's forward puts {wire('tp8 mb1') / 1e6:.0f} MB on each rank's wire with two all-reduces, {wire('tp8:sp mb1') / 1e6:.0f} "
        f"MB with two all-gathers and two reduce-scatters. Norm regions keep four hidden states a layer: 4 x {model.layers} x {seq:,} x "
        f"{model.hidden:,} x 2 B = {plain / GIB:.1f} GiB, {cut / GIB:.2f} GiB with sequence parallel. All that a rank keeps of a "
        f"micro-batch falls from {saved[0] / GIB:.1f} to {saved[1] / GIB:.1f} GiB. (Backward gathers the inputs of linears once more, "
        "under the products that need no gathered input.)",
    )


def recompute() -> Thumb:
    practice = Practice(attention="fused-softmax", whole_recompute=True)
    texts = ("tp8 pp8 mb1", "tp8 pp8 mb1 ac:full", "tp8:sp pp8 mb1", "tp8:sp pp8 mb1 ac:selective")
    got = [priced("gpt3-175b", "a100-superpod", 2048, 64, text, practice) for text in texts]
    rows = [
        (
            f"`{text}`",
            f"{e.step_time_s:.1f} s",
            f"{e.step_time_s / got[0].step_time_s - 1:+.0%}",
            memory(e),
        )
        for text, e in zip(texts, got, strict=True)
    ]
    full, back = got[1].step_time_s - got[0].step_time_s, got[1].step_time_s - got[3].step_time_s
    flash = [priced("gpt3-175b", "a100-superpod", 2048, 64, text) for text in (texts[2], texts[2] + " ac:full")]
    return Thumb(
        "Full recompute costs 30 to 40 %; SP with selective recompute gives most of it back",
        f"{full / got[0].step_time_s:.0%} here, of which {back / full:.0%} come back",
        "175B on 64 A100, 64 sequences of 2,048 tokens, attention that writes its scores out (as in arXiv 2205.05198):\n\n"
        + table(("layout", "step", "against no recompute", "memory"), rows)
        + f"\n\nThis package's own engine has flash attention and "
        f"stops a recompute at the last tensor that backward needs: `{texts[2]}` takes {flash[0].step_time_s:.1f} s, with ac:full "
        f"{flash[1].step_time_s / flash[0].step_time_s - 1:+.0%}.",
    )


def seventy() -> Thumb:
    e = priced("llama-3-70b", "h100-superpod", 4096, 1280, "dp20:zero1 tp8:sp pp4 mb1")
    claimed = 685_000
    return Thumb(
        "640 H100, 70B, TP8 SP PP4 DP20: 45 % MFU, 685,000 tokens/s, 59 B tokens a day",
        f"{e.tokens_per_s / claimed - 1:+.0%} here; other layouts are quicker",
        f"The estimate of `{e.layout}` at 4,096 tokens and 1,280 sequences: {e.step_time_s:.2f} s a step, {e.mfu:.1%} MFU, "
        f"{e.tokens_per_s:,.0f} tokens/s, {e.tokens_per_s * DAY / 1e9:.1f} B tokens a day. The claim agrees with itself: 685,000 x "
        f"86,400 s = {claimed * DAY / 1e9:.1f} B. What the search finds instead is below.",
    )


def across_nodes() -> Thumb:
    model, cluster, work = load_model("llama-3-70b"), load_cluster("h100-superpod"), Workload(4096, 1280)
    fired = lint(model, cluster, work, parse_layout("dp10:zero1 tp16:sp pp4 mb1")).findings
    found = next(f for f in fired if f.rule == "tensor parallel across nodes")
    assert found.given is not None
    assert found.repair is not None
    links, node = cluster.accelerator.scale_up, cluster.node
    nic = node.nics * node.nic_bandwidth / node.accelerators
    ratio = found.given.step_time_s / found.repair.price.step_time_s
    return Thumb(
        "TP across nodes runs 5 to 10 times slower links and stalls",
        "right of one link, too much for a group",
        f"One H100 has {links.bandwidth / 1e9:.0f} GB/s of NVLink and {nic / 1e9:.0f} GB/s of NIC: {links.bandwidth / nic:.0f} times "
        f"less. But a sum over two nodes leaves each by all its {node.nics} NICs, says the estimator: {found.what}. Twice the ranks also "
        f"halve each rank's products. In all the step takes {ratio:.2f} times as long: {found.given.step_time_s:.2f} s against "
        f"{found.repair.price.step_time_s:.2f} s of `{found.repair.change}`.",
    )


def llama_405b() -> Thumb:
    peak = load_cluster("h100-superpod").accelerator.peak_flops["bf16"]
    texts = (
        "dp128:zero1 tp8:sp pp16 mb1",
        "dp128:zero1 tp8:sp pp16x4:interleaved mb1",
        "dp128:zero2 tp8:sp pp16x4:interleaved mb1",
        "dp128:zero1 tp8:sp pp16x4:interleaved mb1 ac:activation",
    )
    got = [priced("llama-3-405b", "h100-superpod", 8192, 2048, text) for text in texts]
    rows = [
        (f"`{text}`", f"{e.mfu * peak / 1e12:.0f}", f"{e.mfu:.1%}", f"{e.bubble:.0%}", memory(e))
        for text, e in zip(texts, got, strict=True)
    ]
    return Thumb(
        "Llama 3 405B on 16,384 GPUs: TP8 PP16 DP128, 400 TFLOP/s per GPU, 41 % MFU",
        f"{got[0].mfu * peak / 4e14 - 1:+.0%} here with plain 1F1B, {got[1].mfu * peak / 4e14 - 1:+.0%} interleaved",
        f"8,192 tokens, 2,048 sequences: 16 micro-batches for 16 stages, so that without interleaving half of the pipeline is bubble. "
        f"400 of {peak / 1e12:.0f} TFLOP/s are {4e14 / peak:.1%}. More than half of the memory are activations of up "
        f"to 16 micro-batches; it fits where the activation function and its product run again in backward, which costs "
        f"{1 - got[3].mfu / got[1].mfu:.0%}.\n\n" + table(("layout", "TFLOP/s a GPU", "MFU", "bubble", "memory"), rows),
    )


def micro_batches() -> Thumb:
    def bubble(p: int, m: int, name: str, chunks: int) -> str:
        if name == "interleaved" and m % p:  # which runs micro-batches in rounds of one a stage
            return "-"
        each = [[ChunkSeconds(1.0 / chunks, 2.0 / chunks, 1.0 / chunks)] * chunks] * p
        return f"{play(make_order(name, p, m, chunks), each, 0.0).bubble:.0%}"

    kinds = (("1f1b", 1), ("interleaved", 4), ("zb-h1", 1), ("zb-v", 2))
    rows = [(str(m), *(bubble(8, m, name, chunks) for name, chunks in kinds)) for m in (4, 8, 16, 32, 64)]
    return Thumb(
        "pipeline needs several times more micro-batches than stages; PP without DP is capped by them",
        "right",
        "Bubble of 8 stages, backward twice the forward and half of it weight gradients, no communication:\n\n"
        + table(("micro-batches", *(f"{n}, {c} chunks" if c > 1 else n for n, c in kinds)), rows)
        + "\n\n1F1B has (p - 1) / (m + p - 1). Without data parallel m is the batch over the micro-batch, however many ranks there are: "
        "more stages only lengthen the bubble (the rule `pipeline without data parallel` of `meshwright lint` prices it).",
    )


def checkpoint() -> Thumb:
    c = load_economic_constants()
    nodes, restart = 2048, c.restart_seconds.value
    mean = between_failures(nodes, c.failures(None).value)
    rows = []
    for save in (10.0, 60.0, 300.0):
        young, daly = young_interval(save, mean), daly_interval(save, mean)
        ratios = [effective_time_ratio(t, save, mean, restart) for t in (daly, 4 * daly)]
        rows.append((f"{save:.0f} s", f"{young / 60:.1f} min", f"{daly / 60:.1f} min", *(f"{r:.1%}" for r in ratios)))
    return Thumb(
        "a checkpoint interval is a reliability parameter",
        "right",
        f"{nodes:,} nodes with a failure every {mean / 3600:.1f} h (Llama 3's rate), restart {restart:.0f} s. Young: sqrt(2 w M), Daly: "
        "sqrt(2 w M) - w, for w seconds that training waits for a save:\n\n"
        + table(("save", "Young", "Daly", "effective time there", "at 4 times Daly's"), rows),
    )


THUMBS: tuple[Callable[[], Thumb], ...] = (
    lockstep, power, zero, weights, tensor_bytes, tensor_efficiency, sequence_parallel, recompute, seventy, across_nodes,
    llama_405b, micro_batches, checkpoint,
)  # fmt: skip


def section(thumb: Thumb) -> str:
    return f"## {thumb.claim}\n\n**{thumb.verdict[0].upper()}{thumb.verdict[1:]}.** {thumb.arithmetic}\n"


HEAD = """# Rules of thumb

Easy to quote and often wrong. Each has its arithmetic here, computed by `python benchmarks/rules_of_thumb.py docs/rules-of-thumb.md`
from the catalogue and the cost model; a test holds this page to that command. Nothing below was measured.
"""


def page() -> str:
    from thumb_sizes import seventy_searched, sizes

    return "\n".join([HEAD, *(section(thumb()) for thumb in (*THUMBS, seventy_searched, sizes))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.parse_args().page.write_text(page())


if __name__ == "__main__":
    main()
