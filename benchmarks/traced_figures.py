"""Figures of the field about memory, as the engine's dry run has them: no arithmetic but sums of what was live.

    python benchmarks/traced_figures.py docs/traced-figures.md

Every figure comes from `meshwright.trace`, of models of their real size in worlds of their real size, in one process.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from meshwright.api import trace
from meshwright.schedule.actions import Kind
from meshwright.trace.result import StageTrace

GIB = 2**30
WIDTH = 130
STATE = ("parameters", "gradients", "optimizer")


def traced(model: str, layout: str, seq: int, batch: int, stage: int = 0) -> StageTrace:
    return trace(model=model, layout=layout, seq=seq, global_batch=batch, stages=[stage]).stages[0]


def table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in (names, ["---"] * len(names), *rows))


def paragraph(*parts: str) -> str:
    return textwrap.fill(" ".join(parts), WIDTH)


def left_by_a_forward(stage: StageTrace) -> dict[tuple[int, ...], int]:
    """Shape to bytes of the activations that the last micro-batch's forward leaves for its backward."""
    work = [s.work for s in stage.sections if s.action is not None and s.action.kind is Kind.FORWARD][-1]
    out: dict[tuple[int, ...], int] = {}
    for storage, sign in work.net.items():
        if storage.category == "activations":
            out[storage.shape] = out.get(storage.shape, 0) + sign * storage.nbytes
    return out


def live(stage: StageTrace) -> int:
    """Most activations at any moment: of all micro-batches in flight."""
    return max(held.get("activations", 0) for _, held in stage.through_time())


def sequence_parallel(layers: int = 80, tp: int = 8, seq: int = 4096, width: int = 8192) -> str:
    rows = []
    for recompute in ("", " ac:selective", " ac:full"):
        for sp in ("", ":sp"):
            layout = f"tp{tp}{sp} mb1{recompute}"
            left = left_by_a_forward(traced("llama-3-70b", layout, seq, 1))
            tokens = seq // tp if sp else seq
            hidden = sum(nbytes for shape, nbytes in left.items() if shape[-1:] == (width,) and _rows(shape) == tokens)
            rows.append((f"`{layout}`", f"{hidden / GIB:.2f}", f"{sum(left.values()) / GIB:.2f}"))
    pipelined = []
    for sp in ("", ":sp"):
        layout = f"tp{tp}{sp} pp4 mb1"
        pipelined.append((f"`{layout}`", f"{live(traced('llama-3-70b', layout, seq, 8)) / GIB:.2f}"))
    return "\n".join(
        [
            "## Sequence parallelism: 20 GB become 2.5 to 3 GB at TP 8 (70B, 4k tokens)",
            "",
            paragraph(
                f"Llama-3-70B, {layers} layers, one micro-batch of {seq:,} tokens, GiB that its forward leaves for its backward",
                "on one rank. What sequence parallelism cuts is all that is as wide as a hidden state: inputs of norms, and",
                "outputs of them that linears keep. Everything else is cut by tensor parallelism already. So the claim is about",
                "the norm regions, without recompute, in one stage:",
            ),
            "",
            table(("layout", "as wide as a hidden state", "all activations"), rows),
            "",
            paragraph(
                "In four stages the first holds four micro-batches of 20 layers each, which comes to the same. Most activations",
                "that are live at once on stage 0, 8 micro-batches:",
            ),
            "",
            table(("layout", "activations"), pipelined),
        ]
    )


def _rows(shape: tuple[int, ...]) -> int:
    out = 1
    for size in shape[:-1]:
        out *= size
    return out


def zero(model: str = "llama-3-8b", ranks: Sequence[int] = (8, 64, 1024)) -> str:
    rows = []
    for precision, name in (("bf16 grads:bf16", "16 B: gradients in bf16"), ("bf16", "18 B: gradients in fp32")):
        whole = _state(model, f"mb1 {precision}", 1)
        for n in ranks:
            saved = [whole / _state(model, f"dp{n}:zero{stage} mb1 {precision}", n) for stage in (1, 2, 3)]
            rows.append((name, f"{n:,}", *(f"{each:.2f}x" for each in saved)))
    return "\n".join(
        [
            "## ZeRO 1 / 2 / 3: 4x / 8x / N x less model state",
            "",
            paragraph(
                f"{model}: bytes of parameters, gradients and optimizer state that are live when a step begins, on one rank of",
                "N, against all of them. 4x and 8x are limits, of many ranks and of gradients in bf16; N x falls short by what",
                "ZeRO-3 keeps whole, norms and routers.",
            ),
            "",
            table(("state of a parameter", "ranks", "ZeRO-1", "ZeRO-2", "ZeRO-3"), rows),
        ]
    )


def _state(model: str, layout: str, batch: int) -> int:
    first = traced(model, layout, 64, batch).sections[0].work
    return sum(sign * storage.nbytes for storage, sign in first.net.items() if storage.category in STATE)


def ring(model: str = "llama-3-8b", layers: int = 2) -> str:
    rows = []
    for cp, seq in ((1, 8192), (4, 32_768), (16, 131_072), (16, 262_144), (16, 524_288)):
        layout = f"{f'cp{cp}:ring ' if cp > 1 else ''}pp16 mb1"
        stage = traced(model, layout, seq, 16, stage=1)
        left = sum(left_by_a_forward(stage).values())
        local = seq // cp
        rows.append(
            (
                f"{seq:,}",
                str(cp),
                f"{local:,}",
                f"{left / layers / local / 1e3:.1f}",
                f"{_working(stage) / local / 1e3:.1f}",
            )
        )
    return "\n".join(
        [
            "## Ring attention: memory linear in the local length",
            "",
            paragraph(
                f"{model}, a stage of {layers} layers: kB that a layer's forward leaves for each token of a rank, and kB for",
                "each token that come and go within an action. Neither depends on the sequence or on how many ranks share it:",
                "no score is ever written, and of other ranks' keys and values two pieces are there at a time.",
            ),
            "",
            table(("sequence", "ranks", "tokens a rank", "left, kB a token", "temporary, kB a token"), rows),
        ]
    )


def _working(stage: StageTrace) -> int:
    return max(held.get("temporary", 0) for _, held in stage.through_time())


SECTIONS: tuple[Callable[[], str], ...] = (sequence_parallel, zero, ring)
HEAD = "# Figures of the field, traced\n\n" + paragraph(
    "Written by `python benchmarks/traced_figures.py docs/traced-figures.md`: sums of what is live in [dry runs](trace.md) of the engine,",
    "at real sizes. The same claims beside their arithmetic are in [rules of thumb](rules-of-thumb.md).",
)


def page() -> str:
    return "\n\n".join([HEAD, *(section() for section in SECTIONS)]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.parse_args().page.write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
