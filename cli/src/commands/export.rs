//! `depthwise export`: writes a model for other programs.

use std::path::PathBuf;

use anyhow::Result;
use engine::weights::Stored;
use engine::{Checkpoint, write_hugging_face};

use experiments::results::ResultsFolder;

use crate::output::say;

/// Write a model as an ordinary Hugging Face folder: loops unrolled into layers, adapters merged into matrices
///
/// The exported model computes what the last loop computes. Heads and gates of earlier exits are left out.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model: a folder that `train` or `convert` wrote, a Hugging Face folder, a GGUF file, or a name on the Hugging
    /// Face hub (OWNER/MODEL or OWNER/MODEL/FILE.gguf)
    #[arg(value_name = "MODEL")]
    model: PathBuf,
    /// Folder to write to; must not exist or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Store weights as 16-bit floats instead of 32-bit floats
    #[arg(long)]
    f16: bool,
}

/// Exports, and says what.
pub fn run(args: Args) -> Result<()> {
    let mut folder = ResultsFolder::create_new(&args.out, "export")?;
    let Checkpoint { weights, tokenizer } = Checkpoint::open(&args.model, None)?;
    let stored = if args.f16 { Stored::F16 } else { Stored::F32 };
    write_hugging_face(&weights, tokenizer.as_ref(), &folder.path()?, stored)?;
    folder.finish()?;
    say!("{} layers written to {}", weights.config().num_layers(), args.out.display());
    Ok(())
}
