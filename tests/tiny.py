"""A tiny random model of every kind of causal language model that transformers has."""

import copy

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

CAUSAL_MODELS = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)

FULL, LINEAR, CONV, SLIDING = "full_attention", "linear_attention", "conv", "sliding_attention"

TEXT = {
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
    "init_std": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "ffn_dim": 96,
    "d_inner": 96,
    # decoders of encoder-decoder models
    "decoder_layers": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "is_decoder": True,
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
    "q_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    # embeddings for each layer
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 160,
}
"""For the fields that a config has."""

MOST_PARAMETERS = 100_000_000

VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 64,
    "output_dim": 32,
    "output_proj_dims": 32,
    "mm_embed_dim": 32,
    "head_dim": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "d_model": 32,
    "max_source_positions": 16,
}

LEFT_OUT = object()

HEADS = {"num_key_value_heads": 4}
HYBRID = {"layer_types": [LINEAR, FULL, LINEAR, FULL]}
SHORT_CONV = {"layer_types": [CONV, FULL, CONV, FULL]}
WINDOWS = {"layer_types": [SLIDING, FULL, SLIDING, FULL], "sliding_window": 8}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
MIXED_WINDOWS = {"layer_types": ["hybrid_sliding", "hybrid"] * 2}
MAMBA2 = {"num_heads": 4, "head_dim": 32, "n_groups": 2, "state_size": 16, "chunk_size": 16}
SHARED = {
    "num_hidden_layers": 6,
    "layer_types": [SLIDING, FULL, FULL] * 2,
    "num_kv_shared_layers": 3,
    "sliding_window": 8,
    "global_head_dim": 16,
}
BYTES = {"hidden_size": 32, "hidden_size_global": 64, "num_key_value_heads": 2, "num_attention_heads": 2}
NGRAM = {
    "ngram_vocab_size_base": 160,
    "ple_layer_ids": [1],
    "ple_embed_dim": 32,
    "heads_per_ngram": 2,
    "split_ngram_parts": 4,
}

PARTICULAR = {
    "axk1": HEADS,
    "axk2": HEADS,
    "bailing_hybrid": {"layer_group_size": 2, "layer_types": [LINEAR, FULL, LINEAR, FULL]} | HEADS,
    "bamba": {"attn_layer_indices": [1, 3], "num_logits_to_keep": LEFT_OUT},
    "blt": {"encoder_hash_byte_group_vocab": 160},
    "blt_local_encoder": BYTES,
    "blt_local_decoder": BYTES,
    "blt_global_transformer": {"hidden_size": 64},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": WINDOWS
    | {"rope_parameters": dict.fromkeys((SLIDING, FULL), ROPE | {"mrope_section": [3, 3, 2]})},
    "cpmant": {"dim_head": 16, "dim_ff": 96},
    "ctrl": {"dff": 96},
    "dbrx": {
        "d_model": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 64, "moe_num_experts": 4},
    },
    "deepseek_v2": HEADS,
    "deepseek_v3": HEADS,
    "deepseek_v32": HEADS,
    "deepseek_v4": {
        "num_key_value_heads": 1,
        "o_lora_rank": 16,
        "o_groups": 2,
        "index_n_heads": 2,
        "index_head_dim": 16,
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_vision_encoder": {"mlp_layer_types": ["dense"], "adapter_in_dim": 32, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 64},
    "dots3_note_text": HEADS | {"index_n_heads": 2, "index_head_dim": 32},
    "falcon_h1": {"num_logits_to_keep": LEFT_OUT},
    "gemma3_text": WINDOWS,
    "gemma3n_text": SHARED | {"laurel_rank": 8},
    "gemma4_assistant": {},
    "gemma4_text": SHARED,
    "gemma4_unified_text": SHARED | {"hidden_size_per_layer_input": LEFT_OUT},
    "glm4_moe_lite": HEADS,
    "glm_moe_dsa": HEADS,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": 8},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": HYBRID | {"shared_intermediate_size": 64},
    "inkling_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 2,
        "swa_head_dim": 16,
        "sliding_window_size": 8,
    }
    | MIXED_WINDOWS,
    "inkling2_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16} | MIXED_WINDOWS,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kolibri1": WINDOWS,
    "kimi_linear": HYBRID | HEADS | {"linear_head_dim": 16, "linear_num_heads": 4},
    "lfm2": SHORT_CONV,
    "lfm2_moe": SHORT_CONV | {"num_dense_layers": 2},
    "longcat_flash": {
        "num_hidden_layers": LEFT_OUT,
        "num_layers": 2,
        "head_dim": 32,
        "num_key_value_heads": LEFT_OUT,
        "zero_expert_num": 2,
    },
    "mamba2": MAMBA2,
    "minicpm3": HEADS,
    "ministral": WINDOWS,
    "mistral": {"sliding_window": None},
    "mistral4": HEADS,
    "moshi": {"ffn_dim": 96, "audio_vocab_size": 160},
    "nemotron_h": {
        "num_hidden_layers": LEFT_OUT,
        "layers_block_type": [LINEAR, "moe", FULL, LINEAR, "mlp", FULL],
        "mamba_num_heads": 4,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "ssm_state_size": 16,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
        "initializer_range": 0.05,
    },
    "olmo_hybrid": HYBRID,
    "prophetnet": {"num_decoder_layers": 4, "num_decoder_attention_heads": 4, "num_encoder_attention_heads": 4},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_5_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": HYBRID
    | {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    }
    | NGRAM,
    "reformer": {"axial_pos_embds": False, "attention_head_size": 16, "feed_forward_size": 96},
    "roc_bert": {"pronunciation_embed_dim": 16, "shape_embed_dim": 16},
    "sarvam_mla": HEADS,
    "xlnet": {"d_head": 16},
    "xlstm": {"num_heads": 4},
    "xmod": {"default_language": "en_XX"},
    "youtu": HEADS,
    "zamba": HEADS | {"layers_block_type": [LINEAR, "hybrid", "hybrid", LINEAR]},
    "zamba2": {
        "layers_block_type": [LINEAR, "hybrid", LINEAR, "hybrid"],
        "n_mamba_heads": 4,
        "num_key_value_heads": 4,
        # transformers' pass over single tokens does without this bound, that over several does not.
        "time_step_min": 1e-6,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
"""What a family needs beside or instead."""

ALONE = {"mistral4": "Mistral4ForCausalLM"}
"""Classes that the automatic ones do not name."""


def tiny_config(model_type, **changes):
    """Skips the test where this version of transformers does not know the model."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return _small(CONFIG_MAPPING[model_type], TEXT, changes)


def _small(kind, sizes, changes=()):
    """A config of this class, and those within it, with the fields that it has."""
    known = set(getattr(kind, "__dataclass_fields__", {})) | set(kind.attribute_map)
    values = {name: value for name, value in sizes.items() if name in known}
    if sizes is TEXT or kind.model_type in PARTICULAR:
        values |= PARTICULAR.get(kind.model_type, {})
    for name, part in kind.sub_configs.items():
        if not hasattr(part, "model_type"):  # an automatic class: the config says which by itself
            part = type(getattr(kind(), name))
        if getattr(part, "model_type", None) in CONFIG_MAPPING:
            values[name] = _small(part, TEXT if "text" in name or "decoder" in name else VISION)
    values |= dict(changes)
    return kind(**{name: value for name, value in values.items() if value is not LEFT_OUT})


def tiny_model(model_type, attention="eager", seed=0, **changes):
    """A random model in eval mode whose generation never ends early."""
    config = tiny_config(model_type, **changes)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in _model(model_type, copy.deepcopy(config)).parameters())
    if parameters > MOST_PARAMETERS:
        raise ValueError(f"{model_type} has {parameters:,} parameters with the sizes of tests/architectures/tiny.py")
    torch.manual_seed(seed)
    model = _model(model_type, config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # what is zero in the beginning is not after training
                parameter.normal_(std=0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    for name in ("forced_bos_token_id", "forced_eos_token_id", "encoder_no_repeat_ngram_size"):
        setattr(model.generation_config, name, None)
    return model.eval()


def _model(model_type, config, **options):
    if model_type in ALONE:
        return getattr(transformers, ALONE[model_type])._from_config(config, **options)
    return AutoModelForCausalLM.from_config(config, **options)
