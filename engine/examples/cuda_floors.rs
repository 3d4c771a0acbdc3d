//! Theoretical minimum time of each operation of a pass on an A100 and an H100: the table of
//! `docs/notebook/gpu-engine.md`.
//!
//! ```sh
//! cargo run --release -p engine --example cuda_floors
//! ```

use engine::config::{LoraConfig, LoraRanks, ModelConfig};
use engine::cuda::floors::{Ceilings, Load, Sizes};
use engine::cuda::source::Scalar;

/// An A100 SXM of 80 GB and an H100 SXM, from their data sheets: bytes per second; operations per second in `f32`, two
/// per multiply-add; and operations in bf16 on tensor cores, without sparsity.
const DEVICES: [Ceilings; 2] = [
    Ceilings { bytes_per_s: 2.04e12, operations_per_s: 19.5e12, product_operations_per_s: 312e12 },
    Ceilings { bytes_per_s: 3.35e12, operations_per_s: 67e12, product_operations_per_s: 989e12 },
];

const LOAD: Load = Load { rows: 64, depths: 2, history: 1536, chunk: 512 };

/// Gemma 2B as a recursive model: 18 layers in two loops of nine, with adapters of rank 64.
fn gemma() -> ModelConfig {
    ModelConfig {
        vocab_size: 256_000,
        hidden_size: 2048,
        intermediate_size: 16_384,
        num_heads: 8,
        num_kv_heads: 1,
        head_dim: 256,
        block_layers: 9,
        num_loops: 2,
        lora: Some(LoraConfig { ranks: LoraRanks::all(64), scale: 1.0 }),
        ..ModelConfig::default()
    }
}

fn main() {
    let config = gemma();
    let sizes = Sizes { config: &config, scalar: Scalar::Bf16 };
    println!("| operation | MB | Mflop | A100 memory, us | A100 arithmetic | H100 memory, us | H100 arithmetic |");
    println!("| --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    for operation in sizes.operations() {
        let work = sizes.work(operation, &LOAD);
        let [a100, h100] = DEVICES.map(|device| (work.memory_us(&device), work.arithmetic_us(&device)));
        println!(
            "| {operation} | {:.1} | {:.0} | {:.1} | {:.1} | {:.1} | {:.1} |",
            work.bytes / 1e6,
            work.operations / 1e6,
            a100.0,
            a100.1,
            h100.0,
            h100.1
        );
    }
}
