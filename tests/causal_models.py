"""A tiny random model of every type that transformers maps to a causal language model, as far as one can be made."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CAUSAL_MODELS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
MOST_PARAMETERS = 20_000_000

_SIZES = {
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_encoder_layers depth "
    "num_decoder_layers num_key_value_heads num_kv_heads n_head_kv num_experts_per_tok num_experts_per_token "
    "moe_top_k moe_k moe_topk top_k_experts num_experts_per_topk zero_expert_num",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts moe_num_experts linear_num_heads",
    1: "n_group topk_group first_k_dense_replace num_nextn_predict_layers",
    16: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim mamba_d_state state_size ssm_state_size "
    "attention_head_size kv_channels linear_key_head_dim linear_value_head_dim rotary_dim index_topk global_head_dim "
    "dim_head linear_head_dim chunk_size mamba_chunk_size",
    32: "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size expert_dim q_lora_rank kv_lora_rank o_lora_rank index_head_dim "
    "expert_ffn_hidden_size index_n_heads",
    64: "hidden_size d_model n_embd dim embed_dim embedding_size word_embed_proj_dim hidden_dim model_dim input_size "
    "emb_dim embedding_dim d_embed decoder_hidden_size",
    96: "intermediate_size ffn_dim n_inner d_ff inner_dim encoder_ffn_dim decoder_ffn_dim intermediate_size_mlp "
    "dense_intermediate_size mlp_hidden_size feed_forward_hidden_size prefix_intermediate_size ffn_hidden_size "
    "block_ff_dim dim_ff dff",
    128: "vocab_size max_position_embeddings n_positions n_ctx max_sequence_length max_seq_len seq_length "
    "vocab_size_per_layer_input",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")

# What the sizes above do not fit.
_PARTICULAR = {
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 64},
    },
    "bailing_hybrid": {"linear_attn_norm_group_size": 16},
    "deepseek_v2": {"num_experts_per_tok": 2, "num_key_value_heads": 4, "head_dim": 16},
    "dots1": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "intermediate_size": 96},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"mamba_num_heads": 4, "mamba_head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 48], "axial_pos_shape": [8, 16]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid", "hybrid"], "num_hidden_layers": 3},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
}


def tiny_causal_model(name: str) -> torch.nn.Module:
    """A random model in eval mode.

    Raises:
        Exception: of any kind: the type's configuration does not go with the sizes above, or needs another library.
    """
    config = CONFIG_MAPPING[name](**_changes(CONFIG_MAPPING[name]()) | _PARTICULAR.get(name, {}))
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{parameters} parameters are not tiny")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert not model.name_or_path  # for which somebody might ask the Hub
    return model


def _changes(config: PretrainedConfig) -> dict[str, object]:
    values = config.to_dict()
    changes: dict[str, object] = {
        key: _SMALL[key]
        for key, value in values.items()
        if key in _SMALL and type(value) is int and value > _SMALL[key]
    }
    changes |= {key: 1 for key in _TOKENS if isinstance(values.get(key), int) and values[key] >= _SMALL["vocab_size"]}
    if "qk_rope_head_dim" in values:
        changes |= {"num_key_value_heads": 4}
    if "head_dim" in values and values["head_dim"] is None:
        changes |= {"head_dim": 16}
    for key in config.sub_configs:
        if isinstance(inner := getattr(config, key, None), PretrainedConfig):
            changes[key] = {"model_type": inner.model_type, **_changes(inner)}
    return changes
