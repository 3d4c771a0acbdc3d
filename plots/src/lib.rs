//! Figures of measured and simulated runs.
