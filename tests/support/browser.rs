//! A browser without a window, and one page in it: Chromium by its DevTools protocol, over two pipes.
//!
//! Chromium reads requests from descriptor 3 and writes answers and events to 4: JSON, a NUL behind each.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use serde_json::{Value, json};

use super::process::wait_until;
use super::{Context, Result, Run, Running, Scratch, bail, ensure};

/// The program, and Debian's package of the same name.
pub const CHROMIUM: &str = "chromium-headless-shell";
/// For one answer, or for one change on the page.
const LIMIT: Duration = Duration::from_secs(120);

/// See the module.
pub struct Browser {
    running: Running,
    requests: File,
    answers: File,
    /// What was read of an answer that is not complete.
    rest: Vec<u8>,
    /// Events that nobody has looked at.
    events: Vec<Value>,
    number: u64,
    /// The page's, once there is one.
    session: Option<String>,
}

impl Browser {
    /// Needs `requires!(Tool(CHROMIUM, CHROMIUM))`. It trusts every certificate.
    pub fn start(scratch: &Scratch) -> Result<Self> {
        let pipe = |name: &str| -> Result<_> {
            let path = scratch.join(name);
            mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
            // For both directions: opening does not wait for the other side.
            let flags = i32::try_from(OFlags::NONBLOCK.bits())?;
            Ok((OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path)?, path))
        };
        let ((requests, to), (answers, from)) = (pipe("browser.requests")?, pipe("browser.answers")?);
        let home = scratch.join("browser");
        let script = format!("exec {CHROMIUM} \"$@\" 3<\"$0\" 4>{}", from.display());
        let run = Run::new("sh").args(["-c", &script]).arg(to).env("HOME", &home);
        let run = run.args(["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]);
        let run = run.args(["--remote-debugging-pipe", "--ignore-certificate-errors", "--lang=en-US"]);
        let run = run.arg(format!("--user-data-dir={}", home.display()));
        let running = run.time_limit(Duration::from_secs(900)).start()?;
        let (rest, events) = (Vec::new(), Vec::new());
        let mut browser = Self { running, requests, answers, rest, events, number: 0, session: None };
        let page = browser.call("Target.createTarget", json!({"url": "about:blank"}))?;
        let attach = json!({"targetId": page.get("targetId"), "flatten": true});
        let attached = browser.call("Target.attachToTarget", attach)?;
        browser.session = attached.get("sessionId").and_then(Value::as_str).map(str::to_owned);
        for domain in ["Runtime", "Log", "Network", "Page"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(browser)
    }

    /// One request of the protocol; what it answers.
    pub fn call(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.number += 1;
        let mut request = json!({"id": self.number, "method": method, "params": parameters});
        if let (Some(session), Some(fields)) = (&self.session, request.as_object_mut()) {
            fields.insert("sessionId".to_owned(), session.clone().into());
        }
        self.requests.write_all(format!("{request}\0").as_bytes())?;
        loop {
            let mut said = self.next().with_context(|| format!("no answer to {method}"))?;
            if said.get("id").and_then(Value::as_u64) != Some(self.number) {
                self.events.push(said);
                continue;
            }
            ensure!(said.get("error").is_none(), "{method}: {said}");
            return Ok(said["result"].take());
        }
    }

    fn next(&mut self) -> Result<Value> {
        let began = Instant::now();
        loop {
            if let Some(end) = self.rest.iter().position(|byte| *byte == 0) {
                let whole: Vec<u8> = self.rest.drain(..=end).collect();
                return Ok(serde_json::from_slice(&whole[..end])?);
            }
            let mut piece = vec![0; 64 << 10];
            match self.answers.read(&mut piece) {
                Ok(read) => self.rest.extend(&piece[..read]),
                Err(cause) if cause.kind() == ErrorKind::WouldBlock => {
                    let ended = self.running.try_status()?;
                    ensure!(ended.is_none() && began.elapsed() < LIMIT, "{}", self.running.stderr_so_far()?);
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(cause) => return Err(cause.into()),
            }
        }
    }

    pub fn open(&mut self, url: &str) -> Result<()> {
        self.call("Page.navigate", json!({"url": url}))?;
        self.wait_for("a page", "document.readyState === 'complete' && location.protocol === 'https:'")
    }

    /// What a JavaScript expression comes to, on the page.
    pub fn evaluate(&mut self, expression: &str) -> Result<Value> {
        let asked = json!({"expression": expression, "returnByValue": true, "awaitPromise": true});
        let mut said = self.call("Runtime.evaluate", asked)?;
        ensure!(said.get("exceptionDetails").is_none(), "{expression}: {said}");
        Ok(said["result"]["value"].take())
    }

    /// Waits until an expression is true.
    pub fn wait_for(&mut self, what: &str, expression: &str) -> Result<()> {
        let waited = wait_until(what, LIMIT, || Ok(self.evaluate(expression)? == Value::Bool(true)));
        match waited {
            Ok(()) => Ok(()),
            Err(error) => bail!("{error:#}\n{}", self.evaluate("document.body.outerHTML")?),
        }
    }

    /// What was asked of whom, and what the console has, since this was last called: URLs and complaints.
    pub fn heard(&mut self) -> Result<(Vec<String>, Vec<String>)> {
        // Whatever was said before this answer is there then.
        self.evaluate("true")?;
        let (mut urls, mut complaints) = (Vec::new(), Vec::new());
        for event in self.events.drain(..) {
            match event["method"].as_str().unwrap_or_default() {
                "Network.requestWillBeSent" => {
                    urls.push(event["params"]["request"]["url"].as_str().unwrap_or_default().to_owned());
                }
                "Log.entryAdded" | "Runtime.consoleAPICalled" | "Runtime.exceptionThrown" => {
                    complaints.push(event["params"].to_string());
                }
                _ => {}
            }
        }
        Ok((urls, complaints))
    }

    /// A window so wide, in colours of this scheme. Where `PGHYDRANT_TEST_PICTURES` names a directory, a picture is left
    /// there for whoever wants to look.
    pub fn look(&mut self, name: &str, width: u32, scheme: &str) -> Result<()> {
        let metrics = json!({"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": false});
        self.call("Emulation.setDeviceMetricsOverride", metrics)?;
        let media = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", media)?;
        let Some(directory) = std::env::var_os("PGHYDRANT_TEST_PICTURES") else { return Ok(()) };
        let picture = self.call("Page.captureScreenshot", json!({"format": "png"}))?;
        // As it comes: `base64 --decode` makes a PNG of it.
        let file = std::path::Path::new(&directory).join(format!("{name}-{width}-{scheme}.png.base64"));
        std::fs::write(file, picture["data"].as_str().context("no picture")?)?;
        Ok(())
    }
}
