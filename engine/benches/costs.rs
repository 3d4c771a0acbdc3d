//! Time of adapters and of the exit head, on a recursive model with the sizes of SmolLM2-135M: three loops of ten
//! layers.
//!
//! ```sh
//! cargo bench -p engine --bench costs -- [--rows 32] [--ranks 0,8,64,256] [--weights f32] [--runs 15]
//! ```
//! Every projection of every loop has adapters. Their cost is the time of a pass of the block relative to a pass of the
//! model without adapters, on equal rows, which are spread over the mixed depths. The cost of the head is the time from
//! hidden states to tokens and exit signals, relative to a pass of the block. Shapes take turns; times are medians.

mod common;

use std::time::Instant;

use candle_core::Device;
use common::{Arguments, machine, median};
use engine::cache::KvCache;
use engine::config::{LoraConfig, LoraRanks, ModelConfig};
use engine::kernels::attention::Row;
use engine::kernels::rows::Source;
use engine::model::{InFlight, Model, Rows};
use engine::{WeightType, Weights, in_pool};
use scheduler::KvFill;

/// Position of every row.
const HISTORY: usize = 100;
/// Blocks of 16 positions per row.
const BLOCKS: usize = HISTORY / 16 + 1;

fn model(rank: usize, weight_type: WeightType) -> Model {
    let config = ModelConfig {
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        num_heads: 9,
        num_kv_heads: 3,
        head_dim: 64,
        block_layers: 10,
        num_loops: 3,
        tie_embeddings: true,
        max_positions: 512,
        lora: (rank > 0).then(|| LoraConfig { ranks: LoraRanks::all(rank), scale: 1.0 }),
        ..ModelConfig::default()
    };
    Model::load(&Weights::random(config, 1).unwrap(), weight_type).unwrap()
}

/// Milliseconds of a pass of the block over `count` rows at `depths` depths, and of the head for all of them.
fn times(model: &Model, cache: &KvCache, count: usize, depths: usize) -> (f64, f64) {
    let blocks: Vec<Vec<u32>> =
        (0..count).map(|row| (0..BLOCKS).map(|block| (row * BLOCKS + block) as u32).collect()).collect();
    let mut rows = Rows::default();
    (0..count).for_each(|row| rows.push(Row::new(HISTORY, row * depths / count, &blocks[row])));
    let nothing = InFlight::new(model.config()).unwrap();
    let sources: Vec<Source> = (0..count).map(|row| Source::First(row as u32)).collect();
    let hidden = model.embed(&nothing, &sources, &rows, cache).unwrap().hidden;
    let millis = |start: Instant| start.elapsed().as_secs_f64() * 1e3;
    in_pool(|| {
        let start = Instant::now();
        model.forward_block(&hidden, &rows, cache).unwrap();
        let block = millis(start);
        let start = Instant::now();
        model.verdicts(&hidden, &rows, cache, 0.0, &vec![0; count]).unwrap();
        (block, millis(start))
    })
}

fn main() {
    let arguments = Arguments::parse(&["rows", "ranks", "weights", "runs"]);
    let (rows, runs): (usize, usize) = (arguments.get("rows", 32), arguments.get("runs", 15));
    let (ranks, weight_type): (Vec<usize>, _) =
        (arguments.list("ranks", "0,8,64,256"), arguments.get("weights", WeightType::F32));
    let models: Vec<(usize, Model)> = ranks.iter().map(|&rank| (rank, model(rank, weight_type))).collect();
    let cache = KvCache::new(models[0].1.config(), KvFill::Reuse, (rows * BLOCKS) as u32, 16, &Device::Cpu).unwrap();
    let mut samples = vec![[const { (Vec::new(), Vec::new()) }; 3]; models.len()];
    for _ in 0..runs {
        for ((_, model), samples) in models.iter().zip(&mut samples) {
            for (depths, (blocks, heads)) in (1..).zip(samples) {
                let (block, head) = times(model, &cache, rows, depths);
                blocks.push(block);
                heads.push(head);
            }
        }
    }
    println!("{}", machine());
    println!("{rows} rows after {HISTORY} tokens, {weight_type} weights");
    println!("\n| rank | depths mixed | block, ms | over no adapters | head, ms | head over block |");
    println!("| ---: | ---: | ---: | ---: | ---: | ---: |");
    let mut unrelaxed = [f64::NAN; 3];
    for ((rank, _), samples) in models.iter().zip(samples) {
        for (depths, (blocks, heads)) in (1..).zip(samples) {
            let (block, head) = (median(blocks), median(heads));
            if *rank == 0 {
                unrelaxed[depths - 1] = block;
            }
            let over = block / unrelaxed[depths - 1];
            println!("| {rank} | {depths} | {block:.2} | {over:.2} | {head:.2} | {:.2} |", head / block);
        }
    }
}
