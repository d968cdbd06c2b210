//! All figures of a run, as a table and as JSON.

use std::fmt;

use serde::Serialize;
use serde_json::{Value, json};

use crate::machine::Machine;
use crate::measure::Figure;
use crate::options::Section;

/// Whose work it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Kind {
    /// What the hardware does with nothing in its way.
    Device,
    /// Of this project.
    Ours,
    /// Another tool.
    Peer,
}

/// How much a run has to do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Work {
    /// Bytes of the cluster.
    Bytes(u64),
    /// So many of something.
    Count(u64, &'static str),
    /// A time alone says all.
    Nothing,
}

/// A contestant's rounds.
#[derive(Clone, Debug)]
pub(crate) struct Series {
    pub(crate) section: Section,
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) work: Work,
    pub(crate) figures: Vec<Figure>,
}

impl Series {
    pub(crate) fn seconds(&self) -> f64 {
        median(self.figures.iter().map(|figure| figure.seconds))
    }

    pub(crate) fn cpu_seconds(&self) -> f64 {
        median(self.figures.iter().map(|figure| figure.cpu_seconds))
    }

    pub(crate) fn peak_bytes(&self) -> u64 {
        self.figures.iter().map(|figure| figure.peak_bytes).max().unwrap_or(0)
    }

    /// The fastest and the slowest round.
    pub(crate) fn spread(&self) -> (f64, f64) {
        let seconds = self.figures.iter().map(|figure| figure.seconds);
        (seconds.clone().fold(f64::INFINITY, f64::min), seconds.fold(0.0, f64::max))
    }

    /// True where the rounds of both overlap: the run cannot tell them apart.
    pub(crate) fn equals(&self, other: &Self) -> bool {
        let ((fast, slow), (other_fast, other_slow)) = (self.spread(), other.spread());
        fast <= other_slow && other_fast <= slow
    }

    pub(crate) fn cpu_seconds_per_gb(&self) -> Option<f64> {
        match self.work {
            Work::Bytes(bytes) if bytes > 0 => Some(self.cpu_seconds() / (bytes as f64 / 1e9)),
            Work::Bytes(_) | Work::Count(..) | Work::Nothing => None,
        }
    }

    pub(crate) fn gigabytes_a_second(&self) -> Option<f64> {
        match self.work {
            Work::Bytes(bytes) => Some(bytes as f64 / 1e9 / self.seconds()),
            Work::Count(..) | Work::Nothing => None,
        }
    }

    fn rate(&self) -> String {
        match self.work {
            Work::Bytes(bytes) => format!("{:.0} MB/s", bytes as f64 / 1e6 / self.seconds()),
            Work::Count(count, what) => format!("{:.0} {what}/s", count as f64 / self.seconds()),
            Work::Nothing => String::new(),
        }
    }
}

/// What did not run, and why.
#[derive(Clone, Debug)]
struct LeftOut {
    section: Section,
    name: String,
    kind: Kind,
    why: String,
}

/// What a run found.
#[derive(Clone, Debug)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) cluster_bytes: u64,
    /// Sizes, by what they are of.
    pub(crate) sizes: Vec<(String, u64)>,
    series: Vec<Series>,
    left_out: Vec<LeftOut>,
}

impl Report {
    pub(crate) fn new(machine: Machine) -> Self {
        Self { machine, cluster_bytes: 0, sizes: Vec::new(), series: Vec::new(), left_out: Vec::new() }
    }

    pub(crate) fn add(&mut self, section: Section, name: &str, kind: Kind, work: Work, figure: Figure) {
        if let Some(series) = self.series.iter_mut().find(|series| series.section == section && series.name == name) {
            series.figures.push(figure);
            return;
        }
        self.series.push(Series { section, name: name.to_owned(), kind, work, figures: vec![figure] });
    }

    pub(crate) fn leave_out(&mut self, section: Section, name: &str, kind: Kind, why: impl Into<String>) {
        self.left_out.push(LeftOut { section, name: name.to_owned(), kind, why: why.into() });
    }

    pub(crate) fn add_size(&mut self, of: impl Into<String>, bytes: u64) {
        self.sizes.push((of.into(), bytes));
    }

    pub(crate) fn size(&self, of: &str) -> Option<u64> {
        self.sizes.iter().find(|(name, _)| name == of).map(|(_, bytes)| *bytes)
    }

    pub(crate) fn find(&self, section: Section, name: &str) -> Option<&Series> {
        self.series.iter().find(|series| series.section == section && series.name == name)
    }

    pub(crate) fn of(&self, section: Section) -> impl Iterator<Item = &Series> {
        self.series.iter().filter(move |series| series.section == section)
    }

    /// The sections that have figures.
    pub(crate) fn sections(&self) -> impl Iterator<Item = Section> {
        Section::ALL.into_iter().filter(|section| self.of(*section).next().is_some())
    }

    pub(crate) fn ours_failed(&self) -> bool {
        self.left_out.iter().any(|left_out| left_out.kind == Kind::Ours && left_out.why.starts_with("failed"))
    }

    pub(crate) fn to_json(&self) -> Value {
        let series = self.series.iter().map(|series| {
            let (fastest, slowest) = series.spread();
            json!({
                "section": series.section.to_string(),
                "name": series.name,
                "kind": series.kind,
                "seconds": series.seconds(),
                "fastest_seconds": fastest,
                "slowest_seconds": slowest,
                "cpu_seconds": series.cpu_seconds(),
                "cpu_seconds_per_gb": series.cpu_seconds_per_gb(),
                "peak_bytes": series.peak_bytes(),
                "work": match series.work {
                    Work::Bytes(bytes) => json!({ "bytes": bytes }),
                    Work::Count(count, what) => json!({ what: count }),
                    Work::Nothing => Value::Null,
                },
                "rounds": series.figures,
            })
        });
        let left_out = self.left_out.iter().map(
            |left_out| json!({ "section": left_out.section.to_string(), "name": left_out.name, "why": left_out.why }),
        );
        let bars: Vec<_> = crate::bars::judge(self).iter().map(crate::bars::Bar::to_json).collect();
        json!({
            "machine": self.machine,
            "cluster_bytes": self.cluster_bytes,
            "sizes": self.sizes.iter().cloned().collect::<std::collections::BTreeMap<_, _>>(),
            "results": series.collect::<Vec<_>>(),
            "left_out": left_out.collect::<Vec<_>>(),
            "bars": bars,
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rounds = self.series.iter().map(|series| series.figures.len()).max().unwrap_or(0);
        writeln!(out, "{}", self.machine)?;
        writeln!(
            out,
            "cluster of {} MB; median of {rounds}, in brackets the fastest and the slowest; \"=\": not to be told from the best",
            self.cluster_bytes / 1_000_000
        )?;
        for section in self.sections() {
            writeln!(out, "\n| {section} | seconds | | | CPU-s | per GB | peak MiB |")?;
            writeln!(out, "|---|---:|---:|---:|---:|---:|---:|")?;
            let contest = |series: &&Series| series.kind != Kind::Device && series.work != Work::Nothing;
            let best = self.of(section).filter(contest).min_by(|one, other| one.seconds().total_cmp(&other.seconds()));
            for series in self.of(section) {
                let (fastest, slowest) = series.spread();
                let equal = best.is_some_and(|best| contest(&series) && series.equals(best) && same_work(series, best));
                let mark = if equal { " =" } else { "" };
                let per_gb = series.cpu_seconds_per_gb().map_or_else(String::new, |per_gb| format!("{per_gb:.2}"));
                writeln!(
                    out,
                    "| {} | {:.2}{mark} | [{fastest:.2} {slowest:.2}] | {} | {:.2} | {per_gb} | {} |",
                    series.name,
                    series.seconds(),
                    series.rate(),
                    series.cpu_seconds(),
                    series.peak_bytes() >> 20,
                )?;
            }
            for left_out in self.left_out.iter().filter(|left_out| left_out.section == section) {
                let why = left_out.why.lines().next().unwrap_or_default();
                writeln!(out, "| {} | {why} | | | | | |", left_out.name)?;
            }
        }
        for left_out in self.left_out.iter().filter(|left_out| self.of(left_out.section).next().is_none()) {
            writeln!(out, "\n{}: {}: {}", left_out.section, left_out.name, left_out.why)?;
        }
        if !self.sizes.is_empty() {
            writeln!(out)?;
        }
        for (of, bytes) in &self.sizes {
            writeln!(out, "{of}: {:.1} MB", *bytes as f64 / 1e6)?;
        }
        Ok(())
    }
}

fn same_work(one: &Series, other: &Series) -> bool {
    one.work == other.work
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<_> = values.collect();
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        count if count % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(seconds: &[f64]) -> Series {
        let figure = |seconds: &f64| Figure { seconds: *seconds, cpu_seconds: 1.0, peak_bytes: 1 };
        Series {
            section: Section::Restore,
            name: "one".to_owned(),
            kind: Kind::Ours,
            work: Work::Bytes(2_000_000_000),
            figures: seconds.iter().map(figure).collect(),
        }
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_ones() {
        assert_eq!(median([4.0, 1.0, 2.0, 3.0].into_iter()).to_bits(), 2.5_f64.to_bits());
        assert_eq!(median([3.0, 1.0, 2.0].into_iter()).to_bits(), 2.0_f64.to_bits());
    }

    #[test]
    fn rounds_that_overlap_are_equal() {
        assert!(series(&[1.0, 2.0, 3.0]).equals(&series(&[2.9, 4.0, 5.0])));
        assert!(!series(&[1.0, 2.0, 3.0]).equals(&series(&[3.1, 4.0, 5.0])));
        assert_eq!(series(&[1.0]).cpu_seconds_per_gb().map(f64::to_bits), Some(0.5_f64.to_bits()));
    }
}
