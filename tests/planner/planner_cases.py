"""Problems for the planner: some of the catalogue, and random ones that are small enough to play every layout."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from meshwright.cost.estimate import Estimator
from meshwright.planner.search import legal_layouts, plain_layouts, relieved_layouts
from meshwright.planner.space import space_on
from meshwright.spec.catalogue import load_cluster
from meshwright.spec.cluster import Cluster
from meshwright.spec.huggingface import load_model
from meshwright.spec.layout import Layout
from meshwright.spec.model import Model
from meshwright.spec.workload import Workload

PROBLEMS = [
    ("llama-3-8b", "h100-superpod", 4, 2048, 4, "bf16"),
    ("gpt2", "h100-superpod", 4, 1024, 16, "bf16"),
    ("llama-small", "local", 4, 256, 16, "bf16"),
    ("llama-small", "local", 4, 256, 16, "fp32"),
    ("llama-3.2-1b", "mi300x-roce", 12, 1024, 12, "bf16"),
    ("deepseek-v2-lite", "h100-superpod", 4, 512, 2, "bf16"),
    ("qwen3-0.6b", "h100-superpod", 6, 2048, 12, "bf16"),
    ("gpt2-xl", "h100-superpod", 8, 512, 16, "bf16"),
]


def some_layouts(model: str, cluster: str, gpus: int, seq: int, batch: int, count: int) -> list[Layout]:
    """Of different combinations, each with some relief or none, and its ranks in some order."""
    space, random = space_on(load_cluster(cluster), load_model(model), Workload(seq, batch), gpus, "bf16"), Random(0)
    every = list(plain_layouts(space))
    return [random.choice(list(relieved_layouts(space, *one))) for one in random.sample(every, min(len(every), count))]


MODELS = {
    "dense": ("gpt2", "opt-1.3b", "llama-small", "llama-3.2-1b", "llama-3-8b", "llama-3-70b", "qwen3-0.6b", "mistral-7b"),
    "experts": ("mixtral-8x7b", "mixtral-8x22b", "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v2-lite"),
}
MACHINES = ("a100-superpod", "h100-superpod", "b200-superpod", "gb200-nvl72", "aws-p5", "mi300x-roce", "local")


def random_problem(random: Random, largest: int) -> tuple[Model, Cluster, Workload, int]:
    """A model of the catalogue with some of its layers, on some accelerators of a cluster, often with so little memory that only a
    part of its 200 to `largest` legal layouts fit, and sometimes with hosts that hold no more than some layout offloads."""
    names = random.choice(list(MODELS.values()))
    while True:
        model, layers = load_model(random.choice(names)), random.randint(2, 8)
        moe = tuple(range(random.randint(0, 1), layers)) if model.moe_layers else ()
        model = replace(model, layers=layers, windows=model.windows[:layers], moe_layers=moe)
        cluster = load_cluster(random.choice(MACHINES))
        uneven = random.choice((1.0, 1.5)) if moe else 1.0
        work = Workload(random.choice((256, 512, 1000, 1024, 2048)), random.randint(1, 16), uneven)
        gpus = random.choice((2, 3, 4, 6, 8, 12, 16))
        if (gpus > 4 and cluster.name == "local") or (model.rope is None and work.seq > model.max_positions):
            continue
        space = space_on(cluster, model, work, gpus, "bf16")
        if not len(space.local) or not 200 <= space.size() <= largest:
            continue
        every = list(legal_layouts(space))
        if random.random() < 0.75:
            some = random.choice(every)
            memory = {"memory_bytes": Estimator(model, cluster, work).played(some).peak_bytes}
            cluster = cluster.model_copy(update={"accelerator": cluster.accelerator.model_copy(update=memory)})
        offloading = [x for x in random.sample(every, min(len(every), 40)) if x.offload != "none"]
        if offloading and random.random() < 0.5:
            offload = Estimator(model, cluster, work).estimate(offloading[0]).offload
            assert offload is not None
            holds = {"host_memory_bytes": offload.kept_bytes * min(gpus, cluster.node.accelerators)}
            cluster = cluster.model_copy(update={"node": cluster.node.model_copy(update=holds)})
        return model, cluster, work, gpus


def narrow_problem(random: Random, largest: int) -> tuple[Model, Cluster, Workload, int]:
    """Two or four layers on nodes of 2 or 4 accelerators that share one slow port: it matters which ranks share a node."""
    while True:
        names = ("gpt2", "llama-small", "llama-3.2-1b", "llama-3-8b", "qwen3-0.6b", "mixtral-8x7b")
        model, few = few_layers(load_model(random.choice(names)), random.choice((2, 4))), random.choice((2, 4))
        cluster, gpus = load_cluster("h100-superpod"), random.choice((4, 8, 16))
        rate = random.choice((1e8, 5e8, 2e9, 1e10))
        node = cluster.node.model_copy(update={"accelerators": few, "nics": 1, "nic_bandwidth": rate})
        cluster = cluster.model_copy(update={"node": node, "fabric": cluster.fabric.model_copy(update={"domain": few})})
        work = Workload(random.choice((256, 1024, 8192) if model.rope else (1024,)), random.choice((1, 2, 4, 8, 16, 32)))
        space = space_on(cluster, model, work, gpus, "bf16")
        if not len(space.local) or space.size() > largest:
            continue
        some = space.layout(*random.choice(list(plain_layouts(space))))
        memory = {"memory_bytes": Estimator(model, cluster, work).played(some).peak_bytes}
        return model, cluster.model_copy(update={"accelerator": cluster.accelerator.model_copy(update=memory)}), work, gpus


def few_layers(model: Model, layers: int) -> Model:
    moe = tuple(range(layers)) if model.moe_layers else ()
    return replace(model, layers=layers, windows=model.windows[:layers], moe_layers=moe)
