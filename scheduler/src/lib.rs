//! Batching policies, exit policies, KV-block accounting and the serving loop.
