//! Request traces, exit traces and latency profiles: types, readers and writers.
