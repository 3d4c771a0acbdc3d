//! Every kernel except attention, compared with the CPU operation.

use std::ops::Range;
use traces::hash::mix;

use candle_core::Tensor;
use engine::config::{Activation, Norm};
use engine::cuda::device::Stored;
use engine::cuda::kernels::{Biases, Formula, LoraInputs, Matrix, Part, Slice, Target, Verdict, sweep_bytes};
use engine::cuda::source::Scalar;
use engine::kernels::activation::activate;
use engine::kernels::adapters::{Adapter, Adapters};
use engine::kernels::attention::Row;
use engine::kernels::norm::{self, HeadNorm};
use engine::kernels::rows::{Source, add_bias, compare, gather, probe_rows, scale, scatter};
use engine::kernels::signals::{divergence, read};

use crate::bench::{Bench, Dice, Held, Rows, assert_close, matrix, numbers, rounded, tolerance};

const DEPTHS: usize = 3;
const ROWS: [usize; 5] = [1, 2, 17, 64, 257];

/// Rows of random depths, on the device and in the format of the CPU operations.
fn rows_by_depth(bench: &Bench, dice: &mut Dice, count: usize) -> (Rows, Vec<(usize, Range<usize>)>) {
    let mut depths: Vec<usize> = (0..count).map(|_| dice.below(DEPTHS)).collect();
    depths.sort_unstable();
    let blocks: Vec<[u32; 1]> = (0..count as u32).map(|block| [block]).collect();
    let places = depths.iter().zip(&blocks);
    let rows: Vec<Row<'_>> = places.map(|(&depth, blocks)| Row::new(0, depth, blocks)).collect();
    let mut start = 0;
    let ranges = depths.chunk_by(|a, b| a == b).map(|of_depth| {
        start += of_depth.len();
        (of_depth[0], start - of_depth.len()..start)
    });
    (bench.upload(&rows, None, DEPTHS), ranges.collect())
}

/// Runs a test for every storage type and count of rows.
fn for_each_size(test: impl Fn(&Bench, &mut Dice, usize)) {
    for scalar in Scalar::ALL {
        let Some(bench) = Bench::of(scalar) else { return };
        for rows in ROWS {
            test(&bench, &mut Dice::new(rows as u64), rows);
        }
    }
}

fn plus_one(numbers: Vec<f32>) -> Vec<f32> {
    numbers.into_iter().map(|x| 1.0 + 0.5 * x).collect()
}

#[test]
fn norms_are_those_of_the_cpu() {
    for_each_size(|bench, dice, count| {
        let (kind, sets, width) =
            (dice.pick(&[Norm::Rms, Norm::Layer]), dice.pick(&[1, DEPTHS]), dice.pick(&[1, 24, 129, 576]));
        let (rows, depths) = rows_by_depth(bench, dice, count);
        let vectors = plus_one(dice.numbers(sets * width * if kind == Norm::Layer { 2 } else { 1 }));
        let on_device = bench.put(&vectors);
        let cpu = norm::Norm::new(matrix(&vectors, vectors.len() / sets), kind, 1e-5, width);
        let formula = Formula::new(kind, width, sets, 1e-5);
        let what = format!("{kind:?} norm of {count} rows of {width}, {sets} sets");

        let x = dice.numbers(count * width);
        let out = bench.empty_stored(count * width);
        let kernels = bench.kernels();
        let residual = bench.put(&x);
        kernels.norm_rows(residual.view, None, rows.views.rows, on_device.view, formula, out.view).unwrap();
        let expected = numbers(&cpu.forward(&matrix(&x, width), &depths).unwrap());
        assert_close(&what, &bench.stored(&out), &expected, tolerance(bench.scalar()));

        let picks: Vec<i32> = (0..count.div_ceil(2)).map(|_| dice.below(count) as i32).collect();
        let (picked, out) = (bench.put(&picks), bench.empty_stored(picks.len() * width));
        kernels
            .norm_rows(residual.view, Some(picked.view), rows.views.rows, on_device.view, formula, out.view)
            .unwrap();
        let expected: Vec<f32> =
            picks.iter().flat_map(|&row| expected[row as usize * width..][..width].to_vec()).collect();
        assert_close(&what, &bench.stored(&out), &expected, tolerance(bench.scalar()));

        let y = bench.random(dice, count * width);
        kernels.add_normed(bench.store(&y).view, rows.views.rows, on_device.view, formula, residual.view).unwrap();
        let sum = matrix(&x, width);
        cpu.add_to(&sum, &matrix(&y, width), &depths).unwrap();
        assert_close(&what, &bench.get(&residual), &numbers(&sum), tolerance(Scalar::F32));

        let (in_place, first_depth) = (bench.put(&x), dice.below(DEPTHS + 1));
        kernels.norm_in_place(in_place.view, rows.views.rows, on_device.view, formula, first_depth).unwrap();
        let normed = numbers(&cpu.forward(&matrix(&x, width), &depths).unwrap());
        let of_depth = |depth: usize, row: usize| if depth < first_depth { x[row] } else { normed[row] };
        let expected: Vec<f32> = depths
            .iter()
            .flat_map(|(depth, rows)| (rows.start * width..rows.end * width).map(|number| of_depth(*depth, number)))
            .collect();
        assert_close(&what, &bench.get(&in_place), &expected, tolerance(Scalar::F32));
    });
}

#[test]
fn head_norms_are_those_of_the_cpu() {
    for_each_size(|bench, dice, count| {
        let (kind, sets, width) =
            (dice.pick(&[Norm::Rms, Norm::Layer]), dice.pick(&[1, DEPTHS]), dice.pick(&[8, 64, 80]));
        let (heads, kv_heads) = dice.pick(&[(1, 1), (4, 2), (9, 3)]);
        let (rows, depths) = rows_by_depth(bench, dice, count);
        let vectors = plus_one(dice.numbers(sets * 2 * width * if kind == Norm::Layer { 2 } else { 1 }));
        let cpu = HeadNorm::new(matrix(&vectors, vectors.len() / sets), kind, 1e-5, width, heads, kv_heads);
        let x = bench.random(dice, count * (heads + 2 * kv_heads) * width);
        let (qkv, of_cpu) = (bench.store(&x), matrix(&x, (heads + 2 * kv_heads) * width));
        let formula = Formula::new(kind, width, sets, 1e-5);
        let vectors = bench.put(&vectors);
        bench.kernels().norm_heads(qkv.view, rows.views.rows, vectors.view, formula, heads, kv_heads).unwrap();
        cpu.apply(&of_cpu, &depths).unwrap();
        assert_close("heads", &bench.stored(&qkv), &numbers(&of_cpu), tolerance(bench.scalar()));
    });
}

#[test]
fn rows_enter_and_are_kept_as_on_the_cpu() {
    for_each_size(|bench, dice, count| {
        let (width, capacity, factor) = (dice.pick(&[1, 30, 576]), count + 3, 1.5);
        let (embedding, arena) = (bench.random(dice, 11 * width), dice.numbers(capacity * width));
        let sources: Vec<i32> = (0..count)
            .map(|_| match dice.below(2) {
                0 => dice.below(11) as i32,
                _ => -1 - dice.below(capacity) as i32,
            })
            .collect();
        let (in_flight, out) = (bench.put(&arena), bench.empty::<f32>(count * width));
        let on_device = (bench.store(&embedding), bench.put(&sources));
        let kernels = bench.kernels();
        kernels.enter_rows(on_device.0.view, in_flight.view, on_device.1.view, width, factor, out.view).unwrap();
        let scaled = matrix(&embedding, width);
        scale(&scaled, factor).unwrap();
        let source = |&source: &i32| match source {
            0.. => Source::First(source as u32),
            _ => Source::Second((-1 - source) as u32),
        };
        let target = matrix(&arena, width);
        let entered = gather(&scaled, &target, &sources.iter().map(source).collect::<Vec<_>>()).unwrap();
        assert_eq!(bench.get(&out), numbers(&entered));

        let mut places: Vec<i32> = (0..capacity as i32).collect();
        (0..capacity).for_each(|i| places.swap(i, dice.below(capacity)));
        places.truncate(count);
        places.iter_mut().step_by(3).for_each(|place| *place = -1);
        kernels.keep_rows(out.view, bench.put(&places).view, width, in_flight.view).unwrap();
        let places: Vec<Option<u32>> = places.into_iter().map(|place| u32::try_from(place).ok()).collect();
        scatter(&target, &entered, &places).unwrap();
        assert_eq!(bench.get(&in_flight), numbers(&target));
    });
}

#[test]
fn the_adapter_reads_the_state_of_a_row_and_what_is_injected() {
    for_each_size(|bench, dice, count| {
        let (width, capacity, states) = (dice.pick(&[1, 30, 576]), count + 3, dice.pick(&[1, 2, 7]));
        let positions: Vec<usize> = (0..count).map(|_| dice.below(99)).collect();
        let blocks: Vec<[u32; 1]> = (0..count as u32).map(|block| [block]).collect();
        let placed: Vec<Row<'_>> =
            positions.iter().zip(&blocks).map(|(&position, blocks)| Row::new(position, 0, blocks)).collect();
        let rows = bench.upload(&placed, None, DEPTHS);
        let sources: Vec<i32> = (0..count).map(|_| dice.below(5 + capacity) as i32 - capacity as i32).collect();
        let (arena, initial) = (bench.random(dice, capacity * width), bench.random(dice, states * width));
        let injected = bench.random(dice, count * width);
        let on_device = (bench.put(&arena), bench.put(&sources), bench.put(&initial), bench.put(&injected));
        let out = bench.empty_stored(count * 2 * width);
        let in_flight = (on_device.0.view, on_device.1.view);
        let (initial_view, injected_view) = (on_device.2.view, on_device.3.view);
        bench.kernels().inject_rows(in_flight, rows.views.rows, initial_view, injected_view, width, out.view).unwrap();
        let expected: Vec<f32> = sources
            .iter()
            .zip(&positions)
            .enumerate()
            .flat_map(|(row, (&source, position))| {
                let state = match source {
                    0.. => &initial[position % states * width..][..width],
                    _ => &arena[(-1 - source) as usize * width..][..width],
                };
                [state, &injected[row * width..][..width]].concat()
            })
            .collect();
        assert_eq!(bench.stored(&out), expected);
    });
}

#[test]
fn biases_are_added_as_on_the_cpu() {
    for_each_size(|bench, dice, count| {
        let (width, sets) = (dice.pick(&[1, 30, 576]), dice.pick(&[1, DEPTHS]));
        let (rows, depths) = rows_by_depth(bench, dice, count);
        let (x, biases) = (bench.random(dice, count * width), dice.numbers(sets * width));
        let (stored, residual, on_device) = (bench.store(&x), bench.put(&x), bench.put(&biases));
        bench.kernels().add_bias(stored.view, rows.views.rows, on_device.view, sets, width).unwrap();
        bench.kernels().add_bias_to_residual(residual.view, rows.views.rows, on_device.view, sets, width).unwrap();
        let expected = matrix(&x, width);
        add_bias(&expected, &matrix(&biases, width), &depths).unwrap();
        let expected = numbers(&expected);
        assert_eq!(bench.get(&residual), expected);
        let expected: Vec<f32> = expected.into_iter().map(|x| rounded(bench.scalar(), x)).collect();
        assert_eq!(bench.stored(&stored), expected);
    });
}

#[test]
fn activations_are_those_of_the_cpu() {
    for_each_size(|bench, dice, count| {
        for activation in [Activation::Silu, Activation::Gelu, Activation::GeluTanh] {
            let (inner, gated) = (dice.pick(&[1, 7, 64, 1536]), dice.pick(&[true, false]));
            let width = if gated { 2 * inner } else { inner };
            let x: Vec<f32> = bench.random(dice, count * width).iter().map(|x| 4.0 * x).collect();
            let out = bench.empty_stored(count * inner);
            bench.kernels().activate(bench.store(&x).view, count, inner, gated, activation, out.view).unwrap();
            let expected = numbers(&activate(&matrix(&x, width), activation, gated).unwrap());
            let what = format!("{activation:?}, {inner} wide, gated {gated}");
            assert_close(&what, &bench.stored(&out), &expected, tolerance(bench.scalar()));
        }
    });
}

#[test]
fn comparisons_of_rows_are_those_of_the_cpu() {
    for_each_size(|bench, dice, count| {
        let width = dice.pick(&[1, 100, 576]);
        let (before, mut after) = (dice.numbers(count * width), dice.numbers(count * width));
        after[..width].fill(0.0);
        let tos: Vec<i32> = (0..count as i32).collect();
        let froms: Vec<i32> = tos.iter().map(|_| dice.below(count) as i32).collect();
        let (x, y, out) = (bench.put(&before), bench.put(&after), bench.empty::<f32>(2 * count));
        let (tos, picked) = (bench.put(&tos), bench.put(&froms));
        bench.kernels().compare((x.view, picked.view), (y.view, tos.view), width, out.view).unwrap();
        let rows: Vec<Source> = froms.iter().map(|&row| Source::First(row as u32)).collect();
        let before = matrix(&before, width);
        let expected = compare(&gather(&before, &before, &rows).unwrap(), &matrix(&after, width)).unwrap();
        let (found, expected) = (bench.get(&out), numbers(&expected));
        assert_eq!(found[..2], [0.0, 1.0], "a state of zeros");
        assert_close("comparisons", &found, &expected, 4e-6);
    });
}

#[test]
fn divergences_are_those_of_the_cpu() {
    for_each_size(|bench, dice, count| {
        let vocab = dice.pick(&[1, 100, 576]);
        let [before, after] =
            [(); 2].map(|()| dice.numbers(count * vocab).iter().map(|x| 9.0 * x).collect::<Vec<f32>>());
        let tos: Vec<i32> = (0..count as i32).rev().collect();
        let froms: Vec<i32> = tos.iter().map(|_| dice.below(count + 1) as i32 - 1).collect();
        let (x, y, out) = (bench.put(&before), bench.put(&after), bench.empty::<f32>(count));
        let (on_device, picked) = (bench.put(&tos), bench.put(&froms));
        bench.kernels().diverge((x.view, picked.view), (y.view, on_device.view), vocab, out.view).unwrap();
        let row = |numbers: &[f32], row: i32| numbers[row as usize * vocab..][..vocab].to_vec();
        let expected: Vec<f32> = froms
            .iter()
            .zip(&tos)
            .map(|(&from, &to)| divergence((from >= 0).then(|| row(&before, from)).as_deref(), &row(&after, to)))
            .collect();
        assert_close("divergences", &bench.get(&out), &expected, 1e-5);
    });
}

#[test]
fn gates_are_those_of_the_cpu() {
    for_each_size(|bench, dice, count| {
        let width = dice.pick(&[1, 100, 576]);
        let (rows, depths) = rows_by_depth(bench, dice, count);
        let (x, probes) = (bench.random(dice, count * width), dice.numbers(DEPTHS * (width + 1)));
        let (picks, out) = (bench.put(&(0..count as i32).collect::<Vec<_>>()), bench.empty::<f32>(count));
        let on_device = (bench.store(&x), bench.put(&probes));
        bench
            .kernels()
            .gates(on_device.0.view, picks.view, rows.views.rows, on_device.1.view, width, out.view)
            .unwrap();
        let expected = probe_rows(&matrix(&x, width), &matrix(&probes, width + 1), &depths).unwrap();
        assert_close("gates", &bench.get(&out), &numbers(&expected), 1e-5);
    });
}

/// Projections of one input with adapters by depth.
struct Lora {
    /// `[outputs, inputs]`
    weight: Vec<f32>,
    /// By depth: the downs of all parts, `[ranks, inputs]`.
    downs: Vec<Vec<f32>>,
    /// By part and depth: `[outputs, rank]`.
    ups: Vec<Vec<Vec<f32>>>,
    parts: Vec<Part>,
    inputs: usize,
}

/// A [`Lora`] on the device.
struct LoraOnDevice {
    sizes: LoraInputs,
    /// The weight, if there is one, with the downs.
    matrix: Matrix,
    _memory: (Held<Stored>, Held<Stored>, Held<Slice>),
}

impl Lora {
    fn random(bench: &Bench, dice: &mut Dice, depths: usize, shape: &[(usize, usize)], inputs: usize) -> Self {
        let parts: Vec<Part> = shape.iter().map(|&(rank, outputs)| Part { rank, outputs }).collect();
        let mut smaller =
            |count| bench.random(dice, count).iter().map(|x| rounded(bench.scalar(), x / 16.0)).collect::<Vec<f32>>();
        let (ranks, outputs): (usize, usize) = (sum(&parts, |part| part.rank), sum(&parts, |part| part.outputs));
        Self {
            weight: smaller(outputs * inputs),
            downs: (0..depths).map(|_| smaller(ranks * inputs)).collect(),
            ups: parts.iter().map(|part| (0..depths).map(|_| smaller(part.outputs * part.rank)).collect()).collect(),
            parts,
            inputs,
        }
    }

    fn outputs(&self) -> usize {
        sum(&self.parts, |part| part.outputs)
    }

    fn on_device(&self, bench: &Bench, with_weight: bool) -> LoraOnDevice {
        let (depths, scalar) = (self.downs.len(), bench.scalar());
        let (slices, numbers) = Part::slices(&self.parts, depths, scalar);
        let mut ups = Vec::new();
        for (part, by_depth) in self.parts.iter().zip(&self.ups).filter(|(part, _)| part.rank > 0) {
            for output in by_depth.iter().flat_map(|up| up.chunks_exact(part.rank)) {
                ups.extend_from_slice(output);
                ups.resize(ups.len() + part.padded_rank(scalar) - part.rank, 0.0);
            }
        }
        assert_eq!(ups.len(), numbers);
        let (ranks, outputs) = (sum(&self.parts, |part| part.rank), self.outputs());
        let stride = LoraInputs::stride(if with_weight { outputs } else { 0 }, depths, ranks, scalar);
        let mut matrix = [if with_weight { &self.weight[..] } else { &[] }, &self.downs.concat()[..]].concat();
        matrix.resize(stride * self.inputs, 0.0);
        let memory = (bench.store(&matrix), bench.store(&ups), bench.put(&slices));
        LoraOnDevice {
            sizes: LoraInputs { ups: memory.1.view, slices: memory.2.view, depths, ranks, outputs, stride },
            matrix: Matrix { numbers: memory.0.view, outputs: stride, inputs: self.inputs },
            _memory: memory,
        }
    }

    /// Adds the adapters' output to `y` `[rows, outputs]`.
    fn on_cpu(&self, y: &Tensor, x: &Tensor, depths: &[(usize, Range<usize>)]) {
        let of_depth = |depth: usize| {
            let down = matrix(&self.downs[depth], self.inputs);
            let mut first_rank = 0;
            let part = |(part, ups): (&Part, &Vec<Vec<f32>>)| {
                let of_part = down.narrow(0, first_rank, part.rank).unwrap();
                first_rank += part.rank;
                (part.rank > 0).then(|| (of_part, matrix(&ups[depth], part.rank)))
            };
            self.parts.iter().zip(&self.ups).map(part).collect()
        };
        let matrices: Vec<Vec<Option<(Tensor, Tensor)>>> = (0..self.downs.len()).map(of_depth).collect();
        let mut adapters = Vec::new();
        for matrices in &matrices {
            let adapted = matrices.iter().map(|part| part.as_ref().map(|(down, up)| (down, up)));
            adapters
                .push(Adapter { parts: self.parts.iter().map(|part| part.outputs).zip(adapted).collect(), scale: 1.0 });
        }
        Adapters::new(&adapters).unwrap().unwrap().add_to(y, x, depths).unwrap();
    }

    /// The product of `x` with the weight, plus the adapters' output.
    fn product_on_cpu(&self, x: &Tensor, depths: &[(usize, Range<usize>)]) -> Tensor {
        let y = x.matmul(&matrix(&self.weight, self.inputs).t().unwrap()).unwrap();
        self.on_cpu(&y, x, depths);
        y
    }
}

fn sum(parts: &[Part], number: impl Fn(&Part) -> usize) -> usize {
    parts.iter().map(number).sum()
}

/// Ranks and outputs of projections of one input.
const LORA_SHAPES: [&[(usize, usize)]; 7] = [
    &[(1, 5)],
    &[(0, 40), (8, 24), (0, 24)],
    &[(3, 130), (3, 40), (5, 40)],
    &[(64, 300)],
    &[(0, 64), (16, 64)],
    &[(129, 133), (5, 133)],
    &[(512, 96)],
];

/// Rows on the device, their ranges by depth, and their number.
type AdaptedRows<'a> = (&'a Rows, &'a [(usize, Range<usize>)], usize);

/// Runs a test of adapters for every shape, with a text about the case.
fn for_each_lora(test: impl Fn(&Bench, &mut Dice, AdaptedRows<'_>, &Lora, &str)) {
    for_each_size(|bench, dice, count| {
        for shape in LORA_SHAPES {
            let (inputs, adapted) = (dice.pick(&[1, 40, 67, 576]), dice.pick(&[DEPTHS, DEPTHS - 1]));
            let lora = Lora::random(bench, dice, adapted, shape, inputs);
            let (rows, depths) = rows_by_depth(bench, dice, count);
            let what = format!("{shape:?} at {adapted} depths, {inputs} inputs, {count} rows, {:?}", bench.scalar());
            test(bench, dice, (&rows, &depths, count), &lora, &what);
        }
    });
}

#[test]
fn lora_of_mixed_depths_is_that_of_the_cpu() {
    for_each_lora(check_lora);
}

/// Adapters of two projections with more ranks than a block has in shared memory, through the kernels of a bench.
#[cfg(not(feature = "cuda"))]
pub fn check_adapters(bench: &Bench) {
    let mut dice = Dice::new(21);
    let lora = Lora::random(bench, &mut dice, DEPTHS, &[(130, 70), (9, 70)], 40);
    let (rows, depths) = rows_by_depth(bench, &mut dice, 33);
    check_lora(bench, &mut dice, (&rows, &depths, 33), &lora, "adapters");
    check_adapted_activations(bench, &mut dice, (&rows, &depths, 33), &lora, "activations");
}

fn check_lora(bench: &Bench, dice: &mut Dice, (rows, depths, count): AdaptedRows<'_>, lora: &Lora, what: &str) {
    let (outputs, sets) = (lora.outputs(), dice.pick(&[0, 1, DEPTHS]));
    let (x, biases, y) =
        (bench.random(dice, count * lora.inputs), dice.numbers(sets * outputs), dice.numbers(count * outputs));
    let (kernels, on_device, groups) = (bench.kernels(), lora.on_device(bench, true), (count, rows.views.groups));
    let (input, biases_held) = (bench.store(&x), bench.put(&biases));
    let with_biases = (sets > 0).then_some(Biases { numbers: biases_held.view, sets });
    let expected = lora.product_on_cpu(&matrix(&x, lora.inputs), depths);
    if sets > 0 {
        add_bias(&expected, &matrix(&biases, outputs), depths).unwrap();
    }
    let expected = numbers(&expected);

    let (wide, found) = (bench.empty_stored(count * on_device.sizes.stride), bench.empty_stored(count * outputs));
    kernels.product(input.view, count, on_device.matrix, Target::Stored(wide.view)).unwrap();
    kernels.lora_expand(&on_device.sizes, wide.view, groups, with_biases, found.view).unwrap();
    assert_close(what, &bench.stored(&found), &expected, tolerance(bench.scalar()));

    let (wide, residual) = (bench.empty::<f32>(count * on_device.sizes.stride), bench.put(&y));
    kernels.product(input.view, count, on_device.matrix, Target::F32(wide.view)).unwrap();
    kernels.lora_add(&on_device.sizes, wide.view, true, groups, with_biases, residual.view).unwrap();
    let expected: Vec<f32> = expected.iter().zip(&y).map(|(product, y)| product + y).collect();
    assert_close(what, &bench.get(&residual), &expected, tolerance(bench.scalar()) / 2.0);
}

#[test]
fn lora_of_the_head_is_that_of_the_cpu() {
    for_each_lora(|bench, dice, (rows, depths, count), lora, what| {
        let (x, y) = (bench.random(dice, count * lora.inputs), dice.numbers(count * lora.outputs()));
        let (kernels, on_device, groups) = (bench.kernels(), lora.on_device(bench, false), (count, rows.views.groups));
        let (input, logits) = (bench.store(&x), bench.put(&y));
        let shrunk = bench.empty::<f32>(count * on_device.sizes.stride);
        kernels.product(input.view, count, on_device.matrix, Target::F32(shrunk.view)).unwrap();
        kernels.lora_add(&on_device.sizes, shrunk.view, false, groups, None, logits.view).unwrap();
        let expected = matrix(&y, lora.outputs());
        lora.on_cpu(&expected, &matrix(&x, lora.inputs), depths);
        assert_close(what, &bench.get(&logits), &numbers(&expected), tolerance(bench.scalar()) / 2.0);
    });
}

#[test]
fn activations_of_adapted_gates_are_those_of_the_cpu() {
    for_each_lora(check_adapted_activations);
}

/// Checks projections of two equal parts, a gate and what it multiplies; no others.
fn check_adapted_activations(
    bench: &Bench,
    dice: &mut Dice,
    (rows, depths, count): AdaptedRows<'_>,
    lora: &Lora,
    what: &str,
) {
    let [gate, up] = lora.parts[..] else { return };
    assert_eq!(gate.outputs, up.outputs);
    let (inner, sets) = (gate.outputs, dice.pick(&[0, DEPTHS]));
    let activation = dice.pick(&[Activation::Silu, Activation::Gelu, Activation::GeluTanh]);
    let (x, biases) = (bench.random(dice, count * lora.inputs), dice.numbers(sets * 2 * inner));
    let (kernels, on_device, groups) = (bench.kernels(), lora.on_device(bench, true), (count, rows.views.groups));
    let (input, biases_held) = (bench.store(&x), bench.put(&biases));
    let with_biases = (sets > 0).then_some(Biases { numbers: biases_held.view, sets });
    let (wide, found) = (bench.empty_stored(count * on_device.sizes.stride), bench.empty_stored(count * inner));
    kernels.product(input.view, count, on_device.matrix, Target::Stored(wide.view)).unwrap();
    kernels.lora_activate(&on_device.sizes, wide.view, groups, with_biases, activation, found.view).unwrap();
    let expected = lora.product_on_cpu(&matrix(&x, lora.inputs), depths);
    if sets > 0 {
        add_bias(&expected, &matrix(&biases, 2 * inner), depths).unwrap();
    }
    let expected = numbers(&activate(&expected, activation, true).unwrap());
    assert_close(what, &bench.stored(&found), &expected, tolerance(bench.scalar()));
}

#[test]
fn lora_of_a_row_is_the_same_to_the_bit_in_any_company() {
    for_each_lora(|bench, dice, (rows, depths, count), lora, what| {
        let (outputs, on_device) = (lora.outputs(), lora.on_device(bench, true));
        let stride = on_device.sizes.stride;
        let base = bench.random(dice, count * stride);
        let expanded = |rows: &Rows, base: &[f32]| {
            let (count, found) = (base.len() / stride, bench.empty_stored(base.len() / stride * outputs));
            let groups = (count, rows.views.groups);
            bench.kernels().lora_expand(&on_device.sizes, bench.store(base).view, groups, None, found.view).unwrap();
            bench.stored(&found)
        };
        let together = expanded(rows, &base);
        let row = dice.below(count);
        let depth = depths.iter().find(|(_, rows)| rows.contains(&row)).unwrap().0;
        let alone = bench.upload(&[Row::new(0, depth, &[0])], None, DEPTHS);
        let alone = expanded(&alone, &base[row * stride..][..stride]);
        assert_eq!(alone, together[row * outputs..][..outputs], "row {row}: {what}");
    });
}

fn verdicts(bench: &Bench, logits: &[f32], vocab: usize, temperature: f32, keys: &[u64]) -> Vec<Verdict> {
    let (logits, keys_held, out): (_, _, Held<Verdict>) = (bench.put(logits), bench.put(keys), bench.empty(keys.len()));
    let scratch = bench.empty::<u8>(sweep_bytes(keys.len(), vocab));
    let (kernels, temperature) = (bench.kernels(), bench.put(&[temperature]));
    kernels.read_logits(logits.view, keys_held.view, vocab, temperature.view, scratch.view, out.view).unwrap();
    bench.get(&out)
}

#[test]
fn exit_signals_and_draws_are_those_of_the_cpu() {
    let Some(bench) = Bench::of(Scalar::F32) else { return };
    for (rows, vocab) in [(1, 1), (2, 2), (257, 37), (17, 2048), (3, 2049), (2, 49_152)] {
        for temperature in [0.0, 0.7] {
            let mut dice = Dice::new(vocab as u64);
            // Coarse logits have ties.
            let logits: Vec<f32> = dice.numbers(rows * vocab).iter().map(|x| (x * 60.0).round() / 8.0 - 3.0).collect();
            let keys: Vec<u64> = (0..rows as u64).map(mix).collect();
            let found = verdicts(&bench, &logits, vocab, temperature, &keys);
            let expected = read(&matrix(&logits, vocab), temperature, &keys).unwrap();
            for (row, (found, expected)) in found.iter().zip(expected).enumerate() {
                let what = format!("row {row} of {vocab} logits");
                let signals = [found.top1, found.margin, found.entropy];
                assert_close(&what, &signals, &[expected.top1, expected.margin, expected.entropy], 1e-5);
                assert_eq!(found.token as u32, expected.token, "{what} at temperature {temperature}");
                let logits = &logits[row * vocab..][..vocab];
                let sum: f64 = logits.iter().map(|&logit| f64::from(logit).exp()).sum();
                assert_close(&what, &[found.log_sum_exp], &[sum.ln() as f32], 1e-5);
            }
        }
    }
}

#[test]
fn logits_that_are_not_finite_show_in_top1() {
    let Some(bench) = Bench::of(Scalar::F32) else { return };
    for bad in [f32::NAN, f32::INFINITY] {
        for at in [0, 5, 2999] {
            let mut logits = Dice::new(1).numbers(3000);
            logits[at] = bad;
            assert!(verdicts(&bench, &logits, 3000, 0.0, &[0])[0].top1.is_nan(), "{bad} at {at}");
        }
    }
}
