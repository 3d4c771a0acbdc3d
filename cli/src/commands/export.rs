//! `depthwise export`: writes a model for other programs.

use std::path::PathBuf;

use anyhow::Result;
use engine::checkpoint::{Checkpoint, write_hugging_face};
use engine::weights::Stored;

use experiments::results::ResultsFolder;

/// Write a model as a plain Hugging Face folder: loops unrolled into layers, adapters merged into matrices
///
/// It computes what the last loop does. Heads and gates of earlier exits are left out.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A folder of ours, or any model that `convert` reads
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Folder to write, which must not be there or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Store numbers in two bytes, rounded, rather than four
    #[arg(long)]
    f16: bool,
}

/// Exports, and says what.
pub fn run(args: Args) -> Result<()> {
    let folder = ResultsFolder::create_new(&args.out)?;
    let Checkpoint { weights, tokenizer } = Checkpoint::open(&args.model, None)?;
    let stored = if args.f16 { Stored::F16 } else { Stored::F32 };
    write_hugging_face(&weights, tokenizer.as_ref(), folder.path(), stored)?;
    folder.finish()?;
    println!("{} layers written to {}", weights.config().num_layers(), args.out.display());
    Ok(())
}
