//! A sweep: every combination of what a YAML file lists, simulated, and summed up over seeds.
//!
//! ```text
//! YAML ──► spec ──► plan: points, settings, models ──► runs on all cores ──► sweep.csv ──► means, figures
//!                            └──► folder: what the results are of
//! ```

pub mod axis;
pub mod figures;
pub mod folder;
pub mod plan;
pub mod spec;
