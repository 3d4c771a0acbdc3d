//! Training under a KV fill: tokens exit, and later tokens find at deeper depths what the fill leaves of them, as when
//! the model is served.

use std::fmt;
use std::str::FromStr;

use candle_core::{D, DType, Result, Tensor};
use engine::reference::{LoopStates, Reference};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use scheduler::KvFill;
use serde::{Deserialize, Serialize};
use traces::ExitSignal;

use super::Loops;
use super::losses::softmax;

/// Training under a KV fill.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FillOptions {
    /// What later tokens find of a token that exited: `reuse`, `first` or `skip`.
    #[serde(with = "by_name")]
    pub fill: KvFill,
    /// Where tokens exit.
    #[serde(default)]
    pub exits: ExitRule,
    /// Most of a window that is a prompt, as a share of its tokens: the tokens of a prompt run every depth. A window's
    /// prompt is up to this long, with equal probabilities.
    #[serde(default = "half")]
    pub prompt: f64,
}

fn half() -> f64 {
    0.5
}

mod by_name {
    use super::{Deserialize, KvFill};

    pub fn serialize<S: serde::Serializer>(fill: &KvFill, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(fill)
    }

    pub fn deserialize<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<KvFill, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl FillOptions {
    /// Options with the default exits and prompts.
    pub fn new(fill: KvFill) -> Self {
        Self { fill, exits: ExitRule::default(), prompt: half() }
    }
}

/// Where tokens exit in training under a KV fill: `uniform`, `geometric:PROBABILITY`, `SIGNAL:THRESHOLD` or
/// `SIGNAL:LOWEST..HIGHEST`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum ExitRule {
    /// At any depth with equal probabilities.
    #[default]
    Uniform,
    /// After each loop with this probability.
    Geometric(f64),
    /// At the earliest depth where the token's own signal passes a threshold. The threshold of a window is between
    /// these two, with equal probabilities.
    Signal(ExitSignal, f32, f32),
}

impl ExitRule {
    /// Signals that a rule can read.
    const SIGNALS: [ExitSignal; 4] = [ExitSignal::Top1, ExitSignal::Margin, ExitSignal::Entropy, ExitSignal::Gate];
}

impl fmt::Display for ExitRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uniform => f.write_str("uniform"),
            Self::Geometric(probability) => write!(f, "geometric:{probability}"),
            Self::Signal(signal, low, high) if low == high => write!(f, "{signal}:{low}"),
            Self::Signal(signal, low, high) => write!(f, "{signal}:{low}..{high}"),
        }
    }
}

impl FromStr for ExitRule {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let threshold = |text: &str| text.parse::<f32>().ok().filter(|threshold| threshold.is_finite());
        let signal = |name: &str, thresholds: &str| {
            let signal = Self::SIGNALS.into_iter().find(|signal| signal.name() == name)?;
            let (low, high) = thresholds.split_once("..").unwrap_or((thresholds, thresholds));
            let (low, high) = (threshold(low)?, threshold(high)?);
            (low <= high).then_some(Self::Signal(signal, low, high))
        };
        let rule = match (text, text.split_once(':')) {
            ("uniform", _) => Some(Self::Uniform),
            (_, Some(("geometric", probability))) => {
                probability.parse().ok().filter(|p| (0.0..=1.0).contains(p)).map(Self::Geometric)
            }
            (_, Some((name, thresholds))) => signal(name, thresholds),
            _ => None,
        };
        rule.ok_or_else(|| {
            let signals = Self::SIGNALS.map(ExitSignal::name).join(", ");
            format!(
                "unknown exits `{text}`: expected uniform, geometric:PROBABILITY, SIGNAL:THRESHOLD or \
                 SIGNAL:LOWEST..HIGHEST, where SIGNAL is one of {signals}"
            )
        })
    }
}

impl From<ExitRule> for String {
    fn from(rule: ExitRule) -> Self {
        rule.to_string()
    }
}

impl TryFrom<String> for ExitRule {
    type Error = String;

    fn try_from(text: String) -> std::result::Result<Self, String> {
        text.parse()
    }
}

/// What is drawn for a window.
struct Draw {
    /// Number of tokens of the prompt, less than the window's.
    prompt: usize,
    exits: DrawnExits,
}

enum DrawnExits {
    /// The exit depth of each token of the window.
    Depths(Vec<usize>),
    /// Threshold of a signal.
    Threshold(ExitSignal, f32),
}

impl Draw {
    fn new(options: &FillOptions, seq: usize, num_loops: usize, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let longest = (options.prompt * (seq - 1) as f64) as usize;
        let prompt = rng.random_range(0..=longest);
        let last = num_loops - 1;
        let exits = match options.exits {
            ExitRule::Uniform => DrawnExits::Depths((0..seq).map(|_| rng.random_range(0..=last)).collect()),
            ExitRule::Geometric(probability) => {
                let mut depth = || (0..last).find(|_| rng.random_bool(probability)).unwrap_or(last);
                DrawnExits::Depths((0..seq).map(|_| depth()).collect())
            }
            ExitRule::Signal(signal, low, high) => {
                DrawnExits::Threshold(signal, low + (high - low) * rng.random::<f32>())
            }
        };
        Self { prompt, exits }
    }
}

/// Exits of a batch in training under a KV fill.
pub(super) struct Served {
    /// The exit depth of each token, by window and position; the last for those of prompts.
    depths: Vec<usize>,
    /// Number of tokens of each window's prompt.
    prompts: Vec<usize>,
    seq: usize,
}

impl Served {
    /// Runs `inputs` `[windows, seq]` under a KV fill. What is drawn for a window depends only on its seed.
    pub fn run(options: &FillOptions, model: &Reference, inputs: &Tensor, seeds: &[u64]) -> Result<(Loops, Self)> {
        let (windows, seq) = inputs.dims2()?;
        if seeds.len() != windows {
            candle_core::bail!("{} seeds for {windows} windows", seeds.len());
        }
        let num_loops = model.config().num_loops;
        let draws: Vec<Draw> = seeds.iter().map(|seed| Draw::new(options, seq, num_loops, *seed)).collect();
        let mut depths = vec![num_loops - 1; windows * seq];
        let mut loops = Loops::default();
        let mut run = model.start(inputs, options.fill)?;
        while let Some(states) = run.next_loop()? {
            let depth = loops.hidden.len();
            let logits = model.logits(&states.exited, depth)?;
            if depth + 1 < num_loops {
                let signals = match options.exits {
                    ExitRule::Signal(signal, ..) => signals(signal, model, &states, &logits, depth)?,
                    _ => Vec::new(),
                };
                let mut exits = vec![false; windows * seq];
                for (window, draw) in draws.iter().enumerate() {
                    for position in draw.prompt..seq {
                        let token = window * seq + position;
                        exits[token] = depths[token] > depth
                            && match &draw.exits {
                                DrawnExits::Depths(depths) => depths[position] == depth,
                                DrawnExits::Threshold(signal, threshold) => {
                                    signal.bound(*threshold).is_reached(signals[token])
                                }
                            };
                        if exits[token] {
                            depths[token] = depth;
                        }
                    }
                }
                run.exit(&exits)?;
            }
            loops.hidden.push(states.hidden);
            loops.logits.push(Some(logits));
        }
        Ok((loops, Self { depths, prompts: draws.iter().map(|draw| draw.prompt).collect(), seq }))
    }

    /// Mean number of passes of the tokens after the prompts, over windows.
    pub fn mean_depth(&self) -> f64 {
        self.mean(|token| (self.depths[token] + 1) as f64)
    }

    /// Share of the tokens after the prompts whose prediction at their exit depth is `expected`, mean over windows.
    /// `predicted` is by depth and token.
    pub fn agreement(&self, predicted: &[Vec<u32>], expected: &[u32]) -> f64 {
        self.mean(|token| f64::from(u8::from(predicted[self.depths[token]][token] == expected[token])))
    }

    fn mean(&self, of_token: impl Fn(usize) -> f64) -> f64 {
        let of_window = |(window, prompt): (usize, &usize)| {
            let tokens = window * self.seq + prompt..(window + 1) * self.seq;
            let served = tokens.len() as f64;
            tokens.map(&of_token).sum::<f64>() / served
        };
        self.prompts.iter().enumerate().map(of_window).sum::<f64>() / self.prompts.len() as f64
    }
}

/// A signal of every row after a loop.
fn signals(
    signal: ExitSignal,
    model: &Reference,
    states: &LoopStates,
    logits: &Tensor,
    depth: usize,
) -> Result<Vec<f32>> {
    let probabilities = || softmax(logits);
    let values = match signal {
        ExitSignal::Gate => {
            let scores = model.gate_logits(&model.final_norm(&states.hidden.detach())?, depth)?;
            let Some(scores) = scores else { candle_core::bail!("no gate at depth {depth}") };
            ((scores.neg()?.exp()? + 1.0)?).recip()?
        }
        ExitSignal::Entropy => {
            let p = probabilities()?;
            (&p * p.maximum(f64::from(f32::MIN_POSITIVE))?.log()?)?.sum(D::Minus1)?.neg()?
        }
        ExitSignal::Top1 => probabilities()?.max(D::Minus1)?,
        ExitSignal::Margin => {
            let p = probabilities()?;
            let top = p.max_keepdim(D::Minus1)?;
            let others = (&p * p.broadcast_lt(&top)?.to_dtype(DType::F32)?)?;
            (top.squeeze(D::Minus1)? - others.max(D::Minus1)?)?
        }
        ExitSignal::Similarity | ExitSignal::Difference | ExitSignal::Kl => {
            candle_core::bail!("training does not compare depths")
        }
    };
    values.detach().to_vec1()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{batch, model, relaxed, variables};
    use super::*;

    #[test]
    fn rules_of_exits_are_read_as_they_are_written() {
        for rule in ["uniform", "geometric:0.25", "margin:0.05", "entropy:0.5..1.5", "gate:0.8..0.95"] {
            assert_eq!(rule.parse::<ExitRule>().unwrap().to_string(), rule);
        }
        for rule in ["none", "geometric", "geometric:1.5", "margin:x", "margin:0.2..0.1", "similarity:0.9", "top1:nan"]
        {
            let refusal = rule.parse::<ExitRule>().unwrap_err();
            assert!(refusal.contains(&format!("unknown exits `{rule}`: expected uniform, geometric")), "{refusal}");
        }
        let options: FillOptions = serde_yaml::from_str("{fill: reuse, exits: 'margin:0.1'}").unwrap();
        assert_eq!(options.exits, ExitRule::Signal(ExitSignal::Margin, 0.1, 0.1));
        assert_eq!((options.fill, options.prompt), (KvFill::Reuse, 0.5));
        assert_eq!(serde_yaml::from_str::<FillOptions>(&serde_yaml::to_string(&options).unwrap()).unwrap(), options);
        let refusal = serde_yaml::from_str::<FillOptions>("{fill: copy}").unwrap_err().to_string();
        assert!(refusal.contains("unknown KV fill `copy`"), "{refusal}");
    }

    fn served(exits: &str, prompt: f64, seeds: [u64; 2]) -> (Loops, Served) {
        let (config, variables) = (relaxed(), variables(&relaxed(), 5));
        let options = FillOptions { exits: exits.parse().unwrap(), prompt, ..FillOptions::new(KvFill::Reuse) };
        Served::run(&options, &model(&config, &variables), &batch().0, &seeds).unwrap()
    }

    #[test]
    fn exits_of_a_window_depend_on_its_seed_alone() {
        let depths = |seeds| served("uniform", 0.0, seeds).1.depths;
        let both = depths([1, 2]);
        assert_eq!([&both[5..], &both[..5]].concat(), depths([2, 1]));
        assert_ne!(both[..5], both[5..]);
        let many: Vec<usize> = (0..40).flat_map(|seed| depths([2 * seed, 2 * seed + 1])).collect();
        for depth in 0..3 {
            let share = many.iter().filter(|exit| **exit == depth).count() as f64 / many.len() as f64;
            assert!((share - 1.0 / 3.0).abs() < 0.08, "{share} exit at depth {depth}");
        }
    }

    #[test]
    fn tokens_exit_where_their_own_signal_first_passes_the_threshold() {
        let (loops, served) = served("margin:0.3", 0.0, [1, 2]);
        let reads = |logits: &Option<Tensor>| {
            let logits = logits.as_ref().unwrap().detach();
            engine::kernels::signals::read(&logits, 0.0, &[0; 10]).unwrap()
        };
        let by_depth: Vec<_> = loops.logits.iter().map(reads).collect();
        for (token, depth) in served.depths.iter().enumerate() {
            let first = (0..2).find(|depth| by_depth[*depth][token].margin >= 0.3).unwrap_or(2);
            assert_eq!(*depth, first, "token {token}");
        }
        assert!((0..3).all(|depth| served.depths.contains(&depth)), "{:?}", served.depths);
    }

    #[test]
    fn tokens_of_prompts_run_every_depth() {
        let mut lengths = Vec::new();
        for seed in 0..40 {
            let (_, served) = served("geometric:1", 1.0, [2 * seed, 2 * seed + 1]);
            for (window, prompt) in served.depths.chunks(5).zip(&served.prompts) {
                assert_eq!(window, [vec![2; *prompt], vec![0; 5 - prompt]].concat());
                lengths.push(*prompt);
            }
        }
        assert!((0..5).all(|length| lengths.contains(&length)) && lengths.iter().all(|length| *length < 5));
    }

    #[test]
    fn signals_equal_those_that_the_engine_reads() {
        let (config, variables) = (relaxed(), variables(&relaxed(), 5));
        let model = model(&config, &variables);
        let states = model.start(&batch().0, KvFill::Reuse).unwrap().next_loop().unwrap().unwrap();
        let logits = model.logits(&states.exited, 0).unwrap();
        let expected = engine::kernels::signals::read(&logits.detach(), 0.0, &[0; 10]).unwrap();
        for signal in [ExitSignal::Top1, ExitSignal::Margin, ExitSignal::Entropy] {
            let found = signals(signal, &model, &states, &logits, 0).unwrap();
            for (found, expected) in found.iter().zip(&expected) {
                let expected = expected.signals().get(signal);
                assert!((found - expected).abs() < 1e-5, "{signal}: {found} is not {expected}");
            }
        }
    }
}
