"""The plain decoder against transformers: the same logits from the same files, in both directions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from their_models import (
    BATCH,
    CASES,
    LENGTH,
    Saved,
    largest_difference,
    load_ours,
    logits_of_theirs,
    message,
    save_ours,
    save_theirs,
    token_ids,
)

from meshwright.models.decoder import Decoder, cross_entropy
from meshwright.models.rotary import Rotary
from meshwright.spec.huggingface import catalogue_models, load_model
from meshwright.spec.model import Model, Rope
from meshwright.spec.parameters import parameters

TOLERANCE = 1e-5
"""Largest absolute difference of a logit in fp32; never to be relaxed."""


@pytest.fixture(scope="module", params=CASES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return save_theirs(CASES[request.param], tmp_path_factory.mktemp("theirs"))


# --- the same logits


def test_logits_are_those_of_transformers(saved: Saved) -> None:
    model = saved.model
    assert largest_difference(load_ours(model, saved.directory), saved.theirs, token_ids(model)) <= TOLERANCE


def test_what_we_save_is_what_transformers_saved(saved: Saved, tmp_path: Path) -> None:
    """Same names, same shapes, same bits; so also for what no logit shows, such as a key bias without rotary positions."""
    model = saved.model
    mine = load_file(save_ours(model, load_ours(model, saved.directory), tmp_path))
    reference = load_file(saved.directory / "model.safetensors")
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[name], reference[name]) for name in reference)


def test_transformers_loads_what_we_save(saved: Saved, tmp_path: Path) -> None:
    model = saved.model
    save_ours(model, load_ours(model, saved.directory), tmp_path)
    saved.theirs.config.save_pretrained(tmp_path)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert torch.equal(logits_of_theirs(back, token_ids(model)), logits_of_theirs(saved.theirs, token_ids(model)))


def test_stages_in_a_chain_are_the_whole_decoder(saved: Saved) -> None:
    model = saved.model
    ids = token_ids(model)
    first = load_ours(model, saved.directory, range(1), last=False)
    middle = load_ours(model, saved.directory, range(1, 2), first=False, last=False)
    last = load_ours(model, saved.directory, range(2, 3), first=False)
    with torch.no_grad():
        hidden = middle(first(ids))
        assert hidden.shape == (BATCH, LENGTH, model.hidden)
        assert torch.equal(last(hidden), load_ours(model, saved.directory)(ids))


def test_a_window_hides_what_is_out_of_reach(tmp_path: Path) -> None:
    """One layer with a window of 5 sees the token itself and four before it."""
    config = CASES["mistral"] | {"num_hidden_layers": 1}
    model = save_theirs(config, tmp_path).model
    decoder, ids = load_ours(model, tmp_path), token_ids(model)
    changed = ids.clone()
    changed[:, 3] = (changed[:, 3] + 1) % model.vocab
    with torch.no_grad():
        moved = (decoder(ids) != decoder(changed)).any(-1).all(0)
    assert moved.nonzero().flatten().tolist() == [3, 4, 5, 6, 7]


def test_a_decoder_that_was_evaluated_can_be_trained(tmp_path: Path) -> None:
    """The rotary tables outlive the forward that makes them, and inference mode makes tensors that backward refuses."""
    decoder = Decoder(save_theirs(CASES["llama 2"], tmp_path).model)
    ids = token_ids(decoder.model)
    with torch.inference_mode():
        decoder(ids)
    cross_entropy(decoder(ids), ids).backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_rotary_tables_are_kept_for_the_longest_length_only() -> None:
    """A generation asks for every length in turn."""
    rotary = Rotary(Rope(), dims=8)
    device = torch.device("cpu")
    tables = [rotary.table(length, device, torch.float32) for length in (5, 9, 3)]
    assert [cos.shape[0] for cos, _ in tables] == [5, 9, 3]
    assert len(rotary._tables) == 1
    for shorter, longer in zip(tables[2], tables[1], strict=True):
        assert torch.equal(shorter, longer[:3])


# --- the same names


@pytest.mark.parametrize("name", catalogue_models())
def test_the_decoder_has_the_parameters_that_spec_lists(name: str) -> None:
    compare_names(load_model(name))


def test_small_decoders_have_the_parameters_that_spec_lists(saved: Saved) -> None:
    compare_names(saved.model)


def compare_names(model: Model) -> None:
    with torch.device("meta"):
        found = [(name, tuple(p.shape)) for name, p in Decoder(model).named_parameters()]
    expected = [(p.name, p.shape) for p in parameters(model)]
    if model.sinks:  # which PyTorch lists before the parameters of submodules
        found, expected = sorted(found), sorted(expected)
    assert found == expected


# --- refusals


@pytest.mark.parametrize("rule", ["linear", "dynamic", "longrope"])
def test_rotary_rules_that_are_only_named_are_refused(rule: str) -> None:
    model = replace(load_model("llama-tiny"), rope=Rope(scaling=rule))
    assert message(Decoder, model) == f"llama-tiny: rotary scaling '{rule}' is not built yet; legal: none, llama3, yarn"
