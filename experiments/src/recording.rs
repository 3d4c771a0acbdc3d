//! What is recorded before anything is timed: every signal at full depth, and where each exit policy exits.

use std::collections::HashMap;

use anyhow::Result;
use engine::{ExitDepths, Generation, Idle};
use scheduler::{Settings, SignalRead};
use simulator::{Draw, ExitModel};
use traces::{ExitTrace, Request};

use crate::named_engine::{NamedEngine, record};
use crate::oracle::{Oracle, is_live};

/// The exits of some requests under some settings.
///
/// What is generated after an early exit is not what full depth generates, and exits elsewhere. A policy that reads
/// signals of the live text is therefore run once, untimed. The exits of a policy that depends on the load are not known
/// before: its simulations read the signals of full depth, as do those of policies without a signal.
///
/// Where exits are [scripted](NamedEngine::is_scripted), the recording is the script, and nothing is run.
pub struct Recording {
    /// Every signal at full depth.
    pub trace: ExitTrace,
    /// The oracle's exit depths.
    pub oracle: Oracle,
    full_depth: ExitModel,
    /// For each of the settings, the exits under its policy; `None` where simulations read the signals of full depth.
    by_policy: Vec<Option<ExitModel>>,
    is_scripted: bool,
}

impl Recording {
    /// Records the requests.
    ///
    /// # Errors
    /// If the engine cannot serve them.
    pub fn new(named: &NamedEngine, settings: &[Settings], requests: &[Request]) -> Result<Self> {
        let script = named.engine.script.as_deref();
        let trace = match script {
            Some(script) => script.of_requests(requests),
            None => record(named, requests)?,
        };
        let oracle = Oracle::new(named, settings, requests, Some(&trace))?;
        let full_depth = ExitModel::new(&trace, Draw::Recorded)?;
        let by_policy = settings.iter().map(|settings| {
            if script.is_some() {
                return Ok(None);
            }
            let depths = live_exits(named, settings, requests, &oracle)?;
            let model = |depths: Vec<Vec<u8>>| {
                ExitModel::from_depths(&depths, full_depth.num_loops().into(), full_depth.fingerprint(), Draw::Recorded)
            };
            Ok(depths.map(model).transpose()?)
        });
        let by_policy = by_policy.collect::<Result<_>>()?;
        Ok(Self { trace, oracle, full_depth, by_policy, is_scripted: script.is_some() })
    }

    /// Signals and predictions at full depth.
    pub fn full_depth(&self) -> &ExitModel {
        &self.full_depth
    }

    /// The exits of the settings at one place.
    pub fn exits(&self, place: usize) -> &ExitModel {
        self.by_policy[place].as_ref().unwrap_or(&self.full_depth)
    }

    /// Whether the exits at one place come with the predictions of full depth, which token agreement is taken from.
    pub fn has_predictions(&self, place: usize) -> bool {
        self.by_policy[place].is_none() && !self.is_scripted
    }
}

/// The depths at which tokens exit under a policy that reads the live text, by request; `None` under another policy.
fn live_exits(
    named: &NamedEngine,
    settings: &Settings,
    requests: &[Request],
    oracle: &Oracle,
) -> Result<Option<Vec<Vec<u8>>>> {
    let by_request = |depths: &dyn Fn(u32) -> Vec<u8>| requests.iter().map(|request| depths(request.id)).collect();
    if is_live(settings.exit) {
        let depths = oracle.depths(settings);
        return Ok(depths.map(|depths: std::sync::Arc<ExitDepths>| by_request(&|id| depths[&id].clone())));
    }
    let reads_signal = matches!(settings.exit.signal_read(), SignalRead::Signal(_) | SignalRead::Repeats);
    // Drafts are verified against the recording at full depth.
    if !reads_signal || settings.exit.depends_on_load() || settings.exit.speculates() {
        return Ok(None);
    }
    let at_once = Request::at_once(requests);
    let served: HashMap<u32, Generation> = named.engine.replay(*settings, &at_once, None, Idle::Skip, &mut ())?;
    Ok(Some(by_request(&|id| served[&id].exit_depths.clone())))
}
