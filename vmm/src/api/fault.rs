//! What a call ends with.
use serde::Serialize;

/// HTTP status of a refused call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// 400: everything that is wrong with a request or its moment, unknown paths included.
    BadRequest,
    /// 413: longer than the limit.
    PayloadTooLarge,
    /// 504: nobody knows whether the call took effect, or will.
    GatewayTimeout,
}

impl Status {
    pub fn code(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::PayloadTooLarge => 413,
            Self::GatewayTimeout => 504,
        }
    }

    pub(super) fn reason(self) -> &'static str {
        match self {
            Self::BadRequest => "Bad Request",
            Self::PayloadTooLarge => "Payload Too Large",
            Self::GatewayTimeout => "Gateway Timeout",
        }
    }
}

/// A refused call; `message` becomes the `fault_message`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    pub status: Status,
    pub message: String,
}

/// Longest `fault_message`, in bytes: messages quote what the client sent.
const MAX_MESSAGE: usize = 2048;

impl Fault {
    /// A 400.
    pub fn new(message: impl Into<String>) -> Self {
        Self::with_status(Status::BadRequest, message.into())
    }

    /// A 504.
    pub(super) fn unanswered(message: impl Into<String>) -> Self {
        Self::with_status(Status::GatewayTimeout, message.into())
    }

    pub(super) fn with_status(status: Status, mut message: String) -> Self {
        if message.len() > MAX_MESSAGE {
            let mut end = MAX_MESSAGE;
            while !message.is_char_boundary(end) {
                end = end.saturating_sub(1);
            }
            message.truncate(end);
            message.push('…');
        }
        Self { status, message }
    }

    /// The JSON body: `{"fault_message": …}`.
    pub(super) fn to_json(&self) -> String {
        #[derive(Serialize)]
        struct Wire<'a> {
            fault_message: &'a str,
        }
        serde_json::to_string(&Wire {
            fault_message: &self.message,
        })
        .unwrap_or_else(|_| String::from(r#"{"fault_message":""}"#))
    }
}

/// Any error can become a 400 with its text: `machine.start().map_err(Fault::from_error)`.
impl Fault {
    /// The error with all its causes, joined by `: `.
    #[allow(clippy::needless_pass_by_value)] // for `map_err(Fault::from_error)`
    pub fn from_error<E: std::error::Error>(error: E) -> Self {
        let mut message = error.to_string();
        let mut cause = error.source();
        while let Some(inner) = cause {
            let text = inner.to_string();
            if !message.ends_with(&text) {
                message.push_str(": ");
                message.push_str(&text);
            }
            cause = inner.source();
        }
        Self::new(message)
    }
}

/// What an accepted call returns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// 204
    Empty,
    /// 200 with this JSON text.
    Json(String),
}

impl Body {
    /// A 200 with `value`.
    pub fn json<T: Serialize>(value: &T) -> Result<Self, Fault> {
        serde_json::to_string(value)
            .map(Self::Json)
            .map_err(|e| Fault::new(format!("cannot write the answer as JSON: {e}")))
    }
}
