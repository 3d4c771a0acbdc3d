//! Writes a model folder with random weights. Pass times do not depend on the values of weights, so the latencies of a
//! model shape can be measured without its trained weights.
//!
//! ```sh
//! cargo run --release -p engine --example random_model -- configs/cuda/gemma-2b-3-loops.json results/gemma-2b-3-loops
//! ```

use std::path::Path;
use std::process::ExitCode;

use engine::ModelConfig;
use engine::weights::{Stored, Weights};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [config, folder] = arguments.as_slice() else {
        eprintln!("usage: random_model CONFIG.json FOLDER");
        return ExitCode::from(2);
    };
    match write(Path::new(config), Path::new(folder)) {
        Ok(parameters) => {
            println!("{folder}: {parameters} parameters");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Writes the model of a configuration file and returns its number of parameters.
fn write(config: &Path, folder: &Path) -> Result<usize, Box<dyn std::error::Error>> {
    let weights = Weights::random(ModelConfig::load(config)?, 1)?;
    std::fs::create_dir_all(folder)?;
    weights.save(folder, Stored::F16)?;
    Ok(weights.num_parameters())
}
