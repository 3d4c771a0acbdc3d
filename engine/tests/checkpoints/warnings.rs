//! Warnings that are logged while a function runs.

use std::cell::RefCell;

use log::{LevelFilter, Log, Metadata, Record};

thread_local! {
    static WARNINGS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// Collects the log messages of a thread.
struct Kept;

static LOGGER: Kept = Kept;

impl Log for Kept {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.target().starts_with("engine")
    }

    fn log(&self, record: &Record) {
        if self.enabled(record.metadata()) {
            WARNINGS.with_borrow_mut(|warnings| warnings.push(record.args().to_string()));
        }
    }

    fn flush(&self) {}
}

/// Result of a function, and its warnings.
pub fn with_warnings<T>(run: impl FnOnce() -> T) -> (T, Vec<String>) {
    if log::set_logger(&LOGGER).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
    WARNINGS.take();
    let result = run();
    (result, WARNINGS.take())
}
