//! Non-negative least squares by the active-set method of Lawson and Hanson, on the normal equations as in Bro and de
//! Jong (1997).

use faer::Mat;
use faer::linalg::solvers::{PartialPivLu, Solve};

/// Weighted sums that the normal equations are made of.
#[derive(Clone, Debug)]
pub struct Normal {
    columns: usize,
    /// Row by row: sums of products of columns.
    products: Vec<f64>,
    /// Sums of products of columns with the target.
    targets: Vec<f64>,
}

impl Normal {
    /// Sums of no rows.
    pub fn new(columns: usize) -> Self {
        Self { columns, products: vec![0.0; columns * columns], targets: vec![0.0; columns] }
    }

    /// Adds a row with its target and its weight.
    pub fn add(&mut self, row: &[f64], target: f64, weight: f64) {
        for (i, &a) in row.iter().enumerate().filter(|(_, a)| **a != 0.0) {
            self.targets[i] += weight * a * target;
            for (j, &b) in row.iter().enumerate() {
                self.products[i * self.columns + j] += weight * a * b;
            }
        }
    }

    /// The coefficients of least weighted squares among those that are at least 0.
    pub fn solve(&self) -> Vec<f64> {
        // Columns of unit length, so that one tolerance suits all.
        let scale: Vec<f64> = (0..self.columns)
            .map(|i| self.products[i * self.columns + i].sqrt())
            .map(|length| if length > 0.0 { 1.0 / length } else { 0.0 })
            .collect();
        let product = |i: usize, j: usize| self.products[i * self.columns + j] * scale[i] * scale[j];
        let target = |i: usize| self.targets[i] * scale[i];
        let tolerance = 1e-9 * (0..self.columns).map(|i| target(i).abs()).fold(0.0, f64::max);
        let mut found = vec![0.0; self.columns];
        let mut is_free = vec![false; self.columns];
        // Rounding may make a column enter and leave without end.
        for _ in 0..10 * self.columns {
            let gradient = |i: usize| target(i) - (0..self.columns).map(|j| product(i, j) * found[j]).sum::<f64>();
            let enters = (0..self.columns).filter(|&i| !is_free[i]).map(|i| (i, gradient(i)));
            let Some((enters, slope)) = enters.max_by(|a, b| a.1.total_cmp(&b.1)) else { break };
            if slope <= tolerance {
                break;
            }
            is_free[enters] = true;
            loop {
                let free: Vec<usize> = (0..self.columns).filter(|&i| is_free[i]).collect();
                let matrix = Mat::from_fn(free.len(), free.len(), |i, j| {
                    product(free[i], free[j]) + if i == j { 1e-12 } else { 0.0 }
                });
                let right = Mat::from_fn(free.len(), 1, |i, _| target(free[i]));
                let solved = PartialPivLu::new(matrix.as_ref()).solve(&right);
                let step = (0..free.len())
                    .filter(|&i| solved[(i, 0)] <= 0.0)
                    .map(|i| found[free[i]] / (found[free[i]] - solved[(i, 0)]))
                    .fold(1.0, f64::min);
                for (i, &column) in free.iter().enumerate() {
                    found[column] += step * (solved[(i, 0)] - found[column]);
                    if solved[(i, 0)] <= 0.0 && found[column] <= 1e-12 {
                        (found[column], is_free[column]) = (0.0, false);
                    }
                }
                if step >= 1.0 {
                    break;
                }
            }
        }
        found.iter().zip(scale).map(|(value, scale)| value * scale).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn solve(rows: &[(&[f64], f64)]) -> Vec<f64> {
        let mut normal = Normal::new(rows[0].0.len());
        rows.iter().for_each(|(row, target)| normal.add(row, *target, 1.0));
        normal.solve()
    }

    fn assert_near(found: &[f64], expected: &[f64]) {
        assert!(found.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?}, expected {expected:?}");
    }

    #[test]
    fn coefficients_that_are_positive_anyway_are_those_of_least_squares() {
        assert_near(&solve(&[(&[1.0, 0.0], 3.0), (&[1.0, 1.0], 5.0), (&[1.0, 2.0], 7.0)]), &[3.0, 2.0]);
    }

    #[test]
    fn a_coefficient_that_would_be_negative_is_zero_and_the_others_make_up_for_it() {
        // The line falls: its slope is 0, and the constant is the mean.
        assert_near(&solve(&[(&[1.0, 0.0], 3.0), (&[1.0, 1.0], 2.0), (&[1.0, 2.0], 1.0)]), &[2.0, 0.0]);
        // Known optimum where the unconstrained solution is (-1, 2).
        assert_near(&solve(&[(&[1.0, 1.0], 1.0), (&[1.0, 2.0], 3.0)]), &[0.0, 1.4]);
    }

    #[test]
    fn columns_of_zeros_and_twice_the_same_column_are_no_trouble() {
        let found = solve(&[(&[1.0, 0.0, 1.0], 4.0), (&[2.0, 0.0, 2.0], 8.0)]);
        assert_eq!(found[1], 0.0);
        assert!((found[0] + found[2] - 4.0).abs() < 1e-6, "{found:?}");
    }
}
