"""Small random models of the architectures that the tests compare with torch SDPA."""

import functools

import torch
import transformers as hf

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "llama-llama3-rope-gqa": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope-mha": ("Llama", {"rope_parameters": LINEAR, "num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "mistral-sliding-window": ("Mistral", {"sliding_window": 24}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "glm-4-9b": ("Glm", {"num_key_value_heads": 1, "partial_rotary_factor": 0.5, "attention_bias": True}),
    "glm4": ("Glm4", {"partial_rotary_factor": 0.5}),
    "phi3": ("Phi3", {}),
    "gemma3": (
        "Gemma3",
        {"sliding_window": 24, "query_pre_attn_scalar": 16, "layer_types": MIXED, "tie_word_embeddings": False},
    ),
    "gpt-neox": ("GPTNeoX", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
HAS_FULL_ATTENTION = [name for name in MODELS if name != "mistral-sliding-window"]


@functools.cache
def tiny(name: str) -> hf.PreTrainedModel:
    """The model, fp32, eval; weights large enough that its greedy tokens vary."""
    family, options = MODELS[name]
    return build(family, **options)


def build(family: str, **options) -> hf.PreTrainedModel:
    torch.manual_seed(1)
    config = getattr(hf, family + ("TextConfig" if family == "Gemma3" else "Config"))(**{**SIZES, **options})
    model = getattr(hf, f"{family}ForCausalLM")(config).eval().float()
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.2)
    return model


def prompt(tokens: int = 70, pads: tuple[int, ...] = (0,), seed: int = 0) -> dict[str, torch.Tensor]:
    """Token ids and attention mask; sequence ``b`` starts with ``pads[b]`` padding tokens."""
    ids = torch.randint(1, 97, (len(pads), tokens), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(tokens) >= torch.tensor(pads)[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}
