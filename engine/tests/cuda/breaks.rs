//! Deliberately broken kernels, which the emulation must detect.

use engine::cache::Kept;
use engine::cuda::source::{Scalar, Specialization};

use crate::attention::{Case, Chunk, SHAPES, Shape};
use crate::bench::{Bench, Dice};
use crate::emulator::Module;
use crate::operations::check_adapters;

/// The error of attention, or of its launch, when `from` is replaced by `to` in the kernels; `None` if there is none.
fn caught(shape: Shape, from: &str, to: &str) -> Option<String> {
    let mut dice = Dice::new(5);
    let chunks = [(40, 1, 0), (300, 1, 1), (3, 30, 2)];
    let chunks = chunks.map(|(history, rows, depth)| Chunk { history, rows, depth }).to_vec();
    let mut case = Case::new(shape, chunks, Kept::AtEachDepth(0), &mut dice)?.without_windows();
    case.check();
    let whole = case.bench.specialization.source();
    assert_eq!(whole.matches(from).count(), 1, "`{from}` is not in the kernels once");
    case.bench.module = Module::of_source(&whole.replace(from, to), 1);
    let wrong = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| case.check()));
    let message = wrong.expect_err("a broken kernel passes for a whole one");
    Some(message.downcast_ref::<String>().expect("a formatted message").clone())
}

fn assert_caught(from: &str, to: &str, by: &str) {
    if let Some(message) = caught(SHAPES[0], from, to) {
        assert!(message.contains(by), "{message}");
    }
}

#[test]
fn a_page_index_off_by_one_is_caught() {
    assert_caught(
        "const int block = visible[key] ? block_table[row.first_block + entry / BLOCK_TOKENS] : 0;",
        "const int block = visible[key] ? block_table[row.first_block + (entry + 1) / BLOCK_TOKENS] : 0;",
        "expected",
    );
}

#[test]
fn a_key_read_beyond_the_last_is_caught() {
    assert_caught(
        "visible[key] = entry >= first && entry < end;",
        "visible[key] = entry >= first && entry <= end;",
        "is NaN, expected",
    );
}

#[test]
fn a_missing_barrier_is_caught() {
    assert_caught("    __syncthreads();\n\n    const bool whole", "\n    const bool whole", "expected");
}

#[test]
fn a_missing_barrier_before_shared_memory_is_written_again_is_caught() {
    assert_caught("step += KEYS_OF_STEP) {\n        __syncthreads();", "step += KEYS_OF_STEP) {", "expected");
}

#[test]
fn a_barrier_that_some_threads_miss_is_caught() {
    assert_caught(
        "    __syncthreads();\n\n    const bool whole",
        "    if (threadIdx.x < 100) { __syncthreads(); }\n\n    const bool whole",
        "a barrier or shuffle that not all threads reach",
    );
}

#[test]
fn a_shuffle_across_too_few_lanes_is_caught() {
    assert_caught("half = LANES / 2; half > 0", "half = LANES / 2; half > 1", "expected");
}

#[test]
fn an_index_beyond_shared_memory_is_caught() {
    assert_caught(
        "tops[warp][head] = seen.top[head];",
        "tops[warp + WARPS][head] = seen.top[head];",
        "beyond an array",
    );
}

#[test]
fn a_misaligned_load_is_caught() {
    assert_caught(
        "keys[key][n] = there ? load_pack(from + pack * PACK) : zero_pack<scalar>();",
        "keys[key][n] = there ? load_pack(from + pack * PACK + 1) : zero_pack<scalar>();",
        "misaligned",
    );
}

#[test]
fn breaks_on_tensor_cores_are_caught() {
    let breaks = [
        (
            "const int entry = here + 8 * half + 2 * quarter + i;",
            "const int entry = here + 8 * half + 2 * quarter + i + 1;",
        ),
        ("at < HEAD_DIM && here + key >= first && here + key < end;", "at < HEAD_DIM && here + key >= first;"),
        ("upper_halves(words[2][pair], words[3][pair])", "upper_halves(words[3][pair], words[2][pair])"),
        ("{upper.x, lower.x, upper.y, lower.y}, {b.x, b.y}", "{upper.x, lower.x, upper.y, lower.y}, {b.x, b.z}"),
        ("correction, 8 * quarter + 4)", "correction, 8 * quarter)"),
        ("seen.sum[octet] += __shfl_xor_sync(FULL_WARP, seen.sum[octet], 2);", ""),
        ("block = tile < end ? blocks[tile / BLOCK_TOKENS] : 0;\n\n", "\n"),
        ("    __syncthreads();\n    float shares", "    float shares"),
        ("        __syncthreads();\n    }\n}\n\n// Blocks per", "    }\n}\n\n// Blocks per"),
        ("row.first_split + item.split) * g.heads", "blockIdx.x + item.split) * g.heads"),
        ("const int index = joins[blockIdx.x];", "const int index = joins[blockIdx.x] - 1;"),
        ("            store(head + half + i, y);\n", ""),
    ];
    // Heads of 24 are not a whole number of steps, and five of them share a key-value head.
    for (from, to) in breaks {
        assert!(caught(SHAPES[9], from, to).is_none_or(|message| message.contains("expected")), "{from}");
    }
}

#[test]
fn breaks_of_adapters_are_caught() {
    let of_both = [
        ("group.depth * sizes.ranks + slice.first_rank;", "slice.first_rank;"),
        ("group.depth * slice.depth_stride", "0 * slice.depth_stride"),
        ("        __syncthreads();\n        of_step.multiply", "        of_step.multiply"),
        ("group.rows, min(ranks - step, RANKS_OF_STEP), sums", "group.rows, min(ranks - step, 32), sums"),
        ("slices[gridDim.y + blockIdx.y]", "slices[blockIdx.y]"),
    ];
    let of_tensor_cores = [
        ("lower[tile] = load_output(group + 8);", "lower[tile] = load_output(group);"),
        ("{a.x, b.x, a.y, b.y}, {x.x, x.y}", "{a.x, b.x, a.y, b.y}, {x.x, x.z}"),
    ];
    for scalar in [Scalar::F32, Scalar::Bf16] {
        let Some(mut bench) = Bench::of(scalar) else { return };
        check_adapters(&bench);
        let whole = bench.specialization.source();
        let of_type = if scalar == Scalar::F32 { &[][..] } else { &of_tensor_cores };
        for &(from, to) in of_both.iter().chain(of_type) {
            assert_eq!(whole.matches(from).count(), 1, "`{from}` is not in the kernels once");
            bench.module = Module::of_source(&whole.replace(from, to), 1);
            let wrong = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| check_adapters(&bench)));
            let message = wrong.expect_err(&format!("{scalar:?}: `{to}` passes for `{from}`"));
            let message = message.downcast_ref::<String>().expect("a formatted message");
            assert!(message.contains("expected"), "{from}: {message}");
        }
    }
}

#[test]
fn an_access_beyond_memory_is_caught() {
    let specialization = Specialization::new(Scalar::F32, 64, 2, 16).unwrap();
    let whole = specialization.source();
    let Some(mut bench) = Bench::new(specialization) else { return };
    bench.module = Module::of_source(&whole.replace("at < width; at += THREADS", "at <= width; at += THREADS"), 1);
    let (rows, places) = (bench.put(&[1.0_f32; 64]), bench.put(&[0]));
    let target = bench.empty::<f32>(64);
    let error = bench.kernels().keep_rows(rows.view, places.view, 64, target.view).unwrap_err();
    assert!(error.to_string().contains("out of bounds"), "{error}");
}
