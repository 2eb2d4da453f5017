"""Execution traces are read back by a reader of their own, add up to what was traced, and can be run to their end."""

from __future__ import annotations

import json
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from chakra_reader import COLL, COMP, RECV, SEND, Node, read, run
from fixtures import MODELS, SPARSE

from meshwright.api import trace
from meshwright.export.chakra import write_chakra
from meshwright.spec.errors import UserError
from meshwright.trace.result import Attended, Trace

EVERY = MODELS | SPARSE
TYPES = {0: "all_reduce", 2: "all_gather", 6: "all_to_all", 7: "reduce_scatter"}


@cache
def seen(name: str, layout: str) -> Trace:
    stages = range(int(layout.split("pp")[1][0])) if "pp" in layout else [0]
    return trace(model=EVERY[name], layout=layout, seq=16, global_batch=8, stages=list(stages))


def written(name: str, layout: str, out: Path) -> tuple[Trace, dict[int, list[Node]], dict[str, list[int]]]:
    traced = seen(name, layout)
    write_chakra(traced, EVERY[name], out)
    ranks = {rank: read(out / f"step.{rank}.et")[1] for rank in range(traced.layout.world)}
    return traced, ranks, json.loads((out / "comm_groups.json").read_text())


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("tied", "dp2:zero1 tp2:sp pp2 mb1 fp32"),
        ("untied", "dp2:zero3 cp2:ring mb1 fp32"),
        pytest.param("tied", "tp2:async pp2x2:interleaved mb1 fp32", marks=pytest.mark.parity),
        pytest.param("untied", "dp4:zero2x2 pp2:zb-h1 mb1 fp32", marks=pytest.mark.parity),
        pytest.param("few-kv-heads", "cp4:ring2xulysses2 tp2 mb2 fp32", marks=pytest.mark.parity),
        pytest.param("mixtral-like", "dp4:zero2 ep4 mb1 ac:full fp32", marks=pytest.mark.parity),
        pytest.param("deepseek-v3-like", "dp2 tp2:sp ep2 etp2 pp2 mb2 fp32", marks=pytest.mark.parity),
    ],
)
def test_ranks_run_to_their_end(name: str, layout: str, tmp_path: Path) -> None:
    """All ranks together, as a simulator runs them: collectives meet their like, messages arrive, nobody waits for ever."""
    traced, ranks, groups = written(name, layout, tmp_path)
    assert "0" not in groups
    for rank, nodes in ranks.items():
        assert [node.id for node in nodes] == list(range(1, len(nodes) + 1))
        assert all(dep < node.id for node in nodes for dep in node.deps)
        stage = traced.stages[rank * traced.layout.pp // traced.layout.world]
        assert sum(n.attr["num_ops"] for n in nodes if n.type == COMP) == sum(
            int(one.flops) * times for one, times in stage.products.items()
        )
        assert any(isinstance(one, Attended) for one in stage.products)
        assert sent(nodes, groups) == Counter({(op, size): total for _, op, size, _, total in merged(stage.sent)})
    run(ranks, groups)


def sent(nodes: list[Node], groups: dict[str, list[int]]) -> Counter[tuple[str, int]]:
    """(operation, group size) to bytes, as the ledger counts them; sends of all axes together."""
    out: Counter[tuple[str, int]] = Counter()
    for node in nodes:
        if node.type == SEND:
            out["send", 0] += node.attr["comm_size"]
        elif node.type == COLL:
            op, size = TYPES[node.attr["comm_type"]], len(groups[node.attr["pg_name"]])
            out[op, size] += node.attr["comm_size"] * (size if op == "all_gather" else 1)
    return out


def merged(rows: tuple[tuple[str, str, int, int, int], ...]) -> list[tuple[str, str, int, int, int]]:
    out: Counter[tuple[str, int]] = Counter()
    for _, op, size, _, total in rows:
        out[op, 0 if op == "send" else size] += total
    return [("", op, size, 0, total) for (op, size), total in out.items()]


def test_what_is_posted_may_run_beside_what_follows(tmp_path: Path) -> None:
    """A receive and the dense backward's collectives are waited for later: what lies between does not depend on them."""
    _, ranks, _ = written("tied", "dp2:zero1 tp2:sp pp2 mb1 fp32", tmp_path)
    nodes = {node.id: node for node in ranks[0]}
    receive = next(node for node in ranks[0] if node.type == RECV)
    first_user = min(node.id for node in ranks[0] if receive.id in node.deps)
    assert first_user > receive.id
    calls = [node for node in ranks[0] if node.type == COLL and node.id + 1 in nodes]
    assert any(call.id not in nodes[call.id + 1].deps for call in calls), "every collective holds up the next node"


def test_calls_of_a_group_keep_their_order(tmp_path: Path) -> None:
    """Also where nothing between them waits: the gradients of several buckets, reduced while backward goes on."""
    _, ranks, _ = written("untied", "dp2:zero3 cp2:ring mb1 fp32", tmp_path)
    nodes = {node.id: node for node in ranks[0]}
    last: dict[str, int] = {}
    for node in ranks[0]:
        if node.type == COLL:
            before = last.get(node.attr["pg_name"])
            assert before is None or follows(node, before, nodes), (node, before)
            last[node.attr["pg_name"]] = node.id


def follows(node: Node, before: int, nodes: dict[int, Node]) -> bool:
    """Whether `node` waits for `before`, at one or more removes."""
    seen, todo = set[int](), [node.id]
    while todo:
        for dep in nodes[todo.pop()].deps - seen:
            if dep == before:
                return True
            seen.add(dep)
            todo += [dep] if dep > before else []
    return False


def test_metadata_names_and_attributes(tmp_path: Path) -> None:
    write_chakra(seen("tied", "dp2:zero1 tp2:sp pp2 mb1 fp32"), EVERY["tied"], tmp_path, [3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["comm_groups.json", "step.3.et"]
    head, nodes = read(tmp_path / "step.3.et")
    assert head[1] == [b"0.0.4"]
    assert {node.attr["is_cpu_op"] for node in nodes} == {False}
    groups = json.loads((tmp_path / "comm_groups.json").read_text())
    assert sorted(groups.values()) == [[1, 3], [2, 3], [3, 7]]
    assert not any(node.duration_micros for node in nodes)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    traced = seen("tied", "dp2:zero1 tp2:sp pp2 mb1 fp32")
    with pytest.raises(UserError, match="cannot be written"):
        write_chakra(traced, EVERY["tied"], tmp_path / "file")
