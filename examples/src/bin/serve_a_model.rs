//! Serve a model: `cargo run --release -p depthwise-examples --bin serve_a_model [PROMPT]...`
//!
//! The prompts run in one batch, depth-wise: their tokens share passes at different depths. Each token exits at the
//! earliest depth where the margin between its two most likely candidates is 0.3 or more.

use std::error::Error;
use std::path::Path;

use engine::{Checkpoint, CompletedToken, DeviceName, Engine, WeightType};
use scheduler::{Batching, Settings};

fn main() -> Result<(), Box<dyn Error>> {
    let mut prompts: Vec<String> = std::env::args().skip(1).collect();
    if prompts.is_empty() {
        prompts = ["In the beginning", "And it came to pass"].map(str::to_owned).to_vec();
    }
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv");
    let Checkpoint { weights, tokenizer } = Checkpoint::open(&folder, None)?;
    let tokenizer = tokenizer.ok_or("the model has no tokenizer")?;
    let engine = Engine::new(DeviceName::Cpu.serve(&weights, WeightType::F32)?);

    let num_loops = engine.num_loops();
    let settings = Settings { num_blocks: 64, ..Settings::new(Batching::Depth, "margin:0.3".parse()?, num_loops) };
    let texts = engine.complete(&tokenizer, &prompts, settings, 40)?;

    for (prompt, tokens) in prompts.iter().zip(&texts) {
        let text: String = tokens.iter().map(|token| token.text.as_str()).collect();
        println!("{prompt}|{text}");
        println!("depths {}", tokens.iter().map(|token| token.depth.to_string()).collect::<Vec<_>>().join(" "));
    }
    let tokens: Vec<&CompletedToken> = texts.iter().flatten().collect();
    let passes: u32 = tokens.iter().map(|token| u32::from(token.depth) + 1).sum();
    println!("{} tokens, {:.2} of {num_loops} passes per token", tokens.len(), f64::from(passes) / tokens.len() as f64);
    Ok(())
}
