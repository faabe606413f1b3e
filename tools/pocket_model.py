"""The pocket model as plain functions: Qwen3's architecture, trained fast, exported as Qwen3ForCausalLM.

Parameters carry Hugging Face's names, so that export is a cast and a save. Work per token runs flat over all tokens
of a batch, hence one compilation serves every length; only attention sees rows.

Shapes: N tokens of a batch, B rows, T tokens a row (N = B T), C hidden, H query heads, K key heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; the defaults are the shipped one's."""

    vocab_size: int = 3584
    hidden_size: int = 256
    num_hidden_layers: int = 8
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 640
    rope_theta: float = 5e5
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768


MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
NORMS = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")


def layer_names(layer: int) -> list[str]:
    """Names of a layer's parameters, in the order in which `before` and `after` take them."""
    order = (
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.q_norm",
        "self_attn.k_norm",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    return [f"model.layers.{layer}.{part}.weight" for part in order]


def new_weights(s: Shape, seed: int, device: str) -> dict[str, Tensor]:
    """Fresh fp32 weights; the two projections that write to the residual stream start at zero."""
    g = torch.Generator().manual_seed(seed)
    C, D = s.hidden_size, s.head_dim
    rows = {
        "q_proj": s.num_attention_heads * D,
        "k_proj": s.num_key_value_heads * D,
        "v_proj": s.num_key_value_heads * D,
        "o_proj": C,
        "gate_proj": s.intermediate_size,
        "up_proj": s.intermediate_size,
        "down_proj": C,
    }
    cols = {"o_proj": s.num_attention_heads * D, "down_proj": s.intermediate_size}
    out = {"model.embed_tokens.weight": torch.randn(s.vocab_size, C, generator=g) * 0.02}
    for layer in range(s.num_hidden_layers):
        for name in layer_names(layer):
            part = name.split(".")[-2]
            if part in rows:
                w = torch.randn(rows[part], cols.get(part, C), generator=g) * cols.get(part, C) ** -0.5
                out[name] = torch.zeros_like(w) if part in ("o_proj", "down_proj") else w
            else:
                out[name] = torch.ones(D if part in ("q_norm", "k_norm") else C)
    out["model.norm.weight"] = torch.ones(C)
    return {k: v.to(device) for k, v in out.items()}


# ---- the pieces of a layer ---------------------------------------------------------------------------------------


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis, in fp32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [N, heads, D] by angles [N, D/2] (halves convention)."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def before(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    norm: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    q_norm: Tensor,
    k_norm: Tensor,
    eps: float,
    low: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C] -> q [N, H, D], k and v [N, K, D], rotated, in `low` precision."""
    h = rms(x, norm, eps).to(low)
    D = q_norm.shape[0]
    q, k, v = (F.linear(h, w.to(low)).unflatten(-1, (-1, D)) for w in (wq, wk, wv))
    return rope(rms(q, q_norm, eps), cos, sin).to(low), rope(rms(k, k_norm, eps), cos, sin).to(low), v


def after(
    x: Tensor, a: Tensor, wo: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, eps: float, low: torch.dtype
) -> Tensor:
    """Add attention's output a [N, H D] and the MLP to x [N, C]."""
    x = x + F.linear(a, wo.to(low))
    h = rms(x, norm, eps).to(low)
    return x + F.linear(F.silu(F.linear(h, gate.to(low))) * F.linear(h, up.to(low)), down.to(low))


def loss_of(
    x: Tensor, norm: Tensor, embed: Tensor, target: Tensor, weight: Tensor, eps: float, low: torch.dtype
) -> Tensor:
    """Weighted mean cross-entropy [] of x [N, C] against target [N] with weight [N]."""
    logits = F.linear(rms(x, norm, eps).to(low), embed.to(low)).float()
    picked = logits.gather(-1, target[:, None])[:, 0]
    return ((logits.logsumexp(-1) - picked) * weight).sum() / weight.sum().clamp_min(1e-3)


def angles(s: Shape, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """cos, sin [tokens, D/2] in fp32."""
    inverse = s.rope_theta ** -(torch.arange(0, s.head_dim, 2, dtype=torch.float64) / s.head_dim)
    angle = torch.arange(tokens, dtype=torch.float64)[:, None] * inverse
    return angle.cos().float().to(device), angle.sin().float().to(device)


def attention(q: Tensor, k: Tensor, v: Tensor, rows: int) -> Tensor:
    """Causal attention of flat q [N, H, D], k and v [N, K, D] within each of `rows` rows -> [N, H D]."""
    q, k, v = (t.view(rows, -1, *t.shape[1:]).transpose(1, 2) for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(0, 1).flatten(1)


class Pocket:
    """Weights with a forward pass for training; `compiled` fuses the pieces (CUDA)."""

    def __init__(
        self, shape: Shape, weights: dict[str, Tensor], *, low: torch.dtype = torch.bfloat16, compiled: bool = False
    ) -> None:
        self.shape, self.weights, self.low = shape, weights, low
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self._before, self._after, self._loss = wrap(before), wrap(after), wrap(loss_of)

    @property
    def device(self) -> str:
        return str(self.weights["model.norm.weight"].device)

    def layer(self, x: Tensor, layer: int, cos: Tensor, sin: Tensor, rows: int) -> Tensor:
        w = [self.weights[n] for n in layer_names(layer)]
        eps = self.shape.rms_norm_eps
        q, k, v = self._before(x, cos, sin, *w[:6], eps, self.low)
        return self._after(x, attention(q, k, v, rows), *w[6:], eps, self.low)

    def loss(self, tokens: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Mean loss of tokens [B, T] (int64) where weight [B, T] says what each token counts; cos, sin [B T, D/2]."""
        embed = self.weights["model.embed_tokens.weight"]
        x = F.embedding(tokens.flatten(), embed)
        for layer in range(self.shape.num_hidden_layers):
            x = self.layer(x, layer, cos, sin, tokens.shape[0])
        target = tokens.roll(-1, 1).flatten()
        weight = torch.cat((weight[:, 1:], torch.zeros_like(weight[:, :1])), 1).flatten()
        return self._loss(
            x, self.weights["model.norm.weight"], embed, target, weight, self.shape.rms_norm_eps, self.low
        )


# ---- Hugging Face format -----------------------------------------------------------------------------------------


def hf_config(s: Shape) -> dict:
    """config.json of a Qwen3ForCausalLM."""
    sizes = asdict(s)
    theta = sizes.pop("rope_theta")
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        **sizes,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "use_cache": True,
        "use_sliding_window": False,
        "sliding_window": None,
        "layer_types": ["full_attention"] * s.num_hidden_layers,
        "initializer_range": 0.02,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def save_checkpoint(folder: Path, s: Shape, weights: dict[str, Tensor]) -> None:
    """Write config.json, generation_config.json and model.safetensors (bf16)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(s), indent=2) + "\n")
    generation = {"do_sample": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    save_file(
        {k: v.detach().to("cpu", torch.bfloat16).contiguous() for k, v in weights.items()},
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )


def load_checkpoint(folder: Path, device: str, dtype: torch.dtype = torch.float32) -> tuple[Shape, dict[str, Tensor]]:
    """Shape and weights of a checkpoint that `save_checkpoint` wrote."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(**{k: config[k] for k in Shape.__slots__})
    return shape, {k: v.to(device, dtype) for k, v in load_file(folder / "model.safetensors").items()}
