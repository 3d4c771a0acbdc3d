//! Bars for every policy, grouped by batching policy.

use crate::Policy;
use crate::axis::Axis;
use crate::canvas::{Canvas, DrawResult, WIDTH, wrap};
use crate::panel::Panel;
use crate::style::{self, Fill, INK, Look, first_seen};

/// In policies: width of a bar, space between neighbours, space between batching policies.
const BAR_WIDTH: f64 = 0.4;
const BAR_GAP: f64 = 0.04;
const GROUP_GAP: f64 = 0.5;
/// Two bars and the space around them.
const UNITS_PER_POLICY: u32 = 190;
const EXIT_SIZE: u32 = 27;
const EXIT_LINE: i32 = 32;
const BATCHING_SIZE: u32 = 30;
const BATCHING_LINE: i32 = 62;

/// One bar.
pub(crate) struct Bar {
    pub(crate) value: f64,
    /// Half the width of its confidence interval; 0 for none.
    pub(crate) half_width: f64,
    pub(crate) fill: Fill,
    pub(crate) label: String,
}

/// Position of a policy's bars, in policies from the left.
struct Place {
    policy: usize,
    group: usize,
    centre: f64,
}

/// Policies along x.
pub(crate) struct Policies<'d> {
    policies: Vec<&'d Policy>,
    places: Vec<Place>,
    /// Width of a bar, in policies.
    bar_width: f64,
}

impl<'d> Policies<'d> {
    /// Room for up to `bars` bars of each policy.
    pub(crate) fn new(policies: Vec<&'d Policy>, bars: usize) -> Self {
        let mut batchings = Vec::new();
        let groups: Vec<usize> = policies.iter().map(|policy| first_seen(&mut batchings, &policy.batching)).collect();
        let mut order: Vec<usize> = (0..policies.len()).collect();
        order.sort_by_key(|&policy| groups[policy]);
        let place = |(index, policy): (usize, usize)| Place {
            policy,
            group: groups[policy],
            centre: index as f64 + 0.5 + groups[policy] as f64 * GROUP_GAP,
        };
        let places = order.into_iter().enumerate().map(place).collect();
        Self { policies, places, bar_width: (2.0 * BAR_WIDTH / bars as f64).min(BAR_WIDTH) }
    }

    fn end(&self) -> f64 {
        self.places.last().map_or(1.0, |place| place.centre + 0.5)
    }

    /// Width of the whole figure, in units.
    pub(crate) fn width(&self) -> u32 {
        WIDTH.max(300 + (self.end() * f64::from(UNITS_PER_POLICY)) as u32)
    }

    /// Panels above each other, with the policies' labels below the last.
    pub(crate) fn panels<'a>(&self, area: &Canvas<'a>, ys: &[Axis]) -> DrawResult<Vec<Panel<'a>>> {
        let exits = self.exit_lines(area)?;
        let most_lines = exits.iter().map(Vec::len).max().unwrap_or(0) as i32;
        let x = Axis::with_linear_ticks("", -0.25, self.end() + 0.25).without_ticks();
        let panels = Panel::stack(area, &x, ys, most_lines * EXIT_LINE + BATCHING_LINE)?;
        if let Some(last) = panels.last() {
            self.label_exits(last, &exits)?;
            self.label_batchings(last, most_lines)?;
        }
        Ok(panels)
    }

    /// Draws the bars of each policy, by the policy's index.
    pub(crate) fn draw(&self, panel: &Panel, bars: impl Fn(usize) -> Vec<Bar>) -> DrawResult {
        let looks = Look::policies(self.policies.iter().copied());
        for place in &self.places {
            let bars = bars(place.policy);
            let mut from = place.centre - self.bar_width * bars.len() as f64 / 2.0;
            for Bar { value, half_width, fill, label } in bars {
                let across = (from + BAR_GAP / 2.0, from + self.bar_width - BAR_GAP / 2.0);
                let middle = f64::midpoint(across.0, across.1);
                let top = value + half_width;
                panel.bar(across, (value, top), (looks[place.policy].colour, fill), &label)?;
                panel.whisker([(middle, value - half_width), (middle, top)], INK)?;
                from += self.bar_width;
            }
        }
        Ok(())
    }

    /// Labels of the exit policies, broken into lines as wide as a policy.
    fn exit_lines(&self, area: &Canvas) -> DrawResult<Vec<Vec<String>>> {
        let style = style::text(EXIT_SIZE, INK);
        let exit = |place: &Place| &self.policies[place.policy].exit;
        self.places.iter().map(|place| wrap(area, exit(place), &style, UNITS_PER_POLICY as i32 - 10)).collect()
    }

    fn label_exits(&self, panel: &Panel, exits: &[Vec<String>]) -> DrawResult {
        let [_, _, _, bottom] = panel.plot;
        let style = style::text(EXIT_SIZE, INK).pos(style::BELOW);
        for (place, lines) in self.places.iter().zip(exits) {
            for (row, line) in lines.iter().enumerate() {
                let y = bottom + 12 + row as i32 * EXIT_LINE;
                panel.canvas.draw_text(line, &style, (panel.at_x(place.centre), y))?;
            }
        }
        Ok(())
    }

    fn label_batchings(&self, panel: &Panel, exit_lines: i32) -> DrawResult {
        let [_, _, _, bottom] = panel.plot;
        let style = style::bold_text(BATCHING_SIZE, INK).pos(style::BELOW);
        for group in self.places.chunk_by(|a, b| a.group == b.group) {
            let centre = (group[0].centre + group[group.len() - 1].centre) / 2.0;
            let at = (panel.at_x(centre), bottom + 22 + exit_lines * EXIT_LINE);
            panel.canvas.draw_text(&self.policies[group[0].policy].batching, &style, at)?;
        }
        Ok(())
    }
}
