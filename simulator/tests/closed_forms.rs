//! Simulations of systems whose answer is known in closed form.

mod common;

use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, Ordering};

use common::{PASS, constant_latency, drawn_exits, exit_trace, poisson, profile, queued, settings, varied_latency};
use latency::LatencyModel;
use scheduler::{Batching, KvFill, Observer, PassRecord, Settings};
use simulator::{Draw, ExitModel, Metrics, Simulation, SimulationError, Summary};
use traces::{ClosedLoop, Component, Nanos, Request};

fn simulate(
    settings: Settings,
    latency: &LatencyModel,
    exits: &ExitModel,
    requests: impl IntoIterator<Item = Request>,
) -> Summary {
    let mut metrics = [Metrics::new(&settings)];
    let simulation = Simulation::new(settings, latency, exits).unwrap();
    let outcome = simulation.run(requests, &mut metrics).unwrap();
    assert!(outcome.extrapolations.is_empty());
    simulation.summary(&metrics[0], &outcome)
}

fn assert_close(found: f64, expected: f64, tolerance: f64) {
    assert!((found / expected - 1.0).abs() < tolerance, "{found}, expected {expected} within {tolerance}");
}

#[test]
fn one_place_and_poisson_arrivals_wait_as_an_m_d_1_queue() {
    let latency = constant_latency(1);
    let exits = drawn_exits(&[1.0], 1, 1, 1);
    let service = PASS.as_secs_f64();
    for batching in Batching::ALL {
        for utilization in [0.3, 0.7] {
            let requests = poisson(1_000_000, utilization / service, 1, 1, 42);
            let summary = simulate(settings(batching, "none", 1, 1), &latency, &exits, requests);
            let wait = utilization * service / (2.0 * (1.0 - utilization));
            assert_close(summary.e2e_mean_ms * 1e-3 - service, wait, 0.02);
            assert_close(summary.busy, utilization, 0.01);
        }
    }
}

/// Sets a flag after some passes.
struct StopsAfter<'f>(u32, &'f AtomicBool);

impl Observer for StopsAfter<'_> {
    fn pass(&mut self, _: &PassRecord<'_>) {
        self.0 -= 1;
        self.1.store(self.0 == 0, Ordering::Relaxed);
    }
}

#[test]
fn a_simulation_ends_at_its_flag() {
    let (latency, exits) = (constant_latency(1), drawn_exits(&[1.0], 1, 1, 1));
    let stop = AtomicBool::new(false);
    let simulation = Simulation::new(settings(Batching::Depth, "none", 1, 1), &latency, &exits).unwrap();
    let error = simulation.with_stop(&stop).run(queued(1_000, 1, 1), &mut [StopsAfter(7, &stop)]).unwrap_err();
    assert_eq!(error, SimulationError::Stopped);
}

#[test]
fn full_depth_wise_batch_yields_batch_over_mean_depth_times_pass_time() {
    let probabilities = [0.5, 0.2, 0.2, 0.1];
    let mean_depth: f64 = probabilities.iter().zip(1..).map(|(p, passes)| p * f64::from(passes)).sum();
    let exits = drawn_exits(&probabilities, 500, 100, 7);
    let batch = 16;
    let requests = queued(4_000, 1, 100);
    let summary =
        simulate(settings(Batching::Depth, "confidence:0.5", 4, batch), &constant_latency(4), &exits, requests);
    assert_close(summary.mean_depth, mean_depth, 0.005);
    assert_close(summary.throughput_tok_s, f64::from(batch) / (summary.mean_depth * PASS.as_secs_f64()), 0.005);
}

#[test]
fn in_a_closed_loop_requests_run_at_once_and_none_waits() {
    let (latency, exits) = (constant_latency(4), drawn_exits(&[0.0, 0.0, 0.0, 1.0], 1, 1, 1));
    let (in_flight, tokens) = (5, 100);
    for batching in [Batching::Sequence, Batching::Depth] {
        let settings = settings(batching, "none", 4, 16);
        let closed_loop = ClosedLoop::in_flight(NonZeroU32::new(in_flight).unwrap());
        let simulation = Simulation::new(settings, &latency, &exits).unwrap().in_closed_loop(&closed_loop);
        let mut metrics = Metrics::new(&settings);
        // Arrivals of their own do not count.
        let requests = poisson(200, 1e-3, 1, tokens, 42);
        let outcome = simulation.run(requests, std::slice::from_mut(&mut metrics)).unwrap();
        let summary = simulation.summary(&metrics, &outcome);
        let of_token = 4.0 * PASS.as_secs_f64();
        assert_close(summary.makespan_s, 200.0 / f64::from(in_flight) * f64::from(tokens) * of_token, 1e-9);
        assert_close(summary.mean_running, f64::from(in_flight), 1e-9);
        assert_close(summary.ttft_p99_ms, 1e3 * of_token, 1e-9);
        assert_close(summary.tpot_mean_ms, 1e3 * of_token, 1e-9);
    }
}

#[test]
fn only_signals_that_read_the_vocabulary_pay_for_the_head() {
    use Component::{Block, Head};
    let (block_us, head_us, tokens) = (100.0, 7.0, 20);
    let latency = LatencyModel::new(&profile(3, &[(Block, 1, 0, 1, block_us), (Head, 1, 0, 1, head_us)])).unwrap();
    let exits = ExitModel::new(&exit_trace(3, &[vec![2; tokens as usize]]), Draw::Recorded).unwrap();
    // The signal of every token is read twice before the token exits at the last depth.
    for (exit, heads) in [
        ("none", 1.0),
        ("top1:0.5", 3.0),
        ("margin:0.5", 3.0),
        ("similarity:0.5", 1.0),
        ("difference:0.5", 1.0),
        ("gate:0.5", 1.0),
        // What compares depths reads the head at every depth as well.
        ("stable:3", 3.0),
        ("entropy-change:-1", 3.0),
    ] {
        let summary = simulate(settings(Batching::Sequence, exit, 3, 1), &latency, &exits, queued(1, 1, tokens));
        let expected_us = f64::from(tokens) * (3.0 * block_us + heads * head_us);
        assert_close(summary.e2e_mean_ms * 1e3, expected_us, 1e-9);
    }
}

#[test]
fn rows_that_exit_early_pay_for_the_depths_they_skip_where_keys_and_values_are_copied() {
    use Component::{Block, KvFill as Copies};
    let tokens = 20;
    let points = [(Block, 1, 0, 1, 100.0), (Copies, 1, 0, 1, 0.5), (Copies, 2, 0, 1, 3.0)];
    let latency = LatencyModel::new(&profile(3, &points)).unwrap();
    let exits = ExitModel::new(&exit_trace(3, &[vec![0; tokens as usize]]), Draw::Recorded).unwrap();
    let e2e_us = |kv_fill| {
        let settings = Settings { kv_fill, ..settings(Batching::Sequence, "oracle", 3, 1) };
        simulate(settings, &latency, &exits, queued(1, 1, tokens)).e2e_mean_ms * 1e3
    };
    // The first token is the prompt's, which runs every depth, except where all depths share the entries of the first.
    let copied = e2e_us(KvFill::Reuse) - e2e_us(KvFill::Skip);
    assert_close(copied, f64::from(tokens - 1) * 3.0, 1e-9);
    assert_close(e2e_us(KvFill::Skip) - e2e_us(KvFill::First), 2.0 * 100.0, 1e-9);
    // One slot needs no copies, two need them at one depth, three are those of `reuse`.
    assert_close(e2e_us(KvFill::Last), e2e_us(KvFill::Skip), 1e-9);
    assert_close(e2e_us(KvFill::Cycle(2)) - e2e_us(KvFill::Last), f64::from(tokens - 1) * 0.5, 1e-9);
    assert_close(e2e_us(KvFill::Cycle(3)), e2e_us(KvFill::Reuse), 1e-9);
}

#[test]
fn prompts_run_as_deep_as_tokens_can_exit_or_as_they_are_told() {
    use Component::{Block, KvFill as Copies};
    let (prompt, tokens) = (7, 20);
    let points = [(Block, 1, 0, 1, 100.0), (Block, 7, 0, 1, 100.0), (Copies, 1, 0, 1, 1.0), (Copies, 99, 0, 1, 99.0)];
    let latency = LatencyModel::new(&profile(4, &points)).unwrap();
    let exits = ExitModel::new(&exit_trace(4, &[vec![1; tokens as usize]]), Draw::Recorded).unwrap();
    let e2e_us = |exit, prefill_depth| {
        let settings = Settings { prefill_depth, ..settings(Batching::Sequence, exit, 4, 1) };
        simulate(settings, &latency, &exits, queued(1, prompt, tokens)).e2e_mean_ms * 1e3
    };
    let (passes, generated) = (100.0, f64::from(tokens - 1));
    assert_close(e2e_us("static:1", None), 2.0 * passes * f64::from(tokens), 1e-9);
    assert_close(e2e_us("static:1", Some(3)), (4.0 + 2.0 * generated) * passes, 1e-9);
    assert_close(e2e_us("mix:1:0:1", None), 2.0 * passes * f64::from(tokens), 1e-9);
    // Exits by a signal: prompts run every depth unless they are told otherwise, and a skipped depth takes a copy.
    let decoding = generated * (2.0 * passes + 2.0);
    assert_close(e2e_us("oracle", None), 4.0 * passes + decoding, 1e-9);
    assert_close(e2e_us("oracle", Some(2)), 3.0 * passes + f64::from(prompt) + decoding, 1e-9);
    assert_close(e2e_us("oracle", Some(1)), 2.0 * passes + 2.0 * f64::from(prompt) + decoding, 1e-9);
    // The row that predicts goes on alone, and leaves copies only at the depths below its exit.
    let copies = 3.0 * f64::from(prompt - 1) + 2.0;
    assert_close(e2e_us("oracle", Some(0)), 2.0 * passes + copies + decoding, 1e-9);
}

#[test]
fn the_token_after_a_prompt_waits_where_the_prompt_still_overwrites_its_entries() {
    let (loops, tokens) = (5_u8, 20);
    let exits = ExitModel::new(&exit_trace(loops, &[vec![0; tokens as usize]]), Draw::Recorded).unwrap();
    let passes = |batching, kv_fill| {
        let settings = Settings { kv_fill, ..settings(batching, "static:0", loops, 1) };
        simulate(settings, &constant_latency(loops.into()), &exits, queued(1, 7, tokens)).passes
    };
    for kv_fill in [KvFill::Last, KvFill::Cycle(4)] {
        for batching in Batching::ALL {
            assert_eq!(passes(batching, kv_fill), u64::from(loops) + u64::from(tokens) - 1, "{batching}, {kv_fill}");
        }
    }
    assert_eq!(
        passes(Batching::Depth, KvFill::Cycle(5)),
        u64::from(tokens),
        "beside the prompt, where it overwrites nothing"
    );
}

#[test]
fn full_lockstep_batch_yields_batch_over_the_passes_of_its_deepest_row() {
    let probabilities = [0.7, 0.2, 0.1];
    let (batch, tokens) = (8u32, 100);
    let exits = drawn_exits(&probabilities, 2000, tokens as usize, 7);
    let up_to = |depth: usize| probabilities[..=depth].iter().sum::<f64>().powi(batch as i32);
    let deepest: f64 =
        (0..3).map(|depth| (depth + 1) as f64 * (up_to(depth) - if depth > 0 { up_to(depth - 1) } else { 0.0 })).sum();
    // All sequences have equal lengths, so one iteration in `tokens` contains their prompts, which run every depth.
    let passes = (3.0 + f64::from(tokens - 1) * deepest) / f64::from(tokens);
    for batching in [Batching::Vanilla, Batching::Sequence] {
        let summary =
            simulate(settings(batching, "oracle", 3, batch), &constant_latency(3), &exits, queued(4_000, 1, tokens));
        assert_close(summary.throughput_tok_s, f64::from(batch) / (passes * PASS.as_secs_f64()), 0.005);
    }
}

#[test]
fn vanilla_batches_last_as_long_as_their_longest_sequence() {
    let generations: Vec<Vec<u8>> = vec![vec![2, 0, 1], vec![0, 0, 0, 0, 1], vec![1, 1], vec![0], vec![0, 2]];
    let exits = ExitModel::new(&exit_trace(3, &generations), Draw::Recorded).unwrap();
    let requests = generations.iter().zip(0..).map(|(generation, id)| Request {
        id,
        arrival: Nanos::ZERO,
        prompt_tokens: 5,
        output_tokens: generation.len() as u32,
    });
    let passes: usize = generations
        .chunks(2)
        .map(|batch| {
            let longest = batch.iter().map(Vec::len).max().unwrap();
            let deepest = |token| batch.iter().filter_map(|exits| exits.get(token)).max().unwrap();
            3 + (1..longest).map(|token| 1 + usize::from(*deepest(token))).sum::<usize>()
        })
        .sum();
    let summary = simulate(settings(Batching::Vanilla, "oracle", 3, 2), &constant_latency(3), &exits, requests);
    assert_eq!(summary.passes, passes as u64);
    assert_close(summary.makespan_s, passes as f64 * PASS.as_secs_f64(), 1e-12);
}

#[test]
fn lone_requests_hold_their_share_of_the_kv_blocks_all_the_time() {
    let exits = drawn_exits(&[1.0], 1, 1, 1);
    let settings = Settings { num_blocks: 10, ..settings(Batching::Depth, "none", 1, 1) };
    let summary = simulate(settings, &constant_latency(1), &exits, queued(100, 40, 8));
    // 40 to 47 positions take 3 blocks of 16.
    assert_eq!((summary.kv_usage, summary.batch_fits, summary.prefix_hit_rate), (0.3, 3, None));
}

#[test]
fn rows_attend_to_every_token_before_them_or_under_skip_to_those_that_got_to_their_depth() {
    let passes_of = vec![2, 0, 0, 1, 2, 0, 2, 1];
    let exits = ExitModel::new(&exit_trace(3, std::slice::from_ref(&passes_of)), Draw::Recorded).unwrap();
    let block = |rows| (Component::Block, rows, 0, 1, 1.0);
    let attention = |history| (Component::DecodeAttention, 1, history, 1, f64::from(history));
    let latency = LatencyModel::new(&profile(3, &[block(1), block(64), attention(0), attention(100)])).unwrap();
    let prompt = 5;
    let mut expected = [0.0, 0.0];
    for (token, &exit) in passes_of.iter().enumerate().skip(1) {
        for depth in 0..=exit {
            let generated = &passes_of[1..token];
            expected[0] += f64::from(prompt) + generated.len() as f64;
            expected[1] += f64::from(prompt) + generated.iter().filter(|&&other| other >= depth).count() as f64;
        }
    }
    assert!(expected[1] < 0.9 * expected[0]);
    for batching in Batching::ALL {
        let found = [KvFill::Reuse, KvFill::Skip].map(|kv_fill| {
            let settings = Settings { kv_fill, ..settings(batching, "oracle", 3, 4) };
            let summary = simulate(settings, &latency, &exits, queued(1, prompt, passes_of.len() as u32));
            (summary.makespan_s * 1e6 - summary.passes as f64).round()
        });
        assert_eq!(found, expected, "{batching}");
    }
}

#[test]
fn backfill_is_free_where_a_pass_takes_no_longer_for_more_rows() {
    let exits = drawn_exits(&[0.6, 0.3, 0.1], 500, 40, 11);
    let latency = constant_latency(3);
    for batching in Batching::ALL {
        let run = |kv_fill, token_budget| {
            let settings = Settings { kv_fill, token_budget, ..settings(batching, "oracle", 3, 8) };
            simulate(settings, &latency, &exits, queued(300, 4, 40))
        };
        let (reuse, backfill) = (run(KvFill::Reuse, 1 << 16), run(KvFill::Backfill, 1 << 16));
        assert_eq!(backfill.makespan_s, reuse.makespan_s, "{batching}");
        // The missing rows are outstanding when requests end.
        let skipped = backfill.output_tokens as f64 * (3.0 - backfill.mean_depth);
        let share = backfill.backfill_rows as f64 / skipped;
        assert!((0.8..1.0).contains(&share), "{batching}: {share}");
        assert!(run(KvFill::Backfill, 8).makespan_s > 1.05 * reuse.makespan_s, "{batching}: a short budget costs time");
    }
}

#[test]
fn drafts_that_are_right_by_chance_give_the_tokens_of_a_truncated_geometric_series() {
    let (num_loops, tokens) = (4, 4_000);
    for (right, drafts) in [(0.9, 4), (0.7, 1), (0.5, 8), (0.0, 3), (1.0, 5)] {
        let exits = drawn_exits(&[right, 0.0, 0.0, 1.0 - right], 60, tokens as usize, 17);
        for batching in Batching::ALL {
            let exit = format!("speculate:static:0:{drafts}");
            let settings = Settings { kv_fill: KvFill::Backfill, ..settings(batching, &exit, num_loops, 1) };
            let summary = simulate(settings, &constant_latency(num_loops.into()), &exits, queued(20, 1, tokens));
            let expected: f64 = (0..=drafts).map(|draft| f64::powi(right, draft)).sum();
            let found = summary.tokens_per_verification.unwrap();
            assert_close(found, expected, 0.02);
            // Each draft takes a pass, and the row that verifies them takes one for each loop.
            let passes = f64::from(drafts) + f64::from(num_loops);
            assert_close(summary.throughput_tok_s, expected / (passes * PASS.as_secs_f64()), 0.02);
            let acceptance = summary.draft_acceptance.unwrap();
            assert!((acceptance - right).abs() < 0.01, "{batching}: {acceptance}, expected {right}");
            assert_eq!((summary.token_agreement, summary.mean_depth), (Some(1.0), f64::from(num_loops)));
            assert_eq!(summary.wasted_rows == Some(0), right == 1.0);
        }
    }
}

/// Integrates the number of running sequences over time, and the lengths of their stays.
#[derive(Default)]
struct Little {
    running_time: u64,
    admitted: std::collections::HashMap<u32, Nanos>,
    stays: u64,
}

impl Observer for Little {
    fn admitted(&mut self, now: Nanos, request: &Request) {
        self.admitted.insert(request.id, now);
    }
    fn preempted(&mut self, now: Nanos, request: &Request) {
        self.stays += (now - self.admitted[&request.id]).0;
    }
    fn pass(&mut self, record: &PassRecord<'_>) {
        self.running_time += record.elapsed.0 * u64::from(record.running);
    }
    fn finished(&mut self, now: Nanos, request: &Request, _: Nanos) {
        self.stays += (now - self.admitted[&request.id]).0;
    }
}

#[test]
fn running_sequences_obey_littles_law_to_the_nanosecond() {
    let exits = drawn_exits(&[0.5, 0.3, 0.2], 50, 40, 3);
    let latency = varied_latency(3);
    for batching in Batching::ALL {
        for num_blocks in [12, 1000] {
            let settings = Settings { num_blocks, ..settings(batching, "confidence:0.5", 3, 8) };
            let mut little = [Little::default()];
            let requests = poisson(2_000, 60.0, 30, 40, 5);
            Simulation::new(settings, &latency, &exits).unwrap().run(requests, &mut little).unwrap();
            let [little] = little;
            assert_eq!(little.running_time, little.stays);
            assert!(little.stays > 0);
        }
    }
}

#[test]
fn the_parts_of_a_run_add_up_to_the_time_in_which_it_ran_passes() {
    let latency = varied_latency(3);
    let exits = drawn_exits(&[0.5, 0.3, 0.2], 50, 20, 3);
    for (batching, exit) in [(Batching::Sequence, "top1:0.5"), (Batching::Depth, "gate:0.5")] {
        let settings = settings(batching, exit, 3, 8);
        let mut metrics = Metrics::new(&settings);
        let simulation = Simulation::new(settings, &latency, &exits).unwrap();
        let outcome = simulation.run(queued(40, 30, 20), std::slice::from_mut(&mut metrics)).unwrap();
        let parts: f64 = Component::ALL.iter().map(|&part| outcome.time.of(part)).sum();
        let ran = simulation.summary(&metrics, &outcome);
        // The times of a pass and of its head are each rounded to whole nanoseconds.
        let rounded = 1e-9 * ran.passes as f64;
        let missing = ran.busy * ran.makespan_s - parts - outcome.time.overhead_s();
        assert!(missing.abs() < rounded, "{batching}: {missing} s");
        assert!(outcome.time.of(Component::Head) > 0.0 && outcome.time.of(Component::PrefillAttention) > 0.0);
    }
}

#[test]
fn a_head_takes_its_own_time_in_a_pass_after_one_that_ran_it() {
    use Component::{Block, Head, HeadAgain};
    let (block, head, again) = (100.0, 7.0, 5.0);
    let points = [(Block, 1, 0, 1, block), (Head, 1, 0, 1, head), (HeadAgain, 1, 0, 1, again)];
    let latency = LatencyModel::new(&profile(2, &points)).unwrap();
    let exits = ExitModel::new(&exit_trace(2, &[vec![0; 4]]), Draw::Recorded).unwrap();
    let makespan_us = |exit| {
        let summary = simulate(settings(Batching::Sequence, exit, 2, 1), &latency, &exits, queued(1, 1, 4));
        1e6 * summary.makespan_s
    };
    // The prompt runs both depths, and every other pass runs the head.
    assert_close(makespan_us("none"), 8.0 * block + 4.0 * head, 1e-9);
    // All tokens exit at the first depth. The signal is read before the exit or the head runs after it. The prompt goes
    // on, so the head for the second token does not follow another one.
    for exit in ["top1:0.5", "oracle"] {
        assert_close(makespan_us(exit), 5.0 * block + 2.0 * head + 2.0 * again, 1e-9);
    }
}

#[test]
fn a_result_names_the_times_that_were_not_measured() {
    let mut made = profile(1, &[(Component::Block, 1, 0, 1, 100.0), (Component::Head, 1, 0, 1, 7.0)]);
    let exits = ExitModel::new(&exit_trace(1, &[vec![0; 4]]), Draw::Recorded).unwrap();
    let mut computed = |repeats| {
        made.points[1].repeats = repeats;
        let latency = LatencyModel::new(&made).unwrap();
        simulate(settings(Batching::Sequence, "none", 1, 1), &latency, &exits, queued(1, 1, 4)).computed_components
    };
    assert_eq!(computed(1), "");
    assert_eq!(computed(0), "head");
}
