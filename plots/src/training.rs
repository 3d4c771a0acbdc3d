//! Loss over training steps, by loop.

use plotters::prelude::*;

use crate::axis::Axis;
use crate::canvas::{self, WIDTH};
use crate::figure::Kind;
use crate::legend::{Entry, Sample};
use crate::panel::Panel;
use crate::style::{self, Dash, Look};
use crate::{Error, Figure};

/// Losses of one exit, normally one loop.
#[derive(Clone, Debug)]
pub struct LossCurve {
    /// Name of the loop.
    pub name: String,
    /// `(step, nats per token)` on training batches, in order.
    pub train: Vec<(f64, f64)>,
    /// `(step, nats per token)` on the validation set, in order; may be empty.
    pub validation: Vec<(f64, f64)>,
}

/// Draws training losses as thin lines marked at their ends, and validation losses as dashed lines with markers.
///
/// # Errors
/// No curves, a curve without training losses, or a value that is not finite.
pub fn losses(figure: &Figure, curves: &[LossCurve]) -> Result<(), Error> {
    figure.require("curves", curves)?;
    for curve in curves {
        let name = &curve.name;
        figure.require(&format!("training loss of `{name}`"), &curve.train)?;
        for (what, points) in [("training", &curve.train), ("validation", &curve.validation)] {
            if !points.is_empty() {
                let steps = points.iter().map(|p| p.0);
                figure.check(&format!("{what} step of `{name}`"), Kind::Finite, steps)?;
                let losses = points.iter().map(|p| p.1);
                figure.check(&format!("{what} loss of `{name}`"), Kind::Finite, losses)?;
            }
        }
    }
    let points = curves.iter().flat_map(|c| c.train.iter().chain(&c.validation));
    let x = Axis::linear("training step", points.clone().map(|p| p.0));
    let y = Axis::auto("loss (nats per token)", points.map(|p| p.1));
    canvas::draw(figure, (WIDTH, 1000), &legend(curves), |area| {
        let panel = Panel::new(area, &x, &y)?;
        for (index, curve) in curves.iter().enumerate() {
            let (train, _) = looks(index);
            let style = train.colour.mix(0.7).stroke_width(2);
            style::stroke(area, &panel.place(&curve.train), style, train.dash)?;
            panel.markers(&curve.train[curve.train.len() - 1..], train)?;
        }
        for (index, curve) in curves.iter().enumerate() {
            let (_, validation) = looks(index);
            panel.marked_line(&curve.validation, validation)?;
        }
        Ok(())
    })
}

/// Styles of a curve's training and validation losses.
fn looks(index: usize) -> (Look, Look) {
    let with_dash = |dash| Look { dash, ..Look::series(index) };
    (with_dash(Dash::Solid), with_dash(Dash::Dashed))
}

/// Entries for all training losses, then for the validation losses.
fn legend(curves: &[LossCurve]) -> Vec<Entry> {
    let train = |(index, curve): (usize, &LossCurve)| {
        Entry::new(format!("{}, train", curve.name), Sample::MarkedLine(looks(index).0))
    };
    let validation = |(index, curve): (usize, &LossCurve)| {
        let entry = Entry::new(format!("{}, validation", curve.name), Sample::MarkedLine(looks(index).1));
        (!curve.validation.is_empty()).then_some(entry)
    };
    let trains = curves.iter().enumerate().map(train);
    trains.chain(curves.iter().enumerate().filter_map(validation)).collect()
}
