//! `depthwise import`: latency profiles from kernels that others measured.

use std::path::PathBuf;

use anyhow::Result;
use import::{KernelTables, KvPolicy, LayerTables, Memory, ModelShape};
use traces::LatencyProfile;

/// Make a latency profile from kernel tables that others measured
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    tables: Tables,
}

#[derive(Debug, clap::Subcommand)]
enum Tables {
    LayerTables(LayerArgs),
    Aiconfigurator(AiconfiguratorArgs),
}

/// From tables by kind of layer, as LLMServingSim's profiler writes them
///
/// The folder holds dense.csv, per_sequence.csv, attention.csv and perhaps skew_fit.csv, or a folder tp1 with them.
#[derive(Debug, clap::Args)]
struct LayerArgs {
    /// Folder of the tables
    #[arg(value_name = "TABLES")]
    tables: PathBuf,
    /// Name of the device that was measured
    #[arg(long, default_value = "as measured")]
    device: String,
    /// Memory of the device in bytes, to say how many KV blocks fit
    #[arg(long, value_name = "BYTES")]
    device_memory: Option<u64>,
    /// Memory in bytes that neither weights nor activations nor keys and values take
    #[arg(long, default_value_t = 0, value_name = "BYTES", requires = "device_memory")]
    other_memory: u64,
    #[command(flatten)]
    common: CommonArgs,
}

/// From the Parquet tables of PyPI's aiconfigurator-core
///
/// What they lack (norms and activations, attention of unmeasured head shapes, mixing of depths) is a roofline, and
/// has `repeats` 0 in the profile.
#[derive(Debug, clap::Args)]
struct AiconfiguratorArgs {
    /// The package's folder `systems`
    #[arg(value_name = "SYSTEMS")]
    systems: PathBuf,
    /// GPU, as its YAML file is named (h100_sxm)
    #[arg(long)]
    gpu: String,
    /// Framework, as its folder is named (vllm)
    #[arg(long, default_value = "vllm")]
    framework: String,
    /// Version of the framework, as its folder is named
    #[arg(long)]
    version: String,
    /// What a pass costs beside its kernels, in microseconds: launches, scheduling, and waiting for exits
    #[arg(long, default_value_t = 0.0, value_name = "MICROSECONDS")]
    overhead_us: f64,
    #[command(flatten)]
    common: CommonArgs,
}

#[derive(Debug, clap::Args)]
struct CommonArgs {
    /// The model's Hugging Face config.json
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Loops that the layers make: 1 is the model as it is
    #[arg(long, default_value_t = 1)]
    num_loops: u64,
    /// Rank of each loop's low-rank weights; 0 for none
    #[arg(long, default_value_t = 0)]
    lora_rank: u64,
    /// Folder to write the profile to
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Share of the memory that the server uses
    #[arg(long, default_value_t = 0.9)]
    memory_utilization: f64,
    /// Positions per KV block
    #[arg(long, default_value_t = 16)]
    block_tokens: u32,
    /// Most rows of a pass, for the memory that activations take
    #[arg(long, default_value_t = 2048)]
    token_budget: u32,
    /// Most sequences that run at once, for the memory that logits take
    #[arg(long, default_value_t = 256)]
    max_batch: u32,
}

/// Runs the command.
pub fn run(args: Args) -> Result<()> {
    match args.tables {
        Tables::LayerTables(args) => {
            let common = &args.common;
            let shape = common.shape()?;
            let profile = LayerTables::read(&args.tables)?.profile(&shape, &args.device, "kernel tables");
            let memory = args.device_memory.map(|device_bytes| Memory {
                device_bytes,
                utilization: common.memory_utilization,
                other_bytes: args.other_memory,
            });
            common.write(&shape, &profile, memory)
        }
        Tables::Aiconfigurator(args) => {
            let common = &args.common;
            let shape = common.shape()?;
            let tables = KernelTables::read(&args.systems, &args.gpu, &args.framework, &args.version)?;
            let memory = tables.memory(common.memory_utilization);
            common.write(&shape, &tables.profile(&shape, args.overhead_us), Some(memory))
        }
    }
}

impl CommonArgs {
    fn shape(&self) -> Result<ModelShape> {
        Ok(ModelShape::read(&self.model, self.num_loops, self.lora_rank)?)
    }

    fn write(&self, shape: &ModelShape, profile: &LatencyProfile, memory: Option<Memory>) -> Result<()> {
        profile.write(&self.out)?;
        let computed: Vec<String> = profile.computed_components().map(|part| part.to_string()).collect();
        println!("{}: {}", profile.meta.model, self.out.display());
        println!(
            "computed, not measured: {}",
            if computed.is_empty() { "nothing".into() } else { computed.join(", ") }
        );
        let blocks = |memory: Memory, policy| {
            memory.kv_blocks(shape, policy, self.block_tokens, self.token_budget, self.max_batch)
        };
        if let Some(memory) = memory {
            println!("KV blocks of {} tokens that fit: {}", self.block_tokens, blocks(memory, KvPolicy::PerDepth));
            if shape.num_loops > 1 {
                println!("with one cache for all depths: {}", blocks(memory, KvPolicy::Shared));
            }
        }
        Ok(())
    }
}
