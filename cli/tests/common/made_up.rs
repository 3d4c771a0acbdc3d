//! A profile and an exit trace that are made up.

use traces::{Component, ExitTrace, ExitTraceMeta, LatencyProfile, MemoryFigures, Point, ProfileMeta, Signals};

const LOOPS: u32 = 3;

/// A pass of 16 rows takes twice as long as one of a single row.
pub fn profile() -> LatencyProfile {
    let point = |component, rows, time_us| Point {
        component,
        rows,
        kv_tokens: 0,
        depths: 1,
        time_us,
        spread_us: 0.0,
        repeats: 9,
    };
    LatencyProfile {
        meta: ProfileMeta {
            schema_version: LatencyProfile::SCHEMA_VERSION,
            model: "made up".into(),
            fingerprint: "made up".into(),
            num_loops: LOOPS,
            device: "no device".into(),
            software: "none".into(),
            source: "made up".into(),
            overhead_us: 5.0,
            weight_bytes: 1_000_000,
            kv_bytes_per_token: 3_000,
            memory: Some(MemoryFigures { device_bytes: None, other_bytes: 0, row_bytes: 100, logits_bytes: 0 }),
            kv_fill: None,
            decode_q_len: None,
            heads_ahead_from: None,
        },
        points: vec![
            point(Component::Block, 1, 100.0),
            point(Component::Block, 64, 500.0),
            point(Component::Embed, 1, 1.0),
            point(Component::Head, 1, 10.0),
        ],
        mixed_attention: None,
    }
}

/// 20 generations of 40 tokens that are the surer the deeper they are, by no rule that anyone would guess.
pub fn exits() -> ExitTrace {
    let mut trace = ExitTrace::new(ExitTraceMeta {
        schema_version: ExitTrace::SCHEMA_VERSION,
        model: "made up".into(),
        fingerprint: "made up".into(),
        num_loops: LOOPS,
        source: "made up".into(),
        recording: None,
    });
    for generation in 0..20_u32 {
        let row = |index: u32| {
            let (token, depth) = (index / LOOPS, index % LOOPS);
            let difficulty = (generation * 7 + token * token * 3 + token * 11) % 10;
            let top1 = 0.3 + 0.06 * (10 - difficulty) as f32 * (depth + 1) as f32 / LOOPS as f32;
            let signals = Signals { top1, margin: top1 / 2.0, entropy: 1.0 - top1, ..Signals::default() };
            (signals, u32::from(depth * 4 < difficulty))
        };
        trace.push_generation(&(0..40 * LOOPS).map(row).collect::<Vec<_>>());
    }
    trace
}
