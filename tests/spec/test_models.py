"""Reading configs: the catalogue's well-known sizes, every family's defaults, and errors a person can act on."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import suppress
from math import log
from pathlib import Path
from typing import Any

import pytest

from meshwright.spec.errors import UserError
from meshwright.spec.huggingface import FAMILIES, _catalogue, catalogue_models, load_model, read_config
from meshwright.spec.model import Model, Rope, Yarn
from meshwright.spec.parameters import count_parameters

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "vocab_size": 100,
}
EXPERTS = {"num_local_experts": 8, "num_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 24}
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100}


def least(family: str) -> dict[str, Any]:
    """The keys without which a config of this family is refused."""
    if family == "gpt2":
        return dict(GPT2)
    config = LLAMA | {"model_type": family} | (EXPERTS if FAMILIES[family].aliases and family != "opt" else {})
    return config | {"ffn_dim": config.pop("intermediate_size")} if family == "opt" else config


def read(**changes: Any) -> Model:
    return read_config(LLAMA | changes, "m", "config.json")


# --- the catalogue

TOTALS = {
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "opt-125m": 125_239_296,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "qwen2-7b": 7_615_616_512,
    "qwen3-30b-a3b": 30_532_122_624,
    # The model card's 671,026,419,200 counts 58 x 256 selection biases, which are a buffer: no gradient trains them.
    "deepseek-v3": 671_026_419_200 - 58 * 256,
    "gpt-oss-20b": 20_914_757_184,
}


@pytest.mark.parametrize("name", TOTALS)
def test_well_known_totals(name: str) -> None:
    assert count_parameters(load_model(name)).total == TOTALS[name]


@pytest.mark.parametrize(
    ("name", "active"), [("mixtral-8x7b", 12.9), ("qwen3-235b-a22b", 22.2), ("deepseek-v2", 21.4), ("deepseek-v3", 37.6)]
)
def test_well_known_active_parameters(name: str, active: float) -> None:
    assert round(count_parameters(load_model(name)).active / 1e9, 1) == active


def test_gpt3_has_the_size_its_paper_states() -> None:
    assert round(count_parameters(load_model("gpt3-175b")).total / 1e9) == 175
    assert "2005.14165" in load_model("gpt3-175b").source


def test_catalogue_models_carry_their_name_and_source() -> None:
    assert len(catalogue_models()) >= 35
    for name in catalogue_models():
        assert name == name.lower()
        model = load_model(name)
        assert model.name == name
        assert model.source


def test_catalogue_rope_and_windows() -> None:
    assert load_model("llama-3-405b").rope == Rope(theta=500_000.0, llama3=(8.0, 1.0, 4.0, 8192))
    assert load_model("llama-3-8b").rope == Rope(theta=500_000.0)
    temperature = 0.1 * log(40) + 1
    yarn = Yarn(factor=40.0, original_positions=4096, attention_factor=1.0, score_factor=temperature**2)
    assert load_model("deepseek-v3").rope == Rope(theta=10_000.0, yarn=yarn)
    yarn = Yarn(factor=32.0, original_positions=4096, truncate=False, attention_factor=0.1 * log(32) + 1)
    assert load_model("gpt-oss-20b").rope == Rope(theta=150_000.0, yarn=yarn)
    assert load_model("mistral-7b").windows == (4096,) * 32
    assert load_model("gpt-oss-20b").windows == (128, None) * 12
    assert load_model("qwen2-7b").windows == ()


def test_deepseek_is_dense_first_and_routes_by_group() -> None:
    model = load_model("deepseek-v3")
    assert model.moe_layers == tuple(range(3, 61))
    assert model.head_dim == 192
    assert model.experts is not None
    assert (model.experts.score, model.experts.groups, model.experts.top_groups) == ("sigmoid", 8, 4)
    assert model.experts.shared_ffn == 2048


# --- defaults


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    transformers = pytest.importorskip("transformers")
    model = read_config(least(family), "m", "test")
    theirs = transformers.AutoConfig.for_model(**least(family))
    assert model.family == family
    assert model.max_positions == theirs.max_position_embeddings
    assert model.tied == theirs.tie_word_embeddings
    eps = getattr(theirs, "rms_norm_eps", None) or getattr(theirs, "layer_norm_epsilon", 1e-5)
    assert model.norm_eps == eps
    if not model.latent:
        assert model.kv_heads == getattr(theirs, "num_key_value_heads", theirs.num_attention_heads)
    else:
        assert model.kv_heads == model.heads
        assert model.head_dim == theirs.qk_head_dim
        assert (model.latent.q_rank, model.latent.kv_rank) == (theirs.q_lora_rank, theirs.kv_lora_rank)
        assert model.moe_layers == tuple(range(theirs.first_k_dense_replace, model.layers))
    if model.rope:
        rule = theirs.rope_parameters
        assert model.rope.theta == rule["rope_theta"]
        assert ("yarn" if model.rope.yarn else model.rope.scaling or "default") == rule["rope_type"]
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * model.layers
    window = getattr(theirs, "sliding_window", None)
    assert [model.window(i) for i in range(model.layers)] == [window if k == "sliding_attention" else None for k in kinds]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}),
        ("qwen3", {"use_sliding_window": True, "layer_types": ["sliding_attention", "full_attention"] * 2}),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}),
        ("gpt_oss", {"layer_types": ["full_attention"] * 4}),
    ],
)
def test_windows_are_those_of_transformers(family: str, changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = least(family) | changes
    theirs = transformers.AutoConfig.for_model(**config)
    expected = [theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types]
    model = read_config(config, "m", "test")
    assert [model.window(i) for i in range(model.layers)] == expected


# --- rope, in the old keys and in the new


def test_rope_reads_the_same_from_old_and_new_keys() -> None:
    rule = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
    rule["original_max_position_embeddings"] = 8192
    old = read(rope_theta=5e5, rope_scaling=rule)
    new = read(rope_parameters=rule | {"rope_theta": 5e5})
    assert old.rope == new.rope == Rope(theta=5e5, llama3=(8.0, 1.0, 4.0, 8192))


def test_a_rope_rule_that_is_only_named_keeps_its_name() -> None:
    assert read(rope_scaling={"type": "linear", "factor": 2.0}).rope == Rope(scaling="linear")
    assert read(rope_scaling=None, rope_theta=7).rope == Rope(theta=7.0)


# --- files and names


def test_a_file_and_its_directory_read_alike(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    model = load_model(str(tmp_path))
    assert model == load_model(str(tmp_path / "config.json"))
    assert (model.name, model.source) == (tmp_path.name, str(tmp_path / "config.json"))


def test_a_path_wins_over_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("gpt2").mkdir()
    assert load_model("gpt2").layers == 12, "a directory without a config.json names no model"
    Path("gpt2/config.json").write_text(json.dumps(LLAMA))
    assert load_model("gpt2").layers == 4


def test_architectures_stand_in_for_an_unknown_model_type() -> None:
    assert read(model_type="my_llama", architectures=["LlamaForCausalLM"]).family == "llama"
    assert read(model_type=None, architectures=["LlamaForCausalLM"]).family == "llama"


def test_reading_a_model_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from meshwright.spec.huggingface import load_model; from meshwright.spec.parameters import parameters;"
        "parameters(load_model('llama-tiny')); print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# --- errors


def message(call: Any, *args: Any, **keywords: Any) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **keywords)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_an_unknown_architecture_lists_those_known() -> None:
    text = message(read, model_type="lama")
    assert text.startswith("config.json: unknown architecture 'lama': did you mean llama")
    assert all(family in text for family in FAMILIES)
    assert "BertModel" in message(read, model_type=None, architectures=["BertModel"])
    assert "missing key model_type" in message(read, model_type=None)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    assert "no such file" in message(load_model, str(path))
    assert "holds no config.json" in message(load_model, str(tmp_path))
    path.write_text('{"model_type": "llama",\n  "hidden_size": }')
    assert message(load_model, str(path)).startswith(f"{path}: not valid JSON, line 2 column 18")
    path.write_text("[1]")
    assert "holds an object, got list" in message(load_model, str(path))
    path.write_bytes(b'{"model_type": "\xff"}')
    assert "not UTF-8" in message(load_model, str(path))


def test_an_unknown_name_suggests_the_nearest() -> None:
    assert "did you mean llama-3-8b" in message(load_model, "llama3-8b")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": None}, "missing key hidden_size"),
        ({"hidden_size": "big"}, "hidden_size must be an integer of at least 1, got 'big'"),
        ({"hidden_size": True}, "hidden_size must be an integer of at least 1, got True"),
        ({"hidden_size": 64.0}, "hidden_size must be an integer of at least 1, got 64.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be an integer of at least 1, got 0"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps must be a positive number, got '1e-5'"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number, got nan"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1"),
        ({"num_attention_heads": 5}, "hidden_size 64 is not a multiple of num_attention_heads 5"),
        ({"num_key_value_heads": 5}, "num_attention_heads 32 is not a multiple of num_key_value_heads 5"),
        ({"hidden_act": "mish"}, "unknown activation 'mish'"),
        ({"rope_scaling": {"type": "spiral"}}, "rope_scaling: unknown rope_type 'spiral'"),
        ({"rope_scaling": {"type": "llama3"}}, "rope_scaling: missing key factor"),
        ({"rope_scaling": 2}, "rope_scaling must be an object, got 2"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "a rule for each layer type is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types names 1 layers, num_hidden_layers is 4"),
        ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 4}, "unknown layer type 'chunked_attention'"),
        ({"model_type": "mixtral", "num_local_experts": 2}, "missing key num_experts_per_tok"),
        ({"model_type": "mixtral"} | EXPERTS | {"num_experts_per_tok": 9}, "cannot visit 9 experts of 8"),
        ({"model_type": "deepseek_v2", "topk_method": "noaux_tc"} | EXPERTS, "unknown topk_method 'noaux_tc'"),
        ({"model_type": "deepseek_v3", "moe_layer_freq": 2} | EXPERTS, "moe_layer_freq 2 is not supported"),
        ({"model_type": "opt", "ffn_dim": 96, "word_embed_proj_dim": 32}, "word_embed_proj_dim 32 is not supported"),
        (
            {"model_type": "opt", "ffn_dim": 96, "do_layer_norm_before": False},
            "do_layer_norm_before false is not supported",
        ),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], said: str) -> None:
    text = message(read, **changes)
    assert text.startswith("config.json: ")
    assert said in text


def test_a_family_is_told_of_its_own_key_names() -> None:
    config = {key: value for key, value in GPT2.items() if key != "n_embd"}
    assert message(read_config, config, "m", "f") == "f: missing key n_embd"
    assert message(read_config, GPT2 | {"n_layer": "2"}, "m", "f") == "f: n_layer must be an integer of at least 1, got '2'"


@pytest.mark.parametrize("name", catalogue_models())
def test_no_value_of_any_key_ends_in_anything_but_a_model_or_a_user_error(name: str) -> None:
    config = _catalogue()[name]["config"]
    for key in (*config, "architectures", "layer_types", "rope_parameters", "head_dim", "hidden_act"):
        for value in ("big", "", -1, 0, 1.5, True, False, None, [], [1], ["x"], {}, {"x": 1}, {"rope_type": "llama3"}):
            with suppress(UserError):
                assert isinstance(read_config(config | {key: value}, name, "test"), Model)
