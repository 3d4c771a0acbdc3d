//! Checkpoints of other programs: read as those programs read them, rejected when damaged, and written so that they
//! read back.

mod assumed;
mod damaged;
mod equality;
mod folders;
mod gguf;
mod hardening;
mod keys;
mod plain;
mod real;
mod stored;
mod tokens;
mod warnings;
mod written;
