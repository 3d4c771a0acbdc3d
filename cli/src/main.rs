//! The `depthwise` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    depthwise::main()
}
