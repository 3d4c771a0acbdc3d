//! Means of repeated runs, with confidence intervals.

use statrs::distribution::{ContinuousCDF, StudentsT};

/// Probability that a confidence interval contains the true mean.
pub const CONFIDENCE: f64 = 0.95;

/// A mean with its confidence interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Interval {
    /// Mean of the values; NaN without values, or if one is NaN.
    pub mean: f64,
    /// Half the width of the interval; `None` for fewer than two values.
    pub half_width: Option<f64>,
}

impl Interval {
    /// Interval for the mean of values from independent runs, by Student's t distribution.
    pub fn of(values: &[f64]) -> Self {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count;
        let freedom = count - 1.0;
        let half_width = StudentsT::new(0.0, 1.0, freedom).ok().map(|t| {
            let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / freedom;
            t.inverse_cdf(f64::midpoint(1.0, CONFIDENCE)) * (variance / count).sqrt()
        });
        Self { mean, half_width }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_is_as_wide_as_the_tables_of_student_s_t_say() {
        // Mean 3, standard deviation sqrt(2.5); Student's t with 4 degrees of freedom is 2.776 at 97.5%.
        let Interval { mean, half_width } = Interval::of(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        assert_eq!(mean, 3.0);
        assert!((half_width.unwrap() - 2.776_445 * (2.5_f64 / 5.0).sqrt()).abs() < 1e-5);
        // For two values Student's t is 12.706, and the standard error is half their distance.
        let pair = Interval::of(&[10.0, 12.0]);
        assert!((pair.half_width.unwrap() - 12.706_205).abs() < 1e-4);
    }

    #[test]
    fn one_value_has_no_interval_and_none_no_mean() {
        assert_eq!(Interval::of(&[7.0]), Interval { mean: 7.0, half_width: None });
        assert!(Interval::of(&[]).mean.is_nan());
        assert_eq!(Interval::of(&[]).half_width, None);
    }

    #[test]
    fn equal_values_are_sure() {
        assert_eq!(Interval::of(&[0.1; 4]).half_width, Some(0.0));
    }
}
