//! Products of rows with the weights of SmolLM2-135M's layers and head, by weight type and number of rows.
//!
//! `cargo bench -p engine --bench products`; the throughput counts multiplications and additions.

use candle_core::{Device, Tensor};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use engine::in_pool;
use engine::kernels::linear::{Linear, WeightType};

/// Name, inputs and outputs.
const WEIGHTS: [(&str, usize, usize); 4] =
    [("qkv", 576, 960), ("gate and up", 576, 3072), ("down", 1536, 576), ("head", 576, 49152)];

fn products(criterion: &mut Criterion) {
    for (name, inputs, outputs) in WEIGHTS {
        let weight = Tensor::rand(-1.0_f32, 1.0, (outputs, inputs), &Device::Cpu).unwrap();
        let mut group = criterion.benchmark_group(name);
        group.sample_size(20);
        for weight_type in WeightType::ON_CPU {
            let linear = Linear::new(&weight, weight_type).unwrap();
            for rows in [1, 8, 32] {
                let x = Tensor::rand(-1.0_f32, 1.0, (rows, inputs), &Device::Cpu).unwrap();
                group.throughput(Throughput::Elements((2 * rows * inputs * outputs) as u64));
                group.bench_function(BenchmarkId::new(weight_type.name(), rows), |bencher| {
                    in_pool(|| bencher.iter(|| linear.forward(&x).unwrap()));
                });
            }
        }
    }
}

criterion_group!(benches, products);
criterion_main!(benches);
