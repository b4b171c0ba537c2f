//! How values are written on the command line: times, disks, images, labels.

use std::str::FromStr;
use std::time::Duration;

use belljar_node::sandbox::{DiskChoice, ImageChoice};

/// A disk's size, or none.
pub(crate) fn disk(text: &str) -> Result<DiskChoice, String> {
    if text == "none" {
        return Ok(DiskChoice::None);
    }
    text.parse()
        .map(DiskChoice::Size)
        .map_err(|error: belljar_node::size::SizeError| error.to_string())
}

/// An image's path, or none.
#[allow(clippy::unnecessary_wraps)] // The shape clap wants.
pub(crate) fn image(text: &str) -> Result<ImageChoice, String> {
    Ok(if text == "none" {
        ImageChoice::None
    } else {
        ImageChoice::Path(text.into())
    })
}

/// A number and what follows it after `separator`.
pub(crate) fn pair(text: &str, separator: char) -> (&str, Option<&str>) {
    text.split_once(separator)
        .map_or((text, None), |(first, second)| (first, Some(second)))
}

/// `500ms`, `30s`, `5m`, `1h`, or seconds without a suffix; fractions are allowed.
pub(crate) fn time(text: &str) -> Result<Duration, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let unit = match suffix {
        "ms" => 0.001,
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err("write for example 500ms, 30s, 5m or 1h".into()),
    };
    let number: f64 = number
        .parse()
        .map_err(|_| "write for example 500ms, 30s, 5m or 1h".to_owned())?;
    let seconds = number * unit;
    if seconds <= 0.0 {
        return Err("the time must be longer than nothing".into());
    }
    // Ten years: more is no limit.
    if seconds > 3.2e8 {
        return Err("the time is too long".into());
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// Offsets in the two streams of a process, `BYTE[:BYTE]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FromByte {
    pub(crate) stdout: u64,
    pub(crate) stderr: u64,
}

impl FromStr for FromByte {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = |text: &str| {
            text.parse::<u64>()
                .map_err(|_| "write a number of bytes, or two with a colon between".to_owned())
        };
        let (stdout, stderr) = pair(text, ':');
        Ok(Self {
            stdout: number(stdout)?,
            stderr: number(stderr.unwrap_or(stdout))?,
        })
    }
}

/// Virtual processors, and how much of the host's they may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cpus {
    pub(crate) vcpus: u32,
    /// Thousandths of a host CPU; `None`: as much as the vCPUs can.
    pub(crate) limit_milli: Option<u32>,
}

/// A number of processors; a fraction is a limit on the next whole number.
pub(crate) fn cpus(text: &str) -> Result<Cpus, String> {
    let wrong = || "write a number from 0.01 to 32: 1, 2, 0.5, 1.5".to_owned();
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    if whole.is_empty()
        || whole.len() > 2
        || fraction.len() > 3
        || !digits(whole)
        || !digits(fraction)
    {
        return Err(wrong());
    }
    let whole: u32 = whole.parse().map_err(|_| wrong())?;
    let fraction: u32 = format!("{fraction:0<3}").parse().map_err(|_| wrong())?;
    let milli = whole.saturating_mul(1000).saturating_add(fraction);
    if !(10..=32_000).contains(&milli) {
        return Err(wrong());
    }
    Ok(Cpus {
        vcpus: milli.div_ceil(1000),
        limit_milli: (fraction != 0).then_some(milli),
    })
}

/// A name for a sandbox.
pub(crate) fn name(text: &str) -> Result<String, String> {
    belljar_node::state::spec::check_name(text)
        .map(|()| text.to_owned())
        .map_err(|error| error.to_string())
}

/// A label with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Label {
    pub(crate) key: String,
    /// `None`, where labels are asked for: any value.
    pub(crate) value: Option<String>,
}

/// Longest key or value of a label.
const LABEL_MAX: usize = 256;

/// `KEY=VALUE`, or `KEY`.
pub(crate) fn label(text: &str) -> Result<Label, String> {
    let (key, value) = match text.split_once('=') {
        Some((key, value)) => (key, Some(value.to_owned())),
        None => (text, None),
    };
    let too_long = |text: &str| text.len() > LABEL_MAX;
    if key.is_empty() || too_long(key) || value.as_deref().is_some_and(too_long) {
        return Err(format!(
            "write KEY=VALUE, each at most {LABEL_MAX} bytes long"
        ));
    }
    if text.chars().any(char::is_control) {
        return Err("a label has no control characters".into());
    }
    Ok(Label {
        key: key.to_owned(),
        value,
    })
}

/// Labels with their values; one without a value has an empty one.
pub(crate) fn labels(all: &[Label]) -> std::collections::BTreeMap<String, String> {
    all.iter()
        .map(|label| (label.key.clone(), label.value.clone().unwrap_or_default()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use belljar_node::size::Size;

    #[test]
    fn times_are_read() {
        assert_eq!(time("500ms"), Ok(Duration::from_millis(500)));
        assert_eq!(time("1.5"), Ok(Duration::from_millis(1500)));
        assert_eq!(time("2m"), Ok(Duration::from_secs(120)));
        for text in [
            "",
            "s",
            "-1",
            "0",
            "1d",
            "1.2.3",
            "99999999999h",
            "nan",
            "1e9",
        ] {
            assert!(time(text).is_err(), "{text}");
        }
    }

    #[test]
    fn none_is_a_choice() {
        assert_eq!(disk("none"), Ok(DiskChoice::None));
        assert_eq!(disk("2G"), Ok(DiskChoice::Size(Size(2 << 30))));
        assert!(disk("big").is_err());
        assert_eq!(image("none"), Ok(ImageChoice::None));
    }

    #[test]
    fn a_fraction_of_a_processor_is_a_limit() {
        let of = |text| cpus(text).map(|cpus| (cpus.vcpus, cpus.limit_milli));
        assert_eq!(of("2"), Ok((2, None)));
        assert_eq!(of("2.0"), Ok((2, None)));
        assert_eq!(of("0.5"), Ok((1, Some(500))));
        assert_eq!(of("1.25"), Ok((2, Some(1250))));
        for text in [
            "", "0", "0.001", "33", "32.5", "-1", "1e1", ".5", "1.2345", "1.+5", "nan",
        ] {
            assert!(of(text).is_err(), "{text}");
        }
    }

    #[test]
    fn labels_have_a_key() {
        let of = |text| label(text).map(|label| (label.key, label.value));
        assert_eq!(of("a=b=c"), Ok(("a".into(), Some("b=c".into()))));
        assert_eq!(of("a="), Ok(("a".into(), Some(String::new()))));
        assert_eq!(of("a"), Ok(("a".into(), None)));
        for text in ["", "=x", "a=\x1b[2J", &"x".repeat(257)] {
            assert!(of(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bytes_are_of_both_streams_or_of_each() {
        let of = |stdout, stderr| Ok(FromByte { stdout, stderr });
        assert_eq!("7".parse(), of(7, 7));
        assert_eq!("7:9".parse(), of(7, 9));
        for text in ["", ":", "7:", "-1", "1:2:3"] {
            assert!(text.parse::<FromByte>().is_err(), "{text}");
        }
    }
}
