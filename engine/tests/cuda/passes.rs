//! Passes of a whole model, padded and replayed as graphs, compared with the CPU's.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::backend::{Answers, Backend, Diverging, GraphCounts, Heads, PassLimits, ServedModel, Work};
use engine::config::{LoraConfig, LoraRanks, ModelConfig, Sharing};
use engine::cuda::CudaModel;
use engine::cuda::floors::{Load, Sizes};
use engine::cuda::source::Scalar;
use engine::kernels::attention::{Fill, Row};
use engine::kernels::rows::Source;
use engine::model::{Model, Rows};
use engine::{Engine, Generation, Idle, Prompts, Sampling, WeightType};
use scheduler::{Batching, ExitPolicy, KvFill, PassRecorder, Settings};
use traces::{ExitSignal, Nanos, PassOrigin, Request};

use crate::bench::{Dice, assert_close};
use crate::common::{grouped, weights, with_everything};
use crate::emulator::{Machine, PRODUCTS_DEPEND_ON_ROWS, WorkDone, machine, replays, work_done};

const BLOCKS: u32 = 64;
const BLOCK_TOKENS: u32 = 16;
/// Rows of a prompt chunk.
const CHUNK: usize = 30;
/// Room for rows in flight.
const IN_FLIGHT: usize = 40;

/// A model on the machine under test and on the CPU, with a cache each.
struct Pair {
    machine: Arc<Machine>,
    on_device: Box<dyn Backend>,
    on_cpu: Box<dyn Backend>,
    config: ModelConfig,
}

/// A sequence with one block per [`BLOCK_TOKENS`] positions, in random order.
struct Sequence {
    blocks: Vec<u32>,
    tokens: Vec<u32>,
}

impl Pair {
    /// `None` if there is no machine to test.
    fn new(config: &ModelConfig, kv_fill: KvFill) -> Option<Self> {
        let (machine, weights) = (machine()?, weights(config, 7));
        let model: Arc<dyn ServedModel> = Arc::new(CudaModel::load(machine.clone(), &weights, Scalar::F32).unwrap());
        let cpu: Arc<dyn ServedModel> = Arc::new(Model::load(&weights, WeightType::F32).unwrap());
        let (on_device, on_cpu) = (backend(model, kv_fill), backend(cpu, kv_fill));
        Some(Self { machine, on_device, on_cpu, config: config.clone() })
    }

    /// Sequences of these lengths, with all positions except the last run at every depth.
    fn sequences(&mut self, dice: &mut Dice, lengths: &[usize]) -> Vec<Sequence> {
        let mut free: Vec<u32> = (0..BLOCKS).collect();
        let mut sequence = |&positions: &usize| Sequence {
            blocks: (0..positions.div_ceil(BLOCK_TOKENS as usize))
                .map(|_| free.swap_remove(dice.below(free.len())))
                .collect(),
            tokens: (0..positions).map(|_| dice.below(self.config.vocab_size) as u32).collect(),
        };
        let sequences: Vec<Sequence> = lengths.iter().map(&mut sequence).collect();
        for Sequence { blocks, tokens } in &sequences {
            let history = &tokens[..tokens.len() - 1];
            for (index, chunk) in history.chunks(CHUNK).enumerate() {
                for depth in 0..self.config.num_loops {
                    let (mut rows, places) = (Rows::default(), 0..chunk.len() as u32);
                    let positions = index * CHUNK..index * CHUNK + chunk.len();
                    positions.for_each(|position| rows.push(Row::new(position, depth, blocks)));
                    self.run(&Work {
                        coda: 0..rows.len(),
                        sources: match depth {
                            0 => chunk.iter().map(|&token| Source::First(token)).collect(),
                            _ => places.clone().map(Source::Second).collect(),
                        },
                        places: places.map(Some).collect(),
                        rows,
                        ..Work::default()
                    });
                }
            }
        }
        sequences
    }

    /// Runs a pass on both; returns the device's results, which are close to the CPU's.
    fn run(&mut self, work: &Work<'_>) -> Answers {
        let (found, expected) = (self.on_device.run(work).unwrap(), self.on_cpu.run(work).unwrap());
        assert_same_answers(&found, &expected);
        found
    }

    /// A decode row at the last position of each sequence at a depth, with all results requested.
    fn decode<'a>(&self, sequences: &'a [Sequence], depths: &[usize], key: u64) -> Work<'a> {
        let mut work = Work::default();
        for (place, (sequence, &depth)) in sequences.iter().zip(depths).enumerate() {
            work.rows.push(Row::new(sequence.tokens.len() - 1, depth, &sequence.blocks));
            work.sources.push(match depth {
                0 => Source::First(*sequence.tokens.last().unwrap()),
                _ => Source::Second(place as u32),
            });
            work.places.push(Some(place as u32));
            work.heads.rows.push(place);
            work.heads.keys.push(key + place as u64);
            if depth > 0 {
                work.compared.push((place, place as u32));
            }
            work.diverging.push(Diverging { head: place, before: None, place: place as u32 });
            if self.config.gate && depth + 1 < self.config.num_loops {
                work.gates.push(place);
            }
        }
        work.coda = 0..work.rows.len();
        work.heads.temperature = 0.7;
        work
    }
}

fn backend(model: Arc<dyn ServedModel>, kv_fill: KvFill) -> Box<dyn Backend> {
    let mut backend = model.backend(kv_fill, BLOCKS, BLOCK_TOKENS).unwrap();
    backend.reserve(IN_FLIGHT).unwrap();
    backend
}

fn without_places(mut work: Work<'_>) -> Work<'_> {
    work.places.fill(None);
    work
}

fn assert_same_answers(found: &Answers, expected: &Answers) {
    let tokens = |answers: &Answers| answers.verdicts.iter().map(|verdict| verdict.token).collect::<Vec<_>>();
    assert_eq!(tokens(found), tokens(expected));
    let numbers = |answers: &Answers| -> Vec<f32> {
        answers.verdicts.iter().flat_map(|verdict| [verdict.top1, verdict.margin, verdict.entropy]).collect()
    };
    assert_close("verdicts", &numbers(found), &numbers(expected), 1e-4);
    assert_close("gates", &found.gates, &expected.gates, 1e-4);
    let changes = |answers: &Answers| -> Vec<f32> {
        answers.changes.iter().flat_map(|change| [change.similarity, change.difference]).collect()
    };
    assert_close("changes", &changes(found), &changes(expected), 1e-4);
    assert_close("divergences", &found.divergences, &expected.divergences, 1e-4);
}

/// Models whose passes have every kind of section.
fn models() -> Vec<ModelConfig> {
    vec![grouped(), with_everything(), ModelConfig { sharing: Sharing::Nothing, lora: None, ..with_everything() }]
}

#[test]
fn graphs_replayed_on_other_rows_give_what_the_cpu_gives() {
    for config in models() {
        let mut dice = Dice::new(11);
        let Some(mut pair) = Pair::new(&config, KvFill::Reuse) else { return };
        for round in 0..6 {
            // An equal number of rows each time, at other depths, positions and blocks; at least two of each depth.
            let sequences = pair.sequences(&mut dice, &[4 + 5 * round; 9]);
            for depths in [[0; 9], [0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 1, 1, 1, 2, 2, 2]] {
                let work = pair.decode(&sequences, &depths, 100 * round as u64);
                pair.run(&work);
            }
        }
        let replays = replays(&pair.machine);
        assert!(replays.is_none_or(|replays| replays >= 10), "{replays:?} replays");
    }
}

#[test]
fn prepared_passes_with_prompts_are_graphs_that_were_captured_before() {
    for config in models() {
        let config = ModelConfig { max_positions: 400, ..config };
        let mut dice = Dice::new(19);
        let Some(mut pair) = Pair::new(&config, KvFill::Reuse) else { return };
        let limits = PassLimits { rows: CHUNK + 10, heads: 9, sequences: 9, positions: 320 };
        pair.on_device.prepare(limits).unwrap();
        let prepared = pair.on_device.graphs().unwrap();
        assert!(prepared.captured > 0 && prepared.replayed + prepared.eager + prepared.dropped == 0, "{prepared:?}");
        // Chunks alone, then decode rows beside chunks, at several depths, with short histories and long ones.
        let sequences = pair.sequences(&mut dice, &[9, 20, 300, 3]);
        for (depths, temperature) in [([0, 1, 2, 2], 0.7), ([0, 0, 1, 2], 0.0), ([0, 1, 1, 1], 1.3)] {
            let all = pair.decode(&sequences, &[0; 4], 6);
            pair.run(&all);
            let mut work = pair.decode(&sequences, &depths, 7);
            work.heads.temperature = temperature;
            pair.run(&beside_a_chunk(work, &sequences[1], dice.below(18) + 2));
        }
        let counts = pair.on_device.graphs().unwrap();
        assert!(counts.replayed > 0, "{counts:?}");
        let GraphCounts { eager, captured, dropped, .. } = counts;
        assert_eq!((eager, captured, dropped), (0, prepared.captured, 0), "nothing else ran, or was captured");
        let last = pair.on_device.device_pass().unwrap();
        assert!(last.graphs > 0 && last.eager + last.captured + last.dropped == 0, "{last:?}");
        // Preparing again finds every graph.
        pair.on_device.prepare(limits).unwrap();
        assert_eq!(pair.on_device.graphs().unwrap(), counts);
    }
}

#[test]
fn the_host_submits_few_pieces_of_work_and_one_upload_for_a_pass() {
    // Without prelude and coda: the rows enter, the block, the head, a comparison, and the rows are kept.
    for (config, submissions) in [(grouped(), 5), (with_everything(), 9)] {
        let mut dice = Dice::new(23);
        let Some(mut pair) = Pair::new(&config, KvFill::Reuse) else { return };
        pair.on_device.prepare(PassLimits { rows: 40, heads: 6, sequences: 6, positions: 32 }).unwrap();
        let sequences = pair.sequences(&mut dice, &[30; 6]);
        let all = pair.decode(&sequences, &[0; 6], 6);
        pair.run(&all);
        for tokens in [0, 20] {
            let mut work = without_places(pair.decode(&sequences, &[0, 0, 1, 1, 2, 2], 7));
            work.diverging.clear();
            let work = if tokens > 0 { beside_a_chunk(work, &sequences[0], tokens) } else { work };
            let Some(before) = work_done(&pair.machine) else { return };
            pair.run(&work);
            let done = work_done(&pair.machine).unwrap();
            let since = |name| (done[name].launches - before[name].launches, done[name].blocks - before[name].blocks);
            let (submitted, (uploads, bytes)) = (since("submission").0, since("upload"));
            assert_eq!((submitted, uploads), (submissions, 1), "with a chunk of {tokens} tokens, {bytes} bytes");
        }
    }
}

/// A pass with a prompt chunk of `tokens` tokens more, which begins a sequence at depth 0 and is not kept.
fn beside_a_chunk<'a>(mut work: Work<'a>, sequence: &'a Sequence, tokens: usize) -> Work<'a> {
    let mut rows = Rows::default();
    (0..tokens).for_each(|position| rows.push(Row { fills: 0..0, ..Row::new(position, 0, &sequence.blocks) }));
    work.rows.rows().iter().for_each(|row| rows.push(row.clone()));
    let later = |rows: &mut [usize]| rows.iter_mut().for_each(|row| *row += tokens);
    later(&mut work.heads.rows);
    later(&mut work.gates);
    work.compared.iter_mut().for_each(|(row, _)| *row += tokens);
    work.sources.splice(0..0, sequence.tokens[..tokens].iter().map(|&token| Source::First(token)));
    work.places.splice(0..0, vec![None; tokens]);
    work.coda = 0..rows.len();
    Work { rows, ..work }
}

#[test]
fn graphs_keep_up_with_memory_that_moves_longer_histories_and_other_temperatures() {
    let mut dice = Dice::new(15);
    let config = ModelConfig { max_positions: 400, ..grouped() };
    let Some(mut pair) = Pair::new(&config, KvFill::Reuse) else { return };
    let mut short = pair.sequences(&mut dice, &[2, 2, 2]);
    // More blocks than needed, so that indices have room for later passes and only the rows' memory grows.
    short.iter_mut().for_each(|sequence| sequence.blocks.resize(500, 0));
    for _ in 0..3 {
        let work = pair.decode(&short, &[0; 3], 1);
        pair.run(&work);
    }
    let sequences = pair.sequences(&mut dice, &[40, 10, 300]);
    // Prompt chunks made it grow, and changed nothing else that graphs depend on.
    let before = replays(&pair.machine);
    let work = pair.decode(&short, &[0; 3], 2);
    pair.run(&work);
    // The third row's history has two splits.
    for temperature in [9.0, 9.0, 0.0] {
        for rows in [0..2, 1..3, 0..3] {
            let mut work = pair.decode(&sequences[rows.clone()], &vec![0; rows.len()], 3);
            work.heads.temperature = temperature;
            pair.run(&work);
        }
    }
    assert!(replays(&pair.machine).is_none_or(|after| Some(after) > before), "no graph was replayed");
}

#[test]
fn a_backend_takes_over_the_graphs_of_the_one_before_if_its_cache_is_laid_out_alike() {
    let (Some(machine), config) = (machine(), with_everything()) else { return };
    let weights = weights(&config, 7);
    let model: Arc<dyn ServedModel> = Arc::new(CudaModel::load(machine.clone(), &weights, Scalar::F32).unwrap());
    let cpu: Arc<dyn ServedModel> = Arc::new(Model::load(&weights, WeightType::F32).unwrap());
    let mut dice = Dice::new(16);
    // Graphs replayed by the first decode pass of a backend, and by a pass after all its graphs are captured.
    let mut replayed = |kv_fill| {
        let (on_device, on_cpu) = (backend(model.clone(), kv_fill), backend(cpu.clone(), kv_fill));
        let mut pair = Pair { machine: machine.clone(), on_device, on_cpu, config: config.clone() };
        let sequences = pair.sequences(&mut dice, &[9, 20, 3]);
        [1, 2].map(|passes| {
            let before = replays(&pair.machine);
            for key in 0..passes {
                let work = pair.decode(&sequences, &[0; 3], key);
                pair.run(&work);
            }
            replays(&pair.machine).zip(before).map(|(after, before)| after - before)
        })
    };
    let [first, then] = replayed(KvFill::Reuse);
    assert!(first.is_none_or(|first| first == 0) && then.is_none_or(|then| then > 0), "{first:?}, {then:?}");
    let [first, then] = replayed(KvFill::Reuse);
    assert_eq!(first.map(|first| 2 * first), then, "graphs of the backend before");
    assert!(first.is_none_or(|first| first > 0));
    // All depths share a cache.
    let [first, _] = replayed(KvFill::First);
    assert!(first.is_none_or(|first| first == 0), "graphs of another layout: {first:?}");
}

/// What a decode pass of sequences of these lengths launches beyond the launches of a pass of no layers: by kernel, for
/// each layer.
fn work_of_a_layer(config: &ModelConfig, lengths: &[usize]) -> Option<BTreeMap<&'static str, WorkDone>> {
    let work_of = |block_layers| {
        let mut dice = Dice::new(17);
        let mut pair = Pair::new(&ModelConfig { block_layers, ..config.clone() }, KvFill::Reuse)?;
        let sequences = pair.sequences(&mut dice, lengths);
        let before = work_done(&pair.machine)?;
        let work = pair.decode(&sequences, &vec![0; lengths.len()], 0);
        pair.run(&work);
        let mut work = work_done(&pair.machine)?;
        for (kernel, before) in before {
            let of_kernel = work.get_mut(kernel).unwrap();
            of_kernel.launches -= before.launches;
            of_kernel.blocks -= before.blocks;
        }
        Some(work)
    };
    let (one, mut two) = (work_of(1)?, work_of(2)?);
    for (kernel, of_one) in one {
        let of_kernel = two.get_mut(kernel).unwrap();
        of_kernel.launches -= of_one.launches;
        of_kernel.blocks -= of_one.blocks;
    }
    two.retain(|&kernel, work| work.launches > 0 && kernel != "submission");
    Some(two)
}

#[test]
fn adapters_add_one_launch_to_a_product_and_only_long_histories_are_joined() {
    let plain = ModelConfig { max_positions: 400, sharing: Sharing::Matrices, ..grouped() };
    let lora = LoraConfig { ranks: LoraRanks::all(2), scale: 0.5 };
    let adapted = ModelConfig { lora: Some(lora), ..plain.clone() };
    let launches = |config: &ModelConfig, lengths: &[usize]| {
        let work = work_of_a_layer(config, lengths)?;
        // The floors count the same launches.
        let (sizes, longest) = (Sizes { config, scalar: Scalar::F32 }, lengths.iter().copied().max().unwrap());
        let load = Load { rows: lengths.len(), depths: 1, history: longest, chunk: 0 };
        let of_floors = sizes.operations().iter().map(|&operation| sizes.launches(operation, &load)).sum::<usize>();
        assert_eq!(work.values().map(|work| work.launches).sum::<usize>(), of_floors);
        Some(work.into_iter().map(|(kernel, work)| (kernel, work.launches)).collect::<Vec<_>>())
    };
    let Some(found) = launches(&plain, &[20, 9, 31]) else { return };
    assert_eq!(
        found,
        [("activate", 1), ("attend_splits", 1), ("norm_rows", 2), ("product", 4), ("rotate_and_store", 1)]
    );
    let found = launches(&adapted, &[20, 9, 31]).unwrap();
    let of_adapters = [("lora_activate", 1), ("lora_add", 2), ("lora_expand", 1)];
    let others = [("norm_rows", 2), ("product", 4), ("rotate_and_store", 1)];
    assert_eq!(found, [&[("attend_splits", 1)][..], &of_adapters, &others].concat());
    launches(&adapted, &[20, 300, 31]).unwrap();
    // One row has two splits; there would be room for two such rows among the four splits.
    let work = work_of_a_layer(&plain, &[20, 300, 31]).unwrap();
    assert_eq!(work["attend_join"], WorkDone { launches: 1, blocks: 2 * plain.num_heads });
    // Two query heads share the loads of a key-value head.
    assert_eq!(work["attend_splits"], WorkDone { launches: 1, blocks: 4 * plain.num_kv_heads });
}

#[test]
fn rows_that_pad_a_pass_change_no_bit() {
    let mut dice = Dice::new(12);
    let Some(mut pair) = Pair::new(&with_everything(), KvFill::Reuse) else { return };
    let sequences = pair.sequences(&mut dice, &[21; 9]);
    let depths = [0, 0, 0, 0, 0, 1, 1, 1, 1];
    // Rows at depth 1 continue from this pass.
    let work = pair.decode(&sequences, &[0; 9], 5);
    pair.run(&work);
    let work = without_places(pair.decode(&sequences, &depths, 5));
    // Nine rows are padded to ten.
    let first = pair.run(&work);
    for _ in 0..2 {
        let again = pair.run(&work);
        assert_eq!(
            (&again.verdicts, &again.gates),
            (&first.verdicts, &first.gates),
            "a graph and what it was captured of"
        );
    }
    for row in 0..9 {
        let mut alone = without_places(pair.decode(&sequences[row..row + 1], &depths[row..row + 1], 5 + row as u64));
        if depths[row] > 0 {
            alone.sources[0] = Source::Second(row as u32);
            alone.compared[0].1 = row as u32;
        }
        // Close to the CPU's, as is this row in the padded pass.
        let alone = pair.run(&alone);
        if !PRODUCTS_DEPEND_ON_ROWS {
            assert_eq!(alone.verdicts[0], first.verdicts[row], "row {row}");
        }
    }
}

#[test]
fn heads_read_after_a_pass_and_fills_are_those_of_the_cpu() {
    for config in models() {
        let mut dice = Dice::new(13);
        let Some(mut pair) = Pair::new(&config, KvFill::Reuse) else { return };
        let sequences = pair.sequences(&mut dice, &[20; 3]);
        let work = Work { heads: Heads::default(), diverging: Vec::new(), ..pair.decode(&sequences, &[0; 3], 0) };
        pair.run(&work);
        let heads = Heads { rows: vec![0, 2], keys: vec![3, 4], temperature: 0.0 };
        let rows = work.rows.pick([0, 2]);
        let [found, expected] = [&mut pair.on_device, &mut pair.on_cpu]
            .map(|backend| Answers { verdicts: backend.read_head(&rows, &heads).unwrap(), ..Answers::default() });
        assert_same_answers(&found, &expected);
        let fills = [0, 2].map(|sequence| Fill { block: sequences[sequence].blocks[1], offset: 3, depth: 0 });
        for backend in [&mut pair.on_device, &mut pair.on_cpu] {
            backend.fill_deeper(&fills).unwrap();
        }
        for sequence in [0, 2] {
            let cached = |backend: &dyn Backend| backend.cached(&sequences[sequence].blocks, 20).unwrap();
            assert_close("the cache", &cached(&*pair.on_device), &cached(&*pair.on_cpu), 1e-4);
        }
    }
}

#[test]
fn impossible_rows_are_refused_before_they_run() {
    let Some(mut pair) = Pair::new(&grouped(), KvFill::Reuse) else { return };
    let mut refused = |source, position| {
        let mut work = Work { sources: vec![source], places: vec![None], ..Work::default() };
        work.rows.push(Row::new(position, 0, &[1]));
        pair.on_device.run(&work).unwrap_err().to_string()
    };
    assert!(refused(Source::First(40), 0).contains("row 40 was asked for, there are 40"));
    assert!(refused(Source::Second(99), 0).contains("row 99 was asked for, there are 40"));
    assert!(refused(Source::First(1), 16).contains("position 16, its sequence has room for 16"));
}

#[test]
fn heads_that_the_kernels_cannot_read_are_refused_at_load() {
    let Some(machine) = machine() else { return };
    for (head_dim, scalar) in [(8, Scalar::Bf16), (4, Scalar::F32), (36, Scalar::F16), (260, Scalar::F32)] {
        let weights = weights(&ModelConfig { head_dim, ..grouped() }, 1);
        let error = CudaModel::load(machine.clone(), &weights, scalar).unwrap_err().to_string();
        assert!(error.contains(&format!("a head is {head_dim} wide")), "{error}");
    }
}

#[test]
fn half_precision_stays_near_single() {
    let Some(machine) = machine() else { return };
    for config in models() {
        let config = ModelConfig { head_dim: 16, ..config };
        let weights = weights(&config, 7);
        let verdicts = |scalar| {
            let model = CudaModel::load(machine.clone(), &weights, scalar).unwrap();
            let mut rows = Rows::default();
            (0..20).for_each(|position| rows.push(Row::new(position, 0, &[3, 9])));
            let work = Work {
                coda: 0..20,
                sources: (0..20).map(|position| Source::First(position * 7 % config.vocab_size as u32)).collect(),
                places: vec![None; 20],
                heads: Heads { rows: (0..20).collect(), keys: vec![0; 20], temperature: 0.0 },
                rows,
                ..Work::default()
            };
            backend(Arc::new(model), KvFill::Reuse).run(&work).unwrap().verdicts
        };
        let exact = verdicts(Scalar::F32);
        for (scalar, tolerance) in [(Scalar::F16, 0.01), (Scalar::Bf16, 0.1)] {
            for (exact, rounded) in exact.iter().zip(verdicts(scalar)) {
                let error = (exact.top1 - rounded.top1).abs().max((exact.entropy - rounded.entropy).abs());
                assert!(error < tolerance * (1.0 + exact.entropy), "{scalar:?}: {rounded:?}, expected {exact:?}");
            }
        }
    }
}

#[test]
fn a_text_has_the_likelihood_on_the_device_that_it_has_on_the_cpu() {
    let Some(machine) = machine() else { return };
    for config in [ModelConfig { head_dim: 16, ..grouped() }, ModelConfig { head_dim: 16, ..with_everything() }] {
        let weights = weights(&config, 7);
        let cpu: Arc<dyn ServedModel> = Arc::new(Model::load(&weights, WeightType::F32).unwrap());
        let device: Arc<dyn ServedModel> = Arc::new(CudaModel::load(machine.clone(), &weights, Scalar::F32).unwrap());
        let tokens = |from: u32, to: u32| (from..to).map(|place| place * 7 % config.vocab_size as u32).collect();
        let text = Generation { prompt: tokens(0, 9), tokens: tokens(9, 20), ..Generation::default() };
        let [expected, found] = [cpu, device].map(|model| Engine::new(model).full_depth(3, &text).unwrap());
        assert_eq!(found.tokens, expected.tokens);
        for (found, expected) in found.log_likelihoods.iter().zip(&expected.log_likelihoods) {
            assert!((found - expected).abs() < 1e-3, "{found}, expected {expected}");
        }
        assert_eq!(found.log_likelihoods.len(), 11);
    }
}

#[test]
fn a_replay_with_prompts_is_graphs_and_captures_none_while_it_is_timed() {
    for config in models() {
        let Some(machine) = machine() else { return };
        let config = ModelConfig { head_dim: 16, ..config };
        let model = Arc::new(CudaModel::load(machine, &weights(&config, 7), Scalar::F32).unwrap());
        let text = (0..400).map(|place| place * 7 % config.vocab_size as u32).collect();
        let engine = Engine { prompts: Arc::new(Prompts::Text(text)), ..Engine::new(model) };
        let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 3 + 5 * (id % 4), output_tokens: 3 };
        let requests: Vec<Request> = (0..7).map(request).collect();
        for batching in [Batching::Sequence, Batching::Depth] {
            let settings = Settings {
                max_batch: 4,
                token_budget: 24,
                prefill_chunk: 20,
                block_tokens: BLOCK_TOKENS,
                num_blocks: BLOCKS,
                ..Settings::new(
                    batching,
                    ExitPolicy::Confidence { signal: ExitSignal::Top1, threshold: 0.05 },
                    config.num_loops as u8,
                )
            };
            let mut recorder = PassRecorder::new(&settings, PassOrigin::Replay, || 0);
            engine.replay(settings, &requests, None, Idle::Skip, &mut recorder).unwrap();
            let passes = recorder.into_run().passes;
            assert!(passes.iter().any(|pass| !pass.work.chunks.is_empty() && pass.work.decode_rows > 0));
            for pass in passes {
                let device = pass.device.expect("a device ran it");
                assert!(device.graphs >= 1 && device.submitted > Nanos::ZERO, "{pass:?}");
                assert_eq!((device.eager, device.captured, device.dropped), (0, 0, 0), "{pass:?}");
                assert!(device.submitted <= pass.elapsed && device.device <= pass.elapsed, "{pass:?}");
            }
        }
    }
}

#[test]
fn heads_read_before_it_is_known_which_rows_exit_change_no_token() {
    let Some(machine) = machine() else { return };
    let config = ModelConfig { head_dim: 16, gate: true, head_lora_rank: 0, ..grouped() };
    let model: Arc<dyn ServedModel> = Arc::new(CudaModel::load(machine, &weights(&config, 7), Scalar::Bf16).unwrap());
    assert_eq!(model.heads_ahead_from(), Some(8));
    let text = (0..400).map(|place| place * 7 % config.vocab_size as u32).collect();
    let prompts = Arc::new(Prompts::Text(text));
    let engine = Engine { model: model.clone(), prompts, sampling: Sampling::default(), script: None };
    let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 2 + id % 3, output_tokens: 4 };
    let requests: Vec<Request> = (0..9).map(request).collect();
    let run = |max_batch| {
        let settings = Settings {
            max_batch,
            token_budget: 4 * max_batch,
            prefill_chunk: 30,
            block_tokens: BLOCK_TOKENS,
            num_blocks: BLOCKS,
            ..Settings::new(
                Batching::Depth,
                ExitPolicy::Confidence { signal: ExitSignal::Gate, threshold: 0.5 },
                config.num_loops as u8,
            )
        };
        engine.replay(settings, &requests, None, Idle::Skip, &mut ()).unwrap()
    };
    let together = run(9);
    assert_eq!(together, run(1));
    let mut exits = together.values().flat_map(|generation| generation.exit_depths.clone());
    let last = config.num_loops as u8 - 1;
    assert!(exits.clone().any(|exit| exit < last) && exits.any(|exit| exit == last), "all exit at one depth");
}
