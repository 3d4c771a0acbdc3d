//! One pass of the block and of the head by rows, on a model of the size that is in the repository.

use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use engine::cache::KvCache;
use engine::config::ModelConfig;
use engine::executor::in_pool;
use engine::kernels::linear::WeightType;
use engine::kernels::rows::Source;
use engine::kernels::signals::read;
use engine::model::{Model, Rows};
use engine::weights::Weights;

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 512,
        hidden_size: 192,
        intermediate_size: 512,
        num_heads: 6,
        num_kv_heads: 2,
        head_dim: 32,
        block_layers: 2,
        num_loops: 4,
        tie_embeddings: true,
        max_positions: 512,
        ..ModelConfig::default()
    }
}

fn pass(criterion: &mut Criterion) {
    let model = Arc::new(Model::load(&Weights::random(config(), 1).unwrap(), WeightType::F32).unwrap());
    let cache = KvCache::new(model.config(), 64 * 16, 16, &candle_core::Device::Cpu).unwrap();
    let blocks: Vec<Vec<u32>> = (0..64).map(|row| (row * 16..row * 16 + 16).collect()).collect();
    for (name, history) in [("block", 1), ("block after 200 tokens", 200)] {
        let mut group = criterion.benchmark_group(name);
        for count in [1_usize, 4, 8, 16, 32, 64] {
            let nothing =
                candle_core::Tensor::zeros((1, 192), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
            let sources: Vec<Source> = (0..count).map(|row| Source::First(row as u32)).collect();
            let mut rows = Rows::default();
            (0..count).for_each(|row| rows.push(history, 1, 1..2, &blocks[row]));
            let hidden = model.embed(&nothing, &sources, &rows, &cache).unwrap();
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
    let mut group = criterion.benchmark_group("head");
    for count in [1_usize, 4, 8, 16, 32, 64] {
        let hidden =
            candle_core::Tensor::ones((count, 192), candle_core::DType::F32, &candle_core::Device::Cpu).unwrap();
        let keys = vec![0; count];
        let mut rows = Rows::default();
        (0..count).for_each(|row| rows.push(1, 1, 1..2, &blocks[row]));
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(count.to_string(), |bencher| {
            in_pool(|| bencher.iter(|| read(&model.logits(&hidden, &rows, &cache).unwrap(), 0.0, &keys).unwrap()));
        });
    }
}

criterion_group!(benches, pass);
criterion_main!(benches);
