//! What users see: results on stdout, talk on stderr, bars only on a terminal; with `--json` one object a line on stdout.
//!
//! An [`Output`] is told of steps, notes and results. A [`Phase`] is a long part with bytes: it implements the engine's
//! `Progress`, and a thread of its own redraws it, so workers only add to counters.
//!
//! What comes out of a repository (paths, settings, names) may hold anything: control characters are shown, never sent.
//!
//! JSON objects have an `event`: `step`, `progress`, `note`, `warning`, `result`, `error`. Fields are only ever added.
//! Where another process of ours reads them ([`Reader::Relay`]), results also carry the text that people would see, and
//! [`Output::replay`] says there what would have been said here.

use std::borrow::Cow;
use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use engine::progress::{Counting, Progress, Stage};
use serde::Serialize;
use serde_json::{Value, json};

use crate::exit::Failure;
use crate::human;

/// Redraw of a terminal's bar.
const TERMINAL_TICK: Duration = Duration::from_millis(200);
/// A line in a log, where there is no terminal.
const LOG_TICK: Duration = Duration::from_secs(10);
/// A JSON object for a program.
const JSON_TICK: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reader {
    Terminal,
    Log,
    Program,
    /// A process of ours, that says it again for its own reader.
    Relay,
}

/// Where a command's words go.
#[derive(Clone, Debug)]
pub(crate) struct Output {
    reader: Reader,
    interrupted: Arc<AtomicBool>,
}

impl Output {
    pub(crate) fn new(relay: bool, json: bool, interrupted: &Arc<AtomicBool>) -> Self {
        let reader = match (relay, json, std::io::stderr().is_terminal()) {
            (true, ..) => Reader::Relay,
            (false, true, _) => Reader::Program,
            (false, false, true) => Reader::Terminal,
            (false, false, false) => Reader::Log,
        };
        Self { reader, interrupted: Arc::clone(interrupted) }
    }

    /// For what fails before the settings are known.
    pub(crate) fn plain() -> Self {
        Self { reader: Reader::Log, interrupted: Arc::default() }
    }

    /// For a process whose words another of ours says again.
    pub(crate) fn relay() -> Self {
        Self { reader: Reader::Relay, interrupted: Arc::default() }
    }

    /// Whether stdout is read by a program.
    pub(crate) fn is_json(&self) -> bool {
        matches!(self.reader, Reader::Program | Reader::Relay)
    }

    /// Whether who reads the result has just seen every step go by: stdout and stderr are one terminal.
    pub(crate) fn is_followed(&self) -> bool {
        self.reader == Reader::Terminal && std::io::stdout().is_terminal()
    }

    /// The result: text for people (may have several lines), or one object with `"event": "result"`.
    pub(crate) fn result(&self, text: &str, object: &impl Serialize) {
        let text = text.trim_end_matches('\n');
        match self.reader {
            Reader::Program => self.object("result", object),
            Reader::Relay => to_stdout(&json_line(&with_text(value_of("result", object), text))),
            Reader::Terminal | Reader::Log => to_stdout(&shown(text)),
        }
    }

    /// One JSON object of its own `event`; silent for people.
    pub(crate) fn event(&self, event: &str, object: &impl Serialize) {
        if self.is_json() {
            self.object(event, object);
        }
    }

    /// Something worth knowing.
    pub(crate) fn note(&self, text: &str) {
        self.say("note", text, text);
    }

    /// Something that may surprise later.
    pub(crate) fn warning(&self, text: &str) {
        self.say("warning", &format!("warning: {text}"), text);
    }

    /// The failure that ends the command, with its hint.
    pub(crate) fn error(&self, error: &anyhow::Error) {
        let message = format!("{error:#}");
        let hint = Failure::hint_of(error);
        if self.is_json() {
            self.object("error", &json!({"message": message, "hint": hint, "exit": Failure::exit_of(error) as u8}));
            return;
        }
        to_stderr(&format!("error: {message}"));
        if let Some(hint) = hint {
            to_stderr(&format!("hint: {hint}"));
        }
    }

    /// A step of a longer story begins; it is printed with its time when it ends.
    pub(crate) fn step(&self, name: &'static str) -> Step<'_> {
        if self.reader == Reader::Terminal {
            to_terminal(&format!("  {name} …"));
        }
        self.event("step", &json!({"step": name, "state": "began"}));
        Step { output: self, name, began: Instant::now(), ended: false }
    }

    /// Where a part without a known end is: one line that a terminal replaces, and none elsewhere.
    pub(crate) fn live(&self, text: &str) {
        if self.reader == Reader::Terminal {
            to_terminal(&format!("  {text}"));
        }
    }

    /// A part with bytes begins; `total_bytes` 0 where nobody knows.
    pub(crate) fn phase(&self, name: &'static str, total_bytes: u64) -> Phase {
        Phase::begin(self, name, total_bytes)
    }

    fn say(&self, event: &str, line: &str, text: &str) {
        match self.reader {
            Reader::Program | Reader::Relay => self.object(event, &json!({"message": text})),
            Reader::Terminal => {
                to_terminal("");
                to_stderr(line);
            }
            Reader::Log => to_stderr(line),
        }
    }

    fn object(&self, event: &str, object: &impl Serialize) {
        to_stdout(&json_line(&value_of(event, object)));
    }

    /// Says what a process of ours said elsewhere. Tells how that process ended, if this was its last word.
    pub(crate) fn replay(&self, mut said: Value) -> Option<u8> {
        let text = |name: &str| said.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
        let event = text("event");
        if event == EXIT {
            return said.get("code").and_then(Value::as_u64).and_then(|code| u8::try_from(code).ok());
        }
        // How each attempt ended is for the mount server.
        if event == "ended" {
            return None;
        }
        if self.is_json() {
            if let Value::Object(fields) = &mut said {
                fields.remove(TEXT);
                fields.remove("at");
            }
            to_stdout(&json_line(&said));
            return None;
        }
        match event.as_str() {
            "note" => self.note(&text("message")),
            "warning" => self.warning(&text("message")),
            "result" => to_stdout(&shown(&text(TEXT))),
            "step" => match text("state").as_str() {
                "began" => self.live(&format!("{} …", text("step"))),
                _ => self.line(&step_line(&text("step"), seconds_of(&said), &text("detail"))),
            },
            "progress" => self.live(&progress_line(&said)),
            "problem" if said.get("only").is_none() => {
                self.line(&format!("problem: {}\nhint: {}", text("what"), text("hint")));
            }
            "error" => {
                self.line(&format!("error: {}", text("message")));
                if !text("hint").is_empty() {
                    to_stderr(&format!("hint: {}", text("hint")));
                }
            }
            _ => {}
        }
        None
    }

    /// The last word of a process whose output is relayed.
    pub(crate) fn exit(&self, code: u8) {
        if self.reader == Reader::Relay {
            self.object(EXIT, &json!({"code": code}));
        }
    }

    /// A line for people.
    fn line(&self, text: &str) {
        if self.reader == Reader::Terminal {
            to_terminal("");
        }
        to_stderr(text.trim_end());
    }
}

/// The event that ends what is relayed.
const EXIT: &str = "exit";
/// What a result says to people.
const TEXT: &str = "text";

fn value_of(event: &str, object: &impl Serialize) -> Value {
    // Of our own types, which all serialise; a failure would be a bug that must show.
    let mut value = serde_json::to_value(object).unwrap_or_else(|cause| json!({"unprintable": cause.to_string()}));
    if let Value::Object(fields) = &mut value {
        fields.insert("event".to_owned(), event.into());
    } else {
        value = json!({"event": event, "value": value});
    }
    value
}

fn with_text(mut value: Value, text: &str) -> Value {
    if let Value::Object(fields) = &mut value {
        fields.insert(TEXT.to_owned(), text.into());
    }
    value
}

fn step_line(name: &str, time: Duration, detail: &str) -> String {
    format!("  {name:<12} {:>10}  {detail}", human::duration(time))
}

fn seconds_of(said: &Value) -> Duration {
    let seconds = said.get("seconds").and_then(Value::as_f64).unwrap_or_default();
    Duration::try_from_secs_f64(seconds).unwrap_or_default()
}

/// The figures of a phase that runs elsewhere.
fn progress_line(said: &Value) -> String {
    let (bytes, total) = (number(said, "bytes"), number(said, "total_bytes"));
    let of = if total > 0 { format!(" of {}", human::bytes(total)) } else { String::new() };
    let rate = |name: &str| said.get(name).and_then(Value::as_f64).unwrap_or_default();
    let left = said.get("eta_seconds").and_then(Value::as_f64).and_then(|left| Duration::try_from_secs_f64(left).ok());
    let left = left.map(|left| format!(", {} left", human::duration(left))).unwrap_or_default();
    let bottleneck = said.get("bottleneck").and_then(Value::as_str).map(|name| format!(", {name}")).unwrap_or_default();
    format!(
        "{}: {}{of}, {:.0} MB/s (average {:.0}){left}{bottleneck}",
        said.get("phase").and_then(Value::as_str).unwrap_or_default(),
        human::bytes(bytes),
        rate("megabytes_per_second"),
        rate("average_megabytes_per_second")
    )
}

fn number(said: &Value, name: &str) -> u64 {
    said.get(name).and_then(Value::as_u64).unwrap_or_default()
}

/// A closed pipe behind us is no reason to fail a restore.
fn to_stdout(line: &str) {
    let mut stdout = std::io::stdout().lock();
    let _ = writeln!(stdout, "{line}").and_then(|()| stdout.flush());
}

fn to_stderr(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{}", shown(line));
}

/// Whether a terminal takes the letter for an order, or for one to turn the direction of writing.
fn is_order(letter: char) -> bool {
    let turns = matches!(letter, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    letter.is_control() || turns
}

/// An object on one line. What JSON itself leaves as it is and a terminal does not, is escaped too: names come from
/// elsewhere, and people look at such lines.
pub(crate) fn json_line(object: &Value) -> String {
    let text = object.to_string();
    if !text.chars().any(is_order) {
        return text;
    }
    // All of them lie within strings, and below U+FFFF.
    let show =
        |letter: char| if is_order(letter) { format!("\\u{:04x}", u32::from(letter)) } else { letter.to_string() };
    text.chars().map(show).collect()
}

/// The text as it may go to a terminal: lines and tabs stay; other control characters, and those that turn the direction
/// of writing, become their escapes.
fn shown(text: &str) -> Cow<'_, str> {
    let harmless = |letter: char| matches!(letter, '\n' | '\t') || !is_order(letter);
    if text.chars().all(harmless) {
        return Cow::Borrowed(text);
    }
    let show = |letter: char| if harmless(letter) { letter.to_string() } else { letter.escape_unicode().to_string() };
    Cow::Owned(text.chars().map(show).collect())
}

/// Replaces the terminal's current line.
fn to_terminal(line: &str) {
    let mut stderr = std::io::stderr().lock();
    let _ = write!(stderr, "\r\x1b[2K{}", shown(line)).and_then(|()| stderr.flush());
}

/// A step that runs; dropped without [`Step::done`] it failed.
#[derive(Debug)]
pub(crate) struct Step<'a> {
    output: &'a Output,
    name: &'static str,
    began: Instant,
    ended: bool,
}

impl Step<'_> {
    /// The step held. `detail` is printed behind its time: what was done, not that it was done.
    pub(crate) fn done(mut self, detail: &str) -> Duration {
        self.ended = true;
        let time = self.began.elapsed();
        self.tell("done", detail, time);
        time
    }

    fn tell(&self, state: &str, detail: &str, time: Duration) {
        let line = step_line(self.name, time, detail);
        match self.output.reader {
            Reader::Program | Reader::Relay => self.output.object(
                "step",
                &json!({"step": self.name, "state": state, "seconds": time.as_secs_f64(), "detail": detail}),
            ),
            Reader::Terminal | Reader::Log => self.output.line(&line),
        }
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.tell("failed", "failed", self.began.elapsed());
        }
    }
}

/// A part with bytes, shown while it runs. Give it to the engine as its `Progress`.
#[derive(Debug)]
pub(crate) struct Phase {
    shared: Arc<Shared>,
    display: Option<std::thread::JoinHandle<()>>,
    wake: Option<crossbeam::channel::Sender<()>>,
}

#[derive(Debug)]
struct Shared {
    output: Output,
    name: &'static str,
    total_bytes: u64,
    began: Instant,
    counting: Counting,
}

/// What a phase came to.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PhaseResult {
    pub(crate) bytes: u64,
    pub(crate) seconds: f64,
    pub(crate) megabytes_per_second: f64,
    pub(crate) bottleneck: Option<&'static str>,
}

impl PhaseResult {
    /// `3.1 GiB, 1204 MB/s, bottleneck: disk`.
    pub(crate) fn text(&self) -> String {
        let bottleneck = self.bottleneck.map(|name| format!(", bottleneck: {name}")).unwrap_or_default();
        format!("{}, {:.0} MB/s{bottleneck}", human::bytes(self.bytes), self.megabytes_per_second)
    }
}

impl Phase {
    fn begin(output: &Output, name: &'static str, total_bytes: u64) -> Self {
        let shared = Arc::new(Shared {
            output: output.clone(),
            name,
            total_bytes,
            began: Instant::now(),
            counting: Counting::default(),
        });
        let (wake, woken) = crossbeam::channel::bounded(1);
        let for_display = Arc::clone(&shared);
        let spawned = std::thread::Builder::new().name("progress".to_owned());
        // Without a thread for the display the work goes on unseen.
        let display = spawned.spawn(move || for_display.display(&woken)).ok();
        Self { shared, display, wake: Some(wake) }
    }

    /// The phase ended; the bar goes.
    pub(crate) fn finish(mut self) -> PhaseResult {
        self.stop_display();
        let time = self.shared.began.elapsed();
        let bytes = self.shared.counting.bytes();
        PhaseResult {
            bytes,
            seconds: time.as_secs_f64(),
            megabytes_per_second: human::megabytes_per_second(bytes, time),
            bottleneck: self.shared.counting.bottleneck().map(Stage::name),
        }
    }

    fn stop_display(&mut self) {
        self.wake = None;
        if let Some(display) = self.display.take() {
            // It only prints; if it panicked, its message is on stderr.
            let _ = display.join();
        }
    }
}

impl Drop for Phase {
    fn drop(&mut self) {
        self.stop_display();
    }
}

impl Progress for Phase {
    fn advance(&self, bytes: u64) {
        self.shared.counting.advance(bytes);
    }

    fn waited(&self, stage: Stage, nanoseconds: u64) {
        self.shared.counting.waited(stage, nanoseconds);
    }

    fn cancelled(&self) -> bool {
        self.shared.output.interrupted.load(Ordering::Relaxed)
    }
}

impl Shared {
    fn display(&self, woken: &crossbeam::channel::Receiver<()>) {
        match self.output.reader {
            Reader::Terminal => self.draw_bar(woken),
            Reader::Log => self.every(LOG_TICK, woken, |now| {
                to_stderr(&format!("  {}: {}", self.name, self.line(now)));
            }),
            Reader::Program | Reader::Relay => self.every(JSON_TICK, woken, |now| {
                self.output.object("progress", &self.figures(now));
            }),
        }
    }

    /// Calls `tell` with the bytes a second of the last tick, until the phase ends.
    fn every(&self, tick: Duration, woken: &crossbeam::channel::Receiver<()>, mut tell: impl FnMut(f64)) {
        let mut before = 0;
        while woken.recv_timeout(tick) == Err(crossbeam::channel::RecvTimeoutError::Timeout) {
            let bytes = self.counting.bytes();
            tell(human::megabytes_per_second(bytes - before, tick));
            before = bytes;
        }
    }

    fn draw_bar(&self, woken: &crossbeam::channel::Receiver<()>) {
        let template = if self.total_bytes > 0 { "  {prefix} {bar:30} {msg}" } else { "  {prefix} {spinner} {msg}" };
        let bar = indicatif::ProgressBar::new(self.total_bytes);
        if let Ok(style) = indicatif::ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("━╸ "));
        }
        to_terminal("");
        bar.set_prefix(self.name);
        self.every(TERMINAL_TICK, woken, |now| {
            bar.set_position(self.counting.bytes());
            bar.set_message(self.line(now));
            bar.tick();
        });
        bar.finish_and_clear();
    }

    fn line(&self, now: f64) -> String {
        let (bytes, time) = (self.counting.bytes(), self.began.elapsed());
        let of = if self.total_bytes > 0 { format!(" of {}", human::bytes(self.total_bytes)) } else { String::new() };
        let eta = self.eta(bytes, time).map(|eta| format!(", {} left", human::duration(eta))).unwrap_or_default();
        let bottleneck = self.counting.bottleneck().map(|stage| format!(", {}", stage.name())).unwrap_or_default();
        format!("{}{of}, {now:.0} MB/s (average {}){eta}{bottleneck}", human::bytes(bytes), human::rate(bytes, time))
    }

    fn figures(&self, now: f64) -> Value {
        let (bytes, time) = (self.counting.bytes(), self.began.elapsed());
        json!({
            "phase": self.name,
            "bytes": bytes,
            "total_bytes": (self.total_bytes > 0).then_some(self.total_bytes),
            "megabytes_per_second": now,
            "average_megabytes_per_second": human::megabytes_per_second(bytes, time),
            "seconds": time.as_secs_f64(),
            "eta_seconds": self.eta(bytes, time).map(|eta| eta.as_secs_f64()),
            "bottleneck": self.counting.bottleneck().map(Stage::name),
        })
    }

    #[allow(clippy::cast_precision_loss)]
    fn eta(&self, bytes: u64, time: Duration) -> Option<Duration> {
        let left = self.total_bytes.checked_sub(bytes)?;
        let seconds = left as f64 / (bytes as f64 / time.as_secs_f64());
        (bytes > 0).then(|| Duration::try_from_secs_f64(seconds).ok()).flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_json_line_has_nothing_that_a_terminal_obeys_and_says_the_same() {
        let object = json!({"name": "a\u{9b}31m\u{202e}b\u{7f}\n", "né": 1});
        let line = json_line(&object);
        assert_eq!(line, r#"{"name":"a\u009b31m\u202eb\u007f\n","né":1}"#);
        assert_eq!(serde_json::from_str::<Value>(&line).ok(), Some(object));
    }

    #[test]
    fn control_characters_are_shown_and_not_sent() {
        assert_eq!(shown("a table:\n\tone é 汉"), "a table:\n\tone é 汉");
        assert_eq!(shown("\u{1b}[2Jgone\r\u{7}\u{9b}x"), "\\u{1b}[2Jgone\\u{d}\\u{7}\\u{9b}x");
        assert_eq!(shown("\u{202e}txt.exe"), "\\u{202e}txt.exe");
    }
}
