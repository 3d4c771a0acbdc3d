//! What families call their tensors.

use std::collections::BTreeSet;

use crate::config::ModelConfig;
use crate::tensor_file::{Entry, Layout};
use crate::weights::expected_tensors;

/// The names of a family's tensors, each without the `.weight` or `.bias` at its end.
pub(super) struct Naming {
    embedding: &'static str,
    norm: &'static str,
    head: &'static str,
    /// What a layer's names begin with, before its number.
    layers: &'static str,
    /// A layer's parts: their name, and ours. Parts that a model does not have are skipped.
    parts: &'static [(&'static str, &'static [&'static str])],
    /// Whether norms are stored less one.
    norms_less_one: bool,
    /// Ends of the names of tensors that follow from the configuration.
    ignored: &'static [&'static str],
}

/// Our own names of a layer's parts, which are Hugging Face's for Llama and Gemma.
const OWN_PARTS: &[(&str, &[&str])] = &[
    ("input_layernorm", &["input_layernorm"]),
    ("post_attention_layernorm", &["post_attention_layernorm"]),
    ("pre_feedforward_layernorm", &["pre_feedforward_layernorm"]),
    ("post_feedforward_layernorm", &["post_feedforward_layernorm"]),
    ("self_attn.q_norm", &["self_attn.q_norm"]),
    ("self_attn.k_norm", &["self_attn.k_norm"]),
    ("self_attn.q_proj", &["self_attn.q_proj"]),
    ("self_attn.k_proj", &["self_attn.k_proj"]),
    ("self_attn.v_proj", &["self_attn.v_proj"]),
    ("self_attn.o_proj", &["self_attn.o_proj"]),
    ("mlp.gate_proj", &["mlp.gate_proj"]),
    ("mlp.up_proj", &["mlp.up_proj"]),
    ("mlp.down_proj", &["mlp.down_proj"]),
];

/// `LlamaForCausalLM`.
pub(super) const LLAMA: Naming = Naming {
    embedding: "model.embed_tokens",
    norm: "model.norm",
    head: "lm_head",
    layers: "model.layers",
    parts: OWN_PARTS,
    norms_less_one: false,
    ignored: &["rotary_emb.inv_freq"],
};

/// `GemmaForCausalLM` and `Gemma3ForCausalLM`.
pub(super) const GEMMA: Naming = Naming { norms_less_one: true, ..LLAMA };

/// `GPTNeoXForCausalLM`. Some of its files hold attention masks.
pub(super) const GPT_NEOX: Naming = Naming {
    embedding: "gpt_neox.embed_in",
    norm: "gpt_neox.final_layer_norm",
    head: "embed_out",
    layers: "gpt_neox.layers",
    parts: &[
        ("input_layernorm", &["input_layernorm"]),
        ("post_attention_layernorm", &["post_attention_layernorm"]),
        ("attention.query_key_value", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("attention.dense", &["self_attn.o_proj"]),
        ("mlp.dense_h_to_4h", &["mlp.up_proj"]),
        ("mlp.dense_4h_to_h", &["mlp.down_proj"]),
    ],
    norms_less_one: false,
    ignored: &["rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"],
};

/// GGUF's `llama`.
pub(super) const GGUF_LLAMA: Naming = Naming {
    embedding: "token_embd",
    norm: "output_norm",
    head: "output",
    layers: "blk",
    parts: &[
        ("attn_norm", &["input_layernorm"]),
        ("ffn_norm", &["post_attention_layernorm"]),
        ("attn_q", &["self_attn.q_proj"]),
        ("attn_k", &["self_attn.k_proj"]),
        ("attn_v", &["self_attn.v_proj"]),
        ("attn_output", &["self_attn.o_proj"]),
        ("ffn_gate", &["mlp.gate_proj"]),
        ("ffn_up", &["mlp.up_proj"]),
        ("ffn_down", &["mlp.down_proj"]),
    ],
    norms_less_one: false,
    ignored: &["rope_freqs.weight"],
};

/// GGUF's `gemma3`, whose norms are stored ready to multiply.
pub(super) const GGUF_GEMMA3: Naming = Naming {
    parts: &[
        ("attn_norm", &["input_layernorm"]),
        ("post_attention_norm", &["post_attention_layernorm"]),
        ("ffn_norm", &["pre_feedforward_layernorm"]),
        ("post_ffw_norm", &["post_feedforward_layernorm"]),
        ("attn_q_norm", &["self_attn.q_norm"]),
        ("attn_k_norm", &["self_attn.k_norm"]),
        ("attn_q", &["self_attn.q_proj"]),
        ("attn_k", &["self_attn.k_proj"]),
        ("attn_v", &["self_attn.v_proj"]),
        ("attn_output", &["self_attn.o_proj"]),
        ("ffn_gate", &["mlp.gate_proj"]),
        ("ffn_up", &["mlp.up_proj"]),
        ("ffn_down", &["mlp.down_proj"]),
    ],
    ignored: &[],
    ..GGUF_LLAMA
};

impl Naming {
    /// Every tensor of a model in a file of the family.
    pub fn entries(&self, config: &ModelConfig) -> Vec<Entry> {
        let known: BTreeSet<String> = expected_tensors(config).into_keys().collect();
        let heads = config.num_heads;
        let mut entries = Vec::new();
        let mut add = |theirs: &str, ours: &[String]| {
            for end in [".weight", ".bias"] {
                let ours: Vec<String> = ours.iter().map(|name| format!("{name}{end}")).collect();
                if known.contains(&ours[0]) {
                    let layout = match ours[..] {
                        [_] if self.norms_less_one && ours[0].contains("norm") => Layout::LessOne,
                        [_] => Layout::Same,
                        _ => Layout::HeadwiseQkv { heads },
                    };
                    entries.push(Entry { theirs: format!("{theirs}{end}"), ours, layout });
                }
            }
        };
        for (theirs, ours) in [(self.embedding, "embed_tokens"), (self.norm, "norm"), (self.head, "lm_head")] {
            add(theirs, &[ours.to_owned()]);
        }
        for place in config.places() {
            let (layer, ours) = (config.layer_index(place), config.matrices_prefix(place));
            for (part, names) in self.parts {
                let ours: Vec<String> = names.iter().map(|name| format!("{ours}.{name}")).collect();
                add(&format!("{}.{layer}.{part}", self.layers), &ours);
            }
        }
        entries
    }

    /// The names of the embedding and the head in a file.
    pub fn ends(&self) -> [String; 2] {
        [self.embedding, self.head].map(|name| format!("{name}.weight"))
    }

    /// Whether a file may hold a tensor of this name that the model does not need.
    pub fn ignores(&self, name: &str, config: &ModelConfig) -> bool {
        let tied_head = config.tie_embeddings && name.strip_suffix(".weight") == Some(self.head);
        tied_head || self.ignored.iter().any(|end| name.ends_with(end))
    }
}
