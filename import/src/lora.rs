//! Time of the low-rank weights of each loop, computed by a roofline where it was not measured.

use traces::{Component, Point};

use crate::model::ModelShape;

/// Rates of a device, for components that were not measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeviceRates {
    /// Memory bandwidth in bytes per microsecond.
    pub bytes_per_us: f64,
    /// Arithmetic in floating-point operations per microsecond.
    pub flops_per_us: f64,
    /// Shortest time of a kernel, in microseconds.
    pub kernel_us: f64,
}

impl DeviceRates {
    /// Time of a kernel that moves `bytes` and computes `flops`: the larger of the two times, and at least that of the
    /// shortest kernel.
    pub fn kernel_time_us(&self, bytes: f64, flops: f64) -> f64 {
        (bytes / self.bytes_per_us).max(flops / self.flops_per_us).max(self.kernel_us)
    }
}

/// Points of [`Component::Lora`] and [`Component::DepthMix`] for these numbers of rows; empty without low-rank weights.
///
/// Each linear layer takes two more kernels, into the rank and out of it, like the grouped kernels of S-LoRA and
/// Punica. Rows at several depths read the weights of each depth. `repeats` is 0, since nothing was measured.
pub fn points(shape: &ModelShape, rates: &DeviceRates, rows: &[u32]) -> Vec<Point> {
    if shape.lora_rank == 0 {
        return Vec::new();
    }
    let depths = |rows: u32| (1..=shape.num_loops as u32).filter(move |&depths| depths <= rows);
    let point = |rows, depths| {
        let (component, time_us) = match depths {
            1 => (Component::Lora, pass_us(shape, rates, rows, 1)),
            _ => (Component::DepthMix, pass_us(shape, rates, rows, depths) - pass_us(shape, rates, rows, 1)),
        };
        Point { component, rows, kv_tokens: 0, depths, time_us, spread_us: 0.0, repeats: 0 }
    };
    rows.iter().flat_map(|&rows| depths(rows).map(move |depths| point(rows, depths))).collect()
}

fn pass_us(shape: &ModelShape, rates: &DeviceRates, rows: u32, depths: u32) -> f64 {
    let (rank, rows, depths) = (shape.lora_rank as f64, f64::from(rows), f64::from(depths));
    let kernel = |width: u64| {
        let width = width as f64;
        let moved = depths * rank * width + rows * (rank + width);
        rates.kernel_time_us(moved * shape.weight_bytes as f64, 2.0 * rows * rank * width)
    };
    let layer: f64 = shape.linears().into_iter().map(|(inputs, outputs)| kernel(inputs) + kernel(outputs)).sum();
    layer * shape.block_layers() as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::{GEMMA, shape};

    #[test]
    fn few_rows_cost_the_weights_of_the_depths_among_them() {
        let gemma = shape(GEMMA, 3, 512).unwrap();
        let rates = DeviceRates { bytes_per_us: 1e6, flops_per_us: 1e9, kernel_us: 0.0 };
        let points = points(&gemma, &rates, &[1, 8]);
        let at = |component, depths| {
            let found = points.iter().find(|p| (p.component, p.rows, p.depths) == (component, 8, depths));
            found.unwrap().time_us
        };
        let weights_us = gemma.lora_bytes_per_loop() as f64 / 1e6;
        assert!((at(Component::Lora, 1) / weights_us - 1.0).abs() < 0.05);
        assert!((at(Component::DepthMix, 3) / (2.0 * weights_us) - 1.0).abs() < 1e-9);
        assert!(points.iter().all(|point| point.repeats == 0 && point.depths <= point.rows));
        assert!(super::points(&shape(GEMMA, 3, 0).unwrap(), &rates, &[1]).is_empty());
    }
}
