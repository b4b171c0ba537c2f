//! `/balloon` and what belongs to it.
use serde::{Deserialize, Serialize};

/// `PUT /balloon`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Target size in MiB; must be less than the guest's RAM (checked at the start).
    pub amount_mib: u32,
    pub deflate_on_oom: bool,
    /// Seconds between two statistics; 0: no statistics queue.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    #[serde(default)]
    pub free_page_hinting: bool,
    #[serde(default)]
    pub free_page_reporting: bool,
}

/// `PATCH /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonUpdate {
    /// New target size in MiB.
    pub amount_mib: u32,
}

/// `PATCH /balloon/statistics`. After the start the interval can change, but not to or from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsUpdate {
    pub stats_polling_interval_s: u16,
}

/// `PATCH /balloon/hinting/start`; the body may be empty.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HintingStart {
    /// Whether the device acknowledges by itself when the guest has finished a run.
    #[serde(default = "yes")]
    pub acknowledge_on_stop: bool,
}

impl Default for HintingStart {
    fn default() -> Self {
        Self {
            acknowledge_on_stop: true,
        }
    }
}

fn yes() -> bool {
    true
}

/// Answer to `GET /balloon/hinting/status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HintingStatus {
    /// The last command the host gave.
    pub host_cmd: u32,
    /// The last command the guest answered to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_cmd: Option<u32>,
}

/// Answer to `GET /balloon/statistics`. Sizes in bytes unless the name says otherwise; a value
/// the guest did not report is left out (virtio 1.2 §5.5.6.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BalloonStats {
    /// 4 KiB pages.
    pub target_pages: u32,
    pub actual_pages: u32,
    pub target_mib: u32,
    pub actual_mib: u32,
    #[serde(flatten)]
    pub guest: GuestStats,
}

macro_rules! guest_stats {
    ($($(#[$doc:meta])* $tag:literal $name:ident,)*) => {
        /// What the guest's driver reports, by tag of VIRTIO_BALLOON_S_*.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
        pub struct GuestStats {
            $($(#[$doc])* #[serde(skip_serializing_if = "Option::is_none")] pub $name: Option<u64>,)*
        }

        impl GuestStats {
            /// Takes one statistic in; false if the tag is unknown (then it is to be ignored).
            pub fn set(&mut self, tag: u16, value: u64) -> bool {
                match tag {
                    $($tag => self.$name = Some(value),)*
                    _ => return false,
                }
                true
            }
        }
    };
}

guest_stats! {
    0 swap_in,
    1 swap_out,
    2 major_faults,
    3 minor_faults,
    4 free_memory,
    5 total_memory,
    6 available_memory,
    7 disk_caches,
    8 hugetlb_allocations,
    9 hugetlb_failures,
    10 oom_kill,
    11 alloc_stall,
    12 async_scan,
    13 direct_scan,
    14 async_reclaim,
    15 direct_reclaim,
}
