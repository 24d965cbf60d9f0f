"""A tiny random model of every kind of causal language model that transformers has."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    # Ten times the usual spread, so that attention is far from uniform.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # experts
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    # recurrent layers
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "mamba_n_heads": 4,
    "mamba_d_state": 16,
    "mamba_d_ssm": 128,
    "mamba_chunk_size": 16,
    "mamba_dt_rank": 4,
    # latent attention
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
"""For the fields that a config has."""

FULL, LINEAR, CONV = "full_attention", "linear_attention", "conv"

PARTICULAR = {
    "qwen3_5_text": {"layer_types": [LINEAR, FULL, LINEAR, FULL]},
    "qwen3_5_moe_text": {"layer_types": [LINEAR, FULL, LINEAR, FULL]},
    "qwen3_next": {"layer_types": [LINEAR, FULL, LINEAR, FULL]},
    "olmo_hybrid": {"layer_types": [LINEAR, FULL, LINEAR, FULL]},
    "granitemoehybrid": {"layer_types": [LINEAR, FULL, LINEAR, FULL], "shared_intermediate_size": 64},
    "lfm2": {"layer_types": [CONV, FULL, CONV, FULL]},
    "lfm2_moe": {"layer_types": [CONV, FULL, CONV, FULL], "num_dense_layers": 2},
    "nemotron_h": {
        "num_hidden_layers": None,
        "layers_block_type": [LINEAR, "moe", FULL, LINEAR, "mlp", FULL],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "ssm_state_size": 16,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
        "initializer_range": 0.05,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1, 3], "num_logits_to_keep": None},
    "falcon_h1": {"num_logits_to_keep": None},
    "kimi_linear": {
        "layer_types": [LINEAR, FULL, LINEAR, FULL],
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "num_key_value_heads": 4,
    },
}


def tiny_config(model_type, **changes):
    kind = CONFIG_MAPPING[model_type]
    known = set(kind.__dataclass_fields__) | set(kind.attribute_map)
    values = {name: value for name, value in SIZES.items() if name in known}
    values |= PARTICULAR.get(model_type, {}) | changes
    return kind(**{name: value for name, value in values.items() if value is not None})


def tiny_model(model_type, attention="eager", seed=0, **changes):
    """A random model in eval mode whose generation never ends early."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type, **changes), attn_implementation=attention)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()
