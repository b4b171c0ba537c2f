//! Which queue is which.
//!
//! virtio 1.2 §5.5.2 numbers all five, but drivers (Linux among them) number only those whose
//! feature was agreed, one after the other; that is also what current drafts say.

pub(super) const F_STATS: u64 = 1 << 1;
pub(super) const F_DEFLATE_ON_OOM: u64 = 1 << 2;
pub(super) const F_HINTING: u64 = 1 << 3;
pub(super) const F_REPORTING: u64 = 1 << 5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Stats,
    Hinting,
    Reporting,
}

impl Role {
    const ALL: [(Self, u64); 5] = [
        (Self::Inflate, 0),
        (Self::Deflate, 0),
        (Self::Stats, F_STATS),
        (Self::Hinting, F_HINTING),
        (Self::Reporting, F_REPORTING),
    ];

    /// The roles of the queues in their order, with `features` agreed.
    pub(super) fn of(features: u64) -> impl Iterator<Item = Self> {
        Self::ALL
            .into_iter()
            .filter(move |(_, needs)| features & needs == *needs)
            .map(|(role, _)| role)
    }

    /// The role of queue `index`.
    pub(super) fn at(features: u64, index: usize) -> Option<Self> {
        Self::of(features).nth(index)
    }

    /// The index of the queue with this role.
    pub(super) fn index(self, features: u64) -> Option<usize> {
        Self::of(features).position(|role| role == self)
    }

    pub(super) fn queue_size(self) -> u16 {
        match self {
            // One request at a time; Linux asks for room for the 32 ranges of one report.
            Self::Inflate | Self::Deflate | Self::Reporting => 32,
            Self::Stats => 2,
            // A block that finds no room is not hinted: as many as fit.
            Self::Hinting => 256,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_without_a_feature_take_no_number() {
        let all = F_STATS | F_HINTING | F_REPORTING;
        assert_eq!(Role::of(all).count(), 5);
        assert_eq!(Role::at(all, 4), Some(Role::Reporting));
        assert_eq!(Role::at(F_REPORTING, 2), Some(Role::Reporting));
        assert_eq!(Role::at(F_REPORTING, 3), None);
        assert_eq!(Role::Hinting.index(F_HINTING | F_STATS), Some(3));
        assert_eq!(Role::Hinting.index(0), None);
    }
}
