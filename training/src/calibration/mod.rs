//! Exit thresholds with a statistical guarantee.
//!
//! The method is Learn then Test (arXiv 2110.01052), as CALM uses it for early exits (arXiv 2207.07061). Each threshold
//! has a hypothesis: its risk, the share of tokens that differ from full depth, exceeds a tolerance. The hypotheses are
//! tested from the strictest threshold on, all at one level, until one is not rejected (fixed-sequence testing). At the
//! requested confidence, *every* threshold before that one keeps the tolerance, for any model. The laxest of them is
//! chosen.
//!
//! The tokens of a request are not independent: easy and hard tokens come in runs, and whole prompts are hard. By
//! default, the risk is therefore the expectation, over requests, of the share of a request's tokens that differ, and
//! only the requests have to be independent.
//!
//! A trace at full depth says how often *recorded* exits differ. A trace that was recorded under exit policies says it of
//! service: each threshold is tested on the requests that were served under it. The binomial test assumes that tokens are independent. If they are not, it
//! claims more than it can.

mod p_values;

use std::fmt;
use std::str::FromStr;

use engine::RecordedPolicy;
use serde::{Deserialize, Serialize};
use traces::{ExitSignal, ExitTrace, SignalUnit};

use crate::evaluation::exits::Exits;

/// Statistical test of a threshold's risk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RiskTest {
    /// Betting test on the share of a request's tokens, for independent requests. It has more power when requests are
    /// alike.
    Betting,
    /// Hoeffding-Bentkus test on the share of a request's tokens, for independent requests. It is weaker than betting,
    /// but does not depend on the order of requests.
    HoeffdingBentkus,
    /// Binomial test on the share of all tokens, for independent tokens.
    Binomial,
}

impl RiskTest {
    /// Every test.
    pub const ALL: [Self; 3] = [Self::Betting, Self::HoeffdingBentkus, Self::Binomial];

    /// The name in files and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Betting => "betting",
            Self::HoeffdingBentkus => "hoeffding-bentkus",
            Self::Binomial => "binomial",
        }
    }

    /// Empirical risk on a trace: a mean over what the test takes to be independent, 0 to 1.
    pub fn risk(self, exits: &Exits) -> f64 {
        match self {
            Self::Binomial => exits.differing() as f64 / exits.tokens() as f64,
            Self::Betting | Self::HoeffdingBentkus => {
                exits.losses().iter().sum::<f64>() / exits.generations.len() as f64
            }
        }
    }

    fn p_value(self, exits: &Exits, tolerance: f64, level: f64) -> f64 {
        match self {
            Self::Betting => p_values::betting(&exits.losses(), tolerance, level),
            Self::HoeffdingBentkus => p_values::hoeffding_bentkus(&exits.losses(), tolerance),
            Self::Binomial => p_values::binomial(exits.differing() as u64, exits.tokens() as u64, tolerance),
        }
    }
}

impl fmt::Display for RiskTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for RiskTest {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let names = Self::ALL.map(Self::name).join(", ");
        let test = Self::ALL.into_iter().find(|test| test.name() == name);
        test.ok_or_else(|| format!("unknown test `{name}`: expected one of {names}"))
    }
}

/// The guarantee that a threshold must keep.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target {
    /// Maximum risk, between 0 and 1.
    pub tolerance: f64,
    /// Probability that the risk is kept, over the draw of the calibration requests; between 0 and 1.
    pub confidence: f64,
    /// Test of the risk.
    pub test: RiskTest,
}

/// Outcome of a threshold on a trace.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Outcome {
    /// Threshold, in the measure's own unit.
    pub threshold: f32,
    /// Risk as defined by the test, 0 to 1.
    pub risk: f64,
    /// Share of all tokens that equal those of full depth, 0 to 1.
    pub agreement: f64,
    /// Passes per token.
    pub mean_depth: f64,
}

impl Outcome {
    /// Outcome of a threshold on a trace, for example one that it was not calibrated on; `None` where the trace was
    /// recorded under other policies.
    pub fn new(trace: &ExitTrace, measure: ExitSignal, threshold: f32, test: RiskTest) -> Option<Self> {
        Some(Self::of(threshold, &exits(trace, measure, threshold)?, test))
    }

    fn of(threshold: f32, exits: &Exits, test: RiskTest) -> Self {
        Self { threshold, risk: test.risk(exits), agreement: exits.agreement(), mean_depth: exits.mean_depth() }
    }
}

/// Evidence of the calibration trace for a threshold.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Evidence {
    /// Probability of a risk this low on the trace if the true risk exceeded the tolerance.
    pub p_value: f64,
    /// Whether this and all stricter thresholds keep the tolerance at the requested confidence.
    pub keeps_tolerance: bool,
}

/// A tested threshold.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Candidate {
    /// Outcome of the threshold on the calibration trace.
    pub outcome: Outcome,
    /// Result of its test.
    pub evidence: Evidence,
    /// Requests and tokens that it was tested on.
    pub trials: (usize, usize),
}

/// Results for all thresholds, from the strictest to the laxest.
#[derive(Clone, Debug, PartialEq)]
pub struct Calibration {
    /// The thresholds.
    pub candidates: Vec<Candidate>,
}

impl Calibration {
    /// The laxest threshold that keeps the tolerance; `None` if not even the strictest does.
    pub fn chosen(&self) -> Option<&Candidate> {
        self.candidates.iter().take_while(|candidate| candidate.evidence.keeps_tolerance).last()
    }

    /// The strictest threshold whose hypothesis was not rejected, where testing stopped.
    pub fn refused(&self) -> Option<&Candidate> {
        self.candidates.iter().find(|candidate| !candidate.evidence.keeps_tolerance)
    }
}

/// Thresholds per unit for probabilities, cosines, relative differences and divergences, of the last two up to 1.
const STEPS_PER_ONE: u16 = 1000;
/// Thresholds per nat for entropies, up to the entropy of half a million equally likely tokens.
const STEPS_PER_NAT: u16 = 100;
const MOST_NATS: u16 = 13;

/// Thresholds to test for a measure, from the strictest to the laxest. They must not depend on the calibration trace.
pub fn thresholds(measure: ExitSignal) -> Vec<f32> {
    let part = |steps: u16, per_unit: u16| f32::from(steps) / f32::from(per_unit);
    match measure.unit() {
        // Depths that have settled differ by thousandths of a nat.
        SignalUnit::Nats if measure == ExitSignal::Kl => {
            (0..=STEPS_PER_ONE).map(|steps| part(steps, STEPS_PER_ONE)).collect()
        }
        SignalUnit::Nats => (0..=MOST_NATS * STEPS_PER_NAT).map(|steps| part(steps, STEPS_PER_NAT)).collect(),
        SignalUnit::Ratio => (0..=STEPS_PER_ONE).map(|steps| part(steps, STEPS_PER_ONE)).collect(),
        SignalUnit::Share => (1..=STEPS_PER_ONE).rev().map(|steps| part(steps, STEPS_PER_ONE)).collect(),
    }
}

/// Thresholds to test on a trace, from the strictest to the laxest: [all](thresholds), or those that requests were
/// served under. Neither depends on what the requests generated.
pub fn thresholds_of(trace: &ExitTrace, measure: ExitSignal) -> Vec<f32> {
    let Some(served) = &trace.served else { return thresholds(measure) };
    let is_served = |policy: &usize| served.policies.iter().any(|&of| of as usize == *policy);
    let mut thresholds: Vec<f32> =
        policies(trace, measure).filter(|(_, policy)| is_served(policy)).map(|(threshold, _)| threshold).collect();
    thresholds.sort_by(|a, b| measure.sureness(*b).total_cmp(&measure.sureness(*a)));
    thresholds.dedup();
    thresholds
}

/// The policies of a recording that read a measure: threshold and index.
fn policies(trace: &ExitTrace, measure: ExitSignal) -> impl Iterator<Item = (f32, usize)> {
    let names = trace.meta.recording.iter().flat_map(|recording| recording.policies.iter());
    names.enumerate().filter_map(move |(index, name)| {
        let policy: RecordedPolicy = name.parse().ok()?;
        Some((policy.threshold_of(measure)?, index))
    })
}

/// The exits of a threshold: at the recorded signals, or as served under it.
fn exits(trace: &ExitTrace, measure: ExitSignal, threshold: f32) -> Option<Exits> {
    match &trace.served {
        None => Some(Exits::confident(trace, measure, threshold)),
        Some(_) => {
            let (_, policy) = policies(trace, measure).find(|(of, _)| *of == threshold)?;
            Some(Exits::served(trace, policy)).filter(|exits| exits.tokens() > 0)
        }
    }
}

/// Tests `thresholds`, ordered from the strictest to the laxest, on a trace.
///
/// # Panics
/// If the trace was recorded under policies, and a threshold is [not one of them](thresholds_of).
pub fn calibrate(trace: &ExitTrace, measure: ExitSignal, thresholds: &[f32], target: &Target) -> Calibration {
    let &Target { tolerance, confidence, test } = target;
    let level = 1.0 - confidence;
    let mut keeps_tolerance = true;
    let candidate = |&threshold: &f32| {
        let exits = exits(trace, measure, threshold).expect("requests were served under every threshold");
        let p_value = test.p_value(&exits, tolerance, level);
        keeps_tolerance &= p_value <= level;
        let evidence = Evidence { p_value, keeps_tolerance };
        let trials = (exits.generations.len(), exits.tokens());
        Candidate { outcome: Outcome::of(threshold, &exits, test), evidence, trials }
    };
    Calibration { candidates: thresholds.iter().map(candidate).collect() }
}

/// The smallest number of requests, or of tokens under the binomial test, from which the tolerance can be shown if no
/// token differs.
pub fn fewest_trials(target: &Target) -> usize {
    let &Target { tolerance, confidence, test } = target;
    let level = 1.0 - confidence;
    let shows = |trials: usize| match test {
        RiskTest::Betting => p_values::betting(&vec![0.0; trials], tolerance, level) <= level,
        RiskTest::HoeffdingBentkus | RiskTest::Binomial => (1.0 - tolerance).powi(trials as i32) <= level,
    };
    let (mut too_few, mut enough) = (0, 1);
    while !shows(enough) {
        (too_few, enough) = (enough, 2 * enough);
    }
    while enough - too_few > 1 {
        let middle = (too_few + enough) / 2;
        if shows(middle) { enough = middle } else { too_few = middle }
    }
    enough
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::evaluation::exits::tests::{empty, row};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};
    use traces::{ExitTraceMeta, Recording, ServedToken};

    fn target(test: RiskTest) -> Target {
        Target { tolerance: 0.05, confidence: 0.9, test }
    }

    /// Three loops: the first is half confident and right, the second is more confident and wrong.
    fn wrong_in_the_middle(requests: usize) -> ExitTrace {
        let mut trace = empty(3);
        (0..requests).for_each(|_| trace.push_generation(&[row(0.5, 1), row(0.9, 2), row(1.0, 1)]));
        trace
    }

    #[test]
    fn testing_stops_at_the_first_threshold_that_fails() {
        let trace = wrong_in_the_middle(200);
        for test in RiskTest::ALL {
            let found = calibrate(&trace, ExitSignal::Top1, &[0.99, 0.95, 0.8, 0.4], &target(test));
            assert_eq!(
                found.candidates.iter().map(|candidate| candidate.outcome.risk).collect::<Vec<_>>(),
                [0.0, 0.0, 1.0, 0.0]
            );
            let (chosen, refused) = (found.chosen().unwrap().outcome, found.refused().unwrap().outcome);
            assert_eq!((chosen.threshold, chosen.mean_depth), (0.95, 3.0));
            assert_eq!((refused.threshold, refused.agreement), (0.8, 0.0));
            let last = found.candidates[3].evidence;
            assert!(last.p_value < 0.1 && !last.keeps_tolerance, "{test}: a later one is not tested any more");
        }
    }

    #[test]
    fn thresholds_of_a_recording_under_policies_are_tested_on_the_requests_that_were_served_under_them() {
        let policies = ["confidence:top1:0.5", "static:1", "confidence:top1:0.9", "confidence:margin:0.1"];
        let policies = policies.map(str::to_owned).to_vec();
        let recording = Recording { policies, kv_fill: "reuse".to_owned(), prefill_depth: None, seed: 1 };
        let mut trace = ExitTrace::new(ExitTraceMeta { recording: Some(recording), ..empty(2).meta });
        // Both signals pass both thresholds. Under 0.9 the served token is that of full depth, under 0.5 it is not, although
        // the last depth says the same there.
        for _ in 0..100 {
            let rows = [row(0.95, 1), row(1.0, 1)];
            for (policy, full_depth) in [(0, 2), (2, 1), (1, 2)] {
                trace.push_served(&rows, &[ServedToken { exit_depth: 0, full_depth }], policy);
            }
        }
        let thresholds = thresholds_of(&trace, ExitSignal::Top1);
        assert_eq!(thresholds, [0.9, 0.5]);
        assert!(thresholds_of(&trace, ExitSignal::Margin).is_empty(), "no request was served under it");
        let found = calibrate(&trace, ExitSignal::Top1, &thresholds, &target(RiskTest::Betting));
        let (chosen, refused) = (found.chosen().unwrap().outcome, found.refused().unwrap().outcome);
        assert_eq!((chosen.threshold, chosen.risk, chosen.mean_depth), (0.9, 0.0, 1.0));
        assert_eq!((refused.threshold, refused.risk, refused.agreement), (0.5, 1.0, 0.0));
        assert_eq!(Outcome::new(&trace, ExitSignal::Top1, 0.7, RiskTest::Betting), None);
    }

    #[test]
    fn too_few_requests_show_nothing_and_it_is_known_how_many_would() {
        for test in RiskTest::ALL {
            let fewest = fewest_trials(&target(test));
            for (requests, shown) in [(fewest - 1, false), (fewest, true)] {
                let found = calibrate(&wrong_in_the_middle(requests), ExitSignal::Top1, &[0.95], &target(test));
                assert_eq!(found.chosen().is_some(), shown, "{test}, {requests} requests");
            }
        }
        assert_eq!(fewest_trials(&target(RiskTest::Binomial)), 45, "0.95^45 is the first power below 0.1");
    }

    #[test]
    fn thresholds_go_from_the_strictest_to_the_laxest() {
        for measure in ExitSignal::ALL {
            let thresholds = thresholds(measure);
            assert!(thresholds.is_sorted_by(|a, b| measure.sureness(*a) > measure.sureness(*b)), "{measure}");
            assert!(thresholds.iter().all(|threshold| threshold.to_string().len() <= 5), "{measure}");
        }
    }

    /// Dependence of the tokens of a request.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Requests {
        /// Independent.
        Alike,
        /// One request in ten has all the errors.
        FewHard,
    }

    impl Requests {
        /// Two loops. The first loop's top-1 probability `s` is uniform. The probability that its token differs falls
        /// linearly to 0 at `s` = 1.
        fn draw(self, random: &mut StdRng) -> ExitTrace {
            let mut trace = empty(2);
            for _ in 0..100 {
                let hardness = match self {
                    Self::Alike => 1.0,
                    Self::FewHard => f32::from(u8::from(random.random_range(0..10) == 0)) * 10.0,
                };
                let mut token = || {
                    let sure: f32 = random.random_range(0.0..1.0);
                    let differs = random.random_range(0.0..1.0) < hardness * (1.0 - sure);
                    [row(sure, u32::from(differs)), row(1.0, 0)]
                };
                trace.push_generation(&(0..20).flat_map(|_| token()).collect::<Vec<_>>());
            }
            trace
        }

        /// The true risk: the probability that a token's signal passes the threshold and the token differs.
        fn risk(self, threshold: f32) -> f64 {
            let room = 1.0 - f64::from(threshold);
            match self {
                Self::Alike => room * room / 2.0,
                Self::FewHard if room <= 0.1 => 0.1 * 5.0 * room * room,
                Self::FewHard => 0.1 * (room - 0.05),
            }
        }
    }

    /// Share of draws in which the chosen threshold exceeds the tolerance, and the mean of its true risk.
    fn simulate(requests: Requests, test: RiskTest) -> (f64, f64) {
        const DRAWS: usize = 200;
        let thresholds: Vec<f32> = (0..50).map(|step| 0.99 - 0.02 * step as f32).collect();
        let mut random = StdRng::seed_from_u64(7);
        let (mut exceeded, mut sum) = (0, 0.0);
        for _ in 0..DRAWS {
            let found = calibrate(&requests.draw(&mut random), ExitSignal::Top1, &thresholds, &target(test));
            let risk = requests.risk(found.chosen().unwrap().outcome.threshold);
            exceeded += usize::from(risk > 0.05);
            sum += risk;
        }
        (exceeded as f64 / DRAWS as f64, sum / DRAWS as f64)
    }

    #[test]
    fn the_threshold_chosen_exceeds_the_tolerance_as_seldom_as_promised() {
        for requests in [Requests::Alike, Requests::FewHard] {
            for (test, useful) in [(RiskTest::Betting, 0.02), (RiskTest::HoeffdingBentkus, 0.005)] {
                let (exceeded, mean) = simulate(requests, test);
                assert!(exceeded <= 0.1, "{requests:?}, {test}: in {exceeded} of draws");
                assert!(mean > useful, "{requests:?}, {test}: a mean risk of {mean} is too careful to be of use");
            }
        }
        let (exceeded, mean) = simulate(Requests::Alike, RiskTest::Binomial);
        assert!(exceeded <= 0.1 && mean > 0.03, "in {exceeded} of draws, mean {mean}");
    }

    #[test]
    fn a_test_of_tokens_breaks_its_promise_where_errors_come_by_request() {
        let (exceeded, _) = simulate(Requests::FewHard, RiskTest::Binomial);
        assert!(exceeded > 0.2, "in {exceeded} of draws");
    }
}
