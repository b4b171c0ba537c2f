//! Processes and terminals in a guest, from outside: started, attached to, listed, signalled, waited for.
//!
//! [`session`] is the pure machine behind a process that one is connected with, [`pump`] connects it with
//! descriptors of the host, [`dial`] makes its connections. The other calls are one question and one
//! answer each.

mod calls;
mod dial;
mod error;
mod keys;
mod login;
mod modes;
mod outcome;
mod pump;
mod retry;
pub mod session;
mod signals;
mod sink;
mod spec;
pub mod terminal;

use std::time::Duration;

pub use calls::{
    Selector, SelectorError, check_name, forget, inspect, list, resize, screen, signal, wait,
};
pub use dial::{Dial, DirectDial};
pub use error::SessionError;
pub use keys::{DetachKeys, KeysError};
pub use login::{is_login_shell, login_shell};
pub use outcome::{Outcome, exit_status};
pub use pump::{Io, Notice, OnInterrupt, Patience, SIGNALS, TERMINAL_SIGNALS, run};
pub use session::{Channel, Session, Started};
pub use signals::signal_number;
pub use spec::{ExecSpec, Rlimit, RlimitError, given_name};

/// Between SIGTERM and SIGKILL when the time of a process is over.
const GRACE: Duration = Duration::from_secs(2);
