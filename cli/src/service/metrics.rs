//! What Prometheus reads.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use serde_json::Value;

use super::https::Refused;
use super::sessions::{Record, State};

/// The text format, version 0.0.4.
pub(super) fn text(records: &[Record], refused: &Refused) -> String {
    let mut out = String::new();
    let mut family = |name: &str, kind: &str, help: &str, lines: Vec<(String, f64)>| {
        // Writing to a string does not fail.
        let _ = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        for (labels, value) in lines {
            let _ = writeln!(out, "{name}{labels} {value}");
        }
    };
    let states = State::ALL.map(|state| {
        let count = records.iter().filter(|record| record.state == state).count();
        (format!("{{state=\"{}\"}}", state.name()), count as f64)
    });
    family("pghydrant_sessions", "gauge", "Sessions by state.", states.to_vec());
    let running: Vec<&Record> = records.iter().filter(|record| !record.state.is_over()).collect();
    let figure = |name: &str| {
        let of = |record: &&Record| {
            let value = record.progress.as_ref()?.get(name)?.as_f64()?;
            Some((labels(record), value))
        };
        running.iter().filter_map(of).collect::<Vec<_>>()
    };
    family("pghydrant_session_bytes_done", "gauge", "Bytes of the step that runs, done.", figure("bytes"));
    family("pghydrant_session_bytes_total", "gauge", "Bytes of the step that runs, in all.", figure("total_bytes"));
    let rate = figure("megabytes_per_second").into_iter().map(|(labels, value)| (labels, value * 1e6)).collect();
    family("pghydrant_session_bytes_per_second", "gauge", "Speed of the step that runs.", rate);
    let bottleneck = |record: &&Record| {
        let name = record.progress.as_ref()?.get("bottleneck").and_then(Value::as_str)?.to_owned();
        Some((format!("{},bottleneck=\"{name}\"}}", labels(record).trim_end_matches('}')), 1.0))
    };
    let bottlenecks = running.iter().filter_map(bottleneck).collect();
    family("pghydrant_session_bottleneck", "gauge", "What the step that runs waits for.", bottlenecks);
    let retries = running.iter().map(|record| (labels(record), f64::from(record.retries))).collect();
    family("pghydrant_session_retries", "gauge", "Retries of the order that is carried out.", retries);
    let counted = |count: &AtomicU64, why: &str| (format!("{{why=\"{why}\"}}"), count.load(Ordering::Relaxed) as f64);
    family(
        "pghydrant_control_refused_total",
        "counter",
        "Connections and requests of the control port that came to nothing.",
        vec![
            counted(&refused.handshakes, "handshake"),
            counted(&refused.requests, "request"),
            counted(&refused.unauthorized, "token"),
        ],
    );
    out
}

fn labels(record: &Record) -> String {
    let host = record.target.host.replace('\\', "\\\\").replace('"', "\\\"");
    format!("{{session=\"{}\",cluster=\"{}\",target=\"{host}\"}}", record.id, record.cluster)
}
