//! Checkpoints of others: read as their own programs read them, refused when damaged, written so that they come back.

mod damaged;
mod equality;
mod folders;
mod gguf;
mod hardening;
mod keys;
mod plain;
mod real;
mod tokens;
mod warnings;
mod written;
