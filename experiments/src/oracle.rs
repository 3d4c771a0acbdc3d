//! Exit depths of the oracle: of the live text, found by looking ahead before a replay is timed, or recorded.

use std::sync::Arc;

use anyhow::Result;
use engine::{ExitDepths, oracle_depths};
use scheduler::{ExitPolicy, KvFill, Settings, SignalRead};
use traces::{ExitTrace, Request};

use crate::named_engine::NamedEngine;

/// The oracle's exit depths for replays of some requests.
#[derive(Default)]
pub struct Oracle {
    recorded: Option<Arc<ExitDepths>>,
    /// Depths of the live text. They depend on no other setting.
    live: Vec<(ExitPolicy, KvFill, Arc<ExitDepths>)>,
}

impl Oracle {
    /// Whether any of these settings follow a recording.
    pub fn needs_recording(settings: &[Settings]) -> bool {
        settings.iter().any(|settings| settings.exit.follows_recording())
    }

    /// The depths for replays of `requests` under any of `settings`; none where exits are
    /// [scripted](NamedEngine::is_scripted). `recorded` is their recording at full depth, which
    /// only `oracle:recorded` needs.
    ///
    /// # Errors
    /// If the engine cannot serve the requests.
    pub fn new(
        named: &NamedEngine,
        settings: &[Settings],
        requests: &[Request],
        recorded: Option<&ExitTrace>,
    ) -> Result<Self> {
        if named.is_scripted() {
            return Ok(Self::default());
        }
        let recorded = recorded.map(|trace| Arc::new(oracle_depths(trace, requests)));
        let mut oracle = Self { recorded, live: Vec::new() };
        for settings in settings {
            let is_live = is_live(settings.exit);
            if is_live && oracle.live_depths(settings).is_none() {
                let exits = Arc::new(named.engine.oracle_exits(settings, requests)?);
                oracle.live.push((settings.exit, settings.kv_fill, exits));
            }
        }
        Ok(oracle)
    }

    /// The depths under one of the settings; none where no oracle is read.
    pub fn depths(&self, settings: &Settings) -> Option<Arc<ExitDepths>> {
        match settings.exit.signal_read() {
            SignalRead::Oracle if settings.exit.follows_recording() => self.recorded.clone(),
            SignalRead::Oracle => self.live_depths(settings),
            SignalRead::None | SignalRead::Signal(_) | SignalRead::Repeats => None,
        }
    }

    fn live_depths(&self, settings: &Settings) -> Option<Arc<ExitDepths>> {
        let is_of =
            |(exit, kv_fill, _): &&(ExitPolicy, KvFill, _)| (*exit, *kv_fill) == (settings.exit, settings.kv_fill);
        self.live.iter().find(is_of).map(|(_, _, exits)| exits.clone())
    }
}

/// Whether a policy reads the oracle of the live text.
pub fn is_live(exit: ExitPolicy) -> bool {
    exit.signal_read() == SignalRead::Oracle && !exit.follows_recording()
}
