//! One module per command.

pub mod bench;
pub mod calibrate;
pub mod capacity;
pub mod convert;
pub mod evaluate;
pub mod export;
pub mod generate;
pub mod import;
pub mod plot;
pub mod profile;
pub mod profiles;
pub mod record;
pub mod replay;
pub mod report;
pub mod run;
pub mod serve;
pub mod simulate;
pub mod sweep;
pub mod timeline;
pub mod trace;
pub mod train;
pub mod validate;
pub mod vllm;
