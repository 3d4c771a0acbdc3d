//! Interpolation of times that were measured over one size.

use std::collections::BTreeMap;

/// Microseconds by size.
pub type Curve = BTreeMap<u32, f64>;

/// Linear between points, and proportional above the last one, as for weights: the slope between two close large sizes
/// would multiply their scatter.
pub fn share_at(curve: &Curve, x: f64) -> f64 {
    match curve.last_key_value() {
        Some((&last, time)) if x > f64::from(last) => time * x / f64::from(last),
        _ => line_at(curve, x),
    }
}

/// The median of each time, its two neighbours on either side among them: a slow measurement among fast ones makes no
/// difference, and times that rise or fall stay as they are. At an end there are as many neighbours on the other side.
pub fn without_outliers(curve: &Curve) -> Curve {
    let points: Vec<(u32, f64)> = curve.iter().map(|(&x, &time)| (x, time)).collect();
    let median = |place: usize| {
        let reach = place.min(points.len() - 1 - place).min(2);
        let mut times: Vec<f64> = points[place - reach..=place + reach].iter().map(|point| point.1).collect();
        times.sort_by(f64::total_cmp);
        times[reach]
    };
    points.iter().enumerate().map(|(place, &(x, _))| (x, median(place))).collect()
}

/// Linear between points; constant below the first point. Above the last point the last slope continues, but does not
/// fall.
pub fn line_at(curve: &Curve, x: f64) -> f64 {
    let mut points = curve.iter().map(|(&x, &y)| (f64::from(x), y));
    let Some(mut low) = points.next() else { return 0.0 };
    let Some(mut high) = points.next() else { return low.1 };
    for next in points {
        if x <= high.0 {
            break;
        }
        (low, high) = (high, next);
    }
    let slope = (high.1 - low.1) / (high.0 - low.0);
    match x {
        _ if x <= low.0 => low.1,
        _ if x <= high.0 => low.1 + slope * (x - low.0),
        _ => high.1 + slope.max(0.0) * (x - high.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_slow_measurements_are_left_out_and_steps_are_kept() {
        let curve: Curve = [8.0, 8.1, 8.0, 28.0, 8.1, 25.0, 8.2, 12.0, 12.1, 12.2, 20.0]
            .into_iter()
            .enumerate()
            .map(|(x, time)| (x as u32, time))
            .collect();
        let smooth: Vec<f64> = without_outliers(&curve).into_values().collect();
        assert_eq!(smooth, [8.0, 8.0, 8.1, 8.1, 8.2, 12.0, 12.0, 12.1, 12.1, 12.2, 20.0]);
        assert!(without_outliers(&Curve::new()).is_empty());
    }
}
