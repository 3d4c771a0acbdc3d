//! Truncated singular value decomposition: the best approximation of a matrix by one of low rank.

use faer::linalg::matmul::matmul;
use faer::linalg::solvers::{Svd, SvdError};
use faer::{Accum, Mat, MatRef, Par};
use rand::Rng;
use rand_distr::{Distribution, StandardNormal};

/// Matrices with at most this many rows or columns are decomposed exactly, which takes about a second at most.
const EXACT_SIDE: usize = 1024;
/// Extra columns of a randomized decomposition's blocks beyond the rank.
const OVERSAMPLING: usize = 8;
/// Number of products of a block with the matrix and its transpose.
const POWER_ITERATIONS: usize = 4;

/// `U_r S_r V_r^T`, with descending singular values.
pub struct LowRank {
    /// `U_r S_r`, `[rows, rank]`.
    pub b: Mat<f32>,
    /// `V_r^T`, `[rank, columns]`.
    pub a: Mat<f32>,
    /// The diagonal of `S_r`.
    pub singular_values: Vec<f32>,
}

/// Approximates `matrix` at a rank of at most its shorter side. The decomposition is exact for small matrices and for
/// high ranks, and randomized where that is several times as fast.
///
/// # Errors
/// If the decomposition does not converge.
pub fn truncated_svd(matrix: MatRef<f32>, rank: usize, rng: &mut impl Rng) -> Result<LowRank, SvdError> {
    let side = matrix.nrows().min(matrix.ncols());
    if side <= EXACT_SIDE || 2 * subspace_size(rank) > side {
        exact(matrix, rank)
    } else {
        randomized(matrix, rank, rng)
    }
}

fn exact(matrix: MatRef<f32>, rank: usize) -> Result<LowRank, SvdError> {
    Ok(truncated(&Svd::new_thin(matrix)?, rank))
}

fn subspace_size(rank: usize) -> usize {
    (rank + OVERSAMPLING) * (POWER_ITERATIONS + 1)
}

/// Randomized block Krylov iteration (arXiv 1504.05477, algorithm 2): the decomposition within the span of `(M M^T)^i M
/// G`, for `i` from 0 to [`POWER_ITERATIONS`] and a random `G`. The singular values of residuals of pretrained weights
/// fall slowly. For them, the span of all blocks retains more of the best approximation's energy than the last block by
/// itself, for an equal number of products.
fn randomized(matrix: MatRef<f32>, rank: usize, rng: &mut impl Rng) -> Result<LowRank, SvdError> {
    let block_size = rank + OVERSAMPLING;
    let test = Mat::from_fn(matrix.ncols(), block_size, |_, _| StandardNormal.sample(rng));
    let mut block = orthonormal(product(matrix, test.as_ref()).as_ref());
    let mut blocks = Mat::zeros(matrix.nrows(), subspace_size(rank));
    blocks.subcols_mut(0, block_size).copy_from(&block);
    for iteration in 1..=POWER_ITERATIONS {
        let projected = product(matrix.transpose(), block.as_ref());
        block = orthonormal(product(matrix, projected.as_ref()).as_ref());
        blocks.subcols_mut(iteration * block_size, block_size).copy_from(&block);
    }
    let basis = orthonormal(blocks.as_ref());
    let within = exact(product(basis.transpose(), matrix).as_ref(), rank)?;
    Ok(LowRank { b: product(basis.as_ref(), within.b.as_ref()), ..within })
}

fn truncated(svd: &Svd<f32>, rank: usize) -> LowRank {
    let singular_values = svd.S().column_vector();
    LowRank {
        b: Mat::from_fn(svd.U().nrows(), rank, |row, i| svd.U()[(row, i)] * singular_values[i]),
        a: svd.V().subcols(0, rank).transpose().to_owned(),
        singular_values: singular_values.iter().take(rank).copied().collect(),
    }
}

fn product(left: MatRef<f32>, right: MatRef<f32>) -> Mat<f32> {
    let mut product = Mat::zeros(left.nrows(), right.ncols());
    matmul(product.as_mut(), Accum::Replace, left, right, 1.0, Par::Seq);
    product
}

fn orthonormal(columns: MatRef<f32>) -> Mat<f32> {
    columns.qr().compute_thin_Q()
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use rand::rngs::StdRng;

    fn random(rows: usize, columns: usize, rng: &mut StdRng) -> Mat<f32> {
        Mat::from_fn(rows, columns, |_, _| StandardNormal.sample(rng))
    }

    /// Sum of the squared errors of an approximation.
    fn error(matrix: &Mat<f32>, low_rank: &LowRank) -> f64 {
        f64::from((matrix - product(low_rank.b.as_ref(), low_rank.a.as_ref())).norm_l2()).powi(2)
    }

    fn energy(matrix: &Mat<f32>) -> f64 {
        f64::from(matrix.norm_l2()).powi(2)
    }

    #[test]
    fn a_matrix_of_low_rank_comes_back_at_that_rank() {
        let mut rng = StdRng::seed_from_u64(1);
        for (rows, columns) in [(30, 20), (20, 30)] {
            let matrix = product(random(rows, 5, &mut rng).as_ref(), random(5, columns, &mut rng).as_ref());
            let low_rank = truncated_svd(matrix.as_ref(), 5, &mut rng).unwrap();
            assert_eq!((low_rank.b.shape(), low_rank.a.shape()), ((rows, 5), (5, columns)));
            assert!(error(&matrix, &low_rank) < 1e-9 * energy(&matrix));
        }
    }

    #[test]
    fn the_error_is_the_energy_of_the_singular_values_left_out_and_none_at_full_rank() {
        let mut rng = StdRng::seed_from_u64(2);
        let matrix = random(40, 24, &mut rng);
        let all = truncated_svd(matrix.as_ref(), 24, &mut rng).unwrap().singular_values;
        assert!(all.is_sorted_by(|left, right| left >= right));
        for rank in [1, 7, 16, 24] {
            let low_rank = truncated_svd(matrix.as_ref(), rank, &mut rng).unwrap();
            let left_out: f64 = all[rank..].iter().map(|value| f64::from(*value).powi(2)).sum();
            assert!((error(&matrix, &low_rank) - left_out).abs() < 1e-5 * energy(&matrix), "rank {rank}");
        }
    }

    #[test]
    fn randomized_keeps_98_percent_of_what_exact_keeps_of_a_slowly_falling_spectrum() {
        let mut rng = StdRng::seed_from_u64(3);
        for (rows, columns) in [(400, 250), (250, 400)] {
            // Singular values fall linearly from 1 to 0.1, more slowly than those of differences of trained layers.
            let side = rows.min(columns);
            let (u, v) = (random(rows, side, &mut rng), random(columns, side, &mut rng));
            let (u, v) = (orthonormal(u.as_ref()), orthonormal(v.as_ref()));
            let scaled = Mat::from_fn(rows, side, |row, i| u[(row, i)] * (1.0 - 0.9 * i as f32 / side as f32));
            let matrix = product(scaled.as_ref(), v.transpose());
            let rank = 12;
            let kept = |low_rank: LowRank| energy(&matrix) - error(&matrix, &low_rank);
            let best = kept(exact(matrix.as_ref(), rank).unwrap());
            let found = kept(randomized(matrix.as_ref(), rank, &mut rng).unwrap());
            assert!(found > 0.98 * best && found <= best * 1.000_001, "{found} of {best}");
        }
    }
}
