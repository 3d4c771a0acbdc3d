//! Discrete-event simulation of serving over latency profiles and exit traces.
