"""What a decoder-only language model is made of: shapes and kinds, no weights.

A `Model` is read from a Hugging Face `config.json` (`spec/huggingface.py`) or from the catalogue.
Everything that prices, splits or builds a model starts from this description.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Norm = Literal["rmsnorm", "layernorm"]
Activation = Literal["silu", "gelu", "gelu_tanh", "relu", "swiglu_oai"]
Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Yarn:
    """Rotary frequencies stretched by `factor` for a model trained on `original_positions` (YaRN, arXiv 2309.00071).

    A dim that turns more than `beta_fast` times within them keeps its frequency, one that turns less than `beta_slow` times
    is slowed by `factor`, and those between are blended by a ramp (section 3.2) whose ends are whole dims if `truncate`.
    `attention_factor` multiplies cos and sin, and so the scores by its square, as far as positions enter them (section 3.4);
    `score_factor` multiplies all of every score (the DeepSeek models).
    """

    factor: float
    original_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    score_factor: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Rotary position embedding, over all dims of a head (the `rope_dim` ones under latent attention).

    `llama3` is the frequency rule of the Llama 3.1 report: (factor, low_freq_factor, high_freq_factor,
    original_positions); `yarn` is that of YaRN. `scaling` names any other rule ("linear", "dynamic", ...): it changes no
    shape, so the model can be priced, but code that runs a model must refuse one whose `scaling` is not None.
    """

    theta: float = 10_000.0
    llama3: tuple[float, float, float, int] | None = None
    yarn: Yarn | None = None
    scaling: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    Queries are compressed to `q_rank` (None: not compressed), keys and values to `kv_rank`; each head has
    `nope_dim` dims without position and `rope_dim` with, and values of `value_dim`.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Mixture of experts in a layer: `count` routed experts of which each token visits `top_k`.

    `shared_ffn` is the width of the always-on shared expert (0: none). `bias` is on the expert matrices,
    `router_bias` a learned bias on the router's logits, `selection_bias` the loss-free balancing bias
    of DeepSeek-V3 (a buffer in some libraries, never trained by gradient: not a parameter).

    Routing: each expert gets a `score`; `groups` above 1 restricts a token to the experts of its best `top_groups`
    groups (arXiv 2405.04434, section 2.2.2); the weights of the visited experts are rescaled to sum to one if
    `normalized`, and multiplied by `scale`.
    """

    count: int
    top_k: int
    ffn: int
    shared_ffn: int = 0
    bias: bool = False
    router_bias: bool = False
    selection_bias: bool = False
    score: Score = "softmax"
    normalized: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A decoder-only transformer. Widths are in elements.

    `ffn` is the width of dense layers' MLP. `moe_layers` says which layers use `experts` instead.
    `windows` holds each layer's attention window in tokens, the token itself included, None for full attention;
    an empty tuple means full attention everywhere. Under `latent` attention `head_dim` is that of queries and keys,
    `nope_dim + rope_dim`, and `qkv_bias` is on the two down-projections.
    """

    name: str
    family: str
    layers: int
    hidden: int
    ffn: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-5
    activation: Activation = "silu"
    gated: bool = True
    rope: Rope | None = Rope()
    """None: learned absolute positions."""
    position_offset: int = 0
    """Rows of the position table in front of position 0 (OPT has 2)."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    """A learned attention sink per head (GPT-OSS)."""
    tied: bool = False
    windows: tuple[int | None, ...] = ()
    latent: LatentAttention | None = None
    experts: Experts | None = None
    moe_layers: tuple[int, ...] = ()
    source: str = ""
    """Where the shapes come from: a file, or the catalogue entry's source."""

    @property
    def dense(self) -> bool:
        return not self.moe_layers

    def is_moe(self, layer: int) -> bool:
        return layer in self.moe_layers

    def window(self, layer: int) -> int | None:
        return self.windows[layer] if self.windows else None
