//! Summaries of samples that are robust against other work on the machine.

/// Replaces numbers by the nearest non-decreasing ones (least squares, by pooling adjacent violators).
pub(super) fn make_rising(numbers: &mut [f64]) {
    let mut pools: Vec<(f64, usize)> = Vec::new();
    for &number in numbers.iter() {
        let mut pool = (number, 1);
        while let Some(&(before, count)) = pools.last().filter(|(before, _)| *before > pool.0) {
            pool = ((before * count as f64 + pool.0 * pool.1 as f64) / (count + pool.1) as f64, count + pool.1);
            pools.pop();
        }
        pools.push(pool);
    }
    let pooled = pools.into_iter().flat_map(|(number, count)| std::iter::repeat_n(number, count));
    numbers.iter_mut().zip(pooled).for_each(|(number, pooled)| *number = pooled);
}

/// Mean of the middle half, and half the distance between the quartiles. With two speed modes of a machine, the median
/// is in either of them by chance; the mean is not. Both ignore single runs that other work interrupts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Summary {
    pub middle: f64,
    pub spread: f64,
    pub repeats: u32,
}

impl Summary {
    pub fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_unstable_by(f64::total_cmp);
        let quantile = |share: f64| {
            let place = share * (sorted.len() - 1) as f64;
            let (below, above) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
            below + (above - below) * place.fract()
        };
        let middle = &sorted[sorted.len() / 4..sorted.len() - sorted.len() / 4];
        Self {
            middle: middle.iter().sum::<f64>() / middle.len() as f64,
            spread: (quantile(0.75) - quantile(0.25)) / 2.0,
            repeats: sorted.len() as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn summaries_are_means_of_the_middle_half_and_half_quartile_distances() {
        let summary = Summary::of(&[5.0, 1.0, 2.0, 4.0, 100.0]);
        assert_eq!(summary, Summary { middle: 11.0 / 3.0, spread: 1.5, repeats: 5 });
        assert_eq!(Summary::of(&[3.0]), Summary { middle: 3.0, spread: 0.0, repeats: 1 });
    }

    #[test]
    fn numbers_that_fall_are_pooled_with_those_before() {
        let mut numbers = [1.0, 5.0, 3.0, 4.0, 9.0, 2.0];
        make_rising(&mut numbers);
        assert_eq!(numbers, [1.0, 4.0, 4.0, 4.0, 5.5, 5.5]);
        let mut falling = [3.0, 2.0, 1.0];
        make_rising(&mut falling);
        assert_eq!(falling, [2.0; 3]);
    }
}
