//! `depthwise convert`: makes a pretrained model recursive.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Result;
use engine::Checkpoint;
use engine::weights::{Stored, TOKENIZER_FILE, Weights};
use serde::Serialize;
use serde::de::value::Error;
use serde::de::{DeserializeOwned, IntoDeserializer};
use training::convert::{
    AdapterStart, Conversion, Converted, Initialization, KindEnergy, Ranks, Relaxation, Vectors, beyond_adapters,
    convert,
};

use crate::output::{note, say};
use crate::progress::progress;
use crate::report::print_table;
use experiments::results::ResultsFolder;

/// File that says what the model was made from and how.
const RECORD_FILE: &str = "conversion.yaml";

/// Make a pretrained model recursive: tie its layers over loops and give each loop low-rank adapters
///
/// As in Relaxed Recursive Transformers (arXiv 2410.20672); docs/explanation/conversion.md has the rules.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Model to convert: a Hugging Face folder, a GGUF file, a name on the Hugging Face hub (OWNER/MODEL or
    /// OWNER/MODEL/FILE.gguf), or an ordinary transformer that `train` wrote
    #[arg(value_name = "SOURCE")]
    source: PathBuf,
    /// Folder for the recursive model; must not exist or be empty
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number of times that the shared block runs; must divide the number of shared layers
    #[arg(long, value_name = "N")]
    loops: usize,
    /// Number of first layers to keep unshared, before the loops
    #[arg(long, default_value_t = 0, value_name = "LAYERS")]
    prelude: usize,
    /// Number of last layers to keep unshared, after the loops
    #[arg(long, default_value_t = 0, value_name = "LAYERS")]
    coda: usize,
    /// Initial shared matrices: stepwise (layers spread evenly from the first to the last), average (mean of the tied
    /// layers), lower (first layers), random [default: average with --rank, stepwise without]
    #[arg(long, value_name = "RULE", value_parser = by_name::<Initialization>)]
    init: Option<Initialization>,
    /// Norms and biases: own (each loop keeps those of its original layers), or shared by all loops: average, first
    /// (those of the layer that the matrices come from), reset (ones and zeros) [default: own with --rank; without it,
    /// as the matrices]
    #[arg(long, value_name = "RULE", value_parser = by_name::<Vectors>)]
    norms: Option<Vectors>,
    /// Rank of the adapters of each loop: one number for all projections, `full`, or a list such as
    /// q=64,k=32,v=32,o=64,gate=128,up=128,down=128 [default: no adapters]
    #[arg(long, value_name = "RANK")]
    rank: Option<Ranks>,
    /// Initial adapters: svd (of the difference between the original and the shared matrices), zero
    #[arg(long, default_value = "svd", value_name = "RULE", value_parser = by_name::<AdapterStart>, requires = "rank")]
    adapters: AdapterStart,
    /// Seed of random draws
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Store weights as 16-bit floats instead of 32-bit floats
    #[arg(long)]
    f16: bool,
}

/// A value by its name in files.
fn by_name<T: DeserializeOwned>(name: &str) -> Result<T, String> {
    T::deserialize(name.into_deserializer()).map_err(|error: Error| error.to_string())
}

/// Converts, and prints what became of the parameters and what adapters keep.
pub fn run(args: Args) -> Result<()> {
    let started = Instant::now();
    let mut folder = ResultsFolder::create_new(&args.out, "convert")?;
    let Checkpoint { weights: source, tokenizer } = Checkpoint::open(&args.source, None)?;
    let conversion = args.conversion();
    let bar = progress(0);
    let converted = convert(&source, &conversion, |sites| {
        bar.set_length(sites as u64);
        bar.inc(1);
    })?;
    bar.finish_and_clear();
    let stored = if args.f16 { Stored::F16 } else { Stored::F32 };
    let written = folder.path()?;
    converted.weights.save(&written, stored)?;
    match tokenizer {
        Some(tokenizer) => tokenizer.save(&written.join(TOKENIZER_FILE))?,
        None => note!("{}: no tokenizer, so the converted model has none", args.source.display()),
    }
    let record = serde_yaml::to_string(&Record { source: &args.source, conversion: &conversion })?;
    std::fs::write(written.join(RECORD_FILE), record)?;
    folder.finish()?;
    report(&source, &conversion, &converted);
    say!("\nwritten to {} in {:.1} s", args.out.display(), started.elapsed().as_secs_f64());
    Ok(())
}

impl Args {
    fn conversion(&self) -> Conversion {
        let relaxation = self.rank.map(|ranks| Relaxation { ranks, start: self.adapters });
        let initialization = self.init.unwrap_or(Initialization::default_for(relaxation.is_some()));
        Conversion {
            num_loops: self.loops,
            prelude_layers: self.prelude,
            coda_layers: self.coda,
            initialization,
            vectors: self.norms.unwrap_or(initialization.default_vectors(relaxation.is_some())),
            relaxation,
            seed: self.seed,
        }
    }
}

#[derive(Serialize)]
struct Record<'a> {
    source: &'a Path,
    #[serde(flatten)]
    conversion: &'a Conversion,
}

/// Prints what became of layers and parameters, and what adapters keep of the original.
fn report(source: &Weights, conversion: &Conversion, converted: &Converted) {
    let (before, after) = (source.num_parameters(), converted.weights.num_parameters());
    let config = converted.weights.config();
    let kept = match (config.prelude_layers, config.coda_layers) {
        (0, 0) => String::new(),
        (prelude, coda) => format!(", the first {prelude} and the last {coda} kept as they were"),
    };
    say!("{} layers, now {} loops of {}{kept}", config.num_layers(), config.num_loops, config.block_layers);
    say!("{before} parameters, now {after}: {:.1}% of the original", 100.0 * after as f64 / before as f64);
    if conversion.relaxation.is_some() {
        say!("");
        print_table(
            &["projection", "rank", "to make up", "at a quarter", "at half", "kept at this rank"],
            converted.energies.iter().map(cells).collect(),
        );
        let beyond = beyond_adapters(config);
        if !beyond.is_empty() {
            say!("shared by all loops and not made up for by adapters: {}", beyond.join(", "));
        }
    }
}

/// A kind of projection: what the shared matrices lack, in percent of the original's energy, and how much of it
/// adapters of a quarter, half and all of the rank give back.
fn cells(energy: &KindEnergy) -> Vec<String> {
    let rank = energy.directions.len();
    let kept = |rank| format!("{:.1}%", 100.0 * energy.kept(rank));
    let lacking = format!("{:.1}%", 100.0 * energy.residual / energy.original);
    vec![energy.projection.name.to_owned(), rank.to_string(), lacking, kept(rank / 4), kept(rank / 2), kept(rank)]
}
