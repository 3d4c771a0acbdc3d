//! Conversion takes the right layers, and at full rank restores the original model.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{Device, Tensor};
use engine::config::{Activation, Architecture, LoraRanks, ModelConfig, Norm, Place, Sharing, SlidingWindow};
use engine::reference::Reference;
use engine::{Checkpoint, Weights};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use training::convert::{AdapterStart, Conversion, Converted, Initialization, Ranks, Relaxation, Vectors, convert};

const INITIALIZATIONS: [Initialization; 4] =
    [Initialization::Stepwise, Initialization::Average, Initialization::Lower, Initialization::Random];
const SHARED_VECTORS: [Vectors; 3] = [Vectors::Average, Vectors::First, Vectors::Reset];

/// An ordinary transformer of a few small layers.
fn ordinary(layers: usize, architecture: Architecture) -> ModelConfig {
    ModelConfig {
        vocab_size: 31,
        hidden_size: 16,
        intermediate_size: 24,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 6,
        block_layers: layers,
        num_loops: 1,
        sharing: Sharing::Nothing,
        max_positions: 32,
        architecture,
        ..ModelConfig::default()
    }
}

/// Distinguishing features of each family.
fn families() -> [(&'static str, Architecture); 3] {
    let llama = Architecture::default();
    let gemma = Architecture {
        post_norms: true,
        qk_norm: true,
        activation: Activation::GeluTanh,
        sliding_window: Some(SlidingWindow { tokens: 3, rope_theta: 5_000.0, layers: vec![0, 1, 3, 4, 6, 7] }),
        attention_scale: Some(0.5),
        embedding_scale: 4.0,
        ..Architecture::default()
    };
    let neox = Architecture {
        norm: Norm::Layer,
        activation: Activation::Gelu,
        gated_mlp: false,
        parallel_residual: true,
        qkv_bias: true,
        output_bias: true,
        mlp_bias: true,
        rotary_dims: Some(2),
        ..Architecture::default()
    };
    [("llama", llama), ("gemma", gemma), ("gpt-neox", neox)]
}

/// Weights that are random everywhere, norms and biases included.
fn random(config: &ModelConfig, seed: u64) -> Weights {
    let fresh = Weights::random(config.clone(), seed).unwrap();
    let mut rng = StdRng::seed_from_u64(seed);
    let noisy = |(name, tensor): (&String, &Tensor)| {
        let noise = Tensor::from_iter((0..tensor.elem_count()).map(|_| rng.random_range(-0.3_f32..0.3)), &Device::Cpu);
        let noisy = match tensor.rank() {
            1 => (tensor + noise.unwrap()).unwrap(),
            _ => tensor.clone(),
        };
        (name.clone(), noisy)
    };
    let tensors = fresh.tensors().iter().map(noisy).collect();
    Weights::from_tensors(config.clone(), tensors, "test").unwrap()
}

/// Weights of layers whose matrices differ little.
fn alike(config: &ModelConfig, seed: u64) -> Weights {
    let weights = random(config, seed);
    let first = |name: &str| {
        let (_, within_layer) = name.split_once(".layers.")?.1.split_once('.')?;
        weights.get(&format!("loops.0.layers.0.{within_layer}")).ok().filter(|tensor| tensor.rank() == 2)
    };
    let near = |(name, tensor): (&String, &Tensor)| {
        let near =
            first(name).map_or(tensor.clone(), |first| (first * 0.95).unwrap().add(&(tensor * 0.05).unwrap()).unwrap());
        (name.clone(), near)
    };
    Weights::from_tensors(config.clone(), weights.tensors().iter().map(near).collect(), "test").unwrap()
}

/// Weights whose every number in layer `l` is `l + 1`.
fn numbered(config: &ModelConfig) -> Weights {
    let fresh = Weights::random(config.clone(), 1).unwrap();
    let mut tensors: HashMap<String, Tensor> = fresh.tensors().clone().into_iter().collect();
    for place in config.places() {
        let prefix = format!("{}.", config.matrices_prefix(place));
        let number = config.layer_index(place) as f64 + 1.0;
        for (_, tensor) in tensors.iter_mut().filter(|(name, _)| name.starts_with(&prefix)) {
            *tensor = tensor.zeros_like().unwrap().affine(0.0, number).unwrap();
        }
    }
    Weights::from_tensors(config.clone(), tensors, "test").unwrap()
}

fn conversion(num_loops: usize, initialization: Initialization) -> Conversion {
    Conversion {
        num_loops,
        prelude_layers: 0,
        coda_layers: 0,
        initialization,
        vectors: initialization.default_vectors(false),
        relaxation: None,
        seed: 7,
    }
}

fn relaxed(num_loops: usize, initialization: Initialization, ranks: Ranks) -> Conversion {
    Conversion {
        vectors: initialization.default_vectors(true),
        relaxation: Some(Relaxation { ranks, start: AdapterStart::Svd }),
        ..conversion(num_loops, initialization)
    }
}

fn run(source: &Weights, conversion: &Conversion) -> Converted {
    convert(source, conversion, |_| {}).unwrap()
}

fn refusal(source: &Weights, conversion: &Conversion) -> String {
    convert(source, conversion, |_| {}).unwrap_err().to_string()
}

fn first_number(weights: &Weights, name: &str) -> f32 {
    weights.get(name).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap()[0]
}

/// The last loop's logits of a sequence.
fn logits(weights: &Weights) -> Vec<f32> {
    logits_of(weights, &(0..20).map(|i| (i * i * 5 + i) % 31).collect::<Vec<_>>())
}

/// The last loop's logits of a text.
fn logits_of(weights: &Weights, tokens: &[u32]) -> Vec<f32> {
    let tokens = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = Reference::new(weights).unwrap().forward(&tokens).unwrap();
    logits.last().unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

/// The largest difference, relative to the largest expected number.
fn difference(found: &[f32], expected: &[f32]) -> f32 {
    let greatest = |numbers: &mut dyn Iterator<Item = f32>| numbers.fold(0_f32, |greatest, x| greatest.max(x.abs()));
    let error = greatest(&mut found.iter().zip(expected).map(|(found, expected)| found - expected));
    error / greatest(&mut expected.iter().copied())
}

/// The root of the sum of squared differences, relative to that of the expected squares.
fn mean_difference(found: &[f32], expected: &[f32]) -> f32 {
    let norm = |numbers: &mut dyn Iterator<Item = f32>| numbers.map(|x| x * x).sum::<f32>().sqrt();
    norm(&mut found.iter().zip(expected).map(|(found, expected)| found - expected))
        / norm(&mut expected.iter().copied())
}

/// Indices of the layers that the shared matrices and norms come from.
fn sources(layers: usize, conversion: &Conversion) -> Vec<f32> {
    let converted = run(&numbered(&ordinary(layers, Architecture::default())), conversion).weights;
    let number = |layer, name| first_number(&converted, &format!("block.layers.{layer}.{name}.weight")) - 1.0;
    (0..converted.config().block_layers)
        .map(|layer| {
            let of_matrix = number(layer, "mlp.gate_proj");
            assert_eq!(number(layer, "input_layernorm"), of_matrix, "norms come from where matrices do");
            of_matrix
        })
        .collect()
}

#[test]
fn stepwise_spreads_the_block_evenly_from_the_first_layer_to_the_last() {
    let stepwise = |layers, loops| sources(layers, &conversion(loops, Initialization::Stepwise));
    assert_eq!(stepwise(18, 2), [0.0, 2.0, 4.0, 6.0, 8.0, 11.0, 13.0, 15.0, 17.0]);
    assert_eq!(stepwise(18, 3), [0.0, 3.0, 7.0, 10.0, 14.0, 17.0]);
    assert_eq!(stepwise(12, 3), [0.0, 4.0, 7.0, 11.0]);
    assert_eq!(stepwise(6, 3), [0.0, 5.0]);
    assert_eq!(stepwise(6, 6), [0.0]);
    assert_eq!(stepwise(6, 1), [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let middle = Conversion { prelude_layers: 1, coda_layers: 1, ..conversion(4, Initialization::Stepwise) };
    assert_eq!(sources(30, &middle), [1.0, 6.0, 10.0, 14.0, 19.0, 24.0, 28.0]);
}

#[test]
fn lower_takes_the_first_layers_and_average_the_mean_of_the_tied_ones() {
    assert_eq!(sources(12, &conversion(3, Initialization::Lower)), [0.0, 1.0, 2.0, 3.0]);
    assert_eq!(sources(12, &conversion(3, Initialization::Average)), [4.0, 5.0, 6.0, 7.0]);
    let middle = |initialization| Conversion { prelude_layers: 2, coda_layers: 1, ..conversion(3, initialization) };
    assert_eq!(sources(12, &middle(Initialization::Lower)), [2.0, 3.0, 4.0]);
    assert_eq!(sources(12, &middle(Initialization::Average)), [5.0, 6.0, 7.0]);
}

#[test]
fn random_blocks_differ_only_by_seed() {
    let source = random(&ordinary(4, Architecture::default()), 1);
    let block = |seed| {
        let conversion = Conversion { seed, ..conversion(2, Initialization::Random) };
        first_number(&run(&source, &conversion).weights, "block.layers.1.mlp.up_proj.weight")
    };
    assert_eq!(block(1), block(1));
    assert_ne!(block(1), block(2));
    let converted = run(&source, &conversion(2, Initialization::Random)).weights;
    assert_eq!(first_number(&converted, "block.layers.1.input_layernorm.weight"), 1.0);
    let embedding = "embed_tokens.weight";
    assert_eq!(first_number(&converted, embedding), first_number(&source, embedding));
}

#[test]
fn norms_and_biases_are_averaged_taken_from_the_chosen_layer_reset_or_kept_by_loop() {
    let [_, _, (_, neox)] = families();
    let source = numbered(&ordinary(6, neox));
    let names = ["input_layernorm.weight", "input_layernorm.bias", "self_attn.q_proj.bias", "mlp.down_proj.bias"];
    let shared = |initialization, vectors| {
        let converted = run(&source, &Conversion { vectors, ..conversion(3, initialization) }).weights;
        names.map(|name| first_number(&converted, &format!("block.layers.1.{name}")))
    };
    assert_eq!(shared(Initialization::Stepwise, Vectors::Average), [4.0; 4]);
    assert_eq!(shared(Initialization::Stepwise, Vectors::First), [6.0; 4]);
    assert_eq!(shared(Initialization::Lower, Vectors::First), [2.0; 4]);
    assert_eq!(shared(Initialization::Average, Vectors::First), [2.0; 4]);
    assert_eq!(shared(Initialization::Random, Vectors::First), [2.0; 4]);
    assert_eq!(shared(Initialization::Average, Vectors::Reset), [1.0, 0.0, 0.0, 0.0]);

    let own = run(&source, &Conversion { vectors: Vectors::Own, ..conversion(3, Initialization::Lower) }).weights;
    for depth in 0..3 {
        let number = |name| first_number(&own, &format!("loops.{depth}.layers.1.{name}"));
        assert_eq!(names.map(number), [2.0 + 2.0 * depth as f32; 4]);
    }
}

#[test]
fn without_adapters_a_model_of_equal_layers_stays_what_it_is() {
    for (family, architecture) in families() {
        let one = random(&ordinary(1, Architecture { sliding_window: None, ..architecture.clone() }), 3);
        let layer = |name: String| {
            let place = name.split_once(".layers.").map(|(_, rest)| rest.split_once('.').unwrap().1);
            let own = place.map_or(name.clone(), |rest| format!("loops.0.layers.0.{rest}"));
            (name, one.get(&own).unwrap().clone())
        };
        let config = ordinary(6, Architecture { sliding_window: None, ..architecture });
        let names = engine::weights::expected_tensors(&config).into_keys();
        let source = Weights::from_tensors(config, names.map(layer).collect(), "test").unwrap();
        for initialization in [Initialization::Stepwise, Initialization::Average, Initialization::Lower] {
            let converted = run(&source, &conversion(3, initialization)).weights;
            assert!(converted.num_parameters() < source.num_parameters());
            let error = difference(&logits(&converted), &logits(&source));
            assert!(error < 1e-5, "{family} {initialization:?}: {error}");
        }
    }
}

#[test]
fn full_rank_with_norms_of_each_loop_gives_back_the_logits_of_every_family() {
    for (family, architecture) in families() {
        let source = random(&ordinary(8, architecture), 5);
        let expected = logits(&source);
        for initialization in INITIALIZATIONS {
            for (num_loops, prelude_layers, coda_layers) in [(1, 0, 0), (2, 0, 0), (4, 0, 0), (8, 0, 0), (3, 1, 1)] {
                let relaxed = relaxed(num_loops, initialization, Ranks::Full);
                let conversion = Conversion { prelude_layers, coda_layers, ..relaxed };
                let converted = run(&source, &conversion);
                let error = difference(&logits(&converted.weights), &expected);
                assert!(error < 1e-3, "{family} {initialization:?} {num_loops} loops: {error}");
                for energy in &converted.energies {
                    assert!((energy.kept(energy.directions.len()) - 1.0).abs() < 1e-5);
                }
            }
        }
    }
}

#[test]
fn full_rank_with_shared_norms_gives_back_a_llamas_logits() {
    let [(_, llama), ..] = families();
    let source = random(&ordinary(6, llama), 6);
    let expected = logits(&source);
    for initialization in INITIALIZATIONS {
        for vectors in SHARED_VECTORS {
            let conversion = Conversion { vectors, ..relaxed(3, initialization, Ranks::Full) };
            let converted = run(&source, &conversion).weights;
            assert_eq!(converted.config().sharing, Sharing::Block);
            let error = difference(&logits(&converted), &expected);
            assert!(error < 1e-3, "{initialization:?} {vectors:?}: {error}");
        }
    }
}

#[test]
fn shared_norms_that_are_zero_lose_their_inputs_and_nothing_else() {
    let config = ordinary(2, Architecture::default());
    let mut tensors: HashMap<String, Tensor> = random(&config, 6).tensors().clone().into_iter().collect();
    let mut norm = vec![1.0_f32; 16];
    norm[3] = 0.0;
    let norm = Tensor::new(norm, &Device::Cpu).unwrap();
    for layer in 0..2 {
        tensors.insert(format!("loops.0.layers.{layer}.input_layernorm.weight"), norm.clone());
    }
    let source = Weights::from_tensors(config, tensors, "test").unwrap();
    let conversion = Conversion { vectors: Vectors::First, ..relaxed(2, Initialization::Lower, Ranks::Full) };
    assert!(difference(&logits(&run(&source, &conversion).weights), &logits(&source)) < 1e-3);
}

#[test]
fn the_error_falls_with_the_rank() {
    for (family, architecture) in families() {
        let source = alike(&ordinary(8, architecture), 8);
        let expected = logits(&source);
        for initialization in [Initialization::Stepwise, Initialization::Average, Initialization::Lower] {
            let at = |rank| {
                let converted = run(&source, &relaxed(2, initialization, Ranks::All(rank)));
                let kept: f64 = converted.energies.iter().map(|energy| energy.kept(energy.directions.len())).sum();
                (mean_difference(&logits(&converted.weights), &expected), kept)
            };
            let by_rank = [2, 6, 10, 14, 16].map(at);
            assert!(by_rank[0].0 > 1e-2 && by_rank[4].0 < 1e-3, "{family} {initialization:?}: {by_rank:?}");
            assert!(
                by_rank.is_sorted_by(|lower, higher| lower.0 > higher.0),
                "{family} {initialization:?}: {by_rank:?}"
            );
            assert!(
                by_rank.is_sorted_by(|lower, higher| lower.1 < higher.1),
                "{family} {initialization:?}: {by_rank:?}"
            );
        }
    }
}

#[test]
fn energies_are_what_the_shared_matrices_lack_and_what_adapters_give_back() {
    let source = random(&ordinary(4, Architecture::default()), 9);
    let conversion = relaxed(2, Initialization::Average, Ranks::All(5));
    let converted = run(&source, &conversion);
    let (bare, merged) = (run(&source, &Conversion { relaxation: None, ..conversion }).weights, &converted.weights);
    let (bare, merged) = (bare.unrolled().unwrap(), merged.unrolled().unwrap());
    for energy in &converted.energies {
        let name = |layer| format!("loops.0.layers.{layer}.{}.weight", energy.projection.name);
        let matrix = |weights: &Weights, layer| weights.get(&name(layer)).unwrap().flatten_all().unwrap();
        let squares =
            |numbers: &Tensor| f64::from(numbers.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
        let missing = |weights: &Weights| -> f64 {
            (0..4).map(|layer| squares(&(matrix(&source, layer) - matrix(weights, layer)).unwrap())).sum()
        };
        let close = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-4, "{found}, {expected}");
        close(energy.original, (0..4).map(|layer| squares(&matrix(&source, layer))).sum());
        close(energy.residual, missing(&bare));
        close(energy.residual * (1.0 - energy.kept(5)), missing(&merged));
        assert!(energy.directions.is_sorted_by(|more, less| more >= less));
    }
    assert_eq!(converted.energies.len(), 7);
}

#[test]
fn adapters_that_start_from_zero_change_nothing_but_are_there_to_be_trained() {
    let source = random(&ordinary(4, Architecture::default()), 2);
    let svd = relaxed(2, Initialization::Average, Ranks::All(3));
    let zero = Relaxation { ranks: Ranks::All(3), start: AdapterStart::Zero };
    let adapted = run(&source, &Conversion { relaxation: Some(zero), ..svd.clone() }).weights;
    let bare = run(&source, &Conversion { relaxation: None, ..svd }).weights;
    assert!(difference(&logits(&adapted), &logits(&bare)) < 1e-6);
    assert_ne!(first_number(&adapted, "lora.1.layers.0.mlp.up_proj.a"), 0.0);
}

#[test]
fn kept_layers_are_the_originals_and_sliding_windows_stay_where_they_were() {
    let [_, (_, gemma), _] = families();
    let source = numbered(&ordinary(8, gemma));
    let conversion = Conversion { prelude_layers: 1, coda_layers: 1, ..conversion(3, Initialization::Average) };
    let converted = run(&source, &conversion).weights;
    assert_eq!(first_number(&converted, "prelude.layers.0.self_attn.q_proj.weight"), 1.0);
    assert_eq!(first_number(&converted, "coda.layers.0.self_attn.q_norm.weight"), 8.0);
    let windows = |config: &ModelConfig| config.architecture.sliding_window.clone().unwrap().layers;
    assert_eq!(windows(converted.config()), windows(source.config()));
    let places: Vec<Place> = converted.config().places().collect();
    assert_eq!(places[3], Place::Block { depth: 1, layer: 0 });
}

#[test]
fn ranks_are_read_and_are_never_more_than_a_matrix_has() {
    let config = ordinary(2, Architecture::default());
    let ranks = |text: &str| text.parse::<Ranks>().map(|ranks| ranks.of_model(&config));
    // Width 16, queries 24, keys and values 12, MLP 24.
    assert_eq!(ranks("14"), Ok(LoraRanks { k: 12, v: 12, ..LoraRanks::all(14) }));
    assert_eq!(ranks("full"), Ok(LoraRanks { k: 12, v: 12, ..LoraRanks::all(16) }));
    assert_eq!(ranks("q=3,down=99"), Ok(LoraRanks { q: 3, down: 16, ..LoraRanks::default() }));
    for (text, message) in [
        ("many", "rank `many`, expected a whole number"),
        ("q=3,k", "`k`, expected KIND=RANK"),
        ("q=3,x=4", "projection `x`, expected one of q, k, v, o, gate, up, down"),
        ("q=3,q=4", "projection `q` twice"),
        ("q=-1", "rank `-1`, expected a whole number"),
    ] {
        assert_eq!(ranks(text), Err(message.to_owned()));
    }
    let [_, _, (_, neox)] = families();
    let source = random(&ordinary(2, neox), 1);
    let converted = run(&source, &relaxed(2, Initialization::Lower, Ranks::All(2))).weights;
    assert_eq!(converted.config().lora.as_ref().unwrap().ranks, LoraRanks { gate: 0, ..LoraRanks::all(2) });
    let message = refusal(&source, &relaxed(2, Initialization::Lower, "gate=2".parse().unwrap()));
    assert!(message.contains("`lora.ranks.gate` is 2, expected 0 without a gated MLP"), "{message}");
}

#[test]
fn loops_that_do_not_divide_the_layers_and_models_that_are_recursive_already_are_refused() {
    let source = random(&ordinary(12, Architecture::default()), 1);
    for (num_loops, prelude_layers, coda_layers, expected) in [
        (5, 0, 0, "12 layers to share do not divide into 5 loops, expected one of 1, 2, 3, 4, 6, 12"),
        (0, 0, 0, "12 layers to share do not divide into 0 loops, expected one of 1, 2, 3, 4, 6, 12"),
        (3, 1, 1, "10 layers to share do not divide into 3 loops, expected one of 1, 2, 5, 10"),
        (1, 6, 6, "a prelude of 6 and a coda of 6 leave none of 12 layers to share"),
    ] {
        let conversion = Conversion { prelude_layers, coda_layers, ..conversion(num_loops, Initialization::Average) };
        assert_eq!(refusal(&source, &conversion), expected);
    }
    let recursive = run(&source, &conversion(3, Initialization::Average)).weights;
    let message = refusal(&recursive, &conversion(2, Initialization::Average));
    assert!(message.contains("`num_loops` 3, expected 1, or loops that share nothing"), "{message}");
}

#[test]
fn conversion_tells_its_progress() {
    let source = random(&ordinary(4, Architecture::default()), 1);
    let told = AtomicUsize::new(0);
    let progress = |all| {
        assert_eq!(all, 28);
        told.fetch_add(1, Ordering::Relaxed);
    };
    convert(&source, &relaxed(2, Initialization::Average, Ranks::All(1)), progress).unwrap();
    assert_eq!(told.into_inner(), 28);
}

/// SmolLM2-135M-Instruct and the tokens of a text, if `scripts/fetch-models.sh` was run; from the folder
/// `DEPTHWISE_MODELS`, or `models/fetched`.
fn smollm2() -> Option<(Weights, Vec<u32>)> {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let folder = std::env::var_os("DEPTHWISE_MODELS").map_or_else(|| repository.join("models/fetched"), PathBuf::from);
    let path = folder.join("SmolLM2-135M-Instruct.Q4_1.gguf");
    if !path.exists() {
        eprintln!("skipped: {} is not there, run scripts/fetch-models.sh", path.display());
        return None;
    }
    let Checkpoint { weights, tokenizer } = Checkpoint::read(&path, 1).unwrap();
    let text = std::fs::read_to_string(repository.join("models/kjv/prompts.txt")).unwrap();
    Some((weights, tokenizer.unwrap().encode(&text[..600]).unwrap()))
}

/// A model with adapters of full rank, cut to the first `rank` directions.
fn truncated(full: &Weights, rank: usize) -> Weights {
    let mut config = full.config().clone();
    let ranks = Ranks::All(rank).of_model(&config);
    config.lora.as_mut().unwrap().ranks = ranks;
    let cut = |(name, tensor): (&String, &Tensor)| {
        let directions = usize::from(!name.ends_with(".a"));
        let tensor = match name.starts_with("lora.") {
            true => tensor.narrow(directions, 0, rank.min(tensor.dims()[directions])).unwrap(),
            false => tensor.clone(),
        };
        (name.clone(), tensor)
    };
    Weights::from_tensors(config, full.tensors().iter().map(cut).collect(), "test").unwrap()
}

/// Mean divergence of next-token distributions from the expected ones over a text, in nats.
fn divergence(found: &[f32], expected: &[f32], vocab_size: usize) -> f64 {
    let log_softmax = |logits: &[f32]| {
        let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
        logits.iter().map(|&logit| f64::from(logit) - sum.ln()).collect::<Vec<_>>()
    };
    let of_token = |(found, expected): (&[f32], &[f32])| {
        let pairs = log_softmax(expected).into_iter().zip(log_softmax(found));
        pairs.map(|(expected, found)| expected.exp() * (expected - found)).sum::<f64>()
    };
    let tokens = found.chunks(vocab_size).zip(expected.chunks(vocab_size));
    tokens.map(of_token).sum::<f64>() / (expected.len() / vocab_size) as f64
}

/// Below rank 256, predictions are further from the original than chance, and the distance has no meaning.
#[test]
fn smollm2_at_full_rank_has_the_logits_of_the_original_and_nears_it_as_the_rank_rises() {
    let Some((source, text)) = smollm2() else { return };
    let expected = logits_of(&source, &text);
    for (initialization, num_loops) in [
        (Initialization::Stepwise, 2),
        (Initialization::Lower, 5),
        (Initialization::Random, 6),
        (Initialization::Average, 3),
    ] {
        let full = run(&source, &relaxed(num_loops, initialization, Ranks::Full)).weights;
        let error = difference(&logits_of(&full, &text), &expected);
        assert!(error < 1e-3, "{initialization:?}, {num_loops} loops: {error}");
        if initialization == Initialization::Average {
            let vocab_size = source.config().vocab_size;
            let at = |rank| divergence(&logits_of(&truncated(&full, rank), &text), &expected, vocab_size);
            let by_rank = [256, 320, 384, 448, 512, 576].map(at);
            assert!(by_rank.is_sorted_by(|lower, higher| lower > higher), "{by_rank:?}");
        }
    }
}
