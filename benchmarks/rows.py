"""One published training run in the package's own words: a row of measurements to cluster, model, layout, workload and practice.

Nothing here looks at a source or at a model's name. A column that is blank gets the usual default, written beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

from meshwright.cost.practice import Attention, Loss, Practice
from meshwright.spec.catalogue import catalogue_accelerators, load_accelerator
from meshwright.spec.cluster import Accelerator, Cluster, Fabric, Node
from meshwright.spec.errors import UserError
from meshwright.spec.layout import Layout, Precision, Recompute
from meshwright.spec.model import Experts, Model
from meshwright.spec.parameters import count_parameters
from meshwright.spec.workload import Workload

Row = Mapping[str, str]
LARGEST = {"layers": 4096, "pp": 4096, "vpp": 4096, "global_batch": 2**20, "n_experts": 2**14}
LARGEST_ELSE = 2**26
"""A cell above these is a slip, and would take for ever."""
MOST_MICRO_BATCHES = 2**14
ROUNDING = 0.02
"""Of a number of parameters as it is printed."""

NODE_NICS = {"v100": 4 * 12.5e9, "a100": 8 * 25e9, "b300": 8 * 100e9, "gb300": 4 * 100e9}
"""Bytes/s out of the vendor's reference node (DGX-1V, DGX A100, DGX B300, GB300 NVL72); 50e9 for each accelerator of others."""
NAMED_NICS = {"xdr": 800, "ndr": 400, "hdr": 200, "edr": 100}
"""Gbit/s of a port, by InfiniBand generation."""
TRAY, RACK = 4, 72
"""Accelerators of a node and of a scale-up domain of the NVL72 racks (gb200, gb300)."""
SOFTMAX_MAPS = 4
"""Megatron's fused softmax takes so many attention maps at a time, and is not used for a number that this does not divide
(megatron/model/fused_softmax.py, is_kernel_available)."""
DEFAULT_NODE = 8
DEFAULT_VOCAB = {True: 32_000, False: 51_200}
"""Of models with a gated MLP (Llama's tokeniser) and without (GPT-2's, padded), where neither column nor notes give it."""


@dataclass(frozen=True, slots=True)
class Run:
    """What a row asks to be priced. The workload's batch is rounded up to whole micro-batches."""

    cluster: Cluster
    model: Model
    layout: Layout
    workload: Workload
    practice: Practice
    may_recompute: bool
    """The row does not say whether activations are recomputed."""


def read_run(row: Row) -> Run:
    """Raises UserError with what is missing or impossible."""
    model, cluster = read_model(row), read_cluster(row)
    layout = read_layout(row, model)
    batch = _integer(row, "global_batch")
    per_step = layout.dp * layout.micro_batch
    whole = -(-batch // per_step) * per_step
    seq = _integer(row, "seq_len")
    if whole // per_step > MOST_MICRO_BATCHES:
        raise UserError(
            f"global_batch {batch} in micro-batches of {per_step} over all ranks is more than {MOST_MICRO_BATCHES} of them"
        )
    practice = read_practice(row, layout)
    return Run(cluster, model, layout, Workload(seq, whole), practice, not (row.get("recompute") or "").strip())


# --- the machine


@lru_cache
def find_accelerator(gpu: str) -> Accelerator:
    """The catalogue's accelerator whose name shares most with `gpu`: its family must be there, then form factor and memory."""
    words = re.findall(r"[a-z]+\d+[a-z]*|[a-z]+|\d+(?:gb|gib)?", gpu.lower())
    memory = next((int(m) for m in re.findall(r"(\d+)\s*gi?b\b", gpu.lower())), None)
    best: tuple[float, str] | None = None
    for name in catalogue_accelerators():
        family, *form = name.split("-") if re.search(r"\d", name.split("-")[0]) else [name.replace("-", ""), name]
        if name == "cpu" or not any(word in (family, f"{family}sxm", f"{family}pcie") for word in (*words, "".join(words))):
            continue
        held = load_accelerator(name).memory_bytes / 2**30
        score = sum(part in words or f"{part}gb" in words for part in form) + 0.5 * ("sxm" in form) + 0.01 * held / 100
        score += 2 * (memory is not None and abs(held / memory - 1) < 0.08)
        if best is None or score > best[0]:
            best = score, name
    if best is None:
        raise UserError(f"gpu {gpu!r} is not in the catalogue; it has {', '.join(catalogue_accelerators())}")
    return load_accelerator(best[1])


def read_cluster(row: Row) -> Cluster:
    try:
        accelerator = find_accelerator(row.get("gpu") or "")
    except UserError:
        accelerator = find_accelerator(row.get("gpu_class") or row.get("gpu") or "")
    family = accelerator.name.split("-")[0]
    racked = family in ("gb200", "gb300")
    per_node = _optional(row, "gpus_per_node") or (TRAY if racked else DEFAULT_NODE)
    rate = _network(row.get("interconnect_inter") or "", per_node)
    if rate is None:
        rate = (
            NODE_NICS.get(family, 50e9 * per_node) * per_node / (TRAY if racked else DEFAULT_NODE)
            if family in NODE_NICS
            else 50e9 * per_node
        )
    return Cluster(
        name="published",
        accelerator=accelerator,
        node=Node(accelerators=per_node, nics=per_node, nic_bandwidth=rate / per_node),
        fabric=Fabric(kind="leaf-spine", transport="infiniband", domain=RACK if racked else per_node),
        source="the row's columns",
    )


def _network(text: str, per_node: int) -> float | None:
    """Bytes/s out of a node, from words such as "8x HDR InfiniBand 200 Gb/s per node" or "1600 Gbps/node RoCE"."""
    lower = text.lower()
    rate = re.search(r"([\d.]+)\s*(t|g)(?:bps|b/s|bit)", lower)
    ports = re.search(r"(\d+)\s*x", lower)
    named = next((gbits for name, gbits in NAMED_NICS.items() if re.search(rf"\b{name}", lower)), None)
    gbits = float(rate.group(1)) * (1000 if rate.group(2) == "t" else 1) if rate else named
    if gbits is None:
        return None
    if ports:
        gbits *= int(ports.group(1))
    elif "node" not in lower:
        gbits *= per_node
    return gbits * 1e9 / 8


# --- the model


def read_model(row: Row) -> Model:
    hidden, heads, layers = (_integer(row, key) for key in ("hidden", "heads", "layers"))
    gated = (row.get("gated_mlp") or "").strip().lower()
    ffn = _optional(row, "ffn_hidden")
    experts = _experts(row, ffn)
    is_gated = gated == "yes" or (not gated and (ffn is not None and ffn != 4 * hidden))
    model = Model(
        name=row.get("model_name") or "unnamed",
        family="published",
        layers=layers,
        hidden=hidden,
        ffn=ffn or 4 * hidden,
        vocab=_optional(row, "vocab") or _vocab_in_words(row.get("notes") or "") or DEFAULT_VOCAB[is_gated],
        heads=heads,
        kv_heads=_optional(row, "kv_heads") or heads,
        head_dim=_optional(row, "head_dim") or hidden // heads,
        max_positions=max(_integer(row, "seq_len"), 2048),
        norm="rmsnorm" if is_gated else "layernorm",
        gated=is_gated,
        rope=is_gated or not _writes_scores(row),
        experts=experts,
        moe_layers=tuple(range(layers)) if experts else (),
    )
    return _tied_as_counted(model, _number(row, "params_b"))


def _experts(row: Row, ffn: int | None) -> Experts | None:
    count = _optional(row, "n_experts")
    if not count or count < 2:
        return None
    width = _optional(row, "expert_ffn") or ffn
    if width is None:
        raise UserError("expert_ffn and ffn_hidden are both blank")
    shared = _optional(row, "shared_experts") or 0
    return Experts(count=count, top_k=_optional(row, "top_k") or 2, ffn=width, shared_ffn=shared * width)


def _vocab_in_words(notes: str) -> int | None:
    """ "~128k vocab", "vocab 250k" or "default vocab 50257"."""
    if found := re.search(r"(\d+)k\s+vocab", notes) or re.search(r"vocab\s+(\d+)k\b", notes):
        return int(found.group(1)) * 1000
    found = re.search(r"vocab(?:ulary)?\s+(?:of\s+)?(\d{4,})", notes)
    return int(found.group(1)) if found else None


def _tied_as_counted(model: Model, billions: float | None) -> Model:
    """Whether the head is the embedding is not in the columns. Models without a gated MLP (GPT) usually tie them, others do not; where
    that misses the number of parameters by more than its rounding, whichever comes nearer."""
    usual, other = (replace(model, tied=tied) for tied in (not model.gated, model.gated))
    if not billions:
        return usual
    missed = [abs(count_parameters(m).total / 1e9 / billions - 1) for m in (usual, other)]
    return usual if missed[0] < ROUNDING or missed[0] <= missed[1] else other


# --- the layout


def read_layout(row: Row, model: Model) -> Layout:
    tp, pp, cp = (_optional(row, key) or 1 for key in ("tp", "pp", "cp"))
    gpus = _integer(row, "n_gpus")
    dp = _optional(row, "dp") or _optional(row, "calc_dp") or max(1, gpus // (tp * pp * cp))
    cluster = read_cluster(row)
    chunks = min(_optional(row, "vpp") or 1, model.layers // pp) if pp > 1 else 1
    zero, shard = _zero(row.get("zero_stage") or "", dp, cp, model, cluster)
    ep = (_optional(row, "ep") or 1) if model.experts else 1
    # Megatron's default: experts are cut like the rest of the layer.
    etp = (_optional(row, "etp") or (tp if dp * cp * tp % (ep * tp) == 0 else 1)) if model.experts else 1
    layout = Layout(
        dp=dp,
        tp=tp,
        pp=pp,
        cp=cp,
        ep=ep,
        etp=etp,
        sp=tp > 1 and _sequence_parallel(row),
        zero=zero,
        zero_shard=shard,
        chunks=chunks,
        schedule=_schedule(row.get("schedule") or "", pp, chunks),
        micro_batch=_optional(row, "micro_batch") or 1,
        recompute=_recompute(row, cp),
        precision=_precision(row, cluster),
        stage_layers=_stage_layers(model.layers, pp) if pp > 1 and chunks == 1 and _is_plain(row) else None,
    )
    if layout.world != gpus:
        raise UserError(f"tp {tp} x pp {pp} x cp {cp} x dp {dp} = {layout.world} ranks, but n_gpus is {gpus}")
    return layout


def _schedule(text: str, pp: int, chunks: int) -> str:
    if pp > 1 and chunks > 1:
        return "interleaved"
    return "gpipe" if pp > 1 and "gpipe" in text.lower() else "1f1b"


def _stage_layers(layers: int, stages: int) -> tuple[int, ...] | None:
    """Of software that cuts a list of modules evenly, embedding, final norm and head among them, and gives what is left over to the
    first stages."""
    modules = layers + 3
    counts = [modules // stages + (stage < modules % stages) for stage in range(stages)]
    counts[0] -= 1
    counts[-1] -= 2
    return tuple(counts) if min(counts) > 0 else None


def _sequence_parallel(row: Row) -> bool:
    """Blank: on, as recipes since 2022 have it with tensor parallel (arXiv 2205.05198)."""
    said = (row.get("sp") or "").strip().lower()
    return said == "yes" or (not said and (_optional(row, "year") or 0) > 2022)


def _zero(text: str, dp: int, cp: int, model: Model, cluster: Cluster) -> tuple[int, int | None]:
    """ZeRO stage and the size of its groups. Blank: the optimizer state is sharded if the model's state (16 bytes a parameter,
    arXiv 1910.02054) would take more than half of one accelerator."""
    if dp * cp == 1:
        return 0, None
    lower = text.strip().lower()
    if lower in ("ddp", "no", "none"):
        return 0, None
    if "fsdp" in lower or "full_shard" in lower or "zero" in lower or "hsdp" in lower:
        stage = 2 if "zero-2" in lower or "grad_op" in lower else 3
    else:
        digit = re.search(r"\d", lower)
        is_large = 16 * count_parameters(model).total > cluster.accelerator.memory_bytes / 2
        stage = int(digit.group()) if digit else int(is_large)
    group = re.search(r"fsdp\s*=\s*(\d+)", lower)
    size = int(group.group(1)) if group else None
    legal = size is not None and stage and 1 < size < dp and dp % size == 0
    return stage, size if legal else None


def _recompute(row: Row, cp: int) -> Recompute:
    """Blank: none. Selective recompute under ring attention, which keeps no scores, is none."""
    said = (row.get("recompute") or "").lower()
    if "full" in said:
        return "full"
    return "selective" if "selective" in said and cp == 1 else "none"


def _precision(row: Row, cluster: Cluster) -> Precision:
    """Of everything but narrower products, which are a practice."""
    said = (row.get("precision") or "").lower()
    if said.startswith(("fp32", "tf32")):
        return "fp32"
    is_half = ("fp16" in said and "bf16" not in said) or "bf16" not in cluster.accelerator.peak_flops
    return "fp16" if is_half else "bf16"


# --- how the software goes about it


def read_practice(row: Row, layout: Layout) -> Practice:
    flags = (row.get("other_flags") or "").lower()
    year = _optional(row, "year") or 2023
    compiled, attention = _is_compiled(row), _attention(row, layout)
    is_recent = year > 2023 and not _writes_scores(row)
    zero = (row.get("zero_stage") or "").lower()
    return Practice(
        gathers_experts=True,
        loss=_loss(row, compiled),
        attention=attention,
        fused_norms=compiled or "norm kernel" in flags or (row.get("gated_mlp") or "") != "yes" or year > 2023,
        # Megatron's since 2023 (core/fusions/fused_bias_swiglu.py).
        fused_activation=compiled or not (_is_plain(row) or "fsdp" in zero),
        products=_products(row),
        overlaps_tensor=(not flags and year > 2024)
        or "async tp" in flags
        or ("tp_comm_overlap" in flags and "no tp_comm_overlap" not in flags),
        overlaps_dx="distributed" in zero or _products(row) is not None or "tp_comm" in flags,
        overlaps_gradients="overlap" in flags or "fsdp" in zero or "deepspeed" in zero or is_recent,
        overlaps_gathers="overlap" in flags or is_recent,
        whole_recompute=True,
        frozen="lora" in (row.get("workload") or "").lower(),
        gradient_bytes=None if layout.zero == 3 and "pure" not in flags else 2,
        single_ring="deepspeed" in zero and year < 2023,
        compiled=compiled,
        whole_gradients=_is_plain(row),
        separate_columns=_is_plain(row),
        keeps_gathered=_is_plain(row),
        packed_qkv=_is_plain(row),
        waits=_is_plain(row),
        fragments=not compiled and year < 2024 and "fsdp" not in zero,
    )


def _writes_scores(row: Row) -> bool:
    """Whether attention is as software of before 2023 has it, whatever year the row is of; that also learns positions (GPT) and hides
    no communication unasked."""
    said = (row.get("attention_kernel") or "").lower()
    return "unfused" in said or (not said and (_optional(row, "year") or 2023) < 2023)


def _products(row: Row) -> str | None:
    said = (row.get("precision") or "").lower()
    if "fp4" in said:
        return "fp4"
    return "fp8" if "fp8" in said or "float8" in said else None


def _is_compiled(row: Row) -> bool:
    flags = (row.get("other_flags") or "").lower()
    return "xla" in flags or "jax" in flags or ("compile" in flags and "no compile" not in flags)


def _loss(row: Row, compiled: bool) -> Loss:
    """Chunked with Liger's kernels. Fused in a compiler and under FSDP, whose trainers take a fused kernel. Megatron's for its own models
    (GPT, no gated MLP) and where one of its features is named: a schedule, a ZeRO stage, fp8. PyTorch's own for other models in code that
    names none."""
    zero = (row.get("zero_stage") or "").strip().lower()
    flags = (row.get("other_flags") or "").lower()
    if "liger" in flags and "without liger" not in flags:
        return "chunked"
    if compiled or "fsdp" in zero:
        return "fused"
    return "whole" if _is_plain(row) else "parallel"


def _is_plain(row: Row) -> bool:
    """Code of its own: no feature of Megatron, FSDP or a compiler is named, and the model is not Megatron's own (GPT, no gated MLP)."""
    named = (row.get("schedule") or "").strip() or (row.get("zero_stage") or "").strip() or _products(row)
    return not (named or _is_compiled(row) or (row.get("gated_mlp") or "").strip().lower() == "no")


def _attention(row: Row, layout: Layout) -> Attention:
    """Blank: flash from 2023 on, fused softmax before; no version: the first of FlashAttention until 2023, the vendor's after."""
    lower, year = (row.get("attention_kernel") or "").lower(), _optional(row, "year") or 2023
    if "unfused" in lower:
        maps = layout.micro_batch * (_optional(row, "heads") or 0) // layout.tp
        return "fused-softmax" if "softmax" in lower and maps % SOFTMAX_MAPS == 0 else "unfused"
    if "flash" in lower or "fused" in lower or "fa" in lower:
        version = re.search(r"(?:flash-attention|flashattention|fa|flash)\s*-?\s*([1-9])", lower)
        if version:
            return {"1": "flash1", "2": "flash2"}.get(version.group(1), "flash")
        return "flash" if year > 2023 or "te" in lower or "cudnn" in lower else "flash1"
    return "flash" if year > 2023 else "flash1" if year == 2023 else "fused-softmax"


# --- cells


def _number(row: Row, key: str) -> float | None:
    text = (row.get(key) or "").strip()
    try:
        return float(text)
    except ValueError:
        return None


def _optional(row: Row, key: str) -> int | None:
    value = _number(row, key)
    if value is None or not value >= 0:
        return None
    if value > (most := LARGEST.get(key, LARGEST_ELSE)):
        raise UserError(f"{key} is {row[key]!r}, above {most}: not a training run")
    return int(value)


def _integer(row: Row, key: str) -> int:
    value = _optional(row, key)
    if not value:
        raise UserError(f"{key} is blank" if not row.get(key) else f"{key} is {row[key]!r}, not a whole number above 0")
    return value
