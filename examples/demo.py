"""First light: measure this machine, plan for it, train as planned, and put the plan beside what was measured.

    make demo

Every step is a command that a person could type; each is printed before it runs. Takes a few minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

WORKLOAD = ["--seq", "256", "--global-batch", "8"]
EVERY_AXIS = "dp2 tp2:sp pp2:1f1b mb2 fp32"
"""Needs 8 ranks: two of each of dp, tp and pp."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/demo")
    parser.add_argument("--steps", default="20")
    args = parser.parse_args()
    out, began = Path(args.out), time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    cluster = str(out / "cluster.yaml")

    say("1. Measure this machine: 8 ranks, which share its cores.")
    run("bench", "--ranks", "8", "--seconds", "60", "--out", cluster)

    say("2. Plan 4 of these ranks for a small Llama.")
    search = ["plan", "--model", "llama-small", "--cluster", cluster, "--gpus", "4", *WORKLOAD, "--precision", "fp32"]
    run(*search, "--top", "3")
    planned = json.loads(run(*search, "--json", show=False))["best"]["layout"]

    say(f"3. Train it on the source of Python's standard library: as planned ({planned}), then with every axis at once.")
    runs = []
    for name, layout in (("planned", planned), ("every-axis", EVERY_AXIS)):
        runs.append(str(out / name))
        train = ["train", "--model", "llama-small", "--layout", layout, *WORKLOAD, "--steps", args.steps, "--warmup", "5"]
        run(*train, "--cluster", cluster, "--out", runs[-1])

    say("4. Planned against measured.")
    run("compare", *runs, "--cluster", cluster)

    say("5. The same question at scale: Llama-3-70B, 4k tokens, 640 H100.")
    run(
        "plan",
        "--model",
        "llama-3-70b",
        "--cluster",
        "h100-superpod",
        "--gpus",
        "640",
        "--seq",
        "4096",
        "--global-batch",
        "1280",
    )
    print(f"\ndone in {time.monotonic() - began:.0f} s; everything is in {out}")


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def run(*arguments: str, show: bool = True) -> str:
    """Run one meshwright command; stop the demo if it fails."""
    if show:
        print(f"$ meshwright {shlex.join(arguments)}", flush=True)
    command = [sys.executable, "-m", "meshwright", *arguments]
    done = subprocess.run(command, stdout=None if show else subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


if __name__ == "__main__":
    main()
