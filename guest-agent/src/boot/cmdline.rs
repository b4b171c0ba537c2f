//! The parts of the kernel command line that are meant for the agent.

/// `belljar.*` parameters. The last of equal names counts; an empty value is none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Parameters {
    /// `belljar.image=`: block device with the read-only EROFS image.
    pub(crate) image: Option<String>,
    /// `belljar.disk=`: block device with the writable ext4 file system.
    pub(crate) disk: Option<String>,
    /// `belljar.hostname=`
    pub(crate) hostname: Option<String>,
}

/// Parses `/proc/cmdline`.
pub(crate) fn parse(line: &str) -> Parameters {
    let mut parameters = Parameters::default();
    for word in line.split_ascii_whitespace() {
        let Some((name, value)) = word.split_once('=') else {
            continue;
        };
        let value = Some(value.trim_matches('"'))
            .filter(|value| !value.is_empty() && !value.contains('\0'))
            .map(str::to_owned);
        match name {
            "belljar.image" => parameters.image = value,
            "belljar.disk" => parameters.disk = value,
            "belljar.hostname" => parameters.hostname = value,
            _ => {}
        }
    }
    parameters
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ours_are_found_among_others() {
        let line = "console=hvc0 belljar.image=/dev/vda quiet belljar.disk=/dev/vdb root=x\n";
        let parameters = parse(line);
        assert_eq!(parameters.image.as_deref(), Some("/dev/vda"));
        assert_eq!(parameters.disk.as_deref(), Some("/dev/vdb"));
        assert_eq!(parameters.hostname, None);
    }

    #[test]
    fn the_last_one_counts_and_empty_is_none() {
        let parameters =
            parse("belljar.image=/dev/vda belljar.image= belljar.disk=a belljar.disk=b");
        assert_eq!(parameters.image, None);
        assert_eq!(parameters.disk.as_deref(), Some("b"));
        assert_eq!(
            parse("belljar.image xbelljar.image=/dev/vda"),
            Parameters::default()
        );
    }

    proptest! {
        #[test]
        fn any_line_is_parsed(line in "\\PC{0,200}") {
            let parameters = parse(&line);
            prop_assert!(parameters.image.is_none_or(|image| !image.is_empty()));
        }
    }
}
