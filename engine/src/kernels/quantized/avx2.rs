//! Products with quantized weights on CPUs with 256-bit registers: AVX2.
//!
//! Weights are multiplied as nibbles. The products of nibbles with bytes fit in 16 bits even when those of a whole
//! block are added. A byte therefore takes two instructions, one for each nibble, and sums are widened once per block.

use std::arch::x86_64::*;

use super::{BLOCK, Block, GROUP, PANEL, Products, Tile};

/// Outputs per register of 32-bit sums.
const HALF: usize = PANEL / 2;
/// Bytes of a panel that a step through a block loads, in two halves: a group of Q8, or two of Q4K.
const STEP: usize = PANEL * GROUP;

// Each 16-bit lane adds two products per group, each of a nibble with a byte.
const _: () = assert!(BLOCK / GROUP * 2 * 15 * 128 <= i16::MAX as usize + 1);

/// [`Tile::products`]; `NIBBLES` for Q4K, which has minima too.
///
/// # Safety
/// The panels and the rows must be as long as the layout says.
#[target_feature(enable = "avx2,fma,f16c")]
#[expect(clippy::needless_range_loop, reason = "panels, rows and their sums are told by the same index")]
pub unsafe fn products<const ROWS: usize, const PANELS: usize, const NIBBLES: bool>(
    tile: &Tile<'_>,
    row: usize,
    panel: usize,
) -> Products<ROWS, PANELS> {
    let layout = tile.layout;
    let mut products = [[[0.0; PANEL]; PANELS]; ROWS];
    for block in 0..layout.blocks {
        // SAFETY: the rows and blocks are within the slices, as the caller ensures.
        let (quants, of_rows) = unsafe { tile.block_of_rows::<ROWS>(row, block) };
        for of_tile in 0..PANELS {
            // SAFETY: as above.
            let panel = unsafe { tile.panels.as_ptr().add((panel + of_tile) * layout.bytes()) };
            // Not a constant, so that the loop over steps is not unrolled: the numbers would not fit in registers.
            let steps = layout.block_bytes() / STEP;
            for half in 0..2 {
                let weights = unsafe { panel.add(block * layout.block_bytes() + half * HALF * GROUP) };
                let dots = unsafe { dots::<ROWS, NIBBLES>(weights, steps, quants, of_rows) };
                let (scale, minimum) = unsafe { scales::<NIBBLES>(tile, panel, block, half * HALF) };
                for index in 0..ROWS {
                    let sums = products[index][of_tile][half * HALF..][..HALF].as_mut_ptr();
                    let factor = _mm256_mul_ps(scale, _mm256_set1_ps(of_rows[index].scale));
                    // SAFETY: half a panel's sums are one register.
                    let mut sum = unsafe { _mm256_loadu_ps(sums) };
                    sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dots[index]), factor, sum);
                    if NIBBLES {
                        sum = _mm256_fnmadd_ps(minimum, _mm256_set1_ps(of_rows[index].sum), sum);
                    }
                    unsafe { _mm256_storeu_ps(sums, sum) };
                }
            }
        }
    }
    products
}

/// The products of the rows' block with that of half a panel, in integers.
#[inline]
#[target_feature(enable = "avx2")]
unsafe fn dots<const ROWS: usize, const NIBBLES: bool>(
    weights: *const u8,
    steps: usize,
    quants: [*const i8; ROWS],
    of_rows: [&Block; ROWS],
) -> [__m256i; ROWS] {
    let ones = _mm256_set1_epi16(1);
    let fifteen = _mm256_set1_epi8(15);
    let mut low = [_mm256_setzero_si256(); ROWS];
    let mut high = low;
    for step in 0..steps {
        // SAFETY: the block has this many steps, and a row's block has this many groups.
        let both = unsafe { _mm256_loadu_si256(weights.add(step * STEP).cast()) };
        let lows = _mm256_and_si256(both, fifteen);
        let highs = _mm256_and_si256(_mm256_srli_epi16(both, 4), fifteen);
        for index in 0..ROWS {
            let group = |group: usize| unsafe {
                _mm256_set1_epi32(quants[index].add(group * GROUP).cast::<i32>().read_unaligned())
            };
            if NIBBLES {
                // The sum fits in 16 bits.
                let both = _mm256_add_epi16(
                    _mm256_maddubs_epi16(lows, group(2 * step)),
                    _mm256_maddubs_epi16(highs, group(2 * step + 1)),
                );
                low[index] = _mm256_add_epi16(low[index], both);
            } else {
                low[index] = _mm256_add_epi16(low[index], _mm256_maddubs_epi16(lows, group(step)));
                high[index] = _mm256_add_epi16(high[index], _mm256_maddubs_epi16(highs, group(step)));
            }
        }
    }
    std::array::from_fn(|index| {
        if NIBBLES {
            return _mm256_madd_epi16(low[index], ones);
        }
        let high = _mm256_slli_epi32(_mm256_madd_epi16(high[index], ones), 4);
        // Weights without minima are stored with 128 added, so that they are unsigned.
        let start = _mm256_set1_epi32(of_rows[index].start);
        _mm256_add_epi32(start, _mm256_add_epi32(_mm256_madd_epi16(low[index], ones), high))
    })
}

/// Scales and minima of a block, for half a panel from an output on.
#[inline]
#[target_feature(enable = "avx2,f16c")]
unsafe fn scales<const MINIMA: bool>(
    tile: &Tile<'_>,
    panel: *const u8,
    block: usize,
    output: usize,
) -> (__m256, __m256) {
    // SAFETY: the layout's scales and units of a block have the width of a panel.
    let halves = |place: usize| _mm256_cvtph_ps(unsafe { _mm_loadu_si128(panel.add(place + 2 * output).cast()) });
    let place = tile.layout.scales(block);
    if !MINIMA {
        return (halves(place), _mm256_setzero_ps());
    }
    let bytes = |place: usize| {
        let bytes = unsafe { _mm_loadl_epi64(panel.add(place + output).cast()) };
        _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes))
    };
    let units = tile.layout.units(block);
    let scale = _mm256_mul_ps(halves(units), bytes(place));
    (scale, _mm256_mul_ps(halves(units + 2 * PANEL), bytes(place + PANEL)))
}
