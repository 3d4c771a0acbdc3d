//! The simulator and the engine for Python: what `depthwise/` in this folder builds upon.
//!
//! ```text
//! files      request traces, exit traces, profiles, pass logs ◄──► table (Arrow)
//! simulate   simulations and sweeps ─┐
//! model      the engine              ├─► detached: without the interpreter's lock, Ctrl-C, progress, warnings
//! callbacks  policies and times written in Python
//! ```

#![deny(clippy::print_stdout, clippy::print_stderr)]

mod callbacks;
mod convert;
mod detached;
mod errors;
mod files;
mod model;
mod simulate;
mod table;

use experiments::results::set_commit;
use pyo3::prelude::*;

/// The compiled part of `depthwise`, which names what is public.
#[pymodule(name = "_depthwise")]
fn depthwise_module(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    if let Some(commit) = option_env!("DEPTHWISE_COMMIT") {
        set_commit(commit);
    }
    module.add("DepthwiseError", py.get_type::<errors::DepthwiseError>())?;
    module.add("DepthwiseWarning", py.get_type::<errors::DepthwiseWarning>())?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<table::Table>()?;
    module.add_class::<files::Requests>()?;
    module.add_class::<files::Exits>()?;
    module.add_class::<files::Profile>()?;
    module.add_class::<files::Passes>()?;
    module.add_class::<model::Engine>()?;
    module.add_class::<model::Token>()?;
    module.add_class::<callbacks::Work>()?;
    module.add_class::<simulate::Runs>()?;
    module.add_class::<simulate::Sweep>()?;
    module.add_function(wrap_pyfunction!(callbacks::register_exit_policy, module)?)?;
    module.add_function(wrap_pyfunction!(simulate::simulate, module)?)?;
    module.add_function(wrap_pyfunction!(simulate::sweep, module)?)?;
    module.add_function(wrap_pyfunction!(simulate::sweep_one_shard, module)?)?;
    module.add_function(wrap_pyfunction!(simulate::merge_all_shards, module)?)
}
