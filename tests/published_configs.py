"""What the config.json of published checkpoints says of their networks; docs/models.md has the sources."""

SDAR_4B = {
    "architectures": ["SDARForCausalLM"], "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rms_norm_eps": 1e-6,
    "rope_theta": 1000000, "tie_word_embeddings": False, "mask_token_id": 151669, "block_size": 4,
}  # fmt: skip
SDAR_30B = SDAR_4B | {
    "architectures": ["SDARMoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48,
    "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    "norm_topk_prob": True,
}  # fmt: skip
DREAM_7B = {
    "architectures": ["DreamModel"], "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "mask_token_id": 151666, "pad_token_id": 151643, "eos_token_id": 151643, "tie_word_embeddings": False,
}  # fmt: skip
LLADA_8B = {
    "architectures": ["LLaDAModelLM"], "d_model": 4096, "mlp_hidden_size": 12288, "n_layers": 32, "n_heads": 32,
    "n_kv_heads": 32, "vocab_size": 126464, "embedding_size": 126464, "max_sequence_length": 4096, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "weight_tying": False, "mask_token_id": 126336, "eos_token_id": 126081, "pad_token_id": 126081,
}  # fmt: skip
LLADA_MOE_7B = {
    "architectures": ["LLaDAMoEModelLM"], "model_type": "llada", "hidden_size": 2048, "num_hidden_layers": 16,
    "num_attention_heads": 16, "num_key_value_heads": 16, "expert_intermediate_size": 1024, "num_experts": 64,
    "num_experts_per_tok": 8, "vocab_size": 157184, "rope_theta": 50000, "max_position_embeddings": 8192,
    "qk_layernorm": True, "partial_rotary_factor": 1, "shared_expert_intermediate_size": None, "moe_layer_freq": [1] * 16,
    "eos_token_id": 156892, "pad_token_id": 156892,
}  # fmt: skip
LLADA2_MINI = {
    "architectures": ["LLaDA2MoeModelLM"], "model_type": "llada2_moe", "hidden_size": 2048, "intermediate_size": 5120,
    "num_hidden_layers": 20, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 128,
    "moe_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1, "n_group": 8,
    "topk_group": 4, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1, "partial_rotary_factor": 0.5,
    "rope_theta": 600000, "rms_norm_eps": 1e-6, "vocab_size": 157184, "max_position_embeddings": 32768, "hidden_act": "silu",
    "norm_topk_prob": True, "score_function": "sigmoid", "norm_head": False, "tie_word_embeddings": False,
    "pad_token_id": 156892,
}  # fmt: skip

# hub id → (config.json, parameters in billions as published or as the size of the files says)
PUBLISHED = {
    "Gen-Verse/TraDo-4B-Instruct": (SDAR_4B, 4.41),
    "JetLM/SDAR-30B-A3B-Chat": (SDAR_30B, 30.5),
    "Dream-org/Dream-v0-Instruct-7B": (DREAM_7B, 7.62),
    "GSAI-ML/LLaDA-8B-Instruct": (LLADA_8B, 8.02),
    "inclusionAI/LLaDA-MoE-7B-A1B-Instruct": (LLADA_MOE_7B, 7.36),
    "inclusionAI/LLaDA2.0-mini": (LLADA2_MINI, 16.26),
}
