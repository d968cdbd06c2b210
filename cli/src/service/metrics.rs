//! What Prometheus reads.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};

use engine::units::SessionId;
use serde_json::Value;

use super::https::Refused;
use super::plane::Measured;
use super::sessions::{Record, State};

/// The text format, version 0.0.4.
pub(super) fn text(records: &[Record], refused: &Refused, plane: &Measured) -> String {
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
        let name = record.progress.as_ref()?.get("bottleneck").and_then(Value::as_str)?;
        // As the target says it: only a word is one of ours.
        let name = name.chars().all(|letter| letter.is_ascii_lowercase()).then_some(name)?;
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
            counted(&refused.too_many, "too_many"),
        ],
    );
    let counts = &plane.counts;
    let whole = |value: u64| vec![(String::new(), value as f64)];
    family("pghydrant_data_connections", "gauge", "Connections of the data plane.", whole(counts.open));
    family("pghydrant_data_requests_total", "counter", "Requests of the data plane.", whole(counts.requests));
    family("pghydrant_data_bytes_total", "counter", "Bytes of blocks sent.", whole(counts.bytes));
    let sent = |(session, bytes): &(SessionId, u64)| (format!("{{session=\"{session}\"}}"), *bytes as f64);
    let sent = plane.sent.iter().map(sent).collect();
    family("pghydrant_session_bytes_sent", "gauge", "Bytes of blocks sent for a session.", sent);
    let why = [
        ("lease", counts.refused_requests),
        ("failed", counts.failed_requests),
        ("too_many", counts.too_many),
        ("token", counts.not_let_in),
        ("garbage", counts.garbage),
        ("slow", counts.slow),
        ("idle", counts.idle),
    ];
    family(
        "pghydrant_data_refused_total",
        "counter",
        "Connections and requests of the data plane that came to nothing.",
        why.map(|(why, count)| (format!("{{why=\"{why}\"}}"), count as f64)).to_vec(),
    );
    let let_in = whole(counts.let_in);
    family("pghydrant_data_let_in_total", "counter", "Connections of the data plane with a good lease.", let_in);
    out
}

fn labels(record: &Record) -> String {
    let host = record.target.host.replace('\\', "\\\\").replace('"', "\\\"");
    format!("{{session=\"{}\",cluster=\"{}\",target=\"{host}\"}}", record.id, record.cluster)
}
