//! Order statistics of samples.

/// What the table shows of a measure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    pub(crate) n: usize,
    pub(crate) min: f64,
    pub(crate) p50: f64,
    pub(crate) p90: f64,
    pub(crate) max: f64,
}

/// `None`: there are no samples.
pub(crate) fn summarise(samples: &[f64]) -> Option<Summary> {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    Some(Summary {
        n: sorted.len(),
        min: *sorted.first()?,
        p50: quantile(&sorted, 50)?,
        p90: quantile(&sorted, 90)?,
        max: *sorted.last()?,
    })
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
            max: 10.0,
        };
        assert_eq!(summarise(&samples), Some(expected));
        assert_eq!(summarise(&[4.0]).map(|s| (s.p50, s.p90)), Some((4.0, 4.0)));
        assert_eq!(summarise(&[]), None);
    }
}
