"""Safetensors in and out: shards, names without a prefix, a save that survives a crash, and errors a person can act on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from their_models import CASES, Saved, load_ours, message, save_ours, save_theirs
from torch import Tensor

from meshwright.models.decoder import Decoder
from meshwright.models.huggingface import SafetensorsReader
from meshwright.models.names import their_name
from meshwright.models.routing import buffer_shapes
from meshwright.spec.model import Model
from meshwright.spec.parameters import parameters

SHARDED = {"max_shard_size": "40KB"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_theirs(CASES["llama 2"], tmp_path_factory.mktemp("llama"))


def weights(model: Model, path: Path) -> dict[str, Tensor]:
    reader = SafetensorsReader(model, path)
    return {name: reader.read(name) for name in [*(p.name for p in parameters(model)), *buffer_shapes(model)]}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --- files


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama 2", "qwen3 tied", "mixtral", "deepseek v3", "gpt-oss"])
def test_shards_hold_what_one_file_holds(name: str, tmp_path: Path) -> None:
    whole = save_theirs(CASES[name], tmp_path / "whole")
    save_theirs(CASES[name], tmp_path / "shards", **SHARDED)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    assert not (tmp_path / "shards" / "model.safetensors").exists()
    assert_same(weights(whole.model, tmp_path / "shards"), weights(whole.model, tmp_path / "whole"))


def test_shards_are_read_without_an_index(llama: Saved, tmp_path: Path) -> None:
    save_theirs(CASES["llama 2"], tmp_path, **SHARDED)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert_same(weights(llama.model, tmp_path), weights(llama.model, llama.directory))


@pytest.mark.parametrize("options", [{}, SHARDED], ids=["whole", "shards"])
def test_other_files_in_the_directory_are_not_read(llama: Saved, tmp_path: Path, options: dict[str, Any]) -> None:
    """Some repositories hold the weights a second time, in another form, beside those that transformers reads."""
    save_theirs(CASES["llama 2"], tmp_path, **options)
    save_file({"model.norm.weight": torch.zeros(48)}, tmp_path / "zz-consolidated.safetensors")
    assert_same(weights(llama.model, tmp_path), weights(llama.model, llama.directory))


@pytest.mark.parametrize("name", ["gpt2", "opt", "qwen3 tied"])
def test_files_of_the_bare_model_have_shorter_names(name: str, tmp_path: Path) -> None:
    """As the published GPT-2 has: saved without its head, so without the prefix."""
    saved = save_theirs(CASES[name], tmp_path / "whole")
    saved.theirs.base_model.save_pretrained(tmp_path / "bare")
    assert not any(key.startswith(("transformer.", "model.")) for key in load_file(tmp_path / "bare" / "model.safetensors"))
    assert_same(weights(saved.model, tmp_path / "bare"), weights(saved.model, tmp_path / "whole"))


def test_one_file_may_be_named(llama: Saved) -> None:
    path = llama.directory / "model.safetensors"
    assert torch.equal(SafetensorsReader(llama.model, path).read("norm.weight"), llama.theirs.model.norm.weight)


def test_weights_keep_the_dtype_of_the_file(tmp_path: Path) -> None:
    saved = save_theirs(CASES["gpt2"], tmp_path)
    saved.theirs.to(torch.bfloat16).save_pretrained(tmp_path)
    read = SafetensorsReader(saved.model, tmp_path).read("layers.1.attention.qkv.k.weight")
    assert read.dtype == torch.bfloat16
    assert read.is_contiguous()
    assert torch.equal(read, saved.theirs.transformer.h[1].attn.c_attn.weight[:, 48:96].t())


def test_a_save_is_on_the_disk_before_it_takes_the_name(
    llama: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def record_fsync(handle: int) -> None:
        fsync(handle)
        inode = os.fstat(handle).st_ino
        events.append("fsync of the " + ("directory" if inode == (tmp_path / "out").stat().st_ino else "file"))

    def record_rename(path: Path, target: Path) -> Path:
        events.append(f"rename to {target.name}")
        return rename(path, target)

    decoder = load_ours(llama.model, llama.directory)
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_rename)
    save_ours(llama.model, decoder, tmp_path / "out")
    assert events == ["fsync of the file", "rename to model.safetensors", "fsync of the directory"]


def test_a_save_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_theirs(CASES["gpt2"], tmp_path).model
    before = (tmp_path / "model.safetensors").read_bytes()
    decoder = Decoder(model)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert message(save_ours, model, decoder, tmp_path).endswith("cannot be written: No space left on device")
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert not list(tmp_path.glob(".*"))


# --- errors


def test_a_directory_without_weights(llama: Saved, tmp_path: Path) -> None:
    assert f"no .safetensors file in {tmp_path}" in message(SafetensorsReader, llama.model, tmp_path)
    missing = tmp_path / "nowhere"
    assert f"{missing}: no such file or directory" in message(SafetensorsReader, llama.model, missing)


def test_a_file_that_is_not_safetensors(llama: Saved, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    assert "model.safetensors: not a safetensors file" in message(SafetensorsReader, llama.model, tmp_path)


def test_a_file_that_was_cut_short(llama: Saved, tmp_path: Path) -> None:
    whole = (llama.directory / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    assert "model.safetensors: not a safetensors file" in message(SafetensorsReader, llama.model, tmp_path)


def test_an_index_that_cannot_be_followed(llama: Saved, tmp_path: Path) -> None:
    save_theirs(CASES["llama 2"], tmp_path, **SHARDED)
    index, shard = tmp_path / "model.safetensors.index.json", max(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    assert message(SafetensorsReader, llama.model, tmp_path) == f"{index} names {shard.name}, which is missing"
    for text in ("{", "[]", "{}", '{"weight_map": 1}', '{"weight_map": {"a": 1}}'):
        index.write_text(text)
        assert message(SafetensorsReader, llama.model, tmp_path).startswith(f"{index}: not an index")


def test_a_tensor_that_is_missing(llama: Saved, tmp_path: Path) -> None:
    state = load_file(llama.directory / "model.safetensors")
    save_file({key: value for key, value in state.items() if "layers.2." not in key}, tmp_path / "model.safetensors")
    reader = SafetensorsReader(llama.model, tmp_path)
    assert f"{tmp_path}: no tensor model.layers.2.mlp.down_proj.weight" in message(reader.read, "layers.2.mlp.down.weight")
    assert reader.read("layers.1.mlp.down.weight").shape == (48, 88)


def test_a_file_without_any_tensor(llama: Saved, tmp_path: Path) -> None:
    save_file({}, tmp_path / "model.safetensors")
    said = message(SafetensorsReader(llama.model, tmp_path).read, "norm.weight")
    assert said == f"{tmp_path}: no tensor model.norm.weight (it has none)"


def test_a_tensor_of_another_shape(llama: Saved) -> None:
    """Cut over ranks, a table of more rows than the model has would be taken in silence."""
    reader = SafetensorsReader(replace(llama.model, vocab=96), llama.directory)
    said = message(reader.read, "embedding.tokens.weight")
    assert "model.embed_tokens.weight gives embedding.tokens.weight the shape (101, 48)" in said
    assert "has (96, 48)" in said


def test_quantised_weights_are_refused(llama: Saved, tmp_path: Path) -> None:
    """Their scales are tensors of their own: read alone, the numbers are not the weights."""
    state = load_file(llama.directory / "model.safetensors")
    state["model.layers.0.mlp.down_proj.weight"] = state["model.layers.0.mlp.down_proj.weight"].to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "model.safetensors")
    said = message(SafetensorsReader(llama.model, tmp_path).read, "layers.0.mlp.down.weight")
    assert "model.layers.0.mlp.down_proj.weight is stored as torch.float8_e4m3fn" in said


def test_a_name_that_is_no_parameter(llama: Saved) -> None:
    reader, name = SafetensorsReader(llama.model, llama.directory), "layers.0.moe.router.weight"
    assert message(reader.read, name) == f"{llama.model.name} has no parameter {name}"
    assert message(their_name, llama.model, name) == f"llama checkpoints have no tensor for {name}"


def test_a_save_under_the_name_of_a_file(llama: Saved, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = message(save_ours, llama.model, Decoder(llama.model), tmp_path / "file")
    assert said == f"{tmp_path / 'file' / 'model.safetensors'}: cannot be written: File exists"


def test_weights_of_other_families_cannot_be_read_yet(llama: Saved) -> None:
    model = replace(llama.model, family="phi")
    said = message(SafetensorsReader, model, llama.directory)
    assert said.startswith("phi checkpoints cannot be read yet; legal: gpt2, opt, llama")


def test_an_expert_of_another_shape(tmp_path: Path) -> None:
    """Stacking would fail, or with all of them wrong the stack would."""
    saved = save_theirs(CASES["mixtral"], tmp_path)
    state, key = load_file(tmp_path / "model.safetensors"), "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    save_file(state | {key: torch.zeros(48, 87)}, tmp_path / "model.safetensors")
    said = message(SafetensorsReader(saved.model, tmp_path).read, "layers.0.moe.experts.down.weight")
    assert key in said
    assert "(48, 87)" in said
    assert "(48, 88)" in said


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    saved = save_theirs(CASES["qwen3 moe"], tmp_path)
    state, key = load_file(tmp_path / "model.safetensors"), "model.layers.2.mlp.experts.5.up_proj.weight"
    del state[key]
    save_file(state, tmp_path / "model.safetensors")
    said = message(SafetensorsReader(saved.model, tmp_path).read, "layers.2.moe.experts.gate_up.up.weight")
    assert f"no tensor {key}" in said


def test_blocks_of_four_bits_are_refused(tmp_path: Path) -> None:
    """As the published GPT-OSS has."""
    saved = save_theirs(CASES["gpt-oss"], tmp_path)
    key = "model.layers.0.mlp.experts.down_proj"
    state = load_file(tmp_path / "model.safetensors")
    state[f"{key}_blocks"] = state.pop(key).to(torch.uint8)
    save_file(state, tmp_path / "model.safetensors")
    said = message(SafetensorsReader(saved.model, tmp_path).read, "layers.0.moe.experts.down.weight")
    assert f"{key} is stored in MXFP4 blocks" in said
