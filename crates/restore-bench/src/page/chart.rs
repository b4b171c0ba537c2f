//! Drawings as SVG. Colours are classes of the page's style, so that they follow its theme; lines differ in dashes and
//! marks too.

use std::fmt::Write as _;

use super::escape;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 300.0;
const LEFT: f64 = 62.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 26.0;
const BOTTOM: f64 = 48.0;
/// Colours that the style has.
const COLOURS: usize = 8;
const DASHES: [&str; 4] = ["", "7 4", "2 3", "9 3 2 3"];

/// A value, and from where to where it scatters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Point {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) range: Option<(f64, f64)>,
}

impl Point {
    pub(super) fn new(x: f64, y: f64) -> Self {
        Self { x, y, range: None }
    }
}

#[derive(Clone, Debug)]
pub(super) struct Line {
    pub(super) label: String,
    /// The same in every drawing of a page.
    pub(super) number: usize,
    pub(super) points: Vec<Point>,
}

impl Line {
    pub(super) fn xs(&self) -> impl Iterator<Item = f64> {
        self.points.iter().map(|point| point.x)
    }

    pub(super) fn ys(&self) -> impl Iterator<Item = f64> {
        let ends = |point: &Point| [point.y, point.range.map_or(point.y, |(_, high)| high)];
        self.points.iter().flat_map(ends)
    }

    fn colour(&self) -> String {
        format!("var(--c{})", self.number % COLOURS)
    }

    fn dashes(&self) -> &'static str {
        DASHES
            .get(self.number % DASHES.len())
            .copied()
            .unwrap_or("")
    }
}

/// An axis: its title, and where its ticks are.
#[derive(Clone, Debug)]
pub(super) struct Scale {
    title: &'static str,
    low: f64,
    high: f64,
    logarithmic: bool,
    ticks: Vec<f64>,
}

impl Scale {
    /// From 0 to a little above the largest value.
    pub(super) fn linear(title: &'static str, values: impl Iterator<Item = f64>) -> Self {
        let largest = values.fold(0.0, f64::max);
        let step = step(largest);
        let count = (largest / step).ceil().max(1.0);
        Self::fixed_with(title, 0.0, count * step, step)
    }

    pub(super) fn fixed(title: &'static str, low: f64, high: f64) -> Self {
        Self::fixed_with(title, low, high, (high - low) / 4.0)
    }

    fn fixed_with(title: &'static str, low: f64, high: f64, step: f64) -> Self {
        let mut ticks = Vec::new();
        let mut tick = low;
        while tick < high + step / 2.0 && ticks.len() < 100 {
            ticks.push(tick);
            tick += step;
        }
        Self {
            title,
            low,
            high,
            logarithmic: false,
            ticks,
        }
    }

    /// The values themselves are its ticks.
    pub(super) fn logarithmic(title: &'static str, values: impl Iterator<Item = f64>) -> Self {
        let mut ticks: Vec<f64> = values.map(|value| value.max(1.0)).collect();
        ticks.sort_by(f64::total_cmp);
        ticks.dedup();
        Self {
            title,
            low: ticks.first().copied().unwrap_or(1.0),
            high: ticks.last().copied().unwrap_or(10.0),
            logarithmic: true,
            ticks,
        }
    }

    /// 0 to 1 from one end of the axis to the other.
    fn share(&self, value: f64) -> f64 {
        let place = |value: f64| {
            if self.logarithmic {
                value.max(f64::MIN_POSITIVE).ln()
            } else {
                value
            }
        };
        let length = place(self.high) - place(self.low);
        if length <= 0.0 {
            return 0.5;
        }
        ((place(value) - place(self.low)) / length).clamp(0.0, 1.0)
    }

    fn x(&self, value: f64) -> f64 {
        // A little air, so that marks at the ends are whole.
        let air = if self.logarithmic { 16.0 } else { 0.0 };
        LEFT + air + self.share(value) * (WIDTH - LEFT - RIGHT - 2.0 * air)
    }

    fn y(&self, value: f64) -> f64 {
        HEIGHT - BOTTOM - self.share(value) * (HEIGHT - TOP - BOTTOM)
    }
}

/// A round distance of ticks, some five to eight of them up to `largest`.
fn step(largest: f64) -> f64 {
    if !largest.is_finite() || largest <= 0.0 {
        return 1.0;
    }
    let power = 10_f64.powf((largest / 5.0).log10().floor());
    let fraction = largest / 5.0 / power;
    let round = match fraction {
        f if f <= 1.0 => 1.0,
        f if f <= 2.0 => 2.0,
        f if f <= 5.0 => 5.0,
        _ => 10.0,
    };
    round * power
}

/// A tick's number, without digits that say nothing.
fn figure(value: f64) -> String {
    let text = format!("{value:.3}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text.is_empty() || text == "-0" {
        return "0".to_owned();
    }
    text.to_owned()
}

fn open(id: &str, title: &str, height: f64) -> String {
    format!(
        "<div class=\"wide\"><svg id=\"{id}\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{}\">\n",
        escape(title)
    )
}

fn axes(x: &Scale, y: &Scale) -> String {
    let mut svg = String::from("<g>");
    let (bottom, right) = (HEIGHT - BOTTOM, WIDTH - RIGHT);
    for tick in &y.ticks {
        let at = y.y(*tick);
        let _ = write!(
            svg,
            "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
             <text class=\"soft\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 8.0,
            at + 4.0,
            figure(*tick)
        );
    }
    let mut last = f64::NEG_INFINITY;
    for tick in &x.ticks {
        let at = x.x(*tick);
        let _ = write!(
            svg,
            "<line class=\"axis\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{bottom}\" y2=\"{}\"/>",
            bottom + 5.0
        );
        // Numbers that would overlap are left out.
        if at - last < 34.0 {
            continue;
        }
        last = at;
        let _ = write!(
            svg,
            "<text class=\"soft\" x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
            bottom + 19.0,
            figure(*tick)
        );
    }
    let _ = writeln!(
        svg,
        "<line class=\"axis\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{bottom}\" y2=\"{bottom}\"/>\
         <text x=\"{right}\" y=\"{}\" text-anchor=\"end\">{}</text>\
         <text x=\"{}\" y=\"14\">{}</text></g>",
        HEIGHT - 8.0,
        escape(x.title),
        LEFT - 40.0,
        escape(y.title)
    );
    svg
}

/// A mark whose form goes with the number.
fn mark(number: usize, x: f64, y: f64, colour: &str) -> String {
    let points: &[(f64, f64)] = match number % 4 {
        0 => return format!("<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\" fill=\"{colour}\"/>"),
        1 => &[(-4.0, -4.0), (4.0, -4.0), (4.0, 4.0), (-4.0, 4.0)],
        2 => &[(0.0, -5.0), (5.0, 4.0), (-5.0, 4.0)],
        _ => &[(0.0, -5.5), (5.5, 0.0), (0.0, 5.5), (-5.5, 0.0)],
    };
    let points: Vec<String> = points
        .iter()
        .map(|(dx, dy)| format!("{:.1},{:.1}", x + dx, y + dy))
        .collect();
    format!(
        "<polygon points=\"{}\" fill=\"{colour}\"/>",
        points.join(" ")
    )
}

fn legend(lines: &[Line], marks: bool) -> String {
    let mut list = String::from("<ul class=\"legend\">");
    for line in lines {
        let colour = line.colour();
        let mark = if marks {
            mark(line.number, 15.0, 6.0, &colour)
        } else {
            String::new()
        };
        let _ = write!(
            list,
            "<li><svg viewBox=\"0 0 30 12\" aria-hidden=\"true\"><path class=\"line\" d=\"M0 6H30\" stroke=\"{colour}\" \
             stroke-dasharray=\"{}\"/>{mark}</svg>{}</li>",
            line.dashes(),
            escape(&line.label)
        );
    }
    list.push_str("</ul>\n");
    list
}

fn path(line: &Line, d: &str) -> String {
    format!(
        "<path class=\"line\" stroke=\"{}\" stroke-dasharray=\"{}\" d=\"{d}\"/>\n",
        line.colour(),
        line.dashes()
    )
}

/// Cumulative distributions.
pub(super) fn steps(id: &str, x: &Scale, y: &Scale, lines: &[Line]) -> String {
    let mut svg = open(id, &format!("{} against {}", y.title, x.title), HEIGHT);
    svg.push_str(&axes(x, y));
    for line in lines {
        let mut d = String::new();
        for point in &line.points {
            let (px, py) = (x.x(point.x), y.y(point.y));
            if d.is_empty() {
                let _ = write!(d, "M{px:.1} {:.1}", y.y(y.low));
            } else {
                let _ = write!(d, "H{px:.1}");
            }
            let _ = write!(d, "V{py:.1}");
        }
        if !d.is_empty() {
            // All are there from then on.
            let _ = write!(d, "H{}", WIDTH - RIGHT);
            svg.push_str(&path(line, &d));
        }
    }
    svg.push_str("</svg></div>\n");
    svg.push_str(&legend(lines, false));
    svg
}

/// Values over values, with how far they scatter.
pub(super) fn lines(id: &str, x: &Scale, y: &Scale, lines: &[Line]) -> String {
    let mut svg = open(id, &format!("{} against {}", y.title, x.title), HEIGHT);
    svg.push_str(&axes(x, y));
    for (place, line) in lines.iter().enumerate() {
        // Beside each other where they would cover each other.
        let aside = (place as f64 - (lines.len().saturating_sub(1)) as f64 / 2.0) * 3.0;
        let colour = line.colour();
        let mut d = String::new();
        let mut marks = String::new();
        for point in &line.points {
            let (px, py) = (x.x(point.x) + aside, y.y(point.y));
            let _ = write!(d, "{}{px:.1} {py:.1}", if d.is_empty() { "M" } else { "L" });
            if let Some((low, high)) = point.range {
                let _ = write!(
                    marks,
                    "<line class=\"range\" stroke=\"{colour}\" x1=\"{px:.1}\" x2=\"{px:.1}\" y1=\"{:.1}\" y2=\"{:.1}\"/>",
                    y.y(low),
                    y.y(high)
                );
            }
            marks.push_str(&mark(line.number, px, py, &colour));
        }
        svg.push_str(&path(line, &d));
        svg.push_str(&marks);
    }
    svg.push_str("</svg></div>\n");
    svg.push_str(&legend(lines, true));
    svg
}

/// Parts of a whole, one behind the other; the first lies left of zero.
#[derive(Clone, Debug)]
pub(super) struct Bar {
    pub(super) label: String,
    pub(super) parts: Vec<(&'static str, f64)>,
}

/// Colours of parts, by their names.
const PARTS: [&str; 5] = [
    "process start",
    "→ vCPU running",
    "→ agent ready",
    "→ first result",
    "faults after that",
];

fn part_colour(name: &str) -> String {
    let number = PARTS.iter().position(|part| *part == name).unwrap_or(0);
    format!("var(--p{number})")
}

/// Room of a bar with its label.
const ROW: f64 = 46.0;

pub(super) fn bars(id: &str, unit: &str, bars: &[Bar]) -> String {
    let first = |bar: &Bar| bar.parts.first().map_or(0.0, |(_, value)| *value);
    let before = bars.iter().map(first).fold(0.0, f64::max);
    let sum = |bar: &Bar| bar.parts.iter().skip(1).map(|(_, value)| value).sum();
    let after = bars.iter().map(sum).fold(0.0, f64::max);
    let step = step(before + after);
    let length = (before + after).max(step);
    let left = 22.0;
    let x = |value: f64| left + (value + before) / length * (WIDTH - left - RIGHT);
    let height = ROW * bars.len() as f64 + 34.0;
    let mut svg = open(id, &format!("phases in {unit}"), height);
    svg.push_str("<g>");
    let bottom = height - 26.0;
    let mut tick = 0.0;
    while tick <= after + 1e-9 {
        let at = x(tick);
        let class = if tick == 0.0 { "axis" } else { "grid" };
        let _ = write!(
            svg,
            "<line class=\"{class}\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"4\" y2=\"{bottom}\"/>\
             <text class=\"soft\" x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}{}</text>",
            bottom + 17.0,
            figure(tick),
            if tick == 0.0 {
                format!(" {unit}")
            } else {
                String::new()
            }
        );
        tick += step;
    }
    svg.push_str("</g>\n");
    for (row, bar) in bars.iter().enumerate() {
        let top = ROW * row as f64 + 4.0;
        let _ = write!(
            svg,
            "<text class=\"over\" x=\"{left}\" y=\"{:.1}\">{}</text>",
            top + 12.0,
            escape(&bar.label)
        );
        let mut begin = -first(bar);
        for (name, value) in &bar.parts {
            let (from, to) = (x(begin), x(begin + value));
            let _ = write!(
                svg,
                "<rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"18\" fill=\"{}\"><title>{}: {value:.3} {unit}</title></rect>",
                top + 18.0,
                (to - from).max(0.0),
                part_colour(name),
                escape(name)
            );
            begin += value;
        }
        svg.push('\n');
    }
    svg.push_str("</svg></div>\n<ul class=\"legend\">");
    for name in PARTS {
        let used = bars
            .iter()
            .any(|bar| bar.parts.iter().any(|(part, _)| *part == name));
        if used {
            let _ = write!(
                svg,
                "<li><svg viewBox=\"0 0 30 12\" aria-hidden=\"true\"><rect width=\"30\" height=\"12\" fill=\"{}\"/></svg>{}</li>",
                part_colour(name),
                escape(name)
            );
        }
    }
    svg.push_str("</ul>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        for (largest, expected) in [(6.2, 2.0), (0.47, 0.1), (93.0, 20.0), (0.0, 1.0)] {
            assert!((step(largest) - expected).abs() < 1e-9, "{largest}");
        }
        let scale = Scale::linear("ms", [1.0, 6.2].into_iter());
        assert_eq!(scale.ticks, [0.0, 2.0, 4.0, 6.0, 8.0]);
        assert_eq!(figure(0.1 + 0.2), "0.3");
        assert_eq!(figure(0.0), "0");
    }

    #[test]
    fn values_stay_within_the_drawing() {
        let wild = [0.0, 1.0, 1e9, -5.0, f64::INFINITY];
        let linear = Scale::linear("a", [10.0].into_iter());
        let logarithmic = Scale::logarithmic("b", [256.0, 8192.0].into_iter());
        let single = Scale::logarithmic("c", [256.0].into_iter());
        for scale in [&linear, &logarithmic, &single] {
            for value in wild {
                assert!((LEFT..=WIDTH).contains(&scale.x(value)), "{value}");
                assert!((0.0..=HEIGHT).contains(&scale.y(value)), "{value}");
            }
        }
        assert!((logarithmic.share(1448.15) - 0.5).abs() < 1e-3);
    }

    #[test]
    fn bars_begin_left_of_zero_with_what_is_not_on_the_path() {
        let bar = Bar {
            label: "a".to_owned(),
            parts: vec![("process start", 1.0), ("→ vCPU running", 2.0)],
        };
        let drawn = bars("phases", "ms", &[bar]);
        assert!(drawn.contains("process start: 1.000 ms"), "{drawn}");
        assert!(drawn.contains("x=\"22.0\""), "{drawn}");
    }
}
