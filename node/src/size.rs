//! Sizes as people write them: `512M`, `2G`, `1048576`.

use std::fmt;
use std::str::FromStr;

/// Bytes in a mebibyte.
pub const MIB: u64 = 1 << 20;

/// A number of bytes. Suffixes are binary, as in other tools of this field: `K`, `M`, `G`, `T`,
/// each optionally followed by `iB` or `B`; without a suffix the number counts bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub u64);

/// Why a text is not a size.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SizeError {
    #[error("'{0}' is not a size; write for example 512M or 2G")]
    Malformed(String),
    #[error("'{0}' is larger than any machine")]
    TooLarge(String),
}

impl FromStr for Size {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, SizeError> {
        let malformed = || SizeError::Malformed(text.to_owned());
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, suffix) = text.split_at_checked(digits).ok_or_else(malformed)?;
        if number.is_empty() {
            return Err(malformed());
        }
        let shift = match suffix.to_ascii_lowercase().as_str() {
            "" | "b" => 0,
            "k" | "kb" | "kib" => 10,
            "m" | "mb" | "mib" => 20,
            "g" | "gb" | "gib" => 30,
            "t" | "tb" | "tib" => 40,
            _ => return Err(malformed()),
        };
        let too_large = || SizeError::TooLarge(text.to_owned());
        let number: u64 = number.parse().map_err(|_| too_large())?;
        number
            .checked_mul(1 << shift)
            .filter(|bytes| *bytes <= 1 << 60)
            .map(Size)
            .ok_or_else(too_large)
    }
}

impl fmt::Display for Size {
    /// The shortest exact form: `512M`, `2G`, `1536`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, suffix) in [(40, "T"), (30, "G"), (20, "M"), (10, "K")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return write!(f, "{}{suffix}", self.0 >> shift);
            }
        }
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn suffixes_are_binary() {
        for (text, bytes) in [
            ("0", 0),
            ("17", 17),
            ("4k", 4096),
            ("512M", 512 * MIB),
            ("512MiB", 512 * MIB),
            ("2g", 2048 * MIB),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Size(bytes)), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_by_name() {
        for text in ["", "M", "-1M", "1.5G", "2X", "2 G", "ff", "1GG", "½G"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::Malformed(text.into())));
        }
        for text in ["99999999999999999999", "9999999999T"] {
            assert_eq!(text.parse::<Size>(), Err(SizeError::TooLarge(text.into())));
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_reads_back(bytes in 0u64..=1 << 60) {
            prop_assert_eq!(Size(bytes).to_string().parse(), Ok(Size(bytes)));
        }

        #[test]
        fn any_text_is_answered(text in ".{0,24}") {
            let _ = text.parse::<Size>();
        }
    }
}
