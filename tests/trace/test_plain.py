"""Models of transformers, traced as they are: as large as a run of them, whatever their size."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from meshwright.cli.main import main
from meshwright.report.plain import module_bytes
from meshwright.spec.errors import UserError
from meshwright.trace.huggingface import Plain, load_config, record_step, skeleton, trace_huggingface, with_memory

pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 96, "vocab_size": 128}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen3": SIZES | {"head_dim": 16},
    "mixtral": SIZES | {"num_local_experts": 4},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128, "n_positions": 64},
}


def config_file(name: str, folder: Path) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIGS[name] | {"model_type": name}))
    return str(path)


def allocated_peak(model: nn.Module, plain: Plain) -> int:
    """Most bytes of a real step, by the events of PyTorch's allocator: state, and what comes on top of it."""
    optimizer = torch.optim.AdamW(model.parameters())
    tokens = torch.zeros(plain.micro_batch, plain.seq, dtype=torch.int64)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if plain.precision == "mixed" else nullcontext():
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    state = [*model.parameters(), *model.buffers(), *(v for s in optimizer.state.values() for v in s.values()), tokens]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    here = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            here += event.nbytes()
            most = max(most, here)
    return sum(each.nbytes for each in state) + most


@pytest.mark.parametrize(
    ("name", "plain", "off"),
    [
        ("llama", Plain(64, 2, "fp32"), 0.0),
        ("mixtral", Plain(64, 2, "bf16"), 0.0),
        pytest.param("llama", Plain(64, 2, "mixed", recompute=True), 0.03, marks=pytest.mark.parity),
        pytest.param("qwen3", Plain(64, 2, "mixed"), 0.0, marks=pytest.mark.parity),
        pytest.param("mixtral", Plain(64, 2, "fp32", recompute=True), 0.003, marks=pytest.mark.parity),
        pytest.param("gpt2", Plain(64, 2, "fp32"), 0.003, marks=pytest.mark.parity),
    ],
)
def test_the_peak_is_that_of_a_real_run(name: str, plain: Plain, off: float, tmp_path: Path) -> None:
    """`off`: what a kernel takes inside, and the random state that checkpointing keeps, which no operator makes; at these sizes."""
    file = config_file(name, tmp_path)
    traced = trace_huggingface(file, plain)
    real = with_memory(skeleton(load_config(file), plain))
    with torch.no_grad():
        for tensor in real.parameters():
            tensor.normal_(0, 0.02)
    assert traced.peak_bytes == pytest.approx(allocated_peak(real, plain), rel=off, abs=0)


@pytest.mark.parametrize(
    ("ref", "low", "high"),
    [
        ("gpt2", 4 * 0.23, 4 * 0.23 + 5),
        pytest.param("llama-3-8b", 4 * 14.9, 4 * 14.9 + 25, marks=pytest.mark.parity),
        pytest.param("qwen3-32b", 3 * 61.0, 3 * 61.0 + 110, marks=pytest.mark.parity),
        pytest.param("mixtral-8x7b", 4 * 86.9, 4 * 86.9 + 40, marks=pytest.mark.parity),
    ],
)
def test_real_sizes(ref: str, low: float, high: float) -> None:
    """GiB: weights, gradients and two moments of two bytes each, and what activations may come to."""
    traced = trace_huggingface(ref, Plain(512))
    assert low < traced.peak_bytes / 2**30 < high
    modules = module_bytes(traced.peak)
    assert any(".*." in name for name in modules)
    assert sum(sum(held.values()) for held in modules.values()) == traced.peak_bytes


def test_recompute_keeps_less(tmp_path: Path) -> None:
    file = config_file("llama", tmp_path)
    whole, less = (trace_huggingface(file, Plain(64, 2, "fp32", recompute=each)) for each in (False, True))
    assert less.peak_bytes < whole.peak_bytes
    assert less.sections[0].work.grown == whole.sections[0].work.grown


def test_bytes_follow_the_modules_of_the_model(tmp_path: Path) -> None:
    file = config_file("llama", tmp_path)
    held = module_bytes(trace_huggingface(file, Plain(64, 2, "fp32")).peak)
    gate = 2 * SIZES["hidden_size"] * SIZES["intermediate_size"] * 4
    assert held["model.layers.*.mlp.gate_proj"]["parameters"] == gate
    assert held["model.layers.*.mlp.gate_proj"]["activations"] == 2 * 2 * 64 * SIZES["intermediate_size"] * 4


def test_a_trace_leaves_transformers_as_it_was(tmp_path: Path) -> None:
    from transformers import masking_utils
    from transformers.integrations import moe

    before = moe._can_use_grouped_mm, masking_utils.find_packed_sequence_indices
    plain = Plain(8)
    model = skeleton(load_config(config_file("llama", tmp_path)), plain)
    with FakeTensorMode(allow_non_fake_inputs=True):
        record_step(with_memory(model), plain)
    assert before == (moe._can_use_grouped_mm, masking_utils.find_packed_sequence_indices)


def test_without_transformers_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"meshwright\[hf\]"):
        trace_huggingface("gpt2", Plain(8))


@pytest.mark.parametrize(
    ("keys", "words"),
    [({"model_type": "nothing"}, "nothing"), ({}, "model_type"), ({"model_type": "vit"}, "no causal language model")],
)
def test_what_is_no_language_model_is_refused(keys: dict[str, str], words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(UserError, match=words):
        trace_huggingface(str(tmp_path), Plain(8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--hf gpt2 --layout dp2", "--layout is not for --hf"),
        ("--model gpt2 --layout dp2 --global-batch 2 --recompute", "--recompute is for --hf"),
        ("--model gpt2", "misses --global-batch, --layout"),
        ("--hf gpt2 --precision int4", "int4"),
    ],
)
def test_options_that_would_be_ignored_are_refused(
    options: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["meshwright", "trace", "--seq", "8", *options.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
