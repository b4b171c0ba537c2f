//! How a forwarding is written: `[HOST:]PORT[:[GUESTHOST:]GUESTPORT]`.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use belljar_protocol::v1;

/// Longest path of a Unix socket.
const PATH_MAX: usize = 107;

/// Where on this machine connections are taken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Listen {
    /// Port 0: a free one.
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// Where in the guest they go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// An address that the guest can reach; `None`: its loopback.
    Tcp(Option<IpAddr>, u16),
    /// A path, or `@` and an abstract name.
    Unix(String),
}

/// A way from this machine into the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forward {
    pub listen: Listen,
    pub target: Target,
}

/// A forwarding cannot be understood.
#[derive(Debug, thiserror::Error)]
#[error(
    "'{text}': {reason}; write PORT, PORT:GUESTPORT, HOST:PORT:GUESTPORT, PORT:GUESTHOST:GUESTPORT or PORT:/SOCKET/IN/THE/GUEST"
)]
pub struct ForwardSyntax {
    text: String,
    reason: &'static str,
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => path.display().fmt(f),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(None, port) => port.fmt(f),
            Self::Tcp(Some(host), port) => SocketAddr::new(*host, *port).fmt(f),
            Self::Unix(path) => path.fmt(f),
        }
    }
}

/// As it is written, so that it can be read back.
impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.listen, self.target)
    }
}

impl Target {
    /// As the agent wants it.
    #[must_use]
    pub fn call(&self) -> v1::connect::Target {
        match self {
            Self::Tcp(host, port) => v1::connect::Target::Tcp(v1::TcpTarget {
                host: host.map_or_else(String::new, |host| host.to_string()),
                port: u32::from(*port),
            }),
            Self::Unix(path) => v1::connect::Target::Unix(path.as_bytes().to_vec()),
        }
    }
}

/// The address that a listener has unless said otherwise: this machine only.
const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

impl FromStr for Forward {
    type Err = ForwardSyntax;

    fn from_str(text: &str) -> Result<Self, ForwardSyntax> {
        let wrong = |reason| ForwardSyntax {
            text: text.to_owned(),
            reason,
        };
        if text.starts_with('/') {
            let (path, target) = split_path(text)
                .and_then(|(path, target)| Some((path, parse_target(target)?)))
                .ok_or_else(|| wrong("after the path there must be a port of the guest"))?;
            if path.len() > PATH_MAX {
                return Err(wrong("the path is too long for a socket"));
            }
            let listen = Listen::Unix(PathBuf::from(path));
            return Ok(Self { listen, target });
        }
        let (host, rest) = split_host(text).ok_or_else(|| wrong("the host is no IP address"))?;
        let (port, target) = rest
            .split_once(':')
            .map_or((rest, None), |(port, target)| (port, Some(target)));
        let port: u16 = port.parse().map_err(|_| wrong("there is no port"))?;
        let target = match target {
            None if port == 0 => return Err(wrong("the guest's port is missing")),
            None => Target::Tcp(None, port),
            Some(target) => {
                parse_target(target).ok_or_else(|| wrong("the guest's address or port is none"))?
            }
        };
        let listen = Listen::Tcp(SocketAddr::new(host, port));
        Ok(Self { listen, target })
    }
}

/// `[ADDRESS]:REST`, `ADDRESS:REST` or `REST`.
fn split_host(text: &str) -> Option<(IpAddr, &str)> {
    if let Some(text) = text.strip_prefix('[') {
        let (host, rest) = text.split_once("]:")?;
        return Some((host.parse().ok()?, rest));
    }
    match text.split_once(':') {
        Some((first, rest)) if !first.bytes().all(|byte| byte.is_ascii_digit()) => {
            let host = if first == "localhost" {
                HERE
            } else {
                first.parse().ok()?
            };
            Some((host, rest))
        }
        _ => Some((HERE, text)),
    }
}

/// `/PATH:[ADDRESS:]PORT`. The path may have colons, too.
fn split_path(text: &str) -> Option<(&str, &str)> {
    let (rest, port) = text.rsplit_once(':')?;
    let begin = if rest.ends_with(']') {
        rest.rfind(":[")
    } else {
        rest.rfind(':')
    };
    let with_address =
        begin.and_then(|at| Some((text.get(..at)?, text.get(at.saturating_add(1)..)?)));
    with_address
        .filter(|(_, target)| target.parse::<SocketAddr>().is_ok())
        .or(Some((rest, port)))
}

fn parse_target(text: &str) -> Option<Target> {
    match text.as_bytes().first()? {
        b'/' | b'@' if text.len() <= PATH_MAX => Some(Target::Unix(text.to_owned())),
        b'/' | b'@' => None,
        _ => {
            let (host, port) = match text.parse::<SocketAddr>() {
                Ok(address) => (Some(address.ip()), address.port()),
                Err(_) => (None, text.parse().ok()?),
            };
            (port != 0).then_some(Target::Tcp(host, port))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(text: &str) -> String {
        text.parse::<Forward>().unwrap().to_string()
    }

    #[test]
    fn every_form_is_understood() {
        for (text, meant) in [
            ("8080", "127.0.0.1:8080:8080"),
            ("8080:80", "127.0.0.1:8080:80"),
            ("0:80", "127.0.0.1:0:80"),
            ("0.0.0.0:8080:80", "0.0.0.0:8080:80"),
            ("localhost:8080", "127.0.0.1:8080:8080"),
            ("192.0.2.1:8080", "192.0.2.1:8080:8080"),
            ("[::1]:8080:80", "[::1]:8080:80"),
            ("8080:/run/x.sock", "127.0.0.1:8080:/run/x.sock"),
            ("8080:@name", "127.0.0.1:8080:@name"),
            ("/tmp/x:80", "/tmp/x:80"),
            ("8080:127.0.0.2:80", "127.0.0.1:8080:127.0.0.2:80"),
            ("0.0.0.0:8080:10.0.0.7:80", "0.0.0.0:8080:10.0.0.7:80"),
            ("8080:[fe80::1]:80", "127.0.0.1:8080:[fe80::1]:80"),
            ("[::1]:8080:[::2]:80", "[::1]:8080:[::2]:80"),
            ("/tmp/x:127.0.0.2:80", "/tmp/x:127.0.0.2:80"),
            ("/tmp/x:[::2]:80", "/tmp/x:[::2]:80"),
            ("/tmp/a:b:80", "/tmp/a:b:80"),
        ] {
            assert_eq!(written(text), meant);
            assert_eq!(written(meant), meant);
        }
    }

    #[test]
    fn what_makes_no_sense_is_told() {
        for text in [
            "",
            "0",
            "x",
            "8080:",
            "8080:0",
            ":80",
            "70000",
            "80:70000",
            "host:1:2",
            "[::1]",
            "/tmp/x",
            "1:2:3",
            "80:127.0.0.2",
            "80:127.0.0.2:0",
            "80:name:80",
            "80:::1:80",
        ] {
            let error = text.parse::<Forward>().unwrap_err().to_string();
            assert!(error.contains("write PORT"), "{error}");
        }
    }

    #[test]
    fn an_address_of_the_guest_is_passed_on() {
        let host = |text: &str| match text.parse::<Forward>().unwrap().target.call() {
            v1::connect::Target::Tcp(tcp) => (tcp.host, tcp.port),
            v1::connect::Target::Unix(_) => panic!("{text}"),
        };
        assert_eq!(host("8080"), (String::new(), 8080));
        assert_eq!(host("1:127.0.0.2:80"), ("127.0.0.2".to_owned(), 80));
        assert_eq!(host("/x:[::2]:80"), ("::2".to_owned(), 80));
        let written: Forward = "/x:[::2]:80".parse().unwrap();
        assert_eq!(written.listen, Listen::Unix("/x".into()));
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "[0-9:/@\\[\\]a-z.é]{0,30}") {
            let _ = text.parse::<Forward>();
        }
    }
}
