//! A profile contains every component of a pass, over the whole grid.

mod common;

use std::sync::Arc;

use common::devices::Device;
use common::{grouped, weights, with_everything};
use engine::{Engine, Grid, Limits, Model, ModelConfig, Probe, Profiler, PromptLine, Prompts, Sampling, WeightType};
use latency::LatencyModel;
use scheduler::{Batching, ExitPolicy, Lengths};
use traces::{ChunkWork, Component, Nanos, PassOrigin, PassRun, PassWork};

fn engine(config: &ModelConfig) -> Engine {
    Engine {
        model: Arc::new(Model::load(&weights(config, 5), WeightType::F32).unwrap()),
        prompts: Arc::new(Prompts::Text((0..40).collect())),
        sampling: Sampling::default(),
        script: None,
    }
}

const LENGTHS: Lengths = Lengths { prompt: 10, output: 8, longest: 40 };

#[test]
fn a_profile_covers_every_component_up_to_its_limits() {
    let grid = Grid::up_to(Limits { rows: 20, decodes: 5, history: 40, chunk: 12 });
    let mut profiler = Profiler::new(&engine(&grouped()), grid, LENGTHS).unwrap();
    let mut done = Vec::new();
    for _ in 0..2 {
        profiler.round(|count, of| done.push((count, of))).unwrap();
    }
    assert_eq!(done.iter().filter(|(count, of)| count == of).count(), 2);
    // Other work on the machine may make the halves differ by any factor.
    let disagreement = profiler.disagreement();
    assert!(disagreement.is_some_and(|share| share >= 0.0 && share.is_finite()), "{disagreement:?}");
    let profile = profiler.profile(0..2, "test", "a test").unwrap();
    // A value of width 8 is padded to 32.
    assert_eq!(profile.meta.kv_bytes_per_token, 3 * 2 * 2 * (8 + 32) * 4);
    assert!(profile.meta.overhead_us > 0.0 && profile.meta.overhead_us.is_finite());
    // Low-rank weights and operations without weights are part of the block here, attention around it of embedding and
    // head. There is one device, and there are no gates.
    use Component::{AllReduce, Elementwise, ExitAttention, ExitSignal, Lora};
    let no_part = [Lora, Elementwise, ExitAttention, AllReduce, ExitSignal];
    assert!(no_part.iter().all(|&component| profile.points_of(component).count() == 0));
    for component in Component::ALL.into_iter().filter(|component| !no_part.contains(component)) {
        let points: Vec<_> = profile.points_of(component).collect();
        let deepest = if component == Component::DepthMix { 3 } else { 1 };
        let (rows, kv_tokens) = match component {
            Component::DepthMix => (20, 0),
            // After a pass with the most rows.
            Component::AfterMore => (5, 20),
            Component::Head | Component::HeadAgain | Component::ExitDecision => (5, 0),
            // Every row that exits at the first of three depths skips two.
            Component::KvFill => (10, 0),
            Component::DecodeAttention => (5, 40),
            Component::PrefillAttention => (12, 40),
            // Two of 12 tokens do not fit.
            Component::PrefillAgain => (8, 40),
            _ => (20, 0),
        };
        assert_eq!(points.iter().map(|point| point.rows).max(), Some(rows), "{component}");
        assert_eq!(points.iter().map(|point| point.kv_tokens).max(), Some(kv_tokens), "{component}");
        assert_eq!(points.iter().map(|point| point.depths).max(), Some(deepest), "{component}");
        for point in points {
            assert!(point.component.can_take(point.time_us) && point.repeats >= 2, "{point:?}");
            assert!(component != Component::Block || point.time_us > 0.0, "{point:?}");
        }
    }
    // What is no component: a chunk beside decode rows, at one depth and at several.
    let in_grid = profiler.pass_runs().filter(|run| run.origin == PassOrigin::Grid).flat_map(|run| run.passes);
    let mixtures = in_grid.filter(|pass| !pass.work.chunks.is_empty() && pass.work.decode_rows > 0);
    let depths: Vec<u32> = mixtures.map(|pass| pass.work.depths).collect();
    assert!([1, 3].iter().all(|found| depths.contains(found)), "{depths:?}");
    let source = profile.meta.source;
    assert!(source.contains("chunks beside decode rows differ from the sum by "), "{source}");
}

#[test]
fn histories_that_were_never_run_are_numbers_to_the_cuda_kernels() {
    // Memory of the emulated device has no numbers until it is written; that of a GPU may have.
    let Some(model) = Device::Cuda.serve(&weights(&with_everything(), 5)) else { return };
    let grid = Grid::up_to(Limits { rows: 3, decodes: 2, history: 4, chunk: 3 });
    let lengths = Lengths { prompt: 2, output: 2, longest: 4 };
    let mut profiler = Profiler::new(&Engine { model, ..engine(&with_everything()) }, grid, lengths).unwrap();
    profiler.round(|_, _| ()).unwrap();
}

#[test]
fn keys_and_values_before_and_after_the_loops_count() {
    let grid = Grid::up_to(Limits { rows: 3, decodes: 2, history: 4, chunk: 3 });
    let lengths = Lengths { prompt: 2, output: 2, longest: 4 };
    let mut profiler = Profiler::new(&engine(&with_everything()), grid, lengths).unwrap();
    profiler.round(|_, _| ()).unwrap();
    // One layer of the prelude and, at each of three depths, two of the block and two of the coda.
    assert_eq!(
        profiler.profile(0..1, "test", "a test").unwrap().meta.kv_bytes_per_token,
        (1 + 3 * (2 + 2)) * 2 * (8 + 32) * 4
    );
}

#[test]
fn reading_gates_and_deciding_by_them_are_components_where_the_model_has_gates() {
    let grid = Grid::up_to(Limits { rows: 3, decodes: 2, history: 4, chunk: 3 });
    let lengths = Lengths { prompt: 2, output: 2, longest: 4 };
    let mut profiler = Profiler::new(&engine(&with_everything()), grid, lengths).unwrap();
    profiler.round(|_, _| ()).unwrap();
    let profile = profiler.profile(0..1, "test", "a test").unwrap();
    for component in [Component::ExitSignal, Component::ExitDecision] {
        assert_eq!(profile.points_of(component).map(|point| point.rows).collect::<Vec<_>>(), [1, 2], "{component}");
    }
    let passes: Vec<_> = profiler.pass_runs().flat_map(|run| run.passes).collect();
    let any = |is: &dyn Fn(&PassWork) -> bool| passes.iter().any(|pass| is(&pass.work));
    assert!(any(&|work| work.signal_rows == 2 && work.exit_head_rows == 0), "gates that are read, and no exit");
    assert!(any(&|work| work.signal_rows > 0 && work.decided_rows > 0 && work.head_rows == 0), "gates that decide");
    assert!(any(&|work| work.before.rows > work.rows && work.signal_rows > 0), "few rows after many");
}

#[test]
fn a_profile_does_not_depend_on_which_prompts_were_given() {
    let grid = Grid::up_to(Limits { rows: 3, decodes: 2, history: 4, chunk: 3 });
    let lengths = Lengths { prompt: 3, output: 2, longest: 8 };
    let prompts = Arc::new(Prompts::Lines(vec![PromptLine { tokens: vec![1, 2], ..PromptLine::default() }]));
    let mut profiler = Profiler::new(&Engine { prompts, ..engine(&grouped()) }, grid, lengths).unwrap();
    profiler.round(|_, _| ()).unwrap();
}

#[test]
fn a_grid_beyond_the_models_positions_is_refused() {
    let grid = Grid::up_to(Limits { rows: 20, decodes: 5, history: 120, chunk: 12 });
    let message = Profiler::new(&engine(&grouped()), grid, LENGTHS).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("needs 132 positions, the model has 128"), "{message}");
}

#[test]
fn probes_serve_a_load_that_never_ends_and_log_its_passes() {
    let grid = Grid::up_to(Limits { rows: 20, decodes: 5, history: 40, chunk: 12 });
    let mut profiler = Profiler::new(&engine(&grouped()), grid, LENGTHS).unwrap();
    let [load, with_exits, depth_wise, adaptive, in_lockstep] = profiler.loads();
    // Two prompts of 10 tokens fit a pass of 20 rows.
    assert_eq!((load.settings().max_batch, load.settings().token_budget, load.settings().prefill_chunk), (5, 20, 20));
    assert_eq!((load.settings().batching, load.settings().exit), (Batching::Sequence, ExitPolicy::None));
    assert_eq!((with_exits, depth_wise), (load.with_exits(), load.depth_wise()));
    // The model has no gates.
    let by_chance = ExitPolicy::Oracle { charged: false, recorded: false };
    assert_eq!((adaptive, in_lockstep), (load.with_exits_by(by_chance), load.with_exits_in_lockstep(by_chance)));
    profiler.round(|_, _| ()).unwrap();
    let between = profiler.probe().unwrap();
    profiler.round(|_, _| ()).unwrap();
    let measured = profiler.measured();
    let (of_rounds, first_round) = (measured.probes().collect::<Vec<_>>(), profiler.measured_in([0]));
    let of_first = first_round.probes().count();
    assert!(of_first > 0 && of_rounds.len() == 2 * of_first);
    let (before, after) = of_rounds.split_at(of_first);
    let in_order: Vec<_> = before.iter().copied().chain([&between]).chain(after.iter().copied()).collect();
    assert!(in_order.windows(2).all(|pair| (pair[0].way + 1) % 5 == pair[1].way), "every way in turn");
    for way in 0..5 {
        let alike: Vec<_> = in_order.iter().filter(|probe| probe.way == way).collect();
        let follows = |pair: &[&&Probe]| pair[0].passes.last().unwrap().start < pair[1].passes[0].start;
        assert!(alike.windows(2).all(follows), "{alike:?}");
    }
    for probe in in_order {
        assert!(probe.passes.len() >= 16, "{probe:?}");
        assert!(probe.elapsed >= Nanos(60_000_000), "{probe:?}");
        assert!(probe.passes.iter().all(|pass| pass.elapsed > Nanos::ZERO && pass.work.rows > 0), "{probe:?}");
    }
}

#[test]
fn under_steady_load_a_profile_takes_what_the_passes_took() {
    let grid = Grid::up_to(Limits { rows: 20, decodes: 5, history: 40, chunk: 12 });
    let mut profiler = Profiler::new(&engine(&grouped()), grid, LENGTHS).unwrap();
    profiler.round(|_, _| ()).unwrap();
    profiler.round(|_, _| ()).unwrap();
    // Of the second round alone: what the first one measured does not matter.
    let profile = profiler.profile([1], "test", "a test").unwrap();
    let model = LatencyModel::new(&profile).unwrap();
    let passes = profiler.measured_in([1]).steady_passes().unwrap();
    let took: u64 = passes.iter().map(|(_, time)| time.0).sum();
    let predicted: f64 = passes.iter().map(|(work, _)| model.pass_ns(work)).sum();
    assert!((predicted / took as f64 - 1.0).abs() < 2e-3, "{predicted} ns for {took} ns");
    // Half of four cycles of five ways, each of which is probed for 60 ms.
    let all = profiler.measured_in([1]).probes().map(|probe| probe.passes.len()).sum::<usize>();
    assert!(passes.len() < all && took > 0, "{} of {all} passes", passes.len());
}

#[test]
fn the_log_has_every_shape_and_passes_from_all_of_the_steady_load() {
    let grid = Grid::up_to(Limits { rows: 20, decodes: 5, history: 40, chunk: 12 });
    let mut profiler = Profiler::new(&engine(&grouped()), grid, LENGTHS).unwrap();
    profiler.round(|_, _| ()).unwrap();
    let runs: Vec<PassRun> = profiler.pass_runs().collect();
    let of = |origin| runs.iter().filter(move |run| run.origin == origin);
    assert_eq!(
        (of(PassOrigin::Grid).count(), of(PassOrigin::Steady).count()),
        (1, profiler.measured().probes().count())
    );
    for (run, probe) in of(PassOrigin::Steady).zip(profiler.measured().probes()) {
        let (logged, of) = (&run.passes, &probe.passes);
        assert!(logged.len() <= 256 && logged.len() > of.len().min(256) / 2, "{} of {}", logged.len(), of.len());
        let places: Vec<usize> = logged.iter().map(|pass| of.iter().position(|found| found == pass).unwrap()).collect();
        assert!(places[0] == 0 && places.windows(2).all(|pair| pair[1] - pair[0] == places[1]), "{places:?}");
        assert!(places[places.len() - 1] + places[1] >= of.len(), "up to the end of the probe: {places:?}");
    }
    let shapes: Vec<_> = of(PassOrigin::Grid).flat_map(|run| &run.passes).collect();
    assert!(shapes.iter().all(|pass| pass.elapsed > Nanos::ZERO && pass.wall_us > 0 && pass.work.rows > 0));
    assert!(shapes.windows(2).all(|pair| pair[0].start + pair[0].elapsed <= pair[1].start), "one after the other");
    let any = |is: &dyn Fn(&PassWork) -> bool| shapes.iter().any(|pass| is(&pass.work));
    assert!(any(&|work| work.rows == 20 && work.decode_rows == 20 && work.depths == 1));
    assert!(any(&|work| work.chunks == [ChunkWork { tokens: 12, history: 40 }] && work.decode_rows == 0));
    assert!(any(&|work| work.chunks.len() == 2 && work.head_rows == 0));
    assert!(any(&|work| work.depths == 3 && work.embed_rows > 0));
    assert!(any(&|work| work.exit_head_rows == 5 && work.head_rows == 0), "the head after the pass");
    assert!(any(&|work| work.filled_depths == 10 && work.head_rows == 5), "copies to two skipped depths");
    assert!(any(&|work| work.before.rows == 20 && work.rows == 1), "after a pass of more rows");
    assert!(any(&|work| work.longest_decode_history == 40 && work.decode_history == 5 * 40));
}
