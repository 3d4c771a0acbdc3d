//! Latency profiles: what the parts of a pass were measured to take.
//!
//! The time of a pass is the sum of its parts:
//!
//! ```text
//! overhead                                   once a pass
//! + block(rows)                              everything of the block that depends on the number of rows alone
//! + decode_attention(rows, history)          decode rows, at their mean history
//! + sum over chunks of prefill_attention(tokens, history)
//! + depth_mix(rows, depths)                  what distinct depths in one pass add (LoRA, gathering)
//! + embed(rows at depth 0)
//! + head(rows that are looked at or leave)
//! ```

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A part of a pass that is measured on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Component {
    /// The shared block, by `rows`: what depends on neither histories nor depths.
    Block,
    /// What the histories of decode rows add, by `rows` and `kv_tokens` (history of each).
    DecodeAttention,
    /// What attention of one prompt chunk adds, by `rows` (its tokens) and `kv_tokens` (history before it).
    PrefillAttention,
    /// What `depths` distinct depths in one pass add to a pass at one depth, by `rows`.
    DepthMix,
    /// Embedding lookup, by `rows`.
    Embed,
    /// The exit head over the vocabulary, by `rows`.
    Head,
}

impl Component {
    /// Every component, in the order in which files list them.
    pub const ALL: [Self; 6] =
        [Self::Block, Self::DecodeAttention, Self::PrefillAttention, Self::DepthMix, Self::Embed, Self::Head];

    /// The name in files.
    pub fn name(self) -> &'static str {
        match self {
            Self::Block => "block",
            Self::DecodeAttention => "decode_attention",
            Self::PrefillAttention => "prefill_attention",
            Self::DepthMix => "depth_mix",
            Self::Embed => "embed",
            Self::Head => "head",
        }
    }
}

impl fmt::Display for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Component {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|component| component.name() == name)
            .ok_or_else(|| format!("unknown component `{name}`"))
    }
}

/// One measured point of a component.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Point {
    /// What was measured.
    pub component: Component,
    /// Rows of the pass (or tokens of the chunk).
    pub rows: u32,
    /// History of each decode row, or before the chunk, in tokens; 0 where it plays no part.
    pub kv_tokens: u32,
    /// Distinct depths among the rows; 1 except for [`Component::DepthMix`].
    pub depths: u32,
    /// Median time in microseconds.
    pub time_us: f64,
    /// Half the distance between the quartiles, in microseconds.
    pub spread_us: f64,
    /// Repeats behind the median; 0 where the time was computed rather than measured.
    pub repeats: u32,
}

/// Where a profile comes from and what the device holds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfileMeta {
    /// Version of the file format: [`LatencyProfile::SCHEMA_VERSION`].
    pub schema_version: u32,
    /// Name of the model, for people.
    pub model: String,
    /// Fingerprint of the model's configuration and weights; `any` matches every exit trace.
    pub fingerprint: String,
    /// Loops of the model.
    pub num_loops: u32,
    /// The device, with what is known of it: name, cores or clock.
    pub device: String,
    /// Software and number type that ran on it.
    pub software: String,
    /// How the numbers came about: the command, or the tables they were computed from.
    pub source: String,
    /// Fixed time of a pass that no other part holds, in microseconds.
    pub overhead_us: f64,
    /// Bytes of all weights.
    pub weight_bytes: u64,
    /// Bytes of keys and values of one token, over all depths.
    pub kv_bytes_per_token: u64,
}

/// What the parts of a pass take on one device, for one model.
#[derive(Clone, Debug, PartialEq)]
pub struct LatencyProfile {
    /// Where it comes from.
    pub meta: ProfileMeta,
    /// The measured points.
    pub points: Vec<Point>,
}

impl LatencyProfile {
    /// Version of the files that this crate reads and writes.
    pub const SCHEMA_VERSION: u32 = 1;
    /// Fingerprint of a profile that stands for no particular weights.
    pub const ANY_MODEL: &str = "any";

    /// The points of one component.
    pub fn points_of(&self, component: Component) -> impl Iterator<Item = &Point> {
        self.points.iter().filter(move |point| point.component == component)
    }
}
