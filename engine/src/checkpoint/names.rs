//! What families call their tensors.

use std::collections::BTreeSet;

use crate::config::{ModelConfig, Place, Sharing};
use crate::tensor_file::{Entry, Layout};
use crate::weights::expected_tensors;

/// The names of a family's tensors, each without the `.weight` or `.bias` at its end.
pub(super) struct Naming {
    embedding: &'static str,
    norm: &'static str,
    head: &'static str,
    /// What a layer's names begin with, before its number.
    layers: Numbered,
    /// A layer's parts: their name, and ours. Parts that a model does not have are skipped.
    parts: &'static [(&'static str, &'static [&'static str])],
    /// How parts that hold several of ours hold them.
    fused: Fused,
    /// Tensors beside those of the layers: their name, and ours. Those that a model does not have are skipped.
    beside: &'static [(&'static str, &'static str)],
    /// Whether norms are stored less one.
    norms_less_one: bool,
    /// Ends of the names of tensors that follow from the configuration.
    ignored: &'static [&'static str],
}

/// How a family numbers layers.
enum Numbered {
    /// One after the other, from the first to the last.
    All(&'static str),
    /// Those of the prelude, the block and the coda each for themselves.
    Apart([&'static str; 3]),
}

/// How a tensor holds several of ours.
#[derive(Clone, Copy)]
enum Fused {
    /// Query, key and value by head.
    Headwise,
    /// One after the other, with the rotated pairs of queries and keys adjacent.
    Adjacent,
}

/// Huginn's biases of queries and keys, whose name has no end.
const QK_BIAS: &str = "attn.qk_bias";

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
    layers: Numbered::All("model.layers"),
    parts: OWN_PARTS,
    fused: Fused::Headwise,
    beside: &[],
    norms_less_one: false,
    ignored: &["rotary_emb.inv_freq"],
};

/// `OuroForCausalLM`, with a norm before and after each attention and each MLP.
pub(super) const OURO: Naming = Naming {
    parts: &[
        ("input_layernorm", &["input_layernorm"]),
        ("input_layernorm_2", &["post_attention_layernorm"]),
        ("post_attention_layernorm", &["pre_feedforward_layernorm"]),
        ("post_attention_layernorm_2", &["post_feedforward_layernorm"]),
        ("self_attn.q_proj", &["self_attn.q_proj"]),
        ("self_attn.k_proj", &["self_attn.k_proj"]),
        ("self_attn.v_proj", &["self_attn.v_proj"]),
        ("self_attn.o_proj", &["self_attn.o_proj"]),
        ("mlp.gate_proj", &["mlp.gate_proj"]),
        ("mlp.up_proj", &["mlp.up_proj"]),
        ("mlp.down_proj", &["mlp.down_proj"]),
    ],
    beside: &[("model.early_exit_gate", "gate")],
    ..LLAMA
};

/// `RavenForCausalLM`.
pub(super) const RAVEN: Naming = Naming {
    embedding: "transformer.wte",
    norm: "transformer.ln_f",
    head: "lm_head",
    layers: Numbered::Apart(["transformer.prelude", "transformer.core_block", "transformer.coda"]),
    parts: &[
        ("norm_1", &["input_layernorm"]),
        ("norm_2", &["post_attention_layernorm"]),
        ("norm_3", &["pre_feedforward_layernorm"]),
        ("norm_4", &["post_feedforward_layernorm"]),
        ("attn.Wqkv", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        (QK_BIAS, &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("attn.proj", &["self_attn.o_proj"]),
        ("mlp.fc", &["mlp.gate_proj", "mlp.up_proj"]),
        ("mlp.proj", &["mlp.down_proj"]),
    ],
    fused: Fused::Adjacent,
    beside: &[("transformer.adapter", "adapter")],
    norms_less_one: false,
    ignored: &["freqs_cis"],
};

/// `GemmaForCausalLM` and `Gemma3ForCausalLM`.
pub(super) const GEMMA: Naming = Naming { norms_less_one: true, ..LLAMA };

/// `GPTNeoXForCausalLM`. Some of its files hold attention masks.
pub(super) const GPT_NEOX: Naming = Naming {
    embedding: "gpt_neox.embed_in",
    norm: "gpt_neox.final_layer_norm",
    head: "embed_out",
    layers: Numbered::All("gpt_neox.layers"),
    parts: &[
        ("input_layernorm", &["input_layernorm"]),
        ("post_attention_layernorm", &["post_attention_layernorm"]),
        ("attention.query_key_value", &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("attention.dense", &["self_attn.o_proj"]),
        ("mlp.dense_h_to_4h", &["mlp.up_proj"]),
        ("mlp.dense_4h_to_h", &["mlp.down_proj"]),
    ],
    fused: Fused::Headwise,
    beside: &[],
    norms_less_one: false,
    ignored: &["rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"],
};

/// GGUF's `llama`.
pub(super) const GGUF_LLAMA: Naming = Naming {
    embedding: "token_embd",
    norm: "output_norm",
    head: "output",
    layers: Numbered::All("blk"),
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
    fused: Fused::Headwise,
    beside: &[],
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
        let mut entries = Vec::new();
        let mut add = |theirs: &str, ours: &[String]| {
            for end in [".weight", ".bias"] {
                let ours: Vec<String> = ours.iter().map(|name| format!("{name}{end}")).collect();
                if known.contains(&ours[0])
                    && let Some((theirs, layout)) = self.stored_as(theirs, end, &ours, config)
                {
                    entries.push(Entry { theirs, ours, layout });
                }
            }
        };
        let ends = [(self.embedding, "embed_tokens"), (self.norm, "norm"), (self.head, "lm_head")];
        for (theirs, ours) in ends.iter().chain(self.beside) {
            add(theirs, &[(*ours).to_owned()]);
        }
        // Layers that loops share are in the file once.
        let stored = |place: &Place| match place {
            Place::Block { depth, .. } => *depth == 0 || config.sharing == Sharing::Nothing,
            Place::Prelude(_) | Place::Coda(_) => true,
        };
        for place in config.places().filter(stored) {
            let (layer, ours) = (self.layer(config, place), config.matrices_prefix(place));
            for (part, names) in self.parts {
                let ours: Vec<String> = names.iter().map(|name| format!("{ours}.{name}")).collect();
                add(&format!("{layer}.{part}"), &ours);
            }
        }
        entries
    }

    /// What the names of a layer's tensors begin with.
    fn layer(&self, config: &ModelConfig, place: Place) -> String {
        match (&self.layers, place) {
            (Numbered::All(layers), _) => format!("{layers}.{}", config.layer_index(place)),
            (Numbered::Apart([prelude, ..]), Place::Prelude(layer)) => format!("{prelude}.{layer}"),
            (Numbered::Apart([_, block, _]), Place::Block { layer, .. }) => format!("{block}.{layer}"),
            (Numbered::Apart([.., coda]), Place::Coda(layer)) => format!("{coda}.{layer}"),
        }
    }

    /// The name and the layout in the file of tensors of ours with this `end`; `None` if another part holds them.
    fn stored_as(&self, theirs: &str, end: &str, ours: &[String], config: &ModelConfig) -> Option<(String, Layout)> {
        let (heads, kv_heads) = (config.num_heads, config.num_kv_heads);
        let name = format!("{theirs}{end}");
        Some(match (ours.len(), self.fused) {
            (1, _) if ours[0] == "gate.weight" => (name, Layout::OneRow),
            (1, _) if self.norms_less_one && ours[0].contains("norm") => (name, Layout::LessOne),
            (1, _) => (name, Layout::Same),
            (_, Fused::Headwise) => (name, Layout::HeadwiseQkv { heads }),
            (3, Fused::Adjacent) => match (theirs.ends_with(QK_BIAS), end) {
                (false, ".weight") => (name, Layout::AdjacentQkv { heads: [heads, kv_heads] }),
                (true, ".bias") => (theirs.to_owned(), Layout::AdjacentQkBias { heads }),
                _ => return None,
            },
            (_, Fused::Adjacent) => (name, Layout::Stacked),
        })
    }

    /// The names of the embedding and the head in a file.
    pub fn ends(&self) -> [String; 2] {
        [self.embedding, self.head].map(|name| format!("{name}.weight"))
    }

    /// Whether a file may hold a tensor of this name that the model does not need.
    pub fn ignores(&self, name: &str, config: &ModelConfig) -> bool {
        let tied_head = config.tie_embeddings && name.strip_suffix(".weight") == Some(self.head);
        // A model of one loop has no gate.
        let beside = self.beside.iter().any(|(theirs, _)| name.starts_with(theirs));
        tied_head || beside || self.ignored.iter().any(|end| name.ends_with(end))
    }
}
