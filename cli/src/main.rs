//! The depthwise command: argument parsing and wiring only.
fn main() {}
