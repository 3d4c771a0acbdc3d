//! A recursive transformer: model, KV cache, kernels, profiler and an executor that runs them.
