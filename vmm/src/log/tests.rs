//! Tests of the log. Lines are formatted without the global settings where possible; one test
//! uses them, as one process has one log.
use std::io::Read;

use super::*;

const HERE: Origin = Origin {
    module: "belljar_vmm::log::tests",
    file: "log/tests.rs",
    line: 7,
};

fn settings() -> Settings {
    Settings {
        id: "box".into(),
        show_level: true,
        show_origin: false,
        module: String::new(),
        output: None,
    }
}

fn formatted(text: &str, settings: &Settings) -> String {
    let mut line = Line::new();
    let now = UNIX_EPOCH + Duration::from_micros(1_795_302_185_000_123);
    header(&mut line, now, settings, Level::Warn, HERE).unwrap();
    write!(Escaped(&mut line), "{text}").unwrap();
    String::from_utf8(line.finish().to_vec()).unwrap()
}

#[test]
fn a_line_has_time_id_and_level() {
    assert_eq!(
        formatted("hello", &settings()),
        "2026-11-21T23:03:05.000123Z [box:Warning] hello\n"
    );
    let all = Settings {
        show_level: false,
        show_origin: true,
        ..settings()
    };
    assert!(formatted("x", &all).ends_with("Z [box:log/tests.rs:7] x\n"));
}

#[test]
fn dates_are_right_around_leap_days() {
    for (days, date) in [
        (0, (1970, 1, 1)),
        (11_016, (2000, 2, 29)),
        (11_017, (2000, 3, 1)),
        (19_782, (2024, 2, 29)),
        (20_453, (2025, 12, 31)),
        (20_454, (2026, 1, 1)),
        (47_540, (2100, 2, 28)),
        (47_541, (2100, 3, 1)),
    ] {
        assert_eq!(civil_date(days), date, "{days}");
    }
}

#[test]
fn nothing_in_a_text_ends_the_line_or_steers_a_terminal() {
    let line = formatted("a\nb\x1b[2J\u{202e}c\u{9b}ü", &settings());
    assert_eq!(line.matches('\n').count(), 1);
    assert!(
        line.ends_with("a\\nb\\u{1b}[2J\\u{202e}c\\u{9b}ü\n"),
        "{line}"
    );
}

#[test]
fn lines_are_bounded_and_cut_between_characters() {
    for unit in ["x", "ü", "€", "🦀", "\n"] {
        let line = formatted(&unit.repeat(5000), &settings());
        assert!(
            line.len() <= MAX_LINE && line.len() > MAX_LINE - 20,
            "{}",
            line.len()
        );
        assert!(line.ends_with("...\n"));
    }
    let mut line = Line::new();
    line.write_str(&"y".repeat(MAX_LINE - CUT.len())).unwrap();
    assert!(line.finish().ends_with(b"y\n"));
}

#[test]
fn levels_are_read_in_any_case() {
    assert_eq!("WARNING".parse(), Ok(Level::Warn));
    assert_eq!("off".parse(), Ok(Level::Off));
    assert!("".parse::<Level>().is_err());
}

#[test]
fn a_guests_messages_are_rationed() {
    let limit = RateLimit::new();
    let start = Instant::now();
    for _ in 0..RateLimit::BURST {
        assert_eq!(limit.allow(start), Some(0));
    }
    for _ in 0..1000 {
        assert_eq!(limit.allow(start + RateLimit::WINDOW / 2), None);
    }
    assert_eq!(limit.allow(start + RateLimit::WINDOW), Some(1000));
    assert_eq!(limit.allow(start + RateLimit::WINDOW), Some(0));
}

#[test]
fn a_full_pipe_loses_lines_instead_of_blocking() {
    let (mut reader, writer) = std::io::pipe().unwrap();
    let writer = std::os::fd::OwnedFd::from(writer);
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    let before = dropped_lines();
    configure(Changes {
        id: Some("pipe".into()),
        level: Some(Level::Error),
        module: Some("belljar_vmm::log".into()),
        output: Some(writer.into()),
        ..Changes::default()
    });
    assert!(!enabled(Level::Warn) && !enabled(Level::Trace));
    for i in 0..200 {
        crate::log_error!("{i} {}", "z".repeat(900));
        crate::log_info!("not at this level");
    }
    assert!(dropped_lines() > before);
    let stderr = rustix::io::dup(rustix::stdio::stderr()).unwrap();
    configure(Changes {
        level: Some(Level::Info),
        module: Some(String::new()),
        output: Some(stderr.into()),
        ..Changes::default()
    });
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert!(text.lines().count() > 10);
    for (i, line) in text.lines().enumerate() {
        assert!(line.contains(&format!("[pipe:Error] {i} zzz")), "{line}");
    }
}
