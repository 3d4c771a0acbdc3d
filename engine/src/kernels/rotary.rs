//! Rotary position embedding (arXiv 2104.09864) of all or the leading dimensions of a head.

use candle_core::{Device, Result, Tensor};

/// Cosines and sines `[tables, positions, rotary_dims]`: a table for each set of frequencies, which has one for each
/// pair of dimensions. A position has its cosines first, then its sines.
///
/// # Errors
/// If there is not enough memory, or the sets have different sizes.
pub fn tables(sets: &[Vec<f32>], positions: usize) -> Result<Tensor> {
    let dims = 2 * sets.first().map_or(0, Vec::len);
    let mut numbers = Vec::with_capacity(sets.len() * positions * dims);
    for frequencies in sets {
        for position in 0..positions {
            let angles = || frequencies.iter().map(|frequency| position as f32 * frequency);
            numbers.extend(angles().map(f32::cos));
            numbers.extend(angles().map(f32::sin));
        }
    }
    Tensor::from_vec(numbers, (sets.len(), positions, dims), &Device::Cpu)
}

/// Rotates one head by a position's cosines and sines and scales it. The table covers the leading dimensions, where `i`
/// is paired with `i` plus half of them; the other dimensions are only scaled.
#[inline(always)]
pub(super) fn rotate(head: &[f32], turn: &[f32], scale: f32, out: &mut [f32]) {
    let half = turn.len() / 2;
    for i in 0..half {
        let (cos, sin) = (turn[i], turn[half + i]);
        out[i] = (head[i] * cos - head[half + i] * sin) * scale;
        out[half + i] = (head[half + i] * cos + head[i] * sin) * scale;
    }
    for i in turn.len()..head.len() {
        out[i] = head[i] * scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_table_turns_by_position_and_frequency() {
        let tables = tables(&[vec![1.0, 0.5], vec![0.25, 0.125]], 4).unwrap().to_vec3::<f32>().unwrap();
        for (table, frequencies) in tables.iter().zip([[1.0_f32, 0.5], [0.25, 0.125]]) {
            for (position, turn) in table.iter().enumerate() {
                let angles = frequencies.map(|frequency| position as f32 * frequency);
                assert_eq!(turn[..2], angles.map(f32::cos));
                assert_eq!(turn[2..], angles.map(f32::sin));
            }
        }
    }

    #[test]
    fn only_the_leading_dimensions_turn() {
        let (quarter, half) = ([0.0, -1.0, 1.0, 0.0], [2.0, 3.0, 5.0, 7.0, 11.0]);
        let mut out = [0.0; 5];
        rotate(&half, &quarter, 2.0, &mut out);
        assert_eq!(out, [-10.0, -6.0, 4.0, -14.0, 22.0]);
    }
}
