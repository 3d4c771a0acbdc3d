//! The highest request rate by policy.

use crate::axis::{Axis, three_digits};
use crate::bars::{Bar, Policies};
use crate::canvas;
use crate::figure::Kind;
use crate::legend::{Entry, Sample};
use crate::pareto::Estimate;
use crate::style::{Fill, MUTED};
use crate::{Error, Figure, Policy};

/// The highest rates of one policy.
#[derive(Clone, Debug)]
pub struct PolicyCapacity {
    /// Batching and exit policy.
    pub policy: Policy,
    /// Requests per second on each system; `None` where it was not searched, 0 where no rate meets the objectives.
    pub rates: Vec<Option<Estimate>>,
}

/// Draws a bar with its confidence interval for each policy and system.
///
/// # Errors
/// No systems, no policies, a policy whose number of rates differs from the number of systems, or a negative rate.
pub fn capacities(figure: &Figure, systems: &[String], policies: &[PolicyCapacity]) -> Result<(), Error> {
    figure.require("systems", systems)?;
    figure.require("policies", policies)?;
    for PolicyCapacity { policy, rates } in policies {
        let what = format!("capacity of `{}`", policy.label());
        figure.require_length(&what, rates, systems.len())?;
        let known = rates.iter().flatten();
        figure.check(&what, Kind::NonNegative, known.clone().map(|rate| rate.value))?;
        figure.check(
            &format!("confidence interval of {what}"),
            Kind::NonNegative,
            known.map(|rate| rate.half_width),
        )?;
    }
    let legend: Vec<Entry> = match systems {
        [_] => Vec::new(),
        _ => systems
            .iter()
            .enumerate()
            .map(|(system, name)| Entry::new(name, Sample::Fill(MUTED, Fill::series(system))))
            .collect(),
    };
    let chart = Policies::new(policies.iter().map(|of| &of.policy).collect(), systems.len());
    let bars = |policy: usize| {
        let bar = |(system, rate): (usize, &Option<Estimate>)| {
            rate.map(|Estimate { value, half_width }| Bar {
                value,
                half_width,
                fill: Fill::series(system),
                label: three_digits(value),
            })
        };
        policies[policy].rates.iter().enumerate().filter_map(bar).collect()
    };
    canvas::draw(figure, (chart.width(), 900), &legend, |area| {
        let tops = policies.iter().flat_map(|of| of.rates.iter().flatten()).map(|rate| rate.value + rate.half_width);
        let y = Axis::from_zero("highest rate (requests/s)", tops.map(|top| 1.06 * top));
        let panels = chart.panels(area, &[y])?;
        chart.draw(&panels[0], bars)
    })
}
