//! Warnings of this workspace's libraries, on standard error, each once.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use crate::output::note;
use log::{Level, LevelFilter, Log, Metadata, Record};

/// The crates whose warnings concern a user: what dependencies log is their own affair.
const CRATES: [&str; 5] = ["engine", "plots", "server", "training", "traces"];

struct Warnings(Mutex<Option<HashSet<String>>>);

static WARNINGS: Warnings = Warnings(Mutex::new(None));

/// Shows warnings from now on.
pub fn show() {
    // A second call finds the same logger.
    if log::set_logger(&WARNINGS).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

impl Log for Warnings {
    fn enabled(&self, metadata: &Metadata) -> bool {
        let name = metadata.target().split("::").next().unwrap_or_default();
        metadata.level() <= Level::Warn && CRATES.contains(&name)
    }

    fn log(&self, record: &Record) {
        let message = record.args().to_string();
        let mut shown = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if self.enabled(record.metadata()) && shown.get_or_insert_default().insert(message.clone()) {
            note!("warning: {message}");
        }
    }

    fn flush(&self) {}
}
