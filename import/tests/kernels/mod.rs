//! Tables of a GPU that are made up, as the package aiconfigurator-core has them.

use std::path::Path;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, DoubleType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;

/// The GPU, `g.yaml`.
pub const SYSTEM: &str = "data_dir: data/g\ngpu:\n  mem_bw: 2.0e12\n  mem_bw_empirical_scaling_factor: 0.8\n  \
    mem_empirical_constant_latency: 3.0e-6\n  mem_capacity: 80000000000\n  bfloat16_tc_flops: 5.0e14\nmisc:\n  \
    other_mem: 1000000000\n";

/// A table with rows of texts, sizes and milliseconds.
fn table(texts: &[&str], sizes: &[&str], rows: &[(&str, Vec<i64>, f64)], compression: Compression) -> Vec<u8> {
    let fields = texts.iter().map(|name| format!("REQUIRED BYTE_ARRAY {name} (UTF8);"));
    let fields = fields.chain(sizes.iter().map(|name| format!("REQUIRED INT64 {name};")));
    let schema = format!("message m {{ {} REQUIRED DOUBLE latency; }}", fields.collect::<String>());
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer = SerializedFileWriter::new(Vec::new(), schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for _ in texts {
        let values: Vec<ByteArray> = rows.iter().map(|row| row.0.into()).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
    }
    for place in 0..sizes.len() {
        let values: Vec<i64> = rows.iter().map(|row| row.1[place]).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<Int64Type>().write_batch(&values, None, None).unwrap();
        column.close().unwrap();
    }
    let mut column = group.next_column().unwrap().unwrap();
    let values: Vec<f64> = rows.iter().map(|row| row.2).collect();
    column.typed::<DoubleType>().write_batch(&values, None, None).unwrap();
    column.close().unwrap();
    group.close().unwrap();
    writer.into_inner().unwrap()
}

/// The tables of a GPU: kind, name and bytes of each.
fn kernel_tables(compression: Compression) -> [(&'static str, &'static str, Vec<u8>); 3] {
    let heads = ["num_heads", "num_key_value_heads", "head_dim", "batch_size", "isl", "step", "window_size"];
    let products: Vec<_> = [64, 128, 256, 512]
        .into_iter()
        .flat_map(|n| [1, 8, 64].map(|m| ("bfloat16", vec![n, 64, m], 1e-3 * m as f64)))
        .collect();
    let prompts = [16, 256, 4096].map(|isl| ("bfloat16", vec![4, 2, 16, 1, isl, 0, 0], 1e-4 * isl as f64));
    let decodes = [(1, 15), (1, 4095), (8, 15), (8, 4095)]
        .map(|(batch, step)| ("bfloat16", vec![4, 2, 16, batch, 1, step, 0], 1e-6 * (batch * step) as f64));
    let types = ["attn_dtype", "kv_cache_dtype"];
    [
        ("gemm", "gemm_perf", table(&["gemm_dtype"], &["n", "k", "m"], &products, compression)),
        ("attention", "context_attention_perf", table(&types, &heads, &prompts, compression)),
        ("attention", "generation_attention_perf", table(&types, &heads, &decodes, compression)),
    ]
}

/// Writes the files of the GPU `g` into a folder, of version 1.0 of `vllm`; file number `hit`, if below 3, with its bytes changed by `other`.
pub fn write_kernels(folder: &Path, compression: Compression, hit: usize, other: impl Fn(Vec<u8>) -> Vec<u8>) {
    std::fs::write(folder.join("g.yaml"), SYSTEM).unwrap();
    for (place, (kind, name, bytes)) in kernel_tables(compression).into_iter().enumerate() {
        let versions = folder.join("data/g").join(kind).join("vllm/1.0");
        std::fs::create_dir_all(&versions).unwrap();
        let bytes = if place == hit { other(bytes) } else { bytes };
        std::fs::write(versions.join(format!("{name}.parquet")), bytes).unwrap();
    }
}
