//! Exit traces of tokens whose exit depth is known, and nothing else.

use crate::exit_trace::{ExitTrace, ExitTraceMeta, SignalSet, Signals};

impl ExitTrace {
    /// A trace of tokens that exit at known depths: `depths` by generation, then by token; depths beyond the last
    /// count as the last.
    ///
    /// Every signal is sure from the exit depth on and unsure before: 1 and 0, entropy, difference and divergence 0 and 1. Any measure
    /// at a threshold of 0.5 therefore exits there, and costs what reading it costs. (Similarity and difference are not read
    /// at depth 0.)
    /// The prediction of the exit depth and of every deeper one is that of the last depth, so the oracle exits there
    /// too. What the model would have predicted is not known: agreement and quality of such a trace mean nothing.
    pub fn from_depths(meta: ExitTraceMeta, depths: &[Vec<u8>]) -> Self {
        let num_loops = meta.num_loops;
        let mut trace = Self { recorded: SignalSet::ALL, ..Self::new(meta) };
        let token = |&exit: &u8| {
            let exit = u32::from(exit).min(num_loops - 1);
            (0..num_loops).map(move |depth| {
                let exits = depth >= exit;
                let sure = f32::from(u8::from(exits));
                let (top1, margin, similarity, gate) = (sure, sure, sure, sure);
                let (entropy, difference, kl) = (1.0 - sure, 1.0 - sure, 1.0 - sure);
                let signals = Signals { top1, margin, entropy, similarity, difference, kl, gate };
                (signals, u32::from(exits))
            })
        };
        for generation in depths {
            trace.push_generation(&generation.iter().flat_map(token).collect::<Vec<_>>());
        }
        trace
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit_file::ExitTable;
    use crate::exit_trace::ExitSignal;

    #[test]
    fn tokens_of_known_depths_exit_there_by_any_measure_and_by_oracle() {
        let meta = ExitTraceMeta {
            schema_version: ExitTrace::SCHEMA_VERSION,
            model: "m".to_owned(),
            fingerprint: "f".to_owned(),
            num_loops: 4,
            source: "made up".to_owned(),
            recording: None,
        };
        let depths = [vec![3, 1, 0], vec![2, 9]];
        let trace = ExitTrace::from_depths(meta, &depths);
        for signal in ExitSignal::ALL {
            let exit = |token| trace.confident_depth(token, signal, 0.5);
            assert_eq!((0..5).map(exit).collect::<Vec<_>>(), [3, 1, 0, 2, 3], "{signal}");
        }
        assert_eq!((0..5).map(|token| trace.oracle_depth(token)).collect::<Vec<_>>(), [3, 1, 0, 2, 3]);
        assert_eq!(trace.mean_oracle_passes(), (4.0 + 2.0 + 1.0 + 3.0 + 4.0) / 5.0);
        assert_eq!(trace.generation(1), 3..5);
        let folder = tempfile::tempdir().unwrap();
        trace.write(folder.path(), ExitTable::Parquet).unwrap();
        assert_eq!(ExitTrace::read(folder.path()).unwrap(), trace);
    }
}
