//! Evaluation by depth: loss on held-out text, accuracy on questions, and reliability of exit signals.

pub mod exits;
pub mod multiple_choice;
pub mod reliability;
pub(crate) mod samples;

use std::path::Path;

use candle_core::{Device, Tensor};
use engine::kernels::rows::{Change, compare};
use engine::kernels::signals;
use engine::reference::Reference;
use traces::Signals;

use crate::corpus::{Corpus, inputs_and_targets};
use crate::error::TrainingError;
use crate::objective::cross_entropy;

/// Results of one loop on a held-out text.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct LoopFigures {
    /// Number of passes: 1 is the first loop.
    pub passes: usize,
    /// Cross-entropy, nats per token.
    pub loss_nats_per_token: f64,
    /// `exp` of the loss: the equivalent number of equally likely tokens.
    pub perplexity: f64,
    /// Bits needed to code the text with this loop's probabilities, per byte. The first token, if nothing precedes it,
    /// counts as `log2(vocab)` bits.
    pub bits_per_byte: f64,
    /// Share of tokens that are the most likely one.
    pub accuracy: f64,
    /// Share of tokens whose most likely token is that of the last loop.
    pub agreement_with_last: f64,
    /// Share of tokens with this oracle depth: the earliest loop that agrees with the last.
    pub oracle_share: f64,
}

/// Results of a model on a held-out text.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Results by loop, first to last.
    pub loops: Vec<LoopFigures>,
    /// Number of predicted tokens.
    pub tokens: usize,
    /// Number of coded bytes.
    pub bytes: usize,
}

impl Evaluation {
    /// Mean passes per token (1 to the number of loops) of an oracle that exits at the earliest loop that agrees with
    /// the last.
    pub fn mean_oracle_depth(&self) -> f64 {
        let weighted = |figures: &LoopFigures| figures.passes as f64 * figures.oracle_share;
        self.loops.iter().map(weighted).sum()
    }

    /// Writes one row per loop as CSV.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn write_csv(&self, path: &Path) -> Result<(), TrainingError> {
        let write = || -> csv::Result<()> {
            let mut file = csv::Writer::from_path(path)?;
            for figures in &self.loops {
                file.serialize(figures)?;
            }
            Ok(file.flush()?)
        };
        write().map_err(|source| TrainingError::File { path: path.to_owned(), source: source.into() })
    }
}

/// Sums over tokens, per loop.
#[derive(Clone, Default)]
struct Sums {
    nats: f64,
    right: usize,
    agree: usize,
    oracle: usize,
}

/// Evaluates `model` on a text. Windows overlap by half, and only a window's second half counts. Each counted token is
/// therefore predicted from the `seq / 2` to `seq - 1` tokens before it. The first window counts completely.
///
/// # Errors
/// If a tensor operation fails or the model's logits are not finite.
pub fn evaluate(model: &Reference, corpus: &Corpus, windows: Windows<'_>) -> Result<Evaluation, TrainingError> {
    evaluate_and_record(model, corpus, windows, |_| ())
}

/// How a text is cut into windows.
#[derive(Clone, Copy, Debug)]
pub struct Windows<'a> {
    /// Tokens per window.
    pub seq: usize,
    /// Tokens that every window begins with, such as Gemma's `<bos>`; fewer than half of `seq`. With them, the text's
    /// first token is predicted too.
    pub begin: &'a [u32],
}

/// As [`evaluate`], and passes on each window's exit signals and predicted tokens. Entry `token * num_loops + depth`
/// belongs to a counted token, as in [`traces::ExitTrace::push_generation`].
///
/// # Errors
/// As for [`evaluate`].
pub fn evaluate_and_record(
    model: &Reference,
    corpus: &Corpus,
    Windows { seq, begin }: Windows<'_>,
    mut record: impl FnMut(&[(Signals, u32)]),
) -> Result<Evaluation, TrainingError> {
    let tokens = corpus.tokens();
    let first = usize::from(begin.is_empty());
    let predicted = tokens.len() - first;
    let mut sums = vec![Sums::default(); model.config().num_loops];
    let mut next = first;
    while next < tokens.len() {
        let start = (next + begin.len()).saturating_sub(seq / 2 + 1);
        let end = (start + seq + 1 - begin.len()).min(tokens.len());
        let window = [begin, &tokens[start..end]].concat();
        let loops = read_window(model, &window, begin.len() + next - start - 1)?;
        if let Some(depth) = loops.iter().position(|read| read.rows.iter().any(|row| !row.0.top1.is_finite())) {
            return Err(TrainingError::NotFinite { from: next - first, to: end - first, depth });
        }
        add(&mut sums, &loops, &tokens[next..end]);
        let rows = (0..end - next).flat_map(|row| loops.iter().map(move |read| read.rows[row]));
        record(&rows.collect::<Vec<_>>());
        next = end;
    }
    let first_token_bits = first as f64 * (model.config().vocab_size as f64).log2();
    let figures = |(loop_index, sums): (usize, &Sums)| LoopFigures {
        passes: loop_index + 1,
        loss_nats_per_token: sums.nats / predicted as f64,
        perplexity: (sums.nats / predicted as f64).exp(),
        bits_per_byte: (sums.nats / std::f64::consts::LN_2 + first_token_bits) / corpus.bytes() as f64,
        accuracy: sums.right as f64 / predicted as f64,
        agreement_with_last: sums.agree as f64 / predicted as f64,
        oracle_share: sums.oracle as f64 / predicted as f64,
    };
    Ok(Evaluation { loops: sums.iter().enumerate().map(figures).collect(), tokens: predicted, bytes: corpus.bytes() })
}

/// One loop's predictions of the counted tokens of a window.
struct LoopReading {
    /// Cross-entropy, summed over the tokens.
    nats: f64,
    /// Exit signals and most likely token of each.
    rows: Vec<(Signals, u32)>,
}

/// Reads the predictions of a window from index `skip` on, at every loop.
fn read_window(model: &Reference, window: &[u32], skip: usize) -> Result<Vec<LoopReading>, TrainingError> {
    let (inputs, targets) = inputs_and_targets(&[window], model.device())?;
    let rows = targets.elem_count() - skip;
    let targets = targets.narrow(0, skip, rows)?;
    let mut before: Option<Tensor> = None;
    let mut logits_before = Vec::new();
    let mut loops = Vec::new();
    for (depth, hidden) in model.hidden_states(&inputs)?.iter().enumerate() {
        let logits = model.logits(&model.exit(hidden, 1)?.narrow(0, skip, rows)?, depth)?;
        // The exit signals are computed on the CPU.
        let hidden = hidden.narrow(0, skip, rows)?;
        let gates = match model.gate_logits(&model.final_norm(&hidden)?, depth)? {
            Some(scores) => (scores.neg()?.exp()? + 1.0)?.recip()?.to_vec1()?,
            None => vec![f32::from(u8::from(model.config().gate)); rows],
        };
        let hidden = hidden.to_device(&Device::Cpu)?;
        let mean: f32 = cross_entropy(&logits, &targets)?.to_scalar()?;
        let changes = match &before {
            Some(before) => Change::of(&compare(before, &hidden)?.flatten_all()?.to_vec1::<f32>()?),
            None => vec![Change::FROM_ZERO; rows],
        };
        let logits = logits.to_device(&Device::Cpu)?;
        let verdicts = signals::read(&logits, 0.0, &vec![0; rows])?;
        let logits = logits.to_vec2::<f32>()?;
        let row = |(index, ((verdict, change), gate)): (usize, ((&signals::Verdict, Change), f32))| {
            let Change { similarity, difference } = change;
            let kl = signals::divergence(logits_before.get(index).map(Vec::as_slice), &logits[index]);
            (Signals { similarity, difference, kl, gate, ..verdict.signals() }, verdict.token)
        };
        let rows_read = verdicts.iter().zip(changes).zip(gates).enumerate().map(row).collect();
        logits_before = logits;
        loops.push(LoopReading { nats: f64::from(mean) * rows as f64, rows: rows_read });
        before = Some(hidden);
    }
    Ok(loops)
}

/// Adds the loops' predictions of tokens whose true values are `right`.
fn add(sums: &mut [Sums], loops: &[LoopReading], right: &[u32]) {
    let token = |depth: usize, row: usize| loops[depth].rows[row].1;
    for (depth, (read, sums)) in loops.iter().zip(sums.iter_mut()).enumerate() {
        let agrees = |depth: usize, row: usize| token(depth, row) == token(loops.len() - 1, row);
        let count = |holds: &dyn Fn(usize) -> bool| (0..right.len()).filter(|&row| holds(row)).count();
        sums.nats += read.nats;
        sums.right += count(&|row| token(depth, row) == right[row]);
        sums.agree += count(&|row| agrees(depth, row));
        sums.oracle += count(&|row| agrees(depth, row) && (0..depth).all(|earlier| !agrees(earlier, row)));
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::sync::Arc;

    use super::*;
    use engine::{Engine, Model, ModelConfig, Prompts, Sampling, Tokenizer, Weights};
    use traces::{ExitSignal, Nanos, Request};

    const TEXT: &str = "In the beginning God created the heaven and the earth.";

    fn weights() -> Weights {
        let config = ModelConfig {
            vocab_size: 256,
            hidden_size: 8,
            intermediate_size: 12,
            num_heads: 2,
            num_kv_heads: 1,
            head_dim: 4,
            block_layers: 1,
            num_loops: 3,
            tie_embeddings: true,
            max_positions: 64,
            gate: true,
            ..ModelConfig::default()
        };
        Weights::random(config, 7).unwrap()
    }

    fn windows(seq: usize) -> Windows<'static> {
        Windows { seq, begin: &[] }
    }

    fn corpus() -> Corpus {
        let tokenizer = Tokenizer::train(TEXT, 256).unwrap();
        Corpus::new(TEXT, &tokenizer, 8, "held-out").unwrap()
    }

    #[test]
    fn a_model_that_knows_nothing_needs_eight_bits_a_byte() {
        let zeros = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.zeros_like().unwrap());
        let config = weights().config().clone();
        let tensors = weights().tensors().iter().map(zeros).collect();
        let model = Reference::new(&Weights::from_tensors(config, tensors, "test").unwrap()).unwrap();
        let evaluation = evaluate(&model, &corpus(), windows(8)).unwrap();
        assert_eq!((evaluation.tokens, evaluation.bytes), (TEXT.len() - 1, TEXT.len()));
        for figures in &evaluation.loops {
            assert!((figures.bits_per_byte - 8.0).abs() < 1e-5);
            assert_eq!(figures.agreement_with_last, 1.0);
        }
        assert_eq!(evaluation.mean_oracle_depth(), 1.0);
    }

    #[test]
    fn the_file_tells_the_share_of_tokens_that_a_loop_predicts_right() {
        // All tokens are equally likely, so the first of the vocabulary is predicted.
        let zeros = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.zeros_like().unwrap());
        let tensors = weights().tensors().iter().map(zeros).collect();
        let model =
            Reference::new(&Weights::from_tensors(weights().config().clone(), tensors, "test").unwrap()).unwrap();
        let tokenizer = Tokenizer::train(TEXT, 256).unwrap();
        assert_eq!(tokenizer.id_of("!"), Some(0));
        let corpus = Corpus::new("!!a!b!!!c", &tokenizer, 4, "held-out").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("eval.csv");
        evaluate(&model, &corpus, windows(4)).unwrap().write_csv(&path).unwrap();
        let mut file = csv::Reader::from_path(&path).unwrap();
        let column = file.headers().unwrap().iter().position(|name| name == "accuracy").unwrap();
        let accuracies: Vec<f64> = file.records().map(|line| line.unwrap()[column].parse().unwrap()).collect();
        assert_eq!(accuracies, [5.0 / 8.0; 3]);
    }

    #[test]
    fn a_later_window_starts_half_a_window_early_and_counts_only_its_second_half() {
        let model = Reference::new(&weights()).unwrap();
        let tokenizer = Tokenizer::train(TEXT, 256).unwrap();
        let corpus = Corpus::new(&TEXT[..13], &tokenizer, 8, "held-out").unwrap();
        let found = evaluate(&model, &corpus, windows(8)).unwrap();
        assert_eq!(found.tokens, 12);

        let nats = |window: &[u32], skip: usize| {
            let (inputs, targets) = inputs_and_targets(&[window], model.device()).unwrap();
            let logits = model.forward(&inputs).unwrap().pop().unwrap();
            let rows = targets.elem_count() - skip;
            let (logits, targets) = (logits.narrow(0, skip, rows).unwrap(), targets.narrow(0, skip, rows).unwrap());
            let mean: f32 = cross_entropy(&logits, &targets).unwrap().to_scalar().unwrap();
            f64::from(mean) * rows as f64
        };
        let tokens = corpus.tokens();
        let expected = (nats(&tokens[..=8], 0) + nats(&tokens[4..=12], 4)) / 12.0;
        assert!((found.loops[2].loss_nats_per_token - expected).abs() < 1e-6);
    }

    #[test]
    fn every_window_begins_with_the_tokens_that_a_sequence_begins_with() {
        let model = Reference::new(&weights()).unwrap();
        let corpus = corpus().start(13, &Tokenizer::train(TEXT, 256).unwrap()).unwrap();
        let found = evaluate(&model, &corpus, Windows { seq: 8, begin: &[200] }).unwrap();
        assert_eq!(found.tokens, 13);
        let tokens = corpus.tokens();
        let windows = [(0..8, 0), (4..12, 4), (8..13, 4)];
        let nats = windows.map(|(range, skip)| {
            let window = [&[200], &tokens[range]].concat();
            read_window(&model, &window, skip).unwrap()[2].nats
        });
        assert!((found.loops[2].loss_nats_per_token - nats.iter().sum::<f64>() / 13.0).abs() < 1e-9);
        let bits = nats.iter().sum::<f64>() / std::f64::consts::LN_2;
        assert!((found.loops[2].bits_per_byte - bits / corpus.bytes() as f64).abs() < 1e-9);
    }

    #[test]
    fn oracle_shares_add_up_and_the_last_loop_agrees_with_itself() {
        let model = Reference::new(&weights()).unwrap();
        let evaluation = evaluate(&model, &corpus(), windows(8)).unwrap();
        let sum: f64 = evaluation.loops.iter().map(|figures| figures.oracle_share).sum();
        assert!((sum - 1.0).abs() < 1e-12);
        assert_eq!(evaluation.loops[2].agreement_with_last, 1.0);
        let first = &evaluation.loops[0];
        assert_eq!(first.oracle_share, first.agreement_with_last);
    }

    #[test]
    fn what_is_recorded_tells_the_same_as_the_figures() {
        let model = Reference::new(&weights()).unwrap();
        let mut exits = exits::tests::empty(3);
        let evaluation = evaluate_and_record(&model, &corpus(), windows(8), |rows| {
            exits.push_generation(rows);
        })
        .unwrap();
        assert_eq!(exits.num_tokens(), evaluation.tokens);
        assert_eq!(exits.num_generations(), 1 + (evaluation.tokens - 8).div_ceil(4));
        for (depth, figures) in evaluation.loops.iter().enumerate() {
            assert_eq!(exits.agreement_at(depth), figures.agreement_with_last);
        }
        assert!((exits.mean_oracle_passes() - evaluation.mean_oracle_depth()).abs() < 1e-12);
    }

    #[test]
    fn signals_are_those_that_the_engine_records() {
        let weights = weights();
        let prompt = corpus().tokens()[..5].to_vec();
        let engine = Engine {
            model: Arc::new(Model::load(&weights, engine::WeightType::F32).unwrap()),
            prompts: Arc::new(Prompts::Text(prompt.clone())),
            sampling: Sampling::default(),
            script: None,
        };
        let request = Request { id: 0, arrival: Nanos::ZERO, prompt_tokens: 5, output_tokens: 6 };
        let recorded = engine.record(&[request], "test", "test", &mut ()).unwrap();
        let generated = (0..6).map(|token| recorded.predictions[token * 3 + 2]);
        let text: Vec<u32> = prompt.iter().copied().chain(generated).collect();
        let loops = read_window(&Reference::new(&weights).unwrap(), &text, 4).unwrap();
        for (row, expected) in recorded.signals.iter().enumerate() {
            let (found, token) = loops[row % 3].rows[row / 3];
            assert_eq!(token, recorded.predictions[row]);
            for measure in ExitSignal::ALL {
                let (found, expected) = (found.get(measure), expected.get(measure));
                assert!((found - expected).abs() < 1e-4, "{measure} of row {row}: {found} is not {expected}");
            }
        }
    }

    #[test]
    fn logits_that_are_not_finite_are_an_error() {
        let mut tensors: HashMap<_, _> = weights().tensors().clone().into_iter().collect();
        let norm = tensors.get_mut("norm.weight").unwrap();
        *norm = (norm.ones_like().unwrap() * 3e38).unwrap();
        let weights = Weights::from_tensors(weights().config().clone(), tensors, "test").unwrap();
        let message = evaluate(&Reference::new(&weights).unwrap(), &corpus(), windows(8)).unwrap_err().to_string();
        assert!(message.contains("tokens 0 to 8") && message.contains("depth 0"), "{message}");
    }
}
