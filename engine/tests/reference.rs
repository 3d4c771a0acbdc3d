//! The serving model gives the logits of the reference, at every position and depth, however a prompt is cut.

mod common;

use candle_core::{DType, Device, Tensor};
use common::{configs, weights};
use engine::cache::KvCache;
use engine::kernels::linear::WeightType;
use engine::kernels::rows::Source;
use engine::model::{Model, Rows};
use engine::reference::Reference;
use proptest::prelude::*;

/// Logits `[tokens][vocab]` by depth, of a sequence that runs in chunks.
fn chunked_logits(model: &Model, tokens: &[u32], chunk: usize) -> Vec<Vec<Vec<f32>>> {
    let config = model.config();
    let cache = KvCache::new(config, 8, 16, &Device::Cpu).unwrap();
    let nothing = Tensor::zeros((1, config.hidden_size), DType::F32, &Device::Cpu).unwrap();
    // Blocks out of order, as a scheduler may hand them out.
    let blocks = [3, 0, 7, 1, 2, 6, 5, 4];
    let mut logits = vec![Vec::new(); config.num_loops];
    for (index, part) in tokens.chunks(chunk).enumerate() {
        let sources: Vec<Source> = part.iter().map(|&token| Source::First(token)).collect();
        let rows = |depth| {
            let mut rows = Rows::default();
            let positions = index * chunk..index * chunk + part.len();
            positions.for_each(|position| rows.push(position, depth, depth..depth + 1, &blocks));
            rows
        };
        let hidden = model.embed(&nothing, &sources, &rows(0), &cache).unwrap();
        for (depth, logits) in logits.iter_mut().enumerate() {
            let rows = rows(depth);
            model.forward_block(&hidden, &rows, &cache).unwrap();
            let exits = model.forward_coda(&hidden, &rows, &cache).unwrap();
            logits.extend(model.logits(&exits, &rows, &cache).unwrap().to_vec2::<f32>().unwrap());
        }
    }
    logits
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn logits_equal_the_reference(
        config in configs(), seed in 0_u64..1000, length in 1_usize..100, chunk in 1_usize..100,
    ) {
        let weights = weights(&config, seed);
        let tokens: Vec<u32> = (0..length).map(|i| (i * i * 31 + i * 7) as u32 % config.vocab_size as u32).collect();
        let found = chunked_logits(&Model::load(&weights, WeightType::F32).unwrap(), &tokens, chunk);
        let input = Tensor::from_vec(tokens.clone(), (1, length), &Device::Cpu).unwrap();
        let expected = Reference::new(&weights).unwrap().forward(&input).unwrap();
        for (found, expected) in found.iter().zip(&expected) {
            let expected = expected.to_vec2::<f32>().unwrap();
            for (found, expected) in found.iter().zip(&expected) {
                let scale = expected.iter().fold(0_f32, |scale, logit| scale.max(logit.abs()));
                for (found, expected) in found.iter().zip(expected) {
                    prop_assert!((found - expected).abs() <= 1e-4 * scale, "{found} is not {expected} (of {scale})");
                }
            }
        }
    }

    #[test]
    fn chunking_changes_no_bit(config in configs(), seed in 0_u64..1000, length in 1_usize..100, chunk in 1_usize..100) {
        let model = Model::load(&weights(&config, seed), WeightType::F32).unwrap();
        let tokens: Vec<u32> = (0..length).map(|i| (i * i * 17 + i) as u32 % config.vocab_size as u32).collect();
        prop_assert_eq!(chunked_logits(&model, &tokens, chunk), chunked_logits(&model, &tokens, length));
    }
}
