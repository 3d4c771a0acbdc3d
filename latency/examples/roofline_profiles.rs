//! Latency profiles that are computed, not measured: Gemma 2B as three loops of six layers on two GPUs, by a roofline.
//!
//! A component takes the longer of two times: that of its bytes at a share of the memory's bandwidth, and that of its
//! arithmetic at a share of the peak rate. The shares are assumptions, and so is the fixed time of a pass. The profiles serve
//! examples of machines with roles, where a prompt must cost what its arithmetic costs:
//!
//! ```sh
//! cargo run --release -p latency --example roofline_profiles -- configs/machines/profiles
//! ```

use std::path::Path;

use traces::{Component, LatencyProfile, MemoryFigures, Point, ProfileMeta};

/// Gemma 2B (`configs/gpu/gemma-2b.json`) in bf16.
mod gemma {
    pub const LAYERS: u64 = 18;
    pub const LOOPS: u64 = 3;
    pub const HIDDEN: u64 = 2048;
    pub const INNER: u64 = 16384;
    pub const HEADS: u64 = 8;
    pub const KV_HEADS: u64 = 1;
    pub const HEAD_SIZE: u64 = 256;
    pub const VOCABULARY: u64 = 256_000;
    pub const BYTES: u64 = 2;

    /// Layers of the block, which all loops share.
    pub const BLOCK_LAYERS: u64 = LAYERS / LOOPS;
    const ATTENTION: u64 = 2 * HIDDEN * HEAD_SIZE * (HEADS + KV_HEADS);
    const MLP: u64 = 3 * HIDDEN * INNER;
    /// Parameters of the block.
    pub const BLOCK: u64 = BLOCK_LAYERS * (ATTENTION + MLP);
    /// Parameters of the head, which is also the embedding.
    pub const HEAD: u64 = VOCABULARY * HIDDEN;
    /// Bytes of keys and values of a token at one depth.
    pub const KV_OF_DEPTH: u64 = 2 * BLOCK_LAYERS * KV_HEADS * HEAD_SIZE * BYTES;
}

/// A GPU, by its data sheet.
struct Device {
    name: &'static str,
    folder: &'static str,
    bytes_per_s: f64,
    /// Dense bf16 operations.
    flops: f64,
    memory_bytes: u64,
}

const DEVICES: [Device; 2] = [
    Device {
        name: "NVIDIA H100 SXM (computed)",
        folder: "h100",
        bytes_per_s: 3.35e12,
        flops: 989e12,
        memory_bytes: 80_000_000_000,
    },
    Device {
        name: "NVIDIA A100 SXM (computed)",
        folder: "a100",
        bytes_per_s: 2.039e12,
        flops: 312e12,
        memory_bytes: 80_000_000_000,
    },
];

/// Shares of the data sheet's rates that kernels reach, and the fixed time of a pass in microseconds: assumptions.
const BANDWIDTH_SHARE: f64 = 0.8;
const FLOPS_SHARE: f64 = 0.6;
const OVERHEAD_US: f64 = 20.0;

const ROWS: [u32; 14] = [1, 16, 32, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192];
const HISTORIES: [u32; 3] = [0, 1024, 16384];

impl Device {
    fn time_us(&self, bytes: f64, operations: f64) -> f64 {
        let seconds = (bytes / (self.bytes_per_s * BANDWIDTH_SHARE)).max(operations / (self.flops * FLOPS_SHARE));
        1e6 * seconds
    }

    /// A product of `rows` rows with a matrix.
    fn product(&self, parameters: u64, rows: u32) -> f64 {
        let parameters = parameters as f64;
        self.time_us(parameters * gemma::BYTES as f64, 2.0 * parameters * f64::from(rows))
    }

    /// Decode rows read the keys and values of their histories.
    fn decode_attention(&self, rows: u32, history: u32) -> f64 {
        self.time_us(f64::from(rows) * f64::from(history) * gemma::KV_OF_DEPTH as f64, 0.0)
    }

    /// A chunk attends to its history and, on average, to half of itself: products with keys and with values.
    fn prefill_attention(&self, tokens: u32, history: u32) -> f64 {
        let keys = f64::from(history) + f64::from(tokens) / 2.0;
        let of_pair = 4 * gemma::BLOCK_LAYERS * gemma::HEADS * gemma::HEAD_SIZE;
        self.time_us(keys * gemma::KV_OF_DEPTH as f64, f64::from(tokens) * keys * of_pair as f64)
    }

    fn points(&self) -> Vec<Point> {
        let point = |component, rows, kv_tokens, time_us| Point {
            component,
            rows,
            kv_tokens,
            depths: 1,
            time_us,
            spread_us: 0.0,
            repeats: 0,
        };
        let by_rows = ROWS.iter().flat_map(|&rows| {
            let embedding = self.time_us(f64::from(rows) * (gemma::HIDDEN * gemma::BYTES) as f64, 0.0);
            [
                point(Component::Block, rows, 0, self.product(gemma::BLOCK, rows)),
                point(Component::Embed, rows, 0, embedding),
                point(Component::Head, rows, 0, self.product(gemma::HEAD, rows)),
            ]
        });
        let grid = ROWS.iter().flat_map(|&rows| HISTORIES.map(|history| (rows, history)));
        let by_history = grid.flat_map(|(rows, history)| {
            [
                point(Component::DecodeAttention, rows, history, self.decode_attention(rows, history)),
                point(Component::PrefillAttention, rows, history, self.prefill_attention(rows, history)),
            ]
        });
        by_rows.chain(by_history).collect()
    }

    fn profile(&self) -> LatencyProfile {
        let meta = ProfileMeta {
            schema_version: LatencyProfile::SCHEMA_VERSION,
            model: format!("Gemma 2B, {} loops", gemma::LOOPS),
            fingerprint: LatencyProfile::ANY_MODEL.to_owned(),
            num_loops: gemma::LOOPS as u32,
            device: self.name.to_owned(),
            software: "none; bf16".to_owned(),
            source: format!(
                "computed by latency/examples/roofline_profiles.rs: {:.0}% of {:.3} TB/s, {:.0}% of {:.0} TFLOP/s, and \
                 {OVERHEAD_US} us a pass, which are assumptions",
                1e2 * BANDWIDTH_SHARE,
                self.bytes_per_s / 1e12,
                1e2 * FLOPS_SHARE,
                self.flops / 1e12
            ),
            overhead_us: OVERHEAD_US,
            weight_bytes: (gemma::BLOCK + gemma::HEAD) * gemma::BYTES,
            kv_bytes_per_token: gemma::LOOPS * gemma::KV_OF_DEPTH,
            memory: Some(MemoryFigures { device_bytes: Some(self.memory_bytes), ..MemoryFigures::default() }),
            kv_fill: None,
            decode_q_len: None,
            heads_ahead_from: None,
        };
        LatencyProfile { meta, points: self.points(), mixed_attention: None }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = std::env::args().nth(1).ok_or("expected a folder to write profiles to")?;
    for device in DEVICES {
        device.profile().write(Path::new(&folder).join(device.folder))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_profiles_of_this_repository_are_what_this_program_writes() {
        let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/machines/profiles");
        for device in DEVICES {
            assert_eq!(LatencyProfile::read(shipped.join(device.folder)).unwrap(), device.profile());
        }
    }
}
