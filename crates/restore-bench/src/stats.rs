//! Order statistics of samples.

/// What is told of a measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    pub n: usize,
    pub min: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// `None`: there are no samples.
#[must_use]
pub fn summarise(samples: &[f64]) -> Option<Summary> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some(Summary {
        n: sorted.len(),
        min: *sorted.first()?,
        p50: quantile(&sorted, 50)?,
        p90: quantile(&sorted, 90)?,
        p99: quantile(&sorted, 99)?,
        max: *sorted.last()?,
    })
}

/// The cumulative distribution: each sample in order, with the share of all that are not above it.
#[must_use]
pub fn distribution(samples: &[f64]) -> Vec<(f64, f64)> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let count = sorted.len() as f64;
    let ranked = sorted.iter().enumerate();
    ranked
        .map(|(rank, value)| (*value, rank.saturating_add(1) as f64 / count))
        .collect()
}

/// The smallest sample that at least `percent` of all are not above (nearest rank).
fn quantile(sorted: &[f64], percent: usize) -> Option<f64> {
    let rank = sorted.len().saturating_mul(percent).div_ceil(100);
    sorted.get(rank.saturating_sub(1)).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nearest_rank() {
        let samples: Vec<f64> = (1..=10).rev().map(f64::from).collect();
        let expected = Summary {
            n: 10,
            min: 1.0,
            p50: 5.0,
            p90: 9.0,
            p99: 10.0,
            max: 10.0,
        };
        assert_eq!(summarise(&samples), Some(expected));
        assert_eq!(summarise(&[4.0]).map(|s| (s.p50, s.p90)), Some((4.0, 4.0)));
        assert_eq!(summarise(&[]), None);
    }

    #[test]
    fn the_distribution_ends_at_all() {
        let points = distribution(&[3.0, 1.0, 2.0, 2.0]);
        assert_eq!(points, [(1.0, 0.25), (2.0, 0.5), (2.0, 0.75), (3.0, 1.0)]);
        assert_eq!(distribution(&[]), []);
    }
}
