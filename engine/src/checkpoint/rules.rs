//! What is done about each key of a configuration that others write: it is used, or refused since it changes what the
//! model computes and this engine has no such thing, or passed over since it changes nothing. A key that is in no table
//! is warned about.

use serde_json::Value;

use super::Result;
use super::family::Family;
use super::keys::Keys;

/// What is done about a key.
#[derive(Clone, Copy)]
pub(super) enum Decision {
    /// The reader of the family uses it.
    Used,
    /// It changes nothing that is computed here.
    NoEffect,
    /// Refused, unless it has a value with which it changes nothing.
    Refused {
        /// Those values, in words.
        unless: &'static str,
        /// Whether the value, which is not null, is one of them.
        harmless: fn(&Value, &Keys) -> bool,
    },
}

/// A decision about keys.
pub(super) struct Rule {
    /// Where it holds: families of Hugging Face, or architectures of GGUF.
    pub of: &'static [&'static str],
    /// The keys.
    pub keys: &'static [&'static str],
    /// What is done about them.
    pub decision: Decision,
}

const LLAMA: &str = Family::Llama.model_type();
const GEMMA: &str = Family::Gemma.model_type();
const GEMMA3: &str = Family::Gemma3.model_type();
const GPT_NEOX: &str = Family::GptNeoX.model_type();
const MISTRAL: &str = Family::Mistral.model_type();
const QWEN2: &str = Family::Qwen2.model_type();
const QWEN3: &str = Family::Qwen3.model_type();
const SMOLLM3: &str = Family::SmolLm3.model_type();
const OURO: &str = Family::Ouro.model_type();
const NANBEIGE: &str = Family::Nanbeige.model_type();
const RAVEN: &str = Family::Raven.model_type();
const ALL: &[&str] = &[LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA, GEMMA3, GPT_NEOX, OURO, NANBEIGE, RAVEN];
/// The families whose keys are those of Hugging Face's own.
const USUAL: &[&str] = &[LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA, GEMMA3, GPT_NEOX, OURO, NANBEIGE];
const ALL_BUT_GEMMA3: &[&str] = &[LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, GEMMA, GPT_NEOX, OURO, NANBEIGE, RAVEN];
const ALL_BUT_SMOLLM3: &[&str] = &[LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA3, GPT_NEOX, OURO, NANBEIGE, RAVEN];
/// Llama and its relatives.
const LLAMAS: &[&str] = &[LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, OURO, NANBEIGE];

const fn used(of: &'static [&'static str], keys: &'static [&'static str]) -> Rule {
    Rule { of, keys, decision: Decision::Used }
}

const fn no_effect(of: &'static [&'static str], keys: &'static [&'static str]) -> Rule {
    Rule { of, keys, decision: Decision::NoEffect }
}

const fn refused(
    of: &'static [&'static str],
    keys: &'static [&'static str],
    unless: &'static str,
    harmless: fn(&Value, &Keys) -> bool,
) -> Rule {
    Rule { of, keys, decision: Decision::Refused { unless, harmless } }
}

fn never(_: &Value, _: &Keys) -> bool {
    false
}

fn is_true(value: &Value, _: &Keys) -> bool {
    value == &Value::Bool(true)
}

fn is_false(value: &Value, _: &Keys) -> bool {
    value == &Value::Bool(false)
}

fn is_zero(value: &Value, _: &Keys) -> bool {
    value.as_f64() == Some(0.0)
}

fn is_one(value: &Value, _: &Keys) -> bool {
    value.as_f64() == Some(1.0)
}

fn is_zero_or_one(value: &Value, keys: &Keys) -> bool {
    is_zero(value, keys) || is_one(value, keys)
}

fn is_empty(value: &Value, _: &Keys) -> bool {
    value.as_object().is_some_and(serde_json::Map::is_empty) || value.as_array().is_some_and(Vec::is_empty)
}

fn is_rotary(value: &Value, _: &Keys) -> bool {
    value == "rope" || value == "rotary"
}

fn all_rotate(value: &Value, _: &Keys) -> bool {
    // The key counts the layers that do rotate.
    value.as_array().is_some_and(|layers| layers.iter().all(|layer| layer == 1 || layer == true))
}

fn all_see_everything(value: &Value, _: &Keys) -> bool {
    value.as_array().is_some_and(|layers| layers.iter().all(|layer| layer == "full_attention"))
}

/// Whether a window is unused, or holds every position of the model.
fn window_holds_all(value: &Value, keys: &Keys) -> bool {
    let positions = keys.value("max_position_embeddings").and_then(Value::as_u64);
    let holds_all = value.as_u64().zip(positions).is_some_and(|(window, positions)| window >= positions);
    holds_all || keys.value("use_sliding_window") == Some(&Value::Bool(false))
}

/// Whether the number of key-value heads equals that of query heads.
fn equals_heads(value: &Value, keys: &Keys) -> bool {
    Some(value) == keys.value("num_attention_heads")
}

fn equals_hidden_activation(value: &Value, keys: &Keys) -> bool {
    keys.value("hidden_activation").map_or(value == "gelu_pytorch_tanh", |activation| value == activation)
}

fn is_width_of_a_head(value: &Value, keys: &Keys) -> bool {
    let size = |key| keys.value(key).and_then(Value::as_u64);
    let width = size("hidden_size").zip(size("num_attention_heads")).and_then(|(size, heads)| size.checked_div(heads));
    value.as_u64() == width
}

/// The heads of a Huginn, which has two names for them.
fn raven_heads(keys: &Keys) -> Option<u64> {
    keys.value("n_heads").or(keys.value("num_attention_heads"))?.as_u64()
}

fn is_raven_heads(value: &Value, keys: &Keys) -> bool {
    value.as_u64() == raven_heads(keys)
}

fn is_share_of_n_embd(value: &Value, keys: &Keys) -> bool {
    let width = keys.value("n_embd").and_then(Value::as_u64);
    value.as_u64() == width.zip(raven_heads(keys)).and_then(|(width, heads)| width.checked_div(heads))
}

/// Whether there is a weight for the loss of each loop but the last: the family's code counts its loops by them.
fn is_a_weight_for_each_loop(value: &Value, keys: &Keys) -> bool {
    let loops = keys.value("num_loops").and_then(Value::as_u64).unwrap_or(1);
    value.as_array().is_some_and(|weights| weights.is_empty() || weights.len() as u64 + 1 == loops)
}

fn equals_rotary_base(value: &Value, keys: &Keys) -> bool {
    value.as_f64() == keys.value("rotary_emb_base").map_or(Some(10_000.0), Value::as_f64)
}

fn equals_rotary_share(value: &Value, keys: &Keys) -> bool {
    value.as_f64() == keys.value("rotary_pct").map_or(Some(0.25), Value::as_f64)
}

/// The keys of `config.json`, as transformers 5 writes them and older versions did.
pub(super) const HUGGING_FACE: &[Rule] = &[
    used(ALL, &["architectures", "intermediate_size", "model_type", "vocab_size"]),
    used(
        USUAL,
        &[
            "hidden_size",
            "max_position_embeddings",
            "num_attention_heads",
            "num_hidden_layers",
            "rope_parameters",
            "rope_scaling",
            "tie_word_embeddings",
        ],
    ),
    used(&[LLAMA, QWEN3, SMOLLM3, GEMMA, GEMMA3, GPT_NEOX, NANBEIGE], &["attention_bias"]),
    used(LLAMAS, &["head_dim", "hidden_act", "num_key_value_heads", "rms_norm_eps", "rope_theta"]),
    used(&[GEMMA, GEMMA3], &["head_dim", "num_key_value_heads", "rms_norm_eps", "rope_theta"]),
    used(&[GEMMA, GPT_NEOX], &["hidden_act"]),
    used(&[LLAMA, SMOLLM3, NANBEIGE], &["mlp_bias"]),
    used(&[GEMMA, GEMMA3], &["hidden_activation"]),
    used(&[MISTRAL], &["sliding_window"]),
    used(&[SMOLLM3], &["no_rope_layer_interval", "no_rope_layers"]),
    used(
        &[GEMMA3],
        &[
            "_sliding_window_pattern",
            "layer_types",
            "query_pre_attn_scalar",
            "rope_local_base_freq",
            "sliding_window",
            "sliding_window_pattern",
        ],
    ),
    used(&[GPT_NEOX], &["layer_norm_eps", "rotary_emb_base", "rotary_pct", "use_parallel_residual"]),
    used(&[OURO], &["early_exit_threshold", "total_ut_steps"]),
    used(&[NANBEIGE], &["num_loops", "skip_loop_final_norm"]),
    used(
        &[RAVEN],
        &[
            "block_size",
            "init_values",
            "mean_recurrence",
            "n_embd",
            "n_heads",
            "num_attention_heads",
            "n_layers_in_coda",
            "n_layers_in_prelude",
            "n_layers_in_recurrent_block",
            "norm_eps",
            "qk_bias",
            "rope_base",
            "tie_embeddings",
        ],
    ),
    // What changes the result, and this engine does not have or the family's own code does not use.
    refused(ALL, &["quantization", "quantization_config", "compression_config"], "null", never),
    refused(
        ALL,
        &["embedding_multiplier", "residual_multiplier", "logits_scaling", "logit_scale", "scale_emb", "scale_depth"],
        "null or 1",
        is_one,
    ),
    refused(ALL, &["attention_multiplier"], "null", never),
    refused(ALL, &["attn_logit_softcapping", "final_logit_softcapping", "logit_softcap"], "null", never),
    refused(LLAMAS, &["query_pre_attn_scalar", "rope_local_base_freq", "hidden_activation"], "null", never),
    refused(&[GEMMA, GPT_NEOX, RAVEN], &["query_pre_attn_scalar", "rope_local_base_freq"], "null", never),
    refused(&[GPT_NEOX, RAVEN], &["hidden_activation"], "null", never),
    refused(&[GEMMA3], &["hidden_act"], "null or `hidden_activation`", equals_hidden_activation),
    refused(
        &[LLAMA, QWEN2, QWEN3, SMOLLM3, GEMMA, GPT_NEOX, OURO, NANBEIGE, RAVEN],
        &["sliding_window"],
        "null, at least `max_position_embeddings`, or `use_sliding_window` false",
        window_holds_all,
    ),
    refused(ALL_BUT_GEMMA3, &["use_sliding_window"], "null or false", is_false),
    refused(
        ALL_BUT_GEMMA3,
        &["sliding_window_pattern", "_sliding_window_pattern", "attention_chunk_size"],
        "null",
        never,
    ),
    refused(ALL_BUT_GEMMA3, &["layer_types"], "null or `full_attention` for all", all_see_everything),
    refused(ALL_BUT_SMOLLM3, &["no_rope_layers"], "null, or 1 for all layers", all_rotate),
    refused(ALL_BUT_SMOLLM3, &["no_rope_layer_interval"], "null or 0", is_zero),
    refused(ALL, &["rope_interleaved", "rope_interleave"], "null or false", is_false),
    refused(LLAMAS, &["partial_rotary_factor", "rotary_pct"], "null or 1", is_one),
    refused(&[GEMMA, GEMMA3, RAVEN], &["partial_rotary_factor", "rotary_pct"], "null or 1", is_one),
    refused(&[GPT_NEOX], &["partial_rotary_factor"], "null or `rotary_pct`", equals_rotary_share),
    refused(&[GPT_NEOX], &["rope_theta"], "null or `rotary_emb_base`", equals_rotary_base),
    refused(&[GPT_NEOX], &["num_key_value_heads"], "null or `num_attention_heads`", equals_heads),
    refused(&[GPT_NEOX], &["head_dim"], "null or `hidden_size` / `num_attention_heads`", is_width_of_a_head),
    refused(ALL, &["rotary_dim", "use_rope"], "null or true", is_true),
    refused(ALL, &["position_embedding_type"], "null, rope or rotary", is_rotary),
    refused(ALL, &["alibi", "use_alibi"], "null or false", is_false),
    refused(ALL, &["qk_layernorm", "use_qk_norm", "qk_norm", "attn_temperature_tuning"], "null or false", is_false),
    refused(LLAMAS, &["use_parallel_residual", "parallel_attn"], "null or false", is_false),
    refused(&[GEMMA, GEMMA3, RAVEN], &["use_parallel_residual", "parallel_attn"], "null or false", is_false),
    refused(&[MISTRAL, OURO, RAVEN], &["attention_bias"], "null or false", is_false),
    refused(&[QWEN2], &["attention_bias"], "null or true", is_true),
    refused(&[MISTRAL, QWEN2, QWEN3, GEMMA, GEMMA3, OURO, RAVEN], &["mlp_bias"], "null or false", is_false),
    refused(&[GPT_NEOX], &["mlp_bias"], "null or true", is_true),
    refused(ALL, &["use_bidirectional_attention"], "null or false", is_false),
    refused(ALL, &["is_causal"], "null or true", is_true),
    refused(ALL, &["is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder"], "null or false", is_false),
    refused(ALL, &["num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts"], "null or 0", is_zero),
    refused(ALL, &["clip_qkv"], "null", never),
    refused(ALL, &["pruned_heads"], "null or empty", is_empty),
    refused(ALL, &["text_config", "vision_config", "audio_config"], "null: this engine reads text models", never),
    // The options of looped models.
    refused(&[OURO], &["early_exit_step"], "null: exits are by the exit policy, such as static:1", never),
    refused(&[NANBEIGE], &["loop_loss_weights"], "null, or one less than `num_loops`", is_a_weight_for_each_loop),
    refused(
        &[NANBEIGE],
        &[
            "enable_depth_attention",
            "enable_double_loop_split",
            "enable_h_res_identity",
            "enable_hyper_connection",
            "enable_mhc",
            "loop_share_kv",
            "mhc_diff_for_loop",
            "mhc_identity_nohresparam",
            "ngram_insert_all_layers",
        ],
        "null or false",
        is_false,
    ),
    refused(
        &[NANBEIGE],
        &[
            "emb_neighbor_num",
            "emb_split_num",
            "loop_middle_layers",
            "loop_middle_repeats",
            "mhc_double_stream_position_for_loop",
            "ngram_embedding_hidden_size",
            "ngram_vocab_size_ratio",
        ],
        "null",
        never,
    ),
    refused(&[NANBEIGE], &["insert_ngram_layer_idx"], "null or empty", is_empty),
    refused(&[RAVEN], &["bias"], "null or false", is_false),
    refused(&[RAVEN], &["block_class_name"], "null or SandwichBlock", |value, _| value == "SandwichBlock"),
    refused(&[RAVEN], &["injection_type"], "null or linear", |value, _| value == "linear"),
    refused(&[RAVEN], &["mlp_class_name"], "null or GatedMLP", |value, _| value == "GatedMLP"),
    refused(&[RAVEN], &["nonlin_name"], "null or SiLU", |value, _| value == "SiLU"),
    refused(&[RAVEN], &["norm_class_name"], "null or RMSNorm_llama", |value, _| value == "RMSNorm_llama"),
    refused(&[RAVEN], &["state_init"], "null, like-init or zero", |value, _| value == "like-init" || value == "zero"),
    refused(&[RAVEN], &["test_time_noise"], "null or 0", is_zero),
    refused(&[RAVEN], &["rope_parameters", "rope_scaling", "rope_theta"], "null", never),
    refused(&[RAVEN], &["hidden_size"], "null or `n_embd`", |value, keys| Some(value) == keys.value("n_embd")),
    refused(&[RAVEN], &["num_key_value_heads"], "null or `n_heads`", is_raven_heads),
    refused(&[RAVEN], &["padded_vocab_size"], "null or `vocab_size`", |value, keys| {
        Some(value) == keys.value("vocab_size")
    }),
    refused(&[RAVEN], &["tie_word_embeddings"], "null or `tie_embeddings`", |value, keys| {
        keys.value("tie_embeddings").map_or(value == true, |tied| tied == value)
    }),
    refused(&[RAVEN], &["head_dim"], "null or `n_embd` / `n_heads`", is_share_of_n_embd),
    // What changes nothing here.
    no_effect(&[OURO], &["chunk_size"]),
    no_effect(
        &[NANBEIGE],
        &[
            "depth_attention_recent_window",
            "depth_attention_static_anchor_once",
            "depth_attention_stride",
            "emb_tp_num",
            "kv_channels",
            "mhc_init_gating_factor",
            "mhc_sinkhorn_iterations",
            "ngram_compressed_tokenizer",
            "ngram_fused_mode",
            "ngram_layer_downproject_size",
            "ngram_mod_force_prime",
            "num_residual_streams",
            "skip_ngram_for_input",
        ],
    ),
    no_effect(
        &[RAVEN],
        &[
            "activation_checkpoint_impl",
            "architecture_class_name",
            "effective_expected_depth",
            "init_orthogonal",
            "init_strategy",
            "mean_backprop_depth",
            "n_layers",
            "padding_multiple",
            "sampling_scheme",
            "test_time_noise_type",
        ],
    ),
    no_effect(
        ALL,
        &[
            "_attn_implementation",
            "_attn_implementation_autoset",
            "_flash_attn_2_enabled",
            "_name_or_path",
            "attention_dropout",
            "attention_probs_dropout_prob",
            "attn_implementation",
            "attn_pdrop",
            "auto_map",
            "bad_words_ids",
            "begin_suppress_tokens",
            "bos_token_id",
            "cache_implementation",
            "chunk_size_feed_forward",
            "classifier_dropout",
            "cls_token_id",
            "cross_attention_hidden_size",
            "decoder_start_token_id",
            "diversity_penalty",
            "do_sample",
            "dtype",
            "early_stopping",
            "embd_pdrop",
            "encoder_no_repeat_ngram_size",
            "eos_token_id",
            "exponential_decay_length_penalty",
            "finetuning_task",
            "forced_bos_token_id",
            "forced_eos_token_id",
            "hidden_dropout",
            "hidden_dropout_prob",
            "id2label",
            "initializer_range",
            "is_decoder",
            "is_llama_config",
            "label2id",
            "length_penalty",
            "max_length",
            "max_window_layers",
            "min_length",
            "name_or_path",
            "no_repeat_ngram_size",
            "num_beam_groups",
            "num_beams",
            "num_labels",
            "num_return_sequences",
            "output_attentions",
            "output_hidden_states",
            "output_scores",
            "pad_token_id",
            "prefix",
            "pretraining_tp",
            "problem_type",
            "remove_invalid_values",
            "repetition_penalty",
            "resid_pdrop",
            "return_dict",
            "return_dict_in_generate",
            "sep_token_id",
            "suppress_tokens",
            "task_specific_params",
            "temperature",
            "tf_legacy_loss",
            "tokenizer_class",
            "top_k",
            "top_p",
            "torch_dtype",
            "torchscript",
            "transformers.js_config",
            "transformers_version",
            "typical_p",
            "unk_token_id",
            "unsloth_fixed",
            "unsloth_version",
            "use_bfloat16",
            "use_cache",
        ],
    ),
];

/// GGUF's `llama`.
pub(super) const GGUF_LLAMA: &str = "llama";
/// GGUF's `gemma3`.
pub(super) const GGUF_GEMMA3: &str = "gemma3";
/// GGUF's `nanbeige`.
pub(super) const GGUF_NANBEIGE: &str = "nanbeige";
const GGUF_ALL: &[&str] = &[GGUF_LLAMA, GGUF_GEMMA3, GGUF_NANBEIGE];

/// The metadata keys of GGUF that begin with the architecture, without it.
pub(super) const GGUF: &[Rule] = &[
    used(
        GGUF_ALL,
        &[
            "attention.head_count",
            "attention.head_count_kv",
            "attention.key_length",
            "attention.layer_norm_rms_epsilon",
            "attention.value_length",
            "block_count",
            "context_length",
            "embedding_length",
            "feed_forward_length",
            "rope.dimension_count",
            "rope.freq_base",
            "rope.scale_linear",
            "rope.scaling.factor",
            "rope.scaling.type",
        ],
    ),
    used(&[GGUF_GEMMA3], &["attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"]),
    used(&[GGUF_NANBEIGE], &["num_loops", "skip_loop_final_norm"]),
    refused(&[GGUF_NANBEIGE], &["loop_count"], "missing: `num_loops`, with the layers of one loop", never),
    refused(
        &[GGUF_LLAMA, GGUF_NANBEIGE],
        &["attention.sliding_window"],
        "missing, 0 or at least the context length",
        gguf_window,
    ),
    refused(
        &[GGUF_LLAMA, GGUF_NANBEIGE],
        &["attention.sliding_window_pattern", "rope.freq_base_swa"],
        "missing",
        never,
    ),
    refused(GGUF_ALL, &["attention.scale"], "missing, 0 or 1 / sqrt(`attention.key_length`)", gguf_attention_scale),
    refused(GGUF_ALL, &["logit_scale", "residual_scale", "embedding_scale"], "missing, 0 or 1", is_zero_or_one),
    refused(
        GGUF_ALL,
        &[
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "attention.clamp_kqv",
            "attention.max_alibi_bias",
            "attention.q_lora_rank",
            "attention.kv_lora_rank",
            "attention.shared_kv_layers",
            "attention.temperature_length",
            "attention.temperature_scale",
            "expert_count",
            "expert_shared_count",
            "expert_used_count",
            "interleave_moe_layer_step",
            "leading_dense_block_count",
            "nextn_predict_layers",
            "rope.scaling.yarn_log_multiplier",
        ],
        "missing or 0",
        is_zero,
    ),
    refused(GGUF_ALL, &["attention.causal"], "missing or true", is_true),
    refused(GGUF_ALL, &["use_parallel_residual"], "missing or false", is_false),
    refused(GGUF_ALL, &["rope.scaling.attn_factor", "rope.scaling.alpha"], "missing, 0 or 1", is_zero_or_one),
    refused(GGUF_ALL, &["rope.dimension_sections"], "missing", never),
    no_effect(
        GGUF_ALL,
        &[
            "attention.head_dim",
            "pooling_type",
            "rope.scaling.finetuned",
            "rope.scaling.original_context_length",
            "rope.scaling.yarn_beta_fast",
            "rope.scaling.yarn_beta_slow",
            "rope.scaling.yarn_ext_factor",
            "tensor_data_layout",
            "vocab_size",
        ],
    ),
];

fn gguf_window(value: &Value, keys: &Keys) -> bool {
    let positions = GGUF_ALL.iter().find_map(|name| keys.value(&format!("{name}.context_length"))?.as_u64());
    value.as_u64().is_some_and(|window| window == 0 || positions.is_some_and(|positions| window >= positions))
}

fn gguf_attention_scale(value: &Value, keys: &Keys) -> bool {
    let width = GGUF_ALL.iter().find_map(|name| keys.value(&format!("{name}.attention.key_length"))?.as_f64());
    let usual = |scale: f64| width.is_some_and(|width| (scale * width.sqrt() - 1.0).abs() < 1e-5);
    value.as_f64().is_some_and(|scale| scale == 0.0 || usual(scale))
}

/// Metadata keys of GGUF that belong to no architecture. One that ends in a dot stands for all that begin so.
pub(super) const GGUF_COMMON: &[Rule] = &[
    used(
        GGUF_ALL,
        &[
            "general.alignment",
            "general.architecture",
            "split.count",
            "split.no",
            "split.tensors.count",
            "tokenizer.ggml.add_bos_token",
            "tokenizer.ggml.add_space_prefix",
            "tokenizer.ggml.bos_token_id",
            "tokenizer.ggml.merges",
            "tokenizer.ggml.model",
            "tokenizer.ggml.pre",
            "tokenizer.ggml.scores",
            "tokenizer.ggml.token_type",
            "tokenizer.ggml.tokens",
            "tokenizer.ggml.unknown_token_id",
        ],
    ),
    refused(GGUF_ALL, &["general.type"], "missing or \"model\"", |value, _| value == "model"),
    no_effect(
        GGUF_ALL,
        &[
            "general.",
            "imatrix.",
            "quantize.",
            "tokenizer.chat_template",
            "tokenizer.chat_template.",
            "tokenizer.chat_templates",
            "tokenizer.ggml.add_eos_token",
            "tokenizer.ggml.add_sep_token",
            "tokenizer.ggml.cls_token_id",
            "tokenizer.ggml.eom_token_id",
            "tokenizer.ggml.eos_token_id",
            "tokenizer.ggml.eot_token_id",
            "tokenizer.ggml.fim_mid_token_id",
            "tokenizer.ggml.fim_pad_token_id",
            "tokenizer.ggml.fim_pre_token_id",
            "tokenizer.ggml.fim_rep_token_id",
            "tokenizer.ggml.fim_sep_token_id",
            "tokenizer.ggml.fim_suf_token_id",
            "tokenizer.ggml.mask_token_id",
            "tokenizer.ggml.middle_token_id",
            "tokenizer.ggml.padding_token_id",
            "tokenizer.ggml.precompiled_charsmap",
            "tokenizer.ggml.prefix_token_id",
            "tokenizer.ggml.remove_extra_whitespaces",
            "tokenizer.ggml.seperator_token_id",
            "tokenizer.ggml.suffix_token_id",
            "tokenizer.ggml.token_type_count",
            "tokenizer.huggingface.json",
        ],
    ),
];

/// Goes through all keys of a `config.json` of a family, known by its model type.
///
/// # Errors
/// The first key that is refused.
pub(super) fn check(keys: &Keys, family: &str) -> Result<()> {
    keys.names().try_for_each(|key| decide(keys, key, find(HUGGING_FACE, family, key)))
}

/// Goes through all metadata keys of a GGUF file.
///
/// # Errors
/// The first key that is refused.
pub(super) fn check_gguf(keys: &Keys, architecture: &str) -> Result<()> {
    keys.names().try_for_each(|key| {
        let own = key.strip_prefix(architecture).and_then(|key| key.strip_prefix('.'));
        let decision = match own {
            Some(own) => find(GGUF, architecture, own),
            None => find(GGUF_COMMON, architecture, key),
        };
        decide(keys, key, decision)
    })
}

fn find(rules: &[Rule], of: &str, key: &str) -> Option<Decision> {
    let named = |name: &&str| *name == key || name.ends_with('.') && key.starts_with(*name);
    let rule = rules.iter().find(|rule| rule.of.contains(&of) && rule.keys.iter().any(named));
    rule.map(|rule| rule.decision)
}

fn decide(keys: &Keys, key: &str, decision: Option<Decision>) -> Result<()> {
    let Some(value) = keys.value(key) else { return Ok(()) };
    match decision {
        Some(Decision::Used | Decision::NoEffect) => {}
        Some(Decision::Refused { unless, harmless }) => {
            if !harmless(value, keys) {
                return Err(keys.refuse(key, &format!("{unless}: this engine computes nothing else")));
            }
        }
        None => keys.warn(key, "not known to this engine, and assumed to change nothing"),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::pre_tokenizers::PRE_TOKENIZERS;
    use super::*;

    const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/checkpoint-keys.md");

    /// Where a rule holds, among all families or architectures.
    fn holds_for(of: &[&str], all: &[&str]) -> String {
        let code = |names: &[&str]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let others: Vec<&str> = all.iter().filter(|name| !of.contains(name)).copied().collect();
        match others.len() {
            0 => "all".to_owned(),
            1..4 if of.len() > others.len() => format!("all but {}", code(&others)),
            _ => code(of),
        }
    }

    /// Rows of a table: keys, where the rule holds, what is done.
    fn rows(rules: &[Rule], all: &[&str]) -> String {
        let code = |names: &[&str]| names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
        let row = |rule: &Rule| {
            let done = match rule.decision {
                Decision::Used => "used".to_owned(),
                Decision::NoEffect => "no effect here".to_owned(),
                Decision::Refused { unless, .. } => format!("refused unless {unless}"),
            };
            format!("| {} | {} | {done} |\n", code(rule.keys), holds_for(rule.of, all))
        };
        rules.iter().map(row).collect()
    }

    fn page() -> String {
        let table =
            |rules, all, of| format!("| key | {of} | what is done |\n| --- | --- | --- |\n{}", rows(rules, all));
        let yes_or_no = |yes| if yes { "yes" } else { "no" };
        let splitters: String = PRE_TOKENIZERS
            .iter()
            .map(|known| {
                let (whole, begin) = (yes_or_no(known.whole_pieces_first), yes_or_no(known.add_bos));
                format!("| `{}` | {whole} | {begin} |\n", known.names.join("`, `"))
            })
            .collect();
        format!(
            "# Keys of model files\n\n\
             What is done about each key of a model that another program wrote. `cargo test -p engine` checks this page \
             against the\ncode; `WRITE_REFERENCE=1 cargo test -p engine --lib reference` writes it. A key that is in no \
             table is warned about once by\nname, and assumed to change nothing. A key whose value is null counts as \
             missing.\n\n\
             ## `config.json` of a Hugging Face folder\n\n{}\n\
             ## Metadata of a GGUF file, after the architecture\n\n{}\n\
             ## Other metadata of a GGUF file\n\nA name that ends in a dot stands for all that begin with it.\n\n{}\n\
             ## `tokenizer.ggml.pre`\n\n\
             | name | a piece that is a token is not split | begins with the first token, where `add_bos_token` is \
             missing |\n| --- | --- | --- |\n{splitters}",
            table(HUGGING_FACE, ALL, "`model_type`"),
            table(GGUF, GGUF_ALL, "architecture"),
            table(GGUF_COMMON, GGUF_ALL, "architecture"),
        )
    }

    #[test]
    fn the_reference_shows_every_decision() {
        if std::env::var_os("WRITE_REFERENCE").is_some() {
            std::fs::write(PAGE, page()).unwrap();
        }
        let written = std::fs::read_to_string(PAGE).unwrap();
        assert!(written == page(), "docs/reference/checkpoint-keys.md is not what the tables say: WRITE_REFERENCE=1");
    }

    #[test]
    fn no_key_is_decided_twice_for_a_family() {
        for rules in [HUGGING_FACE, GGUF, GGUF_COMMON] {
            let decided = rules
                .iter()
                .flat_map(|rule| rule.of.iter().flat_map(|of| rule.keys.iter().map(move |key| (*of, *key))));
            let mut decided: Vec<_> = decided.collect();
            decided.sort_unstable();
            let twice = decided.windows(2).find(|pair| pair[0] == pair[1]);
            assert_eq!(twice, None);
        }
    }
}
