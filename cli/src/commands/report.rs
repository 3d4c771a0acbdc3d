//! `depthwise report`: folders of results as one HTML page.

use std::io::Write;
use std::path::PathBuf;

use anyhow::Result;
use experiments::report::PAGE_BEGINNING;
use experiments::results::write_file;

use crate::output::say;

/// Make one HTML page of folders of results: frontier, tables, latencies, depths, passes, validation, configuration
///
/// The page needs no other file and no network. Several folders are shown side by side.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Folders that commands wrote
    #[arg(required = true, num_args = 1.., value_name = "DIR")]
    folders: Vec<PathBuf>,
    /// HTML file to write
    #[arg(long, value_name = "FILE", default_value = "report.html")]
    out: PathBuf,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let page = experiments::report(&args.folders)?;
    write_file(&args.out, PAGE_BEGINNING, |out| out.write_all(page.as_bytes()))?;
    say!("{}: {:.1} MB, open it in a browser", args.out.display(), page.len() as f64 / 1e6);
    Ok(())
}
