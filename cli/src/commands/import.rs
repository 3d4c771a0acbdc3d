//! `depthwise import`: latency profiles from kernels that others measured, and exits that they recorded.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use bytesize::ByteSize;
use import::{AllReduce, ImportedExits, KernelTables, KvType, LayerTables, LinearType, ModelShape, memory_figures};
use traces::{ExitTable, LatencyProfile, MemoryFigures};

use experiments::ResultsFolder;
use experiments::serving::parse_bytes;

use crate::output::say;

/// Make a latency profile from published tables of measured kernels, or an exit trace from the exits of another engine
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    source: Source,
}

#[derive(Debug, clap::Subcommand)]
enum Source {
    LayerTables(LayerArgs),
    Aiconfigurator(AiconfiguratorArgs),
    Exits(ExitsArgs),
}

/// Import exits that vllm-rlt or CDB recorded
///
/// A JSON file with depths_by_request of vllm-rlt, or a workload of CDB (looped_cdb), a JSON file with an .npz file beside
/// it. None of them has predictions: agreement with full depth and quality of such a trace mean nothing.
#[derive(Debug, clap::Args)]
struct ExitsArgs {
    /// JSON file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Number of loops at full depth [default: that in the file, or the most that a token ran]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    num_loops: Option<u32>,
    /// Folder to write the exit trace to, and requests.csv if the file has the lengths of requests
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Import tables by kind of layer, as the profiler of LLMServingSim writes them
///
/// The folder contains dense.csv, per_sequence.csv, attention.csv and optionally skew_fit.csv and meta.yaml, or a
/// folder tp1 with these files (tpN with --tensor-parallel N).
#[derive(Debug, clap::Args)]
struct LayerArgs {
    /// Folder of the tables
    #[arg(value_name = "TABLES")]
    tables: PathBuf,
    /// Name of the measured device [default: that in meta.yaml]
    #[arg(long)]
    device: Option<String>,
    /// Memory of the device, such as 24GB or 24GiB
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    device_memory: Option<u64>,
    /// Memory used by anything but weights, activations, keys and values
    #[arg(long, default_value = "0", value_name = "BYTES", value_parser = parse_bytes)]
    other_memory: u64,
    /// With --tensor-parallel: times of sums over devices, a table custom_allreduce_perf.parquet of aiconfigurator-core
    #[arg(long, value_name = "FILE")]
    all_reduce: Option<PathBuf>,
    #[command(flatten)]
    common: CommonArgs,
}

/// Import the Parquet tables of the Python package aiconfigurator-core
///
/// Times that the tables lack (norms and activations, attention of unmeasured head shapes, mixing of depths) are
/// computed by a roofline. Matrix products larger than any in the tables are scaled in proportion. Both have `repeats`
/// 0 in the profile.
#[derive(Debug, clap::Args)]
struct AiconfiguratorArgs {
    /// Folder `systems` of the package
    #[arg(value_name = "SYSTEMS")]
    systems: PathBuf,
    /// GPU: the name of its YAML file, such as h100_sxm
    #[arg(long)]
    gpu: String,
    /// Framework: the name of its folder
    #[arg(long, default_value = "vllm")]
    framework: String,
    /// Version of the framework: the name of its folder
    #[arg(long)]
    version: String,
    /// Fixed time of a pass beyond its kernels, in microseconds: launches, scheduling, waiting for exit signals
    #[arg(long, default_value_t = 0.0, value_name = "MICROSECONDS")]
    overhead_us: f64,
    /// Take the median of each product's time and those of its neighbours, which leaves out disturbed measurements
    #[arg(long)]
    smooth: bool,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, clap::Args)]
struct CommonArgs {
    /// Hugging Face config.json of the model
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Number of loops. The layers of a vanilla model are divided into them [default: 1]. A model made with loops runs
    /// all its layers in each [default: as many as its config says]
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=64))]
    num_loops: Option<u64>,
    /// Rank of the low-rank weights of each loop; 0 for none
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=65_536))]
    lora_rank: u64,
    /// Number of devices that share each layer (tensor parallelism)
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=64))]
    tensor_parallel: u64,
    /// Number type of the linear layers: bf16, fp8, fp8-block or nvfp4 [default: as the model's config says]
    #[arg(long, value_name = "TYPE")]
    gemm: Option<LinearType>,
    /// Number type of keys and values: bf16 or fp8 [default: bf16]
    #[arg(long, value_name = "TYPE")]
    kv: Option<KvType>,
    /// Folder to write the profile to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    match args.source {
        Source::LayerTables(args) => {
            let common = &args.common;
            let whole = common.whole()?;
            if whole.outside.is_some() {
                bail!(
                    "{}: found model_type {}, expected a vanilla model: layer tables lack what loops add to its layers",
                    common.model.display(),
                    whole.kind
                );
            }
            let devices = common.tensor_parallel;
            let all_reduce = match &args.all_reduce {
                Some(path) if devices > 1 => Some(AllReduce::read(path, devices)?),
                None if devices == 1 => None,
                Some(_) => bail!("--all-reduce on one device: expected --tensor-parallel with more"),
                None => {
                    bail!("--tensor-parallel {devices} without --all-reduce: layer tables lack the sums over devices")
                }
            };
            let tables = LayerTables::read_shared(&args.tables, devices, all_reduce)?;
            let (linear, kv) = tables.types(common.gemm, common.kv)?;
            let shape = common.share_of(whole, linear, kv)?;
            let device = args.device.as_deref().or(tables.device()).unwrap_or("as measured");
            let mut profile = tables.profile(&shape, device);
            let (device_bytes, other_bytes) = (args.device_memory, args.other_memory);
            profile.meta.memory = Some(MemoryFigures { device_bytes, other_bytes, ..memory_figures(&shape) });
            common.write(&profile)
        }
        Source::Aiconfigurator(args) => {
            let common = &args.common;
            let shape = common.share_of(common.whole()?, common.gemm, common.kv)?;
            let tables = KernelTables::read(&args.systems, &args.gpu, &args.framework, &args.version)?;
            let tables = if args.smooth { tables.smoothed() } else { tables };
            common.write(&tables.profile(&shape, args.overhead_us)?)
        }
        Source::Exits(args) => import_exits(&args),
    }
}

fn import_exits(args: &ExitsArgs) -> Result<()> {
    let ImportedExits { exits, requests } = ImportedExits::read(&args.file, args.num_loops)?;
    let mut folder = ResultsFolder::create(&args.out, "import")?;
    exits.write(folder.path()?, ExitTable::Parquet)?;
    if let Some(requests) = &requests {
        requests.write(folder.path()?.join("requests.csv"))?;
    }
    folder.finish()?;
    let (generations, tokens) = (exits.num_generations(), exits.num_tokens());
    say!("{generations} requests, {tokens} tokens, {} loops: {}", exits.num_loops(), args.out.display());
    if requests.is_some() {
        say!("requests.csv: the same requests, all at once");
    }
    Ok(())
}

impl CommonArgs {
    /// The model on one device.
    fn whole(&self) -> Result<ModelShape> {
        Ok(ModelShape::read(&self.model, self.num_loops, self.lora_rank)?)
    }

    /// What one of the devices has of it, in the number types that are asked for.
    fn share_of(&self, whole: ModelShape, linear: Option<LinearType>, kv: Option<KvType>) -> Result<ModelShape> {
        let shared = whole.with_types(linear, kv).shared_by(self.tensor_parallel);
        shared.with_context(|| self.model.display().to_string())
    }

    fn write(&self, profile: &LatencyProfile) -> Result<()> {
        let mut folder = ResultsFolder::create(&self.out, "import")?;
        profile.write(folder.path()?)?;
        folder.finish()?;
        let computed: Vec<String> = profile.computed_components().map(|part| part.to_string()).collect();
        let meta = &profile.meta;
        say!("{}: {}", meta.model, self.out.display());
        say!("computed, not measured: {}", if computed.is_empty() { "nothing".into() } else { computed.join(", ") });
        let bytes = |bytes| ByteSize(bytes).display().iec();
        let device = meta.memory.and_then(|memory| memory.device_bytes);
        let device = device.map_or("not known".to_owned(), |device| bytes(device).to_string());
        let (weights, token) = (bytes(meta.weight_bytes), bytes(meta.kv_bytes_per_token));
        say!("weights {weights}, keys and values {token} a token, memory {device}");
        Ok(())
    }
}
