//! The calls, typed: one variant per method and path.
use crate::config::{
    Balloon, BalloonStatsUpdate, BalloonUpdate, BootSource, Console, Drive, DrivePatch, Entropy,
    HintingStart, Logger, MachineConfig, MachinePatch, Metrics, Prepare, Serial, SnapshotCreate,
    SnapshotLoad, SnapshotLookAhead, SnapshotReset, Vsock, WorkingSetRecord, Workplace,
};

/// A call that was understood: its documents are valid each by itself. Whether it fits the
/// moment and the other documents is the [`Configurator`](super::Configurator)'s business.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    GetInstanceInfo,
    GetVersion,
    GetVmConfig,
    GetMachineConfig,
    PutMachineConfig(MachineConfig),
    PatchMachineConfig(MachinePatch),
    PutBootSource(BootSource),
    PutDrive(Drive),
    PatchDrive(DrivePatch),
    PutVsock(Vsock),
    PutEntropy(Entropy),
    GetBalloon,
    PutBalloon(Balloon),
    PatchBalloon(BalloonUpdate),
    GetBalloonStats,
    PatchBalloonStats(BalloonStatsUpdate),
    GetHintingStatus,
    StartHinting(HintingStart),
    StopHinting,
    PutSerial(Serial),
    PutConsole(Console),
    PutLogger(Logger),
    PutMetrics(Metrics),
    Prepare(Prepare),
    PutWorkplace(Workplace),
    Action(Action),
    /// `PATCH /vm {"state": "Paused"}`
    Pause,
    /// `PATCH /vm {"state": "Resumed"}`
    Resume,
    CreateSnapshot(SnapshotCreate),
    LoadSnapshot(SnapshotLoad),
    ResetSnapshot(SnapshotReset),
    RecordWorkingSet(WorkingSetRecord),
    LookAhead(SnapshotLookAhead),
}

/// `PUT /actions`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    InstanceStart,
    FlushMetrics,
    /// Asks the guest to shut down: the power button, where the machine has one.
    SendCtrlAltDel,
    /// Ours: the VMM ends at once, with exit status 20. The API thread sees to it by itself.
    Stop,
}
