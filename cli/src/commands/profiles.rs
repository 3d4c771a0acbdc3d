//! `depthwise profiles`: the latency profiles that ship.

use std::path::{Path, PathBuf};

use anyhow::Result;
use experiments::profiles::{Found, Origin, ShippedProfile};
use serde::Serialize;
use traces::ProfileMeta;

use crate::output::say;
use crate::report::print_table;

/// List the latency profiles that ship, which every --profile and `profile` key finds by name; show one, or copy it
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Name of a profile that ships, DEVICE/MODEL, to show
    #[arg(value_name = "NAME")]
    name: Option<PathBuf>,
    /// Folder to copy the profile to
    #[arg(long, value_name = "DIR", requires = "name")]
    out: Option<PathBuf>,
    /// List as CSV
    #[arg(long, conflicts_with = "name")]
    csv: bool,
}

/// A profile of the list.
#[derive(Debug, Serialize)]
struct Line {
    name: &'static str,
    device: String,
    model: String,
    num_loops: u32,
    software: String,
    date: String,
    command: String,
}

impl Line {
    fn new(shipped: &ShippedProfile) -> Result<Self> {
        let Origin { date, device, model, command } = shipped.origin()?;
        let ProfileMeta { num_loops, software, .. } = shipped.read()?.meta;
        Ok(Self { name: shipped.name(), device, model, num_loops, software, date, command })
    }
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    let Some(name) = &args.name else { return list(args.csv) };
    let shipped = match ShippedProfile::of_name(name) {
        Some(shipped) => shipped,
        // A folder of this name is none of them.
        None => match Found::find(Path::new(""), name)? {
            Found::Shipped(shipped) => shipped,
            Found::Folder(folder) => anyhow::bail!(
                "{}: a folder, expected the name of a profile that ships (`depthwise profiles` lists them)",
                folder.display()
            ),
        },
    };
    match &args.out {
        None => {
            for (file, text) in shipped.files().filter(|(file, _)| file.ends_with(".yaml")) {
                say!("# {file}\n{}", text.trim_end());
            }
            say!("# {} points", shipped.read()?.points.len());
        }
        Some(out) => {
            shipped.write(out)?;
            say!("{}: {}", shipped.name(), out.display());
        }
    }
    Ok(())
}

fn list(as_csv: bool) -> Result<()> {
    let lines = ShippedProfile::all().iter().map(Line::new).collect::<Result<Vec<Line>>>()?;
    if as_csv {
        let mut out = csv::Writer::from_writer(Vec::new());
        lines.iter().try_for_each(|line| out.serialize(line))?;
        say!("{}", String::from_utf8(out.into_inner()?)?.trim_end());
        return Ok(());
    }
    let row = |line: Line| {
        let Line { name, device, model, num_loops, software, date, command } = line;
        vec![name.to_owned(), device, model, num_loops.to_string(), software, date, command]
    };
    let header = ["name", "device", "model", "loops", "software", "date", "command"];
    print_table(&header, lines.into_iter().map(row).collect());
    Ok(())
}
