//! A section's bars as SVG, readable on light and on dark: the colours follow the reader's scheme.

use std::fmt::Write as _;

use crate::options::Section;
use crate::report::{Kind, Report, Series, Work};

const WIDTH: f64 = 860.0;
const ROW: f64 = 24.0;
const BAR: f64 = 14.0;
const HEAD: f64 = 58.0;
/// Names stand left of the bars, figures right.
const BARS_FROM: f64 = 330.0;
const BARS_TO: f64 = 640.0;

const STYLE: &str = "
    text { font: 13px system-ui, sans-serif; fill: #1f2328 }
    .head { font-weight: 600; font-size: 15px }
    .small { fill: #59636e; font-size: 12px }
    .ours { fill: #1a7f5a } .peer { fill: #8c959f } .device { fill: #b08800 }
    .spread { stroke: #1f2328; stroke-width: 1.5 }
    @media (prefers-color-scheme: dark) {
      text { fill: #e6edf3 } .small { fill: #9198a1 }
      .ours { fill: #3fb68b } .peer { fill: #6e7681 } .device { fill: #d4a72c }
      .spread { stroke: #e6edf3 }
    }";

/// Wall time as bars with the rounds' spread; processor time and memory as figures beside them.
pub(crate) fn svg(report: &Report, section: Section) -> String {
    let series: Vec<_> = report.of(section).collect();
    let longest = series.iter().map(|series| series.spread().1).fold(0.0, f64::max).max(f64::MIN_POSITIVE);
    let height = HEAD + ROW * series.len() as f64 + 26.0;
    let mut out = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" \
         aria-label=\"{section}: seconds\">\n<style>{STYLE}\n</style>\n"
    );
    // Writing to a String does not fail.
    let mut text = |x: f64, y: f64, class: &str, anchor: &str, words: &str| {
        let words = escape(words);
        let _ = writeln!(out, "<text x=\"{x}\" y=\"{y}\" class=\"{class}\" text-anchor=\"{anchor}\">{words}</text>");
    };
    text(8.0, 22.0, "head", "start", &format!("{section}: seconds, less is better"));
    text(WIDTH - 8.0, 44.0, "small", "end", "seconds · CPU-s per GB · peak MiB");
    let mut shapes = String::new();
    for (row, series) in series.iter().enumerate() {
        let top = HEAD + ROW * row as f64;
        text(BARS_FROM - 8.0, top + 12.0, "name", "end", &series.name);
        text(WIDTH - 8.0, top + 12.0, "small", "end", &figures(series));
        let to = |seconds: f64| (BARS_TO - BARS_FROM) * seconds / longest;
        let class = match series.kind {
            Kind::Ours => "ours",
            Kind::Peer => "peer",
            Kind::Device => "device",
        };
        let width = to(series.seconds()).max(1.0);
        let _ = writeln!(
            shapes,
            "<rect x=\"{BARS_FROM}\" y=\"{top}\" width=\"{width:.1}\" height=\"{BAR}\" rx=\"2\" class=\"{class}\"/>"
        );
        let (fastest, slowest) = series.spread();
        if series.figures.len() > 1 {
            let (from, until, middle) = (BARS_FROM + to(fastest), BARS_FROM + to(slowest), top + BAR / 2.0);
            let _ = writeln!(
                shapes,
                "<line x1=\"{from:.1}\" y1=\"{middle}\" x2=\"{until:.1}\" y2=\"{middle}\" class=\"spread\"/>"
            );
        }
    }
    let note = format!(
        "{} MB; medians, the line is the rounds' spread; green: pghydrant, grey: others, yellow: the device alone",
        report.cluster_bytes / 1_000_000
    );
    text(8.0, height - 8.0, "small", "start", &note);
    out.push_str(&shapes);
    out.push_str("</svg>\n");
    out
}

fn figures(series: &Series) -> String {
    if series.work == Work::Nothing && series.cpu_seconds() == 0.0 {
        return format!("{:.2}", series.seconds());
    }
    let per_gb = series.cpu_seconds_per_gb().map_or_else(|| "–".to_owned(), |per_gb| format!("{per_gb:.2}"));
    format!("{:.2} · {per_gb} · {}", series.seconds(), series.peak_bytes() >> 20)
}

fn escape(words: &str) -> String {
    words.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_end_the_element() {
        assert_eq!(escape("a <b> & c"), "a &lt;b&gt; &amp; c");
    }
}
