//! Interpolation of times that were measured over one size.

use std::collections::BTreeMap;

/// Microseconds by size.
pub type Curve = BTreeMap<u32, f64>;

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
