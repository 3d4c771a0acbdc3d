//! Pace of a machine: how much slower passes are than in its profile, over time.

use traces::Nanos;

/// Factors on the times of passes, each valid from its time on until the next one.
#[derive(Clone, Debug, PartialEq)]
pub struct Pace(Vec<(Nanos, f64)>);

impl Pace {
    /// Pace from factors measured at points in time, in ascending order. Each factor is valid from halfway after the
    /// previous point to halfway before the next. Without points, passes take the time of the profile.
    pub fn measured_at(points: &[(Nanos, f64)]) -> Self {
        let from = |index: usize| match index {
            0 => Nanos::ZERO,
            _ => Nanos((points[index - 1].0.0 + points[index].0.0) / 2),
        };
        Self((0..points.len()).map(|index| (from(index), points[index].1)).collect())
    }

    /// Duration of a pass that starts `now` and takes `elapsed` by the profile.
    pub fn stretch(&self, now: Nanos, elapsed: Nanos) -> Nanos {
        let (mut at, mut work) = (now, elapsed.0 as f64);
        let mut index = self.0.partition_point(|(from, _)| *from <= now).saturating_sub(1);
        while let Some(&(_, pace)) = self.0.get(index) {
            let lasts = self.0.get(index + 1).map_or(f64::INFINITY, |(next, _)| next.since(at).0 as f64);
            if work * pace <= lasts {
                return at.since(now) + Nanos((work * pace).round() as u64);
            }
            work -= lasts / pace;
            index += 1;
            at = self.0[index].0;
        }
        elapsed
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pass_takes_each_pace_for_as_long_as_that_lasts() {
        let pace = Pace::measured_at(&[(Nanos(100), 1.0), (Nanos(300), 2.0), (Nanos(500), 0.5)]);
        let stretched = |now, elapsed| pace.stretch(Nanos(now), Nanos(elapsed)).0;
        assert_eq!(stretched(0, 150), 150, "the first pace holds from the start to 200");
        assert_eq!(stretched(200, 50), 100, "twice as long between 200 and 400");
        // 100 of work until 200, 100 more until 400, and 50 in half the time.
        assert_eq!(stretched(100, 250), 100 + 200 + 25);
        assert_eq!(stretched(1_000_000, 50), 25, "the last pace holds for ever");
    }

    #[test]
    fn a_machine_of_which_nothing_was_measured_is_as_fast_as_its_profile() {
        assert_eq!(Pace::measured_at(&[]).stretch(Nanos(5), Nanos(70)), Nanos(70));
    }
}
