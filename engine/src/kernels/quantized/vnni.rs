//! Products with quantized weights on CPUs that multiply and add bytes in one instruction: AVX-512 VNNI.

use std::arch::x86_64::*;

use super::{BLOCK, Block, GROUP, PANEL, Products, Tile};

/// [`Tile::products`]; `MINIMA` for the format that has them, Q4_K.
///
/// # Safety
/// The panels and the rows must be as long as the layout says.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub unsafe fn products<const ROWS: usize, const PANELS: usize, const MINIMA: bool>(
    tile: &Tile<'_>,
    row: usize,
    panel: usize,
) -> Products<ROWS, PANELS> {
    let layout = tile.layout;
    let panels: [*const u8; PANELS] =
        std::array::from_fn(|of_tile| unsafe { tile.panels.as_ptr().add((panel + of_tile) * layout.bytes()) });
    let mut sums = [[_mm512_setzero_ps(); PANELS]; ROWS];
    for block in 0..layout.blocks {
        // SAFETY: the rows and blocks are within the slices, as the caller ensures.
        let (quants, of_rows) = unsafe { tile.block_of_rows::<ROWS>(row, block) };
        // Weights without minima are stored with 128 added, so that they are unsigned.
        let start = |block: &Block| if MINIMA { _mm512_setzero_si512() } else { _mm512_set1_epi32(block.start) };
        let mut dots: [[__m512i; PANELS]; ROWS] = std::array::from_fn(|index| [start(of_rows[index]); PANELS]);
        for group in 0..BLOCK / GROUP {
            let weights: [__m512i; PANELS] = std::array::from_fn(|of_tile| unsafe {
                group_quants::<MINIMA>(panels[of_tile].add(block * layout.block_bytes()), group)
            });
            for index in 0..ROWS {
                let x = unsafe { quants[index].add(group * GROUP).cast::<i32>().read_unaligned() };
                for of_tile in 0..PANELS {
                    dots[index][of_tile] =
                        _mm512_dpbusd_epi32(dots[index][of_tile], weights[of_tile], _mm512_set1_epi32(x));
                }
            }
        }
        for of_tile in 0..PANELS {
            let (scale, minimum) = unsafe { scales::<MINIMA>(tile, panels[of_tile], block) };
            for index in 0..ROWS {
                let sum = &mut sums[index][of_tile];
                let factor = _mm512_mul_ps(scale, _mm512_set1_ps(of_rows[index].scale));
                *sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[index][of_tile]), factor, *sum);
                if MINIMA {
                    *sum = _mm512_fnmadd_ps(minimum, _mm512_set1_ps(of_rows[index].sum), *sum);
                }
            }
        }
    }
    let mut products = [[[0.0; PANEL]; PANELS]; ROWS];
    for (products, sums) in products.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
        // SAFETY: a register holds one panel's outputs.
        unsafe { _mm512_storeu_ps(products.as_mut_ptr(), *sums) };
    }
    products
}

/// A group's unsigned quants, `[output][input in group]`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn group_quants<const NIBBLES: bool>(block: *const u8, group: usize) -> __m512i {
    let bytes = PANEL * GROUP;
    if !NIBBLES {
        return unsafe { _mm512_loadu_si512(block.add(group * bytes).cast()) };
    }
    let both = unsafe { _mm512_loadu_si512(block.add(group / 2 * bytes).cast()) };
    let nibbles = if group.is_multiple_of(2) { both } else { _mm512_srli_epi16(both, 4) };
    _mm512_and_si512(nibbles, _mm512_set1_epi8(15))
}

/// Scales and minima of a block, by output.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn scales<const MINIMA: bool>(tile: &Tile<'_>, panel: *const u8, block: usize) -> (__m512, __m512) {
    let halves = |place: usize| _mm512_cvtph_ps(unsafe { _mm256_loadu_si256(panel.add(place).cast()) });
    let place = tile.layout.scales(block);
    if !MINIMA {
        return (halves(place), _mm512_setzero_ps());
    }
    let bytes = |place: usize| {
        let bytes = unsafe { _mm_loadu_si128(panel.add(place).cast()) };
        _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes))
    };
    let units = tile.layout.units(block);
    let scale = _mm512_mul_ps(halves(units), bytes(place));
    (scale, _mm512_mul_ps(halves(units + 2 * PANEL), bytes(place + PANEL)))
}
