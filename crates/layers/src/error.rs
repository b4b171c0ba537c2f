//! What can go wrong, and with which file.
use std::io;

use crate::MAX_LAYERS;
use crate::format::{Damage, LayerId};

/// Every message names the file as its opener called it.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{layer}: cannot {what}: {source}")]
    Io {
        layer: String,
        what: &'static str,
        source: io::Error,
    },
    #[error("{layer}: it is no usable disk layer: {damage}")]
    Damaged { layer: String, damage: Damage },
    #[error("{layer}: it has {found} bytes instead of {wanted}: it was cut or is no disk layer")]
    Length {
        layer: String,
        found: u64,
        wanted: u64,
    },
    #[error("{layer}: it is for a disk of {found} bytes, and this one has {wanted}")]
    Size {
        layer: String,
        found: u64,
        wanted: u64,
    },
    #[error(
        "{layer}: it lies over layer {wanted}, and the one below it is {found}; layers are named lowest first"
    )]
    Order {
        layer: String,
        found: LayerId,
        wanted: LayerId,
    },
    #[error(
        "{layer}: it is frozen, and a writable drive needs a new layer on top: name an empty file as the last one"
    )]
    Frozen { layer: String },
    #[error(
        "{layer}: it is not frozen; only the last layer of a writable drive may be one that is written"
    )]
    NotFrozen { layer: String },
    #[error("a disk has at most {MAX_LAYERS} layers; merge some of them first")]
    TooMany,
    #[error("a layered disk needs at least one layer")]
    None,
    #[error(
        "{size} bytes are no size for a layered disk: it has whole clusters of 4 KiB, at most 1 TiB"
    )]
    BadSize { size: u64 },
    #[error("{layer}: it does not have the same clusters as the layers it is to replace")]
    OtherClusters { layer: String },
    #[error("bytes {offset} to {end} are not whole clusters of the disk")]
    Range { offset: u64, end: u64 },
    #[error(
        "{layer}: writing it durably failed before, so that what it lost is not known; it takes no more"
    )]
    Poisoned { layer: String },
}

pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn io(layer: &str, what: &'static str) -> impl FnOnce(io::Error) -> Self {
        let layer = layer.to_owned();
        move |source| Self::Io {
            layer,
            what,
            source,
        }
    }

    pub(crate) fn damaged(layer: &str) -> impl FnOnce(Damage) -> Self {
        let layer = layer.to_owned();
        move |damage| Self::Damaged { layer, damage }
    }
}
