//! Guarantees of every figure: both files, complete; readable labels; errors instead of panics.

use std::fs;
use std::path::Path;

use plots::*;

type Draw = Box<dyn Fn(&Figure, &[f64]) -> Result<(), Error>>;

fn figure(folder: &Path) -> Figure {
    Figure {
        folder: folder.to_path_buf(),
        name: "figure".into(),
        title: "A title".into(),
        setting: "a setting".into(),
        device: "a device".into(),
        origin: Origin::Measured,
    }
}

fn policy() -> Policy {
    Policy::new("depth-wise", "oracle")
}

/// Every figure as a function of the values of its one series, named `depth-wise, oracle` or `series`.
fn every_figure() -> Vec<(&'static str, Draw)> {
    fn indexed(values: &[f64]) -> Vec<(f64, f64)> {
        values.iter().enumerate().map(|(i, v)| (i as f64 + 1.0, *v)).collect()
    }
    let draw_lines = |figure: &Figure, v: &[f64]| {
        throughput_by_batch(figure, &[PolicyLine { policy: policy(), points: indexed(v) }])
    };
    let draw_pareto = |figure: &Figure, v: &[f64]| {
        let estimate = |value| Estimate { value, half_width: 0.1 };
        let point = |(x, y)| TradePoint { x: estimate(x), y: estimate(y), label: "0.5".into() };
        let lines =
            vec![TradeLine { policy: policy(), attainable: true, points: indexed(v).into_iter().map(point).collect() }];
        let latency = TradeOff { x: Quantity::Throughput, y: Quantity::Latency("latency"), lines: lines.clone() };
        pareto(figure, &[TradeOff { x: Quantity::Throughput, y: Quantity::Agreement, lines }, latency])
    };
    let draw_frontier = |figure: &Figure, v: &[f64]| {
        let estimate = |value| Estimate { value, half_width: 0.0 };
        let point = |(x, y): (f64, f64)| TradePoint { x: estimate(y), y: estimate(x), label: "0.5".into() };
        let points = indexed(v).into_iter().map(point).collect();
        let lines = vec![TradeLine { policy: policy(), attainable: true, points }];
        frontier(
            figure,
            &[Quantity::Agreement, Quantity::Accuracy].map(|x| TradeOff {
                x,
                y: Quantity::Throughput,
                lines: lines.clone(),
            }),
        )
    };
    let draw_capacities = |figure: &Figure, v: &[f64]| {
        let rates = |v: &f64| vec![Some(Estimate { value: *v, half_width: 0.1 }), None];
        let policies = v.iter().map(|v| PolicyCapacity { policy: policy(), rates: rates(v) });
        capacities(figure, &["series".into(), "other".into()], &policies.collect::<Vec<_>>())
    };
    let draw_thresholds = |figure: &Figure, v: &[f64]| {
        let point = |(x, v): (f64, f64)| ThresholdPoint { threshold: x, throughput: v, agreement: v };
        thresholds(figure, &[ThresholdLine { policy: policy(), points: indexed(v).into_iter().map(point).collect() }])
    };
    let draw_speedup = |figure: &Figure, v: &[f64]| {
        let run = |v: &f64| PolicyThroughput { policy: policy(), measured: Some(*v), simulated: None };
        speedup(figure, &v.iter().map(run).collect::<Vec<_>>(), &policy())
    };
    let draw_latencies = |figure: &Figure, v: &[f64]| {
        latency_cdfs(figure, &[PolicyLatencies { policy: policy(), ttft_ms: v.to_vec(), tpot_ms: v.to_vec() }])
    };
    let draw_rows = |figure: &Figure, v: &[f64]| {
        let pass = |(i, v): (f64, f64)| PassRows { start_s: i, end_s: i + v, rows: vec![3.0, 2.0] };
        rows_by_depth(figure, &indexed(v).into_iter().map(pass).collect::<Vec<_>>())
    };
    let draw_times = |figure: &Figure, v: &[f64]| {
        let run = |v: &f64| TokenTime { label: "series".into(), parts_us: vec![2.0, *v], speedup: 1.5 };
        token_times(figure, &["part", "other part"], &v.iter().map(run).collect::<Vec<_>>())
    };
    let draw_exits = |figure: &Figure, v: &[f64]| {
        exit_depths(figure, &[ExitDepths { name: "series".into(), exiting: v.to_vec(), agreement: v.to_vec() }])
    };
    let draw_predictions = |figure: &Figure, v: &[f64]| {
        let point =
            |v: &f64| Prediction { metric: "metric".into(), series: "series".into(), measured: *v, predicted: 1.2 * v };
        predictions(figure, &v.iter().map(point).collect::<Vec<_>>())
    };
    let draw_losses = |figure: &Figure, v: &[f64]| {
        losses(figure, &[LossCurve { name: "series".into(), train: indexed(v), validation: Vec::new() }])
    };
    let draw_heat_map = |figure: &Figure, v: &[f64]| {
        let columns = ("batch limit".into(), v.iter().map(f64::to_string).collect());
        let row = |value: fn(&f64) -> Option<f64>| v.iter().map(value).collect();
        let rows = ("history".into(), vec!["series".into(), "other".into()]);
        heat_map(figure, &HeatMap { columns, rows, cells: vec![row(|v| Some(*v)), row(|_| None)], pays: 1.05 })
    };
    let draw_sweep = |figure: &Figure, v: &[f64]| {
        let point = |(x, y): (f64, f64)| SweepPoint { x, y, low: y, high: y };
        let line = SweepLine { name: "series".into(), points: indexed(v).into_iter().map(point).collect() };
        sweep(figure, "x", Scale::Log, "y", &[line])
    };
    let draw_reliability = |figure: &Figure, v: &[f64]| {
        let curves = vec![(1, v.iter().map(|v| (0.5, *v)).collect())];
        reliability(figure, &[Reliability { signal: "series".into(), note: "a note".into(), curves }])
    };
    let draw_exit_curves = |figure: &Figure, v: &[f64]| {
        exit_curves(figure, &[ExitCurve { signal: "series".into(), points: indexed(v) }], &[0.7, 1.0], 1.2)
    };
    let draw_calibration = |figure: &Figure, v: &[f64]| {
        let point = |(threshold, risk): (f64, f64)| CalibrationPoint { threshold, risk, mean_depth: 1.0 };
        let points = indexed(v).into_iter().map(point).collect();
        let lines = vec![CalibrationLine { name: "series".into(), points }];
        calibration(figure, &CalibratedThreshold { signal: "x".into(), tolerance: 0.1, chosen: Some(0.5), lines })
    };
    vec![
        ("throughput_by_batch", Box::new(draw_lines)),
        ("pareto", Box::new(draw_pareto)),
        ("frontier", Box::new(draw_frontier)),
        ("capacities", Box::new(draw_capacities)),
        ("thresholds", Box::new(draw_thresholds)),
        ("speedup", Box::new(draw_speedup)),
        ("latency_cdfs", Box::new(draw_latencies)),
        ("rows_by_depth", Box::new(draw_rows)),
        ("token_times", Box::new(draw_times)),
        ("exit_depths", Box::new(draw_exits)),
        ("predictions", Box::new(draw_predictions)),
        ("losses", Box::new(draw_losses)),
        ("sweep", Box::new(draw_sweep)),
        ("heat_map", Box::new(draw_heat_map)),
        ("reliability", Box::new(draw_reliability)),
        ("exit_curves", Box::new(draw_exit_curves)),
        ("calibration", Box::new(draw_calibration)),
    ]
}

/// Names of the files in a folder, sorted.
fn files(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let name = |entry: std::io::Result<fs::DirEntry>| entry.expect("an entry").file_name();
    let mut names: Vec<_> = entries.map(|entry| name(entry).into_string().expect("UTF-8")).collect();
    names.sort();
    names
}

/// Width and height in the header of a PNG file.
fn png_size(bytes: &[u8]) -> (u32, u32) {
    assert_eq!(&bytes[..8], b"\x89PNG\r\n\x1a\n");
    let number = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    (number(16), number(20))
}

#[test]
fn every_figure_writes_both_files_with_title_origin_and_series() {
    for (name, draw) in every_figure() {
        let scratch = tempfile::tempdir().expect("a folder");
        let folder = scratch.path().join("made on the way");
        draw(&figure(&folder), &[0.2, 0.5, 0.3]).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(files(&folder), ["figure.png", "figure.svg"], "{name}");
        let svg = fs::read_to_string(folder.join("figure.svg")).expect("an SVG");
        assert!(svg.contains("A title"), "{name}");
        assert!(svg.contains("Measured on a device · a setting"), "{name}");
        let labels = ["depth-wise, oracle", "series", "depth 1"];
        assert!(labels.iter().any(|label| svg.contains(label)), "{name}");
        let png = fs::read(folder.join("figure.png")).expect("a PNG");
        let (width, height) = png_size(&png);
        assert!(svg.contains(&format!("viewBox=\"0 0 {width} {height}\"")), "{name}");
        let (shown_width, shown_height) = (width as f64 / 2.0, height as f64 / 2.0);
        assert!(svg.starts_with(&format!("<svg width=\"{shown_width}\" height=\"{shown_height}\"")), "{name}");
    }
}

#[test]
fn every_figure_draws_one_value_and_equal_values() {
    for (name, draw) in every_figure() {
        for values in [vec![0.5], vec![1.0; 4]] {
            let scratch = tempfile::tempdir().expect("a folder");
            draw(&figure(scratch.path()), &values).unwrap_or_else(|e| panic!("{name}: {e}"));
            let svg = fs::read_to_string(scratch.path().join("figure.svg")).expect("an SVG");
            assert!(!svg.contains("NaN") && !svg.contains("2147483647"), "{name}");
        }
    }
}

#[test]
fn every_figure_refuses_no_values_and_writes_nothing() {
    for (name, draw) in every_figure() {
        let scratch = tempfile::tempdir().expect("a folder");
        let error = draw(&figure(scratch.path()), &[]).expect_err(name);
        assert!(matches!(error, Error::Empty { .. }), "{name}: {error}");
        assert!(files(scratch.path()).is_empty(), "{name}");
    }
}

#[test]
fn every_figure_names_the_value_that_is_not_a_number() {
    for (name, draw) in every_figure() {
        for bad in [f64::NAN, f64::INFINITY] {
            let scratch = tempfile::tempdir().expect("a folder");
            let error = draw(&figure(scratch.path()), &[0.5, bad]).expect_err(name);
            let Error::Value { index, .. } = &error else {
                panic!("{name}: {error}");
            };
            // The values of each bar are checked separately.
            assert_eq!(*index, usize::from(!["speedup", "capacities"].contains(&name)), "{name}: {error}");
            assert!(error.to_string().contains(&bad.to_string()), "{name}: {error}");
            assert!(files(scratch.path()).is_empty(), "{name}");
        }
    }
}

#[test]
fn text_that_the_font_lacks_is_the_same_in_both_files() {
    let draw = |name: &str| {
        let scratch = tempfile::tempdir().expect("a folder");
        let figure =
            Figure { title: format!("{name}, p99"), setting: format!("model {name}"), ..figure(scratch.path()) };
        let line = PolicyLine { policy: Policy::new(name, "oracle"), points: vec![(1.0, 2.0)] };
        throughput_by_batch(&figure, &[line]).expect("a figure");
        ["svg", "png"].map(|kind| fs::read(scratch.path().join(format!("figure.{kind}"))).expect("a file"))
    };
    let [svg, _] = draw("千问\u{1b}");
    let text = String::from_utf8(svg).expect("UTF-8");
    assert!(text.is_ascii() || !text.contains(['千', '问', '\u{1b}']), "{text}");
    assert!(text.contains("U+5343 U+95EE U+001B , oracle"), "{text}");
    // The PNG differs where the names differ: missing characters do not all become one box.
    assert_ne!(draw("千问")[1], draw("通义")[1]);
}

#[test]
fn rounding_does_not_keep_a_share_from_being_drawn() {
    let traces = |share: f64| ExitDepths { name: "series".into(), exiting: vec![share], agreement: vec![1.0] };
    let draw = |share| {
        let scratch = tempfile::tempdir().expect("a folder");
        exit_depths(&figure(scratch.path()), &[traces(share)])
    };
    for share in [1.0 + f64::EPSILON, (0..11).map(|_| 1.0 / 11.0).sum(), -f64::EPSILON] {
        draw(share).unwrap_or_else(|error| panic!("{share}: {error}"));
    }
    for share in [1.001, -0.001] {
        assert!(matches!(draw(share), Err(Error::Value { .. })), "{share}");
    }
}

#[test]
fn markup_in_labels_is_escaped() {
    let scratch = tempfile::tempdir().expect("a folder");
    let figure = Figure { title: "p99 < 5 & \"rising\" </text>".into(), ..figure(scratch.path()) };
    let line = PolicyLine { policy: Policy::new("<depth>", "a&b"), points: vec![(1.0, 2.0)] };
    throughput_by_batch(&figure, &[line]).expect("a figure");
    let svg = fs::read_to_string(scratch.path().join("figure.svg")).expect("an SVG");
    assert!(svg.contains("p99 &lt; 5 &amp; &quot;rising&quot; &lt;/text&gt;"));
    assert!(svg.contains("&lt;depth&gt;, a&amp;b"));
}

#[test]
fn the_same_data_give_the_same_bytes() {
    for (name, draw) in every_figure() {
        let bytes = [(); 2].map(|()| {
            let scratch = tempfile::tempdir().expect("a folder");
            draw(&figure(scratch.path()), &[0.2, 0.4]).unwrap_or_else(|e| panic!("{name}: {e}"));
            ["svg", "png"].map(|kind| fs::read(scratch.path().join(format!("figure.{kind}"))).expect("a file"))
        });
        assert!(bytes[0] == bytes[1], "{name}");
    }
}

#[test]
fn a_speedup_is_relative_to_the_baseline_of_its_own_source() {
    let scratch = tempfile::tempdir().expect("a folder");
    let baseline = Policy::new("sequence-wise", "no exit");
    let run = |policy: &Policy, measured, simulated| PolicyThroughput { policy: policy.clone(), measured, simulated };
    let runs = [run(&baseline, Some(100.0), Some(80.0)), run(&policy(), Some(150.0), Some(136.0))];
    speedup(&figure(scratch.path()), &runs, &baseline).expect("a figure");
    let svg = fs::read_to_string(scratch.path().join("figure.svg")).expect("an SVG");
    for label in ["1.50", "1.70"] {
        assert!(svg.contains(&format!(">\n{label}\n")), "{label}");
    }
}

#[test]
fn a_speedup_without_its_baseline_is_refused() {
    let scratch = tempfile::tempdir().expect("a folder");
    let runs = [PolicyThroughput { policy: policy(), measured: Some(2.0), simulated: None }];
    let error = speedup(&figure(scratch.path()), &runs, &Policy::new("sequence-wise", "no exit"));
    let message = error.expect_err("no baseline").to_string();
    assert!(message.contains("no measured throughput of the baseline `sequence-wise, no exit`"), "{message}");
}

#[test]
fn predictions_are_counted_against_the_tolerance() {
    let scratch = tempfile::tempdir().expect("a folder");
    let point = |predicted| Prediction {
        metric: "throughput (tokens/s)".into(),
        series: "depth-wise".into(),
        measured: 1000.0,
        predicted,
    };
    predictions(&figure(scratch.path()), &[1099.0, 901.0, 899.0].map(point)).expect("a figure");
    let svg = fs::read_to_string(scratch.path().join("figure.svg")).expect("an SVG");
    assert!(svg.contains("2 of 3 within ±10 %"));
    let zero = Prediction { measured: 0.0, ..point(0.0) };
    predictions(&figure(scratch.path()), &[point(0.0), zero.clone(), point(950.0)]).expect("a figure");
    let svg = fs::read_to_string(scratch.path().join("figure.svg")).expect("an SVG");
    assert!(svg.contains("2 of 3 within ±10 %"));
    predictions(&figure(scratch.path()), &[zero]).expect("a figure");
}

#[test]
fn figures_are_left_out_for_their_values_but_not_for_their_files() {
    let scratch = tempfile::tempdir().expect("a folder");
    let line = |value| PolicyLine { policy: policy(), points: vec![(1.0, value)] };
    let draw = |folder: &Path, value| or_left_out(throughput_by_batch(&figure(folder), &[line(value)]));
    draw(scratch.path(), -1.0).expect("it is left out");
    or_left_out(throughput_by_batch(&figure(scratch.path()), &[])).expect("it is left out");
    assert!(files(scratch.path()).is_empty());
    let file = scratch.path().join("a file");
    fs::write(&file, "").expect("a file");
    assert!(matches!(draw(&file, 1.0), Err(Error::Write { .. })));
}

#[test]
fn an_unwritable_folder_is_named() {
    let scratch = tempfile::tempdir().expect("a folder");
    let file = scratch.path().join("a file");
    fs::write(&file, "").expect("a file");
    let line = PolicyLine { policy: policy(), points: vec![(1.0, 2.0)] };
    let error = throughput_by_batch(&figure(&file), &[line]).expect_err("a file is no folder");
    assert!(error.to_string().contains("a file/figure.svg"), "{error}");
}
