//! Theoretical minimum time of each operation of a pass on an A100 and an H100, and of a whole layer: the tables of
//! `docs/notebook/gpu-engine.md`.
//!
//! ```sh
//! cargo run --release -p engine --example cuda_floors
//! ```

use engine::config::{LoraConfig, LoraRanks, ModelConfig};
use engine::cuda::floors::{Ceilings, Load, Operation, Sizes};
use engine::cuda::pass::{Arrays, BlockTable, PassRows};
use engine::cuda::source::Scalar;
use engine::kernels::attention::Row;

/// An A100 SXM of 80 GB and an H100 SXM, from their data sheets: bytes per second; operations per second in `f32`, two
/// per multiply-add; and operations in bf16 on tensor cores, without sparsity.
const DEVICES: [Ceilings; 2] = [
    Ceilings { bytes_per_s: 2.04e12, operations_per_s: 19.5e12, product_operations_per_s: 312e12 },
    Ceilings { bytes_per_s: 3.35e12, operations_per_s: 67e12, product_operations_per_s: 989e12 },
];

const LOAD: Load = Load { rows: 64, depths: 3, history: 2560, chunk: 512 };

const BLOCK_TOKENS: usize = 16;

/// Gemma 2B as a recursive model: 18 layers in three loops of six, with adapters of rank 64, as in
/// `configs/cuda/gemma-2b-3-loops.json`.
fn gemma() -> ModelConfig {
    ModelConfig {
        vocab_size: 256_000,
        hidden_size: 2048,
        intermediate_size: 16_384,
        num_heads: 8,
        num_kv_heads: 1,
        head_dim: 256,
        block_layers: 6,
        num_loops: 3,
        lora: Some(LoraConfig { ranks: LoraRanks::all(64), scale: 1.0 }),
        ..ModelConfig::default()
    }
}

/// Launches, megabytes and minimum times on both devices of the operations of a layer that satisfy a condition.
fn sum(sizes: &Sizes<'_>, belongs: impl Fn(Operation) -> bool) -> (usize, f64, [f64; 2]) {
    let mut sum = (0, 0.0, [0.0; 2]);
    for operation in sizes.operations().into_iter().filter(|&operation| belongs(operation)) {
        let (launches, work) = (sizes.launches(operation, &LOAD), sizes.work(operation, &LOAD));
        sum.0 += launches;
        sum.1 += launches as f64 * work.bytes / 1e6;
        for (sum, device) in sum.2.iter_mut().zip(&DEVICES) {
            *sum += launches as f64 * work.floor_us(device);
        }
    }
    sum
}

/// Bytes of indices that the host uploads for the block in a pass.
fn uploaded_bytes() -> usize {
    let blocks: Vec<Vec<u32>> = vec![(0..(LOAD.history / BLOCK_TOKENS) as u32).collect(); LOAD.rows];
    let depth = |row| row * LOAD.depths / LOAD.rows;
    let rows = blocks.iter().enumerate().map(|(row, blocks)| Row::new(LOAD.history - 1, depth(row), blocks));
    let (mut table, mut arrays) = (BlockTable::default(), Arrays::default());
    let pass = PassRows::new(&rows.collect::<Vec<_>>(), None, LOAD.depths, &mut table);
    let table = table.append(&mut arrays);
    pass.append(&mut arrays, pass.room(), table);
    arrays.bytes().len()
}

fn main() {
    let (config, plain) = (gemma(), ModelConfig { lora: None, ..gemma() });
    let [sizes, without] = [&config, &plain].map(|config| Sizes { config, scalar: Scalar::Bf16 });
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

    println!("\n| a layer of the block | launches | MB | A100, us | H100, us |");
    println!("| --- | ---: | ---: | ---: | ---: |");
    let line = |name: &str, (launches, megabytes, [a100, h100]): (usize, f64, [f64; 2])| {
        println!("| {name} | {launches} | {megabytes:.1} | {a100:.1} | {h100:.1} |");
    };
    let (whole, other) = (sum(&sizes, |_| true), sum(&without, |_| true));
    let times = [0, 1].map(|device| whole.2[device] - other.2[device]);
    line("all", whole);
    line("of which adapters add", (whole.0 - other.0, whole.1 - other.1, times));
    line("`attend_splits`", sum(&sizes, |operation| operation == Operation::AttendSplits));
    line("`attend_join`", sum(&sizes, |operation| operation == Operation::AttendJoin));
    println!("\nIndices that the host uploads for a pass: {:.1} kB", uploaded_bytes() as f64 / 1e3);
}
