//! The report as one HTML document: no outside resources, drawings as inline SVG, light and dark, wide and narrow.

mod chart;

use std::fmt::Write as _;

use crate::host;
use crate::record::{Measure, Series};
use crate::run::{Circumstances, Outcome};
use crate::settings::{Cache, Case, Guest, Settings};
use chart::{Bar, Line, Point, Scale};

/// Text as HTML shows it.
fn escape(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    for letter in text.chars() {
        match letter {
            '&' => safe.push_str("&amp;"),
            '<' => safe.push_str("&lt;"),
            '>' => safe.push_str("&gt;"),
            '"' => safe.push_str("&quot;"),
            '\'' => safe.push_str("&#39;"),
            letter => safe.push(letter),
        }
    }
    safe
}

/// Milliseconds with as many digits as they deserve.
fn ms(us: f64) -> String {
    let ms = us / 1e3;
    if ms < 10.0 {
        format!("{ms:.2}")
    } else if ms < 100.0 {
        format!("{ms:.1}")
    } else {
        format!("{ms:.0}")
    }
}

fn mib(kib: f64) -> String {
    format!("{:.2}", kib / 1024.0)
}

const STYLE: &str = include_str!("style.css");

/// Writes the page.
#[must_use]
pub fn write(settings: &Settings, circumstances: &Circumstances, outcome: &Outcome) -> String {
    let series = Series::of(&outcome.iterations);
    let mut page = String::new();
    let _ = write!(
        page,
        "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\
         <meta name=\"color-scheme\" content=\"light dark\">\
         <title>Bell Jar: restoring a guest</title>\n<style>\n{STYLE}</style></head>\n<body><main>\n\
         <h1>Restoring a saved guest</h1>\n"
    );
    match outcome.headline(settings, circumstances) {
        Ok(said) => {
            let _ = writeln!(page, "<p class=\"headline\">{}</p>", escape(&said));
        }
        Err(why) => {
            let _ = writeln!(page, "<p class=\"headline none\">{}</p>", escape(&why));
        }
    }
    page.push_str(&boundaries(settings));
    for section in [
        distribution(settings, &series),
        phases(settings, &series),
        against_memory(settings, &series),
        against_working_set(settings, &series),
        against_clones(settings, &series),
    ] {
        page.push_str(&section);
    }
    page.push_str(&table(&series));
    page.push_str(&conditions(settings, circumstances, outcome));
    page.push_str("</main></body></html>\n");
    page
}

fn section(title: &str, told: &str, drawing: &str) -> String {
    format!("<section><h2>{title}</h2>\n<p>{told}</p>\n{drawing}</section>\n")
}

/// What the clock means.
fn boundaries(settings: &Settings) -> String {
    let reply = match settings.guest {
        Guest::Agent => {
            "<li><b>agent ready</b>: the agent in the guest has answered over vsock.</li>\
             <li><b>first result</b>: a command that was run in the guest has printed a valid reply.</li>"
        }
        Guest::Program => {
            "<li><b>first result</b>: a program in the guest has sent a valid reply over vsock.</li>"
        }
    };
    format!(
        "<details><summary>What the clock measures</summary><p>It starts with the call that restores, in a VMM process that \
         is there already, and has boundaries:</p><ul><li><b>vCPU running</b>: the call is answered, and the guest runs.</li>\
         {reply}<li><b>faults after that</b>: the guest writes to pages that were not needed before, as many as the working \
         set says.</li></ul><p>A reply is valid if it mixes a random number with a counter that lives only in the guest's RAM. \
         After the clock has stopped the guest hashes the RAM that it filled before it was saved, with a random salt; a wrong \
         reply or hash ends the measurement. VMMs, ways and cases take turns.</p></details>\n"
    )
}

/// Those of one case; in the same order everywhere, so that they keep their colours.
fn of_case(series: &[Series], case: Case) -> Vec<&Series> {
    series.iter().filter(|series| series.case == case).collect()
}

fn labels(series: &[Series]) -> Vec<String> {
    let mut labels: Vec<String> = Vec::new();
    for series in series {
        if !labels.contains(&series.label()) {
            labels.push(series.label());
        }
    }
    labels.sort();
    labels
}

/// The number of its colour.
fn number(labels: &[String], series: &Series) -> usize {
    let label = series.label();
    labels.iter().position(|known| *known == label).unwrap_or(0)
}

fn distribution(settings: &Settings, series: &[Series]) -> String {
    let labels = labels(series);
    let lines: Vec<Line> = of_case(series, settings.base())
        .into_iter()
        .map(|series| Line {
            label: series.label(),
            number: number(&labels, series),
            points: crate::stats::distribution(&series.values(Measure::Result))
                .into_iter()
                .map(|(us, share)| Point::new(us / 1e3, share * 100.0))
                .collect(),
        })
        .collect();
    let x = Scale::linear("call → first result, ms", lines.iter().flat_map(Line::xs));
    let y = Scale::fixed("of all restores, %", 0.0, 100.0);
    let told = format!(
        "Of all restores at {}, the share whose first result was there within a time. Further left is faster, steeper is steadier.",
        told_of(settings.base())
    );
    section(
        "Distribution",
        &told,
        &chart::steps("distribution", &x, &y, &lines),
    )
}

fn told_of(case: Case) -> String {
    let clones = match case.clones {
        1 => "one at a time".to_owned(),
        many => format!("{many} at the same time"),
    };
    format!("{} MiB of RAM, {clones}", case.memory_mib)
}

fn phases(settings: &Settings, series: &[Series]) -> String {
    let bars: Vec<Bar> = of_case(series, settings.base())
        .into_iter()
        .filter_map(|series| {
            let p50 = |measure| series.summary(measure).map(|summary| summary.p50 / 1e3);
            let running = p50(Measure::Running)?;
            let result = p50(Measure::Result)?;
            let mut parts = vec![("process start", p50(Measure::Process)?)];
            parts.push(("→ vCPU running", running));
            let mut begin = running;
            if let Some(ready) = p50(Measure::Ready) {
                parts.push(("→ agent ready", ready - running));
                begin = ready;
            }
            parts.push(("→ first result", result - begin));
            parts.push(("faults after that", p50(Measure::Faults)?));
            let parts = parts
                .into_iter()
                .map(|(name, value)| (name, value.max(0.0)))
                .collect();
            Some(Bar {
                label: series.label(),
                parts,
            })
        })
        .collect();
    let told = format!(
        "Medians, at {}; {} MiB written after the first result. The clock starts at 0: the start of the VMM process, left of it, is \
         not on the path of a restore into a process that is there.",
        told_of(settings.base()),
        settings.base().working_set_mib
    );
    section("Phases", &told, &chart::bars("phases", "ms", &bars))
}

/// Median, with 10 and 90 % where there are more values than one.
fn point(x: f64, series: &Series, measure: Measure, unit: f64) -> Option<Point> {
    let summary = series.summary(measure)?;
    Some(Point {
        x,
        y: summary.p50 / unit,
        range: (summary.n > 1).then_some((summary.min / unit, summary.p90 / unit)),
    })
}

/// Lines over those cases that differ from the base in one thing.
fn lines(
    settings: &Settings,
    series: &[Series],
    measure: Measure,
    unit: f64,
    x: impl Fn(Case) -> u64,
    fits: impl Fn(Case, Case) -> bool,
) -> Vec<Line> {
    let labels = labels(series);
    let base = settings.base();
    let drawn = labels.iter().enumerate().map(|(number, label)| {
        let fitting = series
            .iter()
            .filter(|series| series.label() == *label && fits(series.case, base));
        let mut points: Vec<Point> = fitting
            .filter_map(|series| point(x(series.case) as f64, series, measure, unit))
            .collect();
        points.sort_by(|one, other| one.x.total_cmp(&other.x));
        Line {
            label: label.clone(),
            number,
            points,
        }
    });
    drawn.filter(|line| !line.points.is_empty()).collect()
}

fn against_memory(settings: &Settings, series: &[Series]) -> String {
    if settings.memory_mib.len() < 2 {
        return String::new();
    }
    let drawn = lines(
        settings,
        series,
        Measure::Result,
        1e3,
        |case| case.memory_mib,
        |case, base| case.working_set_mib == base.working_set_mib && case.clones == base.clones,
    );
    let x = Scale::logarithmic("RAM of the guest, MiB", drawn.iter().flat_map(Line::xs));
    let y = Scale::linear("call → first result, ms", drawn.iter().flat_map(Line::ys));
    section(
        "Against the size of RAM",
        "Medians; the thin strokes reach from the least to 90 %. Flat is good: restoring does not depend on how large the guest is.",
        &chart::lines("memory", &x, &y, &drawn),
    )
}

fn against_working_set(settings: &Settings, series: &[Series]) -> String {
    if settings.working_set_mib.len() < 2 {
        return String::new();
    }
    let drawn = lines(
        settings,
        series,
        Measure::Faults,
        1e3,
        |case| case.working_set_mib,
        |case, base| case.memory_mib == base.memory_mib && case.clones == base.clones,
    );
    let x = Scale::linear(
        "written after the first result, MiB",
        drawn.iter().flat_map(Line::xs),
    );
    let y = Scale::linear("faults after that, ms", drawn.iter().flat_map(Line::ys));
    section(
        "Against the working set",
        "What it takes a restored guest to write one byte to each page of so many MiB, beyond the first result. Medians; the thin \
         strokes reach from the least to 90 %.",
        &chart::lines("working-set", &x, &y, &drawn),
    )
}

fn against_clones(settings: &Settings, series: &[Series]) -> String {
    if settings.clones.len() < 2 {
        return String::new();
    }
    let over_clones = |measure, unit| {
        lines(
            settings,
            series,
            measure,
            unit,
            |case| u64::from(case.clones),
            |case, base| {
                case.memory_mib == base.memory_mib && case.working_set_mib == base.working_set_mib
            },
        )
    };
    let times = over_clones(Measure::Result, 1e3);
    let memory = over_clones(Measure::Pss, 1024.0);
    let x = |drawn: &[Line]| {
        Scale::logarithmic("restored at the same time", drawn.iter().flat_map(Line::xs))
    };
    let y = Scale::linear("call → first result, ms", times.iter().flat_map(Line::ys));
    let mut both = section(
        "Against how many at the same time",
        "Medians over all clones; the thin strokes reach from the least to 90 %.",
        &chart::lines("clones", &x(&times), &y, &times),
    );
    let y = Scale::linear("PSS of each, MiB", memory.iter().flat_map(Line::ys));
    both.push_str(&section(
        "Memory of each clone",
        "Proportional set size of the VMM process with its guest's RAM, after all have answered and written to the working set: what \
         is shared counts to each in part.",
        &chart::lines("memory-of-clones", &x(&memory), &y, &memory),
    ));
    both
}

fn table(series: &[Series]) -> String {
    let mut rows = String::new();
    for series in series {
        let cell = |measure: Measure, told: fn(f64) -> String| {
            series.summary(measure).map_or_else(
                || "<td>–</td><td>–</td>".to_owned(),
                |summary| {
                    format!(
                        "<td>{}</td><td>{}</td>",
                        told(summary.p50),
                        told(summary.p99)
                    )
                },
            )
        };
        let count = series.values(Measure::Result).len();
        let Case {
            memory_mib,
            working_set_mib,
            clones,
        } = series.case;
        let _ = writeln!(
            rows,
            "<tr><th scope=\"row\">{}</th><td>{memory_mib}</td><td>{working_set_mib}</td><td>{clones}</td><td>{count}</td>{}{}{}{}{}{}</tr>",
            escape(&series.label()),
            cell(Measure::Running, ms),
            cell(Measure::Ready, ms),
            cell(Measure::Result, ms),
            cell(Measure::All, ms),
            cell(Measure::Faults, ms),
            cell(Measure::Pss, mib),
        );
    }
    format!(
        "<section><h2>All figures</h2>\n<p>Times in ms, memory in MiB; the raw samples are in the JSON lines.</p>\n\
         <div class=\"wide\"><table><thead><tr><th rowspan=\"2\">how</th><th rowspan=\"2\">RAM</th><th rowspan=\"2\">working set</th>\
         <th rowspan=\"2\">at once</th><th rowspan=\"2\">n</th><th colspan=\"2\">vCPU running</th><th colspan=\"2\">agent ready</th>\
         <th colspan=\"2\">first result</th><th colspan=\"2\">process start and first result</th><th colspan=\"2\">faults</th>\
         <th colspan=\"2\">PSS of each</th></tr><tr>{}</tr></thead>\n<tbody>{rows}</tbody></table></div></section>\n",
        "<th>p50</th><th>p99</th>".repeat(6)
    )
}

fn conditions(settings: &Settings, circumstances: &Circumstances, outcome: &Outcome) -> String {
    let (processor, kernel) = host::describe();
    let load = circumstances.load;
    let clock = match circumstances.instrument.as_str() {
        "" => "time",
        other => other,
    };
    let vmms: Vec<&str> = settings.vmms.iter().map(|vmm| vmm.name.as_str()).collect();
    let mut rows = vec![
        ("version", circumstances.version.clone()),
        ("VMMs, in turn", vmms.join(", ")),
        (
            "host",
            format!(
                "{processor}, {} processors, Linux {kernel}",
                load.processors
            ),
        ),
        ("clock", clock.to_owned()),
        (
            "load before",
            format!(
                "load average {:.2}, {:.0} % busy with other things, {:.1} % stolen, pressure {}",
                load.average,
                load.busy * 100.0,
                load.steal * 100.0,
                load.pressure.map_or_else(
                    || "unknown".to_owned(),
                    |pressure| format!("{pressure:.0} %")
                )
            ),
        ),
        (
            "guest",
            format!(
                "{} vCPU, {} MiB filled with bytes without structure, {}",
                settings.vcpus,
                settings.filled_mib,
                match settings.guest {
                    Guest::Agent => "the project's agent",
                    Guest::Program => "one program as PID 1",
                }
            ),
        ),
        ("iterations", settings.iterations.to_string()),
        (
            "memory back end",
            "File, for all VMMs; each restores a snapshot that it made itself".to_owned(),
        ),
    ];
    for cache in &settings.caches {
        let shares: Vec<f64> = Series::of(&outcome.iterations)
            .iter()
            .filter(|series| series.way.cache == *cache)
            .filter_map(Series::cached_share)
            .collect();
        let seen = crate::stats::summarise(&shares).map_or_else(String::new, |summary| {
            format!(
                "; {:.0} % of the memory file was in the page cache",
                summary.p50 * 100.0
            )
        });
        let meaning = match cache {
            Cache::Hot => "the snapshot is in the page cache",
            Cache::Warm => "the snapshot was dropped from the page cache, all else is there",
            Cache::Cold => "everything that could be was dropped from the page cache",
            Cache::Lazy => {
                "it was in a store's chunks alone, and a keeper brought in what the guest touched"
            }
        };
        rows.push((cache.name(), format!("{meaning}{seen}")));
    }
    rows.extend(outcome.notes.iter().map(|note| ("note", note.clone())));
    rows.extend(
        outcome
            .loaded
            .iter()
            .map(|reason| ("loaded", reason.clone())),
    );
    let rows: String = rows
        .iter()
        .map(|(name, told)| format!("<dt>{name}</dt><dd>{}</dd>\n", escape(told)))
        .collect();
    format!("<section><h2>Conditions</h2>\n<dl>\n{rows}</dl></section>\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::tests::iteration;
    use crate::settings::tests::settings;

    fn measured() -> (Settings, Outcome) {
        let mut iterations = Vec::new();
        for memory in [256, 1024] {
            for round in 0..5 {
                let slower = 6000.0 + f64::from(round) * 100.0;
                iterations.push(iteration("belljar", false, memory, slower));
                iterations.push(iteration("<peer>", false, memory, slower * 1.4));
            }
        }
        let settings = Settings {
            memory_mib: vec![256, 1024],
            ..settings()
        };
        let outcome = Outcome {
            iterations,
            notes: vec!["a & b".to_owned()],
            loaded: Vec::new(),
        };
        (settings, outcome)
    }

    #[test]
    fn the_page_is_whole_and_needs_nothing_from_outside() {
        let (settings, outcome) = measured();
        let page = write(&settings, &Circumstances::default(), &outcome);
        for outside in ["http", "src=", "url(", "<script", "@import", "<link"] {
            assert!(!page.contains(outside), "{outside}");
        }
        for part in [
            "id=\"distribution\"",
            "id=\"phases\"",
            "id=\"memory\"",
            "answers 6.20 ms after the call",
            "&lt;peer&gt;, hot",
            "a &amp; b",
            "</html>",
        ] {
            assert!(page.contains(part), "{part}");
        }
        assert!(!page.contains("<peer>"), "names are escaped");
        assert!(!page.contains("NaN") && !page.contains("inf"), "numbers");
        assert!(
            !page.contains("id=\"working-set\"") && !page.contains("id=\"clones\""),
            "what was not swept is not drawn"
        );
    }

    #[test]
    fn every_element_is_closed() {
        let (settings, outcome) = measured();
        let page = write(&settings, &Circumstances::default(), &outcome);
        for tag in [
            "svg", "g", "section", "table", "tr", "td", "th", "dl", "text", "p", "details",
        ] {
            let opened = page.matches(&format!("<{tag}>")).count()
                + page.matches(&format!("<{tag} ")).count();
            let closed = page.matches(&format!("</{tag}>")).count();
            assert_eq!(opened, closed, "{tag}");
        }
    }

    #[test]
    fn nothing_measured_is_no_reason_to_fail() {
        let outcome = Outcome {
            iterations: Vec::new(),
            notes: Vec::new(),
            loaded: vec!["busy".to_owned()],
        };
        let page = write(&settings(), &Circumstances::default(), &outcome);
        assert!(page.contains("no headline") && !page.contains("NaN"));
    }
}
