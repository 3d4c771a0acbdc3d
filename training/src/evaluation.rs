//! What a model knows of a held-out text at each depth, and how early its tokens could leave.

use std::path::Path;

use candle_core::{D, Tensor};
use engine::reference::Reference;

use crate::corpus::{Corpus, inputs_and_targets};
use crate::error::TrainingError;
use crate::objective::cross_entropy;

/// Figures of one loop over a held-out text.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct LoopFigures {
    /// Passes run: 1 is the first loop.
    pub passes: usize,
    /// Cross-entropy, nats per token.
    pub loss_nats_per_token: f64,
    /// Bits to code the text with this loop's probabilities, over its bytes; the first token, which
    /// nothing precedes, is counted at `log2(vocab)` bits.
    pub bits_per_byte: f64,
    /// Share of tokens whose most likely token is the right one.
    pub accuracy: f64,
    /// Share of tokens whose most likely token is that of the last loop.
    pub agreement_with_last: f64,
    /// Share of tokens whose oracle depth this is: the earliest loop that agrees with the last.
    pub oracle_share: f64,
}

/// Figures of a model over a held-out text.
#[derive(Clone, Debug, PartialEq)]
pub struct Evaluation {
    /// Per loop, first to last.
    pub loops: Vec<LoopFigures>,
    /// Tokens predicted.
    pub tokens: usize,
    /// Bytes coded.
    pub bytes: usize,
}

impl Evaluation {
    /// Mean passes per token (1 to the number of loops) of an oracle that leaves at the earliest
    /// loop that agrees with the last.
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

/// Evaluates `model` on a text. Windows of `seq` tokens overlap by half
/// and only a window's second half counts, so a token is predicted from `seq / 2` to `seq - 1`
/// tokens before it, except in the first window, which counts whole.
///
/// # Errors
/// If a tensor operation fails.
pub fn evaluate(model: &Reference, corpus: &Corpus, seq: usize) -> Result<Evaluation, TrainingError> {
    let tokens = corpus.tokens();
    let predicted = tokens.len() - 1;
    let mut sums = vec![Sums::default(); model.config().num_loops];
    let mut counted = 0;
    while counted < predicted {
        let start = counted.saturating_sub(seq / 2);
        let end = (start + seq).min(predicted);
        let window = &tokens[start..=end];
        add_window(model, window, counted - start, &mut sums)?;
        counted = end;
    }
    let first_token_bits = (model.config().vocab_size as f64).log2();
    let figures = |(loop_index, sums): (usize, &Sums)| LoopFigures {
        passes: loop_index + 1,
        loss_nats_per_token: sums.nats / predicted as f64,
        bits_per_byte: (sums.nats / std::f64::consts::LN_2 + first_token_bits) / corpus.bytes() as f64,
        accuracy: sums.right as f64 / predicted as f64,
        agreement_with_last: sums.agree as f64 / predicted as f64,
        oracle_share: sums.oracle as f64 / predicted as f64,
    };
    Ok(Evaluation { loops: sums.iter().enumerate().map(figures).collect(), tokens: predicted, bytes: corpus.bytes() })
}

/// Adds the predictions of a window from its `skip`-th on.
fn add_window(model: &Reference, window: &[u32], skip: usize, sums: &mut [Sums]) -> Result<(), TrainingError> {
    let (inputs, targets) = inputs_and_targets(&[window])?;
    let rows = targets.elem_count() - skip;
    let targets = targets.narrow(0, skip, rows)?;
    let mut tokens_by_loop = Vec::new();
    for (depth, (hidden, sums)) in model.hidden_states(&inputs)?.iter().zip(sums.iter_mut()).enumerate() {
        let logits = model.logits(&model.exit(hidden, 1)?.narrow(0, skip, rows)?, depth)?;
        let mean: f32 = cross_entropy(&logits, &targets)?.to_scalar()?;
        sums.nats += f64::from(mean) * rows as f64;
        tokens_by_loop.push(most_likely(&logits)?);
    }
    let right: Vec<u32> = targets.to_vec1()?;
    let last = tokens_by_loop.last().cloned().unwrap_or_default();
    for row in 0..rows {
        let agrees = |tokens: &Vec<u32>| tokens[row] == last[row];
        let oracle = tokens_by_loop.iter().position(agrees);
        for (depth, (tokens, sums)) in tokens_by_loop.iter().zip(sums.iter_mut()).enumerate() {
            sums.right += usize::from(tokens[row] == right[row]);
            sums.agree += usize::from(agrees(tokens));
            sums.oracle += usize::from(oracle == Some(depth));
        }
    }
    Ok(())
}

fn most_likely(logits: &Tensor) -> candle_core::Result<Vec<u32>> {
    logits.argmax(D::Minus1)?.to_vec1()
}

#[cfg(test)]
mod tests {
    use super::*;
    use engine::config::ModelConfig;
    use engine::tokenizer::Tokenizer;
    use engine::weights::Weights;

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
            ..ModelConfig::default()
        };
        Weights::random(config, 7).unwrap()
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
        let evaluation = evaluate(&model, &corpus(), 8).unwrap();
        assert_eq!((evaluation.tokens, evaluation.bytes), (TEXT.len() - 1, TEXT.len()));
        for figures in &evaluation.loops {
            assert!((figures.bits_per_byte - 8.0).abs() < 1e-5);
            assert_eq!(figures.agreement_with_last, 1.0);
        }
        assert_eq!(evaluation.mean_oracle_depth(), 1.0);
    }

    #[test]
    fn a_later_window_starts_half_a_window_early_and_counts_only_its_second_half() {
        let model = Reference::new(&weights()).unwrap();
        let tokenizer = Tokenizer::train(TEXT, 256).unwrap();
        let corpus = Corpus::new(&TEXT[..13], &tokenizer, 8, "held-out").unwrap();
        let found = evaluate(&model, &corpus, 8).unwrap();
        assert_eq!(found.tokens, 12);

        let nats = |window: &[u32], skip: usize| {
            let (inputs, targets) = inputs_and_targets(&[window]).unwrap();
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
    fn oracle_shares_add_up_and_the_last_loop_agrees_with_itself() {
        let model = Reference::new(&weights()).unwrap();
        let evaluation = evaluate(&model, &corpus(), 8).unwrap();
        let sum: f64 = evaluation.loops.iter().map(|figures| figures.oracle_share).sum();
        assert!((sum - 1.0).abs() < 1e-12);
        assert_eq!(evaluation.loops[2].agreement_with_last, 1.0);
        let first = &evaluation.loops[0];
        assert_eq!(first.oracle_share, first.agreement_with_last);
    }
}
