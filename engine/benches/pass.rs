//! Time of one pass of the block and of the head by rows, for a model of the repository's size and one with the sizes
//! of SmolLM2-135M. `RAYON_NUM_THREADS` sets the number of threads.

use candle_core::{DType, Device, Tensor};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engine::cache::KvCache;
use engine::kernels::attention::Row;
use engine::kernels::rows::Source;
use engine::model::{InFlight, Model, Rows};
use engine::{ModelConfig, WeightType, Weights, in_pool};
use scheduler::KvFill;

/// The model of the repository.
fn small() -> ModelConfig {
    ModelConfig { max_positions: 512, ..ModelConfig::default() }
}

/// SmolLM2-135M's layers as three loops of ten.
fn medium() -> ModelConfig {
    ModelConfig {
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        num_heads: 9,
        num_kv_heads: 3,
        head_dim: 64,
        block_layers: 10,
        num_loops: 3,
        max_positions: 512,
        ..ModelConfig::default()
    }
}

/// Sixteen blocks of sixteen positions for each row.
fn blocks(rows: usize) -> Vec<Vec<u32>> {
    (0..rows as u32).map(|row| (row * 16..row * 16 + 16).collect()).collect()
}

fn block(criterion: &mut Criterion, name: &str, model: &Model, history: usize, counts: &[usize]) {
    let most = counts.iter().copied().max().unwrap_or(0);
    let (cache, blocks) =
        (KvCache::new(model.config(), KvFill::Reuse, most as u32 * 16, 16, &Device::Cpu).unwrap(), blocks(most));
    let mut group = criterion.benchmark_group(name);
    for &count in counts {
        let nothing = InFlight::new(model.config()).unwrap();
        let sources: Vec<Source> = (0..count).map(|row| Source::First(row as u32)).collect();
        let mut rows = Rows::default();
        (0..count).for_each(|row| rows.push(Row::new(history, 1, &blocks[row])));
        let hidden = model.embed(&nothing, &sources, &rows, &cache).unwrap().hidden;
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(count.to_string(), |bencher| {
            in_pool(|| {
                bencher.iter(|| {
                    let hidden = hidden.copy().unwrap();
                    model.forward_block(&hidden, &rows, &cache).unwrap();
                })
            });
        });
    }
}

fn head(criterion: &mut Criterion, model: &Model, counts: &[usize]) {
    let (cache, blocks) = (KvCache::new(model.config(), KvFill::Reuse, 1, 16, &Device::Cpu).unwrap(), blocks(1));
    let mut group = criterion.benchmark_group("head");
    for &count in counts {
        let hidden = Tensor::ones((count, model.config().hidden_size), DType::F32, &Device::Cpu).unwrap();
        let keys = vec![0; count];
        let mut rows = Rows::default();
        (0..count).for_each(|_| rows.push(Row::new(1, 1, &blocks[0])));
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(count.to_string(), |bencher| {
            in_pool(|| bencher.iter(|| model.verdicts(&hidden, &rows, &cache, 0.0, &keys).unwrap()));
        });
    }
}

fn pass(criterion: &mut Criterion) {
    let load = |config| Model::load(&Weights::random(config, 1).unwrap(), WeightType::F32).unwrap();
    let (model, counts) = (load(small()), [1, 4, 8, 16, 32, 64]);
    block(criterion, "block", &model, 1, &counts);
    block(criterion, "block after 200 tokens", &model, 200, &counts);
    head(criterion, &model, &counts);
    block(criterion, "block of 135M", &load(medium()), 1, &[8, 32, 128]);
}

criterion_group!(benches, pass);
criterion_main!(benches);
