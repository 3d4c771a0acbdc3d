//! Times of sums over devices: the table `custom_allreduce_perf` of PyPI's `aiconfigurator-core`.

use std::collections::BTreeMap;
use std::path::Path;

use crate::curve::{Curve, share_at};
use crate::error::ImportError;
use crate::kernel_tables::{keep_fastest, read_parquet};

/// Times of sums over one number of devices, by 16-bit elements on each of them.
#[derive(Clone, Debug)]
pub struct AllReduce(Curve);

impl AllReduce {
    /// Reads the sums over `devices` devices. Where several ways were measured, the fastest is taken: kernels in a graph,
    /// for launches of kernels one by one are hidden behind the device's work.
    ///
    /// # Errors
    /// If the file cannot be read, or has no sum over so many devices; the message says over how many it has.
    pub fn read(path: &Path, devices: u64) -> Result<Self, ImportError> {
        let mut sums: BTreeMap<u32, Curve> = BTreeMap::new();
        read_parquet(path, &["op_name"], &["num_gpus", "message_size"], |texts, sizes, time_us| {
            if texts == ["all_reduce"] {
                keep_fastest(sums.entry(sizes[0]).or_default(), sizes[1], time_us);
            }
            sizes.iter().all(|&size| size > 0)
        })?;
        let known = sums.keys().map(u32::to_string).collect::<Vec<_>>().join(", ");
        let found = u32::try_from(devices).ok().and_then(|devices| sums.remove(&devices));
        let missing =
            || ImportError::unusable(path, format!("no sum over {devices} devices"), format!("one over {known}"));
        found.map(Self).ok_or_else(missing)
    }

    /// Microseconds of a sum of this number of elements; in proportion beyond the largest measured.
    pub(crate) fn us(&self, elements: f64) -> f64 {
        share_at(&self.0, elements)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel_tables::tests::write;

    #[test]
    fn the_fastest_sum_over_the_devices_is_taken_and_others_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("custom_allreduce_perf.parquet");
        let row = |op, devices, elements, ms| (vec![op], vec![devices, elements], ms);
        let rows = [
            row("all_reduce", 2, 128, 0.02),
            row("all_reduce", 2, 128, 0.004),
            row("all_gather", 2, 128, 0.001),
            row("all_reduce", 2, 1024, 0.008),
            row("all_reduce", 8, 128, 0.03),
        ];
        write(&path, &["op_name"], &["num_gpus", "message_size"], &rows);
        let two = AllReduce::read(&path, 2).unwrap();
        assert_eq!([128.0, 576.0, 2048.0].map(|elements| two.us(elements)), [4.0, 6.0, 16.0]);
        let error = AllReduce::read(&path, 4).unwrap_err().to_string();
        assert!(error.ends_with("found no sum over 4 devices, expected one over 2, 8"), "{error}");
    }
}
