//! The report on a device's kernels, as far as a device without a reliable clock can test it.

use engine::config::{LoraConfig, LoraRanks, ModelConfig};
use engine::cuda::floors::{Load, Sizes};
use engine::cuda::source::Scalar;
use engine::cuda::timing::{Effort, report};

use crate::bench::Bench;

/// An effort for an emulated device.
const LITTLE: Effort = Effort { repeats: 1, copied_bytes: 1 << 16, product: 16 };

#[test]
fn every_operation_of_a_pass_is_timed_and_has_a_floor() {
    let config = ModelConfig {
        vocab_size: 300,
        hidden_size: 48,
        intermediate_size: 64,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 16,
        block_layers: 1,
        num_loops: 3,
        head_lora_rank: 2,
        lora: Some(LoraConfig { ranks: LoraRanks { q: 3, up: 2, down: 5, ..LoraRanks::default() }, scale: 1.0 }),
        ..ModelConfig::default()
    };
    for scalar in [Scalar::F32, Scalar::Bf16] {
        let Some(bench) = Bench::of(scalar) else { return };
        let sizes = Sizes { config: &config, scalar };
        let loads =
            [Load { rows: 1, depths: 1, history: 1, chunk: 5 }, Load { rows: 5, depths: 3, history: 600, chunk: 40 }];
        let report = report(&*bench.machine, &sizes, &loads, LITTLE).unwrap();
        let names: Vec<String> = report.times.iter().map(|time| time.operation.clone()).collect();
        let expected: Vec<String> = sizes.operations().iter().map(ToString::to_string).collect();
        assert_eq!(names, [&expected[..], &expected[..]].concat());
        assert!(expected.contains(&"lora_add of head".to_owned()) && !expected.contains(&"lora_add of o".to_owned()));
        for time in &report.times {
            // A history of one split is not joined.
            let idle = time.operation == "attend_join" && time.history == 1;
            assert_eq!(time.floor_us > 0.0, !idle, "{time:?}");
        }
        let ceilings = report.ceilings;
        for ceiling in [ceilings.bytes_per_s, ceilings.operations_per_s, ceilings.product_operations_per_s] {
            assert!(ceiling.is_finite() && ceiling > 0.0, "{ceilings:?}");
        }
    }
}
