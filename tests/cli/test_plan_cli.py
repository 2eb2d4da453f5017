"""The command as a person meets it: quick to start, free of torch, and one line with status 2 for whatever cannot be."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from meshwright.cli.main import main

COMMAND = (sys.executable, "-m", "meshwright")
GPT2 = ("--model", "gpt2", "--seq", "512", "--global-batch", "16")
SMALL_PLAN = ("plan", *GPT2, "--cluster", "h100-superpod", "--gpus", "4")
SMALL_ESTIMATE = ("estimate", *GPT2, "--cluster", "h100-superpod", "--layout", "dp4 mb1")
LARGE_PLAN = (
    "plan", "--model", "llama-3-70b", "--cluster", "h100-superpod", "--gpus", "640", "--seq", "4096", "--global-batch", "1280",
)  # fmt: skip


class Said(NamedTuple):
    status: int
    out: str
    err: str


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command in this process, which saves the time to start Python."""

    def call(*args: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["meshwright", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        shown = capsys.readouterr()
        return Said(int(ended.value.code or 0), shown.out, shown.err)

    return call


def changed(args: tuple[str, ...], **options: str) -> tuple[str, ...]:
    """`args` with the values of some options replaced or added."""
    out = list(args)
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if flag in out:
            out[out.index(flag) + 1] = value
        else:
            out += [flag, value]
    return tuple(out)


def refused(said: Said, *parts: str) -> None:
    assert said.status == 2, said
    assert said.out == ""
    [line] = said.err.splitlines()
    assert line.startswith("error: ")
    assert said.err.endswith("\n")
    for part in parts:
        assert part in line, line


# --- quick, and without torch


def cpu_seconds(*args: str) -> float:
    """Of one run of the command. It has one thread, so on an idle machine this is the wall time, and on a busy one not the others'."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*COMMAND, *args], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


@pytest.mark.parametrize(
    ("args", "limit", "tries"), [(("plan", "--help"), 0.5, 5), (LARGE_PLAN, 2.0, 6)], ids=["plan --help", "plan 70B on 640"]
)
def test_it_answers_quickly(args: tuple[str, ...], limit: float, tries: int) -> None:
    """The quickest of a few runs: noise only adds."""
    taken: list[float] = []
    while len(taken) < tries and not any(seconds < limit for seconds in taken):
        taken.append(cpu_seconds(*args))
    assert min(taken) < limit, taken


@pytest.mark.parametrize(
    "args",
    [
        (*SMALL_ESTIMATE, "--json"),
        ("plan", "--help"),
        ("layout", "explain", "dp2 tp2"),
        ("models",),
        ("clusters",),
    ],
    ids=" ".join,
)
def test_the_planner_runs_where_torch_and_numpy_are_absent(args: tuple[str, ...]) -> None:
    program = (
        "import sys; sys.modules.update(torch=None, numpy=None)\n"  # any import of them fails
        "from meshwright.cli.main import main\n"
        "sys.argv[0] = 'meshwright'\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", program, *args], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_the_search_runs_where_torch_is_absent() -> None:
    program = "import sys; sys.modules.update(torch=None)\nfrom meshwright.cli.main import main\nmain()"
    done = subprocess.run([sys.executable, "-c", program, *SMALL_PLAN], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_the_module_is_the_command() -> None:
    done = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("meshwright 0.")
    done = subprocess.run([*COMMAND, *changed(SMALL_PLAN, model="gtp2")], capture_output=True, text=True, check=False)
    refused(Said(done.returncode, done.stdout, done.stderr), "unknown model 'gtp2'", "gpt2")


def test_a_reader_that_stops_early_is_no_error() -> None:
    with subprocess.Popen(
        [*COMMAND, "models", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        assert "Traceback" not in process.stderr.read()


# --- what it shows


def test_a_plan_for_people(run: Any) -> None:
    said = run(*SMALL_PLAN, "--top", "3")
    assert (said.status, said.err) == (0, "")
    for part in (
        "gpt2 on 4 x h100-superpod",
        "legal layouts: ",
        "best and runners-up",
        "the obvious alternatives",
        "rests on",
        "--layout",
    ):
        assert part in said.out


def test_an_estimate_for_people(run: Any) -> None:
    said = run(*changed(SMALL_ESTIMATE, layout="dp2:zero1 tp2:sp mb1", gpus="4"))
    assert (said.status, said.err) == (0, "")
    for part in (
        "dp2:zero1 tp2:sp mb1 bf16",
        "MFU / HFU",
        "memory of a rank by stage",
        "GiB",
        "reduce_scatter",
        "scale-up",
        "rests on",
    ):
        assert part in said.out


def test_what_plan_says_next_is_a_layout_that_estimate_takes(run: Any) -> None:
    layout = run(*SMALL_PLAN).out.split('--layout "')[1].split('"')[0]
    assert run(*changed(SMALL_ESTIMATE, layout=layout)).status == 0


ESTIMATE_KEYS = {
    "layout",
    "world",
    "step_time_s",
    "tokens_per_s",
    "tokens_per_s_per_gpu",
    "mfu",
    "hfu",
    "bubble",
    "fits",
    "memory",
    "collectives",
}


def test_json_of_plan_and_estimate(run: Any) -> None:
    plan = json.loads(run(*SMALL_PLAN, "--json").out)
    assert set(plan) >= {"best", "candidates", "alternatives", "searched", "fitting", "seconds"}
    for row in (plan["best"], *plan["candidates"], *plan["alternatives"]):
        assert set(row) >= ESTIMATE_KEYS | {"reason"}
    priced = json.loads(run(*changed(SMALL_ESTIMATE, layout=plan["best"]["layout"]), "--json").out)
    assert set(priced) >= ESTIMATE_KEYS
    assert priced == {name: value for name, value in plan["best"].items() if name != "reason"}
    assert {"stage", "total_bytes", "categories"} <= set(priced["memory"][0])
    assert {"axis", "op", "count", "bytes", "group_size", "link", "time_s", "exposed_s"} <= set(priced["collectives"][0])


def test_json_of_the_catalogue_and_of_a_layout(run: Any) -> None:
    assert {"llama-3-70b", "gpt2"} <= {row["name"] for row in json.loads(run("models", "--json").out)}
    assert {"h100-superpod", "local"} <= {row["name"] for row in json.loads(run("clusters", "--json").out)}
    explained = json.loads(run("layout", "explain", "dp2 tp2", "--json").out)
    assert (explained["world"], explained["groups"]) == (4, {"tp": [[0, 1], [2, 3]], "dp": [[0, 2], [1, 3]]})
    assert [row["rank"] for row in explained["ranks"]] == [0, 1, 2, 3]


def test_nothing_fits_is_an_answer_with_status_1(run: Any) -> None:
    args = changed(SMALL_PLAN, model="llama-3-405b", gpus="8")
    said = run(*args)
    assert (said.status, said.err) == (1, "")
    assert "nothing fits" in said.out
    assert "GiB of 80.0" in said.out
    said = run(*args, "--json")
    assert said.status == 1
    assert json.loads(said.out)["best"] is None


# --- bad input: one line, status 2

PLANS: list[tuple[dict[str, str], tuple[str, ...]]] = [
    ({"model": "gtp2"}, ("unknown model 'gtp2'", "did you mean gpt2")),
    ({"model": "no/such/config.json"}, ("no/such/config.json: no such file",)),
    ({"cluster": "h100"}, ("unknown cluster 'h100'", "h100-superpod", "YAML file")),
    ({"cluster": "no-such.yaml"}, ("no-such.yaml: no such file",)),
    ({"gpus": "0"}, ("gpus must be at least 1, got 0",)),
    ({"gpus": "-4"}, ("gpus must be at least 1, got -4",)),
    ({"seq": "0"}, ("seq must be at least 1, got 0",)),
    ({"global_batch": "0"}, ("global_batch must be at least 1, got 0",)),
    ({"precision": "fp4"}, ("no fp4 rate", "bf16, fp16, fp8")),
    ({"precision": "fp64"}, ("h100-sxm has no fp64 rate",)),
    ({"gpus": "13", "global_batch": "4"}, ("no layout of 13 ranks", "global batch of 4", "try 12")),
    ({"seq": "2048"}, ("1024 learned positions",)),
    ({"cluster": "local", "gpus": "8"}, ("local is one node of 4 ranks", "needs 8")),
]


@pytest.mark.parametrize(("changes", "said"), PLANS, ids=[str(changes) for changes, _ in PLANS])
def test_a_plan_that_cannot_be_is_refused_in_one_line(run: Any, changes: dict[str, str], said: tuple[str, ...]) -> None:
    refused(run(*changed(SMALL_PLAN, **changes)), *said)


ESTIMATES: list[tuple[dict[str, str], tuple[str, ...]]] = [
    ({"layout": "dp2:sp"}, ("'dp2:sp' is not understood", "dp20:zero1 tp8:sp pp4 mb1")),
    ({"layout": ""}, ("the layout is empty",)),
    ({"layout": "dp0"}, ("dp must be at least 1, got 0",)),
    ({"layout": "dp2\ndp2"}, ("gives dp twice",)),
    ({"layout": "tp1:sp"}, ("tp of 2 or more",)),
    ({"layout": "dp1:zero1"}, ("dp of 2 or more",)),
    ({"layout": "fp4"}, ("no fp4 rate",)),
    ({"layout": "dp2 ep2"}, ("gpt2 is dense",)),
    ({"layout": "dp2 ep4"}, ("ep 4 x etp 1 = 4", "does not divide")),
    ({"layout": "tp5"}, ("tp 5 does not divide the 12 attention heads of gpt2", "1, 2, 3, 4, 6, 12")),
    ({"layout": "pp13"}, ("gpt2 has 12 layers", "13 stages")),
    ({"layout": "dp3"}, ("dp 3 x micro_batch 1 = 3 does not divide 16", "15 or 18")),
    ({"layout": "dp2 mb3"}, ("dp 2 x micro_batch 3 = 6 does not divide 16", "12 or 18")),
    ({"layout": "tp3:sp", "seq": "512"}, ("512 tokens", "tp 3", "seq 513")),
    ({"seq": "1025"}, ("1024 learned positions", "seq 1025")),
    ({"gpus": "8"}, ("world = dp4 = 4 ranks, but 8 are given", "dp8 would fill 8")),
    ({"gpus": "0"}, ("0",)),
    ({"seq": "0"}, ("seq must be at least 1, got 0",)),
    ({"model": "gtp2"}, ("unknown model 'gtp2'",)),
    ({"cluster": "h100"}, ("unknown cluster 'h100'",)),
    ({"cluster": "local", "layout": "dp8"}, ("local is one node of 4 ranks",)),
]


@pytest.mark.parametrize(("changes", "said"), ESTIMATES, ids=[str(changes) for changes, _ in ESTIMATES])
def test_an_estimate_that_cannot_be_is_refused_in_one_line(
    run: Any, changes: dict[str, str], said: tuple[str, ...]
) -> None:
    refused(run(*changed(SMALL_ESTIMATE, **changes)), *said)


@pytest.mark.parametrize("layout", ["dp2 foo", "", "dp2 dp2", "pp4:foo"])
def test_a_layout_that_cannot_be_explained_is_refused_in_one_line(run: Any, layout: str) -> None:
    refused(run("layout", "explain", layout))


CLUSTER = """\
name: mine
accelerator: h100-sxm
node: {accelerators: 8, nics: 8, nic_bandwidth: 50e9}
fabric: {kind: leaf-spine, transport: roce, domain: 8}
source: my rack
"""
CLUSTERS = [
    (CLUSTER.replace("h100-sxm", "h100-sxn"), ("line 2", "unknown accelerator 'h100-sxn'", "h100-sxm")),
    (CLUSTER.replace("nics: 8", "nics: eight"), ("line 3", "nics", "'eight'", "whole number")),
    (CLUSTER.replace("leaf-spine", "torus"), ("line 4", "kind", "'torus'", "leaf-spine")),
    (CLUSTER.replace("domain: 8", "domian: 8"), ("line 4", "domian", "domain")),
    (CLUSTER.replace("50e9", "-50e9"), ("line 3", "nic_bandwidth", "greater than or equal to 0", "-50")),
    (CLUSTER.replace("accelerators: 8", "accelerators: 0"), ("line 3", "node.accelerators", "got 0")),
    (CLUSTER.replace("nics: 8", "nics: 0"), ("line 3", "nics 0 with nic_bandwidth 5e+10", "both are 0")),
    (CLUSTER.replace("domain: 8", "domain: 0"), ("line 4", "fabric.domain", "got 0")),
    (CLUSTER + "nodes: 4\n", ("line 6", "unknown key 'nodes'", "did you mean node")),
    (CLUSTER.replace("roce", "none"), ("line 4", "kind leaf-spine with transport none")),
    (CLUSTER.replace("source: my rack\n", ""), ("source", "missing")),
    (CLUSTER.replace("8}\nsource", "8\nsource"), ("line 5", "not valid YAML")),
    ("", ("must hold keys and values",)),
    ("- 1\n- 2\n", ("must hold keys and values",)),
]


@pytest.mark.parametrize(("text", "said"), CLUSTERS, ids=[said[1] if len(said) > 1 else text for text, said in CLUSTERS])
def test_a_cluster_file_that_cannot_be_read_is_refused_with_its_line(
    run: Any, tmp_path: Path, text: str, said: tuple[str, ...]
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    refused(run(*changed(SMALL_PLAN, cluster=str(path))), str(path), *said)


def test_nodes_without_nics_are_planned_for_one_domain_alone(run: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(CLUSTER.replace("nics: 8, nic_bandwidth: 50e9", "nics: 0, nic_bandwidth: 0"))
    args = changed(SMALL_PLAN, cluster=str(path))
    assert run(*args).status == 0
    refused(run(*changed(args, gpus="16")), "mine has no NICs", "one domain of 8", "take fewer accelerators")


def test_a_cluster_file_that_can_be_read_is_planned_for(run: Any, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(CLUSTER)
    assert (
        json.loads(run(*changed(SMALL_PLAN, cluster=str(tmp_path / "mine.yaml")), "--json").out)["best"]["cluster"]
        == "mine"
    )


LLAMA = {"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
LLAMA |= {"num_hidden_layers": 4, "num_attention_heads": 8}
CONFIGS = [
    ("{not json", ("not valid JSON", "line 1 column 2")),
    ("[1, 2]", ("holds an object", "list")),
    (json.dumps(LLAMA | {"model_type": "lama"}), ("'lama'", "llama")),
    (json.dumps({k: v for k, v in LLAMA.items() if k != "hidden_size"}), ("hidden_size",)),
    (json.dumps(LLAMA | {"num_hidden_layers": "four"}), ("num_hidden_layers", "four")),
    (json.dumps(LLAMA | {"num_key_value_heads": 3}), ("num_attention_heads 8", "num_key_value_heads 3")),
]


@pytest.mark.parametrize(("text", "said"), CONFIGS, ids=[said[0] for _, said in CONFIGS])
def test_a_config_that_cannot_be_read_is_refused(run: Any, tmp_path: Path, text: str, said: tuple[str, ...]) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    refused(run(*changed(SMALL_PLAN, model=str(path))), str(path), *said)


def test_a_config_that_can_be_read_is_planned_for(run: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert run(*changed(SMALL_PLAN, model=str(tmp_path))).status == 0


def test_a_timeline_that_cannot_be_drawn_there_is_refused_in_one_line(run: Any, tmp_path: Path) -> None:
    said = run(*SMALL_ESTIMATE, "--timeline", str(tmp_path / "no" / "such" / "timeline.png"))
    assert said.status == 2
    [line] = said.err.splitlines()
    assert "timeline.png" in line


USAGE = [
    (("plan",), "Missing option '--model'"),
    (changed(SMALL_PLAN, gpus="four"), "--gpus"),
    (changed(SMALL_PLAN, top="0"), "--top"),
    ((*SMALL_PLAN, "--gpu-count", "4"), "--gpu-count"),
    ((*SMALL_PLAN, "stray"), "stray"),
    (("plam",), "plam"),
    (("layout", "explain"), "Missing argument"),
]


@pytest.mark.parametrize(("args", "said"), USAGE, ids=[said for _, said in USAGE])
def test_a_command_that_cannot_be_parsed_is_refused_with_one_error_beside_its_usage(
    run: Any, args: tuple[str, ...], said: str
) -> None:
    shown = run(*args)
    assert (shown.status, shown.out) == (2, "")
    assert "Traceback" not in shown.err
    [line] = [line for line in shown.err.splitlines() if line.lower().startswith("error:")]
    assert said in line


@pytest.mark.parametrize(
    "args",
    [("--help",), ("plan", "--help"), ("estimate", "--help"), ("layout", "--help"), ("--version",), ("layout", "grammar")],
)
def test_help_is_no_error(run: Any, args: tuple[str, ...]) -> None:
    said = run(*args)
    assert (said.status, said.err) == (0, "")
    assert said.out


# --- lint, and what plan shows around its answer


LINT = ("lint", *GPT2, "--cluster", "h100-superpod", "--layout", "dp4 tp2:sp mb1")


def test_lint_warns_with_status_0_and_refuses_nothing(run: Any) -> None:
    said = run(*LINT, "--json")
    assert said.status == 0
    rules = {f["rule"]: f for f in json.loads(said.out)["findings"]}
    split = rules["model too small to split"]
    assert split["severity"] == "warning"
    assert split["given"]["step_time_s"] * (1 - split["loss"]) == pytest.approx(split["repaired"]["step_time_s"])
    assert "severity" in run(*LINT).out


def test_lint_ends_with_status_1_on_errors_and_2_on_bad_input(run: Any) -> None:
    broken = run(*changed(LINT, layout="dp4 tp5 mb1"))
    assert broken.status == 1
    assert "12 attention heads" in " ".join(broken.out.split())
    assert broken.err == ""
    refused(run(*changed(LINT, layout="dp4 tpx")), "tpx")
    refused(run(*LINT, "--checkpoint-interval", "soon"), "'soon'", "1.5h")
    refused(run(*LINT, "--grouped-gemm", "no"), "--grouped-gemm", "on, off")
    assert run(*LINT, "--checkpoint-interval", "30d").status == 0


def test_the_rules_have_their_sources(run: Any) -> None:
    rows = json.loads(run("rules", "--json").out)
    assert len(rows) >= 17
    assert all(row["source"] and row["looks_for"] for row in rows)
    assert run("rules").status == 0


def test_plan_shows_what_it_is_asked_for(run: Any) -> None:
    said = run(*SMALL_PLAN, "--refine", "--pareto", "--sensitivity", "--json")
    found = json.loads(said.out)
    assert said.status == 0
    assert found["pareto"][0]["step_time_s"] >= found["best"]["step_time_s"]
    assert [v["gpus"] for v in found["sensitivity"]] == [4, 4, 4, 2]


def test_plan_sizes_a_run(run: Any) -> None:
    found = json.loads(run(*SMALL_PLAN, "--tokens", "1e9", "--deadline", "365d", "--json").out)
    assert found["chosen"]["gpus"] == 1
    assert "least money a token" in run(*SMALL_PLAN, "--objective", "cost").out
    assert run(*SMALL_PLAN, "--tokens", "1e15", "--budget", "1").status == 1
    refused(run(*SMALL_PLAN, "--tokens", "1e9"), "--deadline")
    refused(run(*SMALL_PLAN, "--tokens", "1e9", "--deadline", "60d", "--pareto"), "--pareto")
    refused(run(*SMALL_PLAN, "--deadline", "60d"), "--tokens")


def test_plan_names_the_ways_out_when_nothing_fits(run: Any) -> None:
    args = (
        "plan",
        "--model",
        "llama-2-13b",
        "--cluster",
        "h100-superpod",
        "--gpus",
        "1",
        "--seq",
        "4096",
        "--global-batch",
        "8",
    )
    said = run(*args)
    assert said.status == 1
    assert "ways out, the cheapest first" in said.out
    assert "offload" in said.out
    assert len(json.loads(run(*args, "--json").out)["ways_out"]) == 3


def test_uneven_experts_are_priced_with_a_memory_budget_and_refused_beside_a_dry_run(run: Any) -> None:
    asked = (
        "estimate", "--model", "mixtral-8x7b", "--cluster", "h100-superpod", "--seq", "4096", "--global-batch", "256", "--layout",
        "dp16:zero1 pp4 ep8 mb1", "--json",
    )  # fmt: skip
    even, uneven = (
        json.loads(run(*asked, "--memory-budget", "60GiB", "--expert-imbalance", given).out) for given in ("1", "3")
    )
    assert uneven["expert_imbalance"] == 3
    assert even["layout"] != uneven["layout"]  # more must run again
    assert even["step_time_s"] < uneven["step_time_s"]
    refused = run(*asked, "--check", "--expert-imbalance", "2")
    assert refused.status == 2
    assert refused.err.count("\n") == 1
    assert "without --expert-imbalance" in refused.err
