//! The page of the mount server, as a browser has it: what stands on it while a restore runs, and when the service is away.

use std::time::Duration;

use serde_json::Value;

use crate::service::Stage;
use crate::support::browser::{Browser, CHROMIUM};
use crate::support::process::wait_until;
use crate::support::*;

/// A name that would be an element, and run, where it is taken for markup.
const HOSTILE: &str = "<img src=x onerror=alert(1)>";
/// What its reader sees of the one session.
const ARTICLE: &str = "document.querySelector('article')";

/// As a person does.
fn give_token(browser: &mut Browser, token: &str) -> Result<()> {
    browser.evaluate("document.getElementById('token').focus()")?;
    browser.call("Input.insertText", serde_json::json!({"text": token}))?;
    browser.evaluate("document.querySelector('#login button').click()").map(drop)
}

/// All that was asked for came from the service, and the console's complaints are `expected`.
fn nothing_else(browser: &mut Browser, url: &str, expected: &str) -> Result<()> {
    let (urls, complaints) = browser.heard()?;
    ensure!(urls.iter().all(|asked| asked.starts_with(url)), "{urls:?}");
    let is_expected = |complaint: &String| !expected.is_empty() && complaint.contains(expected);
    ensure!(complaints.iter().all(is_expected), "{complaints:#?}");
    Ok(())
}

fn wait_for_state(browser: &mut Browser, state: &str) -> Result<()> {
    browser.wait_for(state, &format!("{ARTICLE}?.dataset.state === '{state}'"))
}

fn wait_for_progress(browser: &mut Browser, over: f64) -> Result<f64> {
    let bar = format!("({ARTICLE}?.querySelector('progress[value]')?.value ?? 0)");
    browser.wait_for("more progress", &format!("{bar} > {over}"))?;
    Ok(browser.evaluate(&bar)?.as_f64().unwrap_or(over).max(over))
}

fn pictures(browser: &mut Browser, name: &str) -> Result<()> {
    for (width, scheme) in [(1200, "light"), (1200, "dark"), (400, "light"), (400, "dark")] {
        browser.look(name, width, scheme)?;
        let wide = browser.evaluate("document.documentElement.scrollWidth")?;
        ensure!(wide.as_u64().is_some_and(|wide| wide <= width.into()), "{name}: {wide} of {width}");
    }
    Ok(())
}

#[test]
fn the_page_shows_a_restore_live_says_when_it_is_disconnected_and_takes_names_for_text() -> Result<()> {
    requires_network!(Tool(CHROMIUM, CHROMIUM));
    // At the line's low speed it is minutes long, so that all of what follows is seen of it.
    let world = World::with(4, &["--compression", "none"], &[])?;
    let mut stage = Stage::of(world, &["--retries", "20", "--retry-every", "3s"])?;
    let state = stage.world.scratch.join("server-state").display().to_string();
    let root = stage.world.pghydrant.as_user(&OsUser::current());
    let token = root.succeed(["serve", "--state", &state, "--issue-token", HOSTILE])?.stdout;
    std::fs::write(&stage.server.token, &token)?;
    let url = stage.server.url();
    let mut browser = Browser::start(&stage.world.scratch)?;
    browser.open(&format!("{url}/"))?;

    browser.wait_for("a form", "document.getElementById('login').checkVisibility()")?;
    nothing_else(&mut browser, &url, "")?;
    give_token(&mut browser, "pgh_0")?;
    browser.wait_for("a refusal", "document.getElementById('refusal').textContent.includes('does not know')")?;
    nothing_else(&mut browser, &url, "401")?;
    give_token(&mut browser, token.trim())?;
    browser.wait_for("a connection", "document.getElementById('state').textContent === 'live'")?;
    let empty =
        "document.getElementById('empty').checkVisibility() && !document.getElementById('login').checkVisibility()";
    browser.wait_for("an empty list", empty)?;
    pictures(&mut browser, "empty")?;

    let target = stage.world.scratch.join(HOSTILE);
    let client = stage.server.restore(&stage.host, &target, &[]).start()?;
    wait_until("an agent", Duration::from_secs(120), || Ok(!stage.host.our_pids()?.is_empty()))?;
    stage.host.slow(4)?;
    wait_for_state(&mut browser, "running")?;
    let before = wait_for_progress(&mut browser, 0.0)?;
    wait_for_progress(&mut browser, before)?;
    let copies = format!("[...{ARTICLE}.querySelectorAll('li.began')].some((step) => step.textContent === 'copy')");
    browser.wait_for("a step", &copies)?;
    let figures =
        format!("/^copy: .* MiB of .* MiB, .* MB\\/s/.test({ARTICLE}.querySelector('.figures')?.textContent)");
    browser.wait_for("figures", &figures)?;
    browser.wait_for("a plot", "document.querySelector('polyline')?.points.length > 1")?;
    nothing_else(&mut browser, &url, "")?;
    pictures(&mut browser, "running")?;

    stage.server.kill()?;
    let disconnected = "/^disconnected since .*trying again$/.test(document.getElementById('state').textContent)";
    browser.wait_for("a notice", disconnected)?;
    ensure!(browser.evaluate("document.body.classList.contains('lost')")? == Value::Bool(true));
    pictures(&mut browser, "disconnected")?;
    wait_for_progress(&mut browser, 0.0)?;
    stage.server.start_again()?;
    stage.host.speed_up()?;
    browser.wait_for(
        "a connection",
        "document.body.className === '' && document.getElementById('state').textContent === 'live'",
    )?;
    nothing_else(&mut browser, &url, "net::ERR_")?;
    client.wait()?.expect_code(0)?;
    wait_for_state(&mut browser, "finished")?;
    let done = format!("!{ARTICLE}.querySelector('progress') && !{ARTICLE}.querySelector('li.began')");
    browser.wait_for("every step done", &done)?;
    let shown = browser.evaluate(&format!("{ARTICLE}.innerText"))?;
    let shown = shown.as_str().context("no text")?;
    let (place, person) = (target.display().to_string(), format!("ordered by {HOSTILE},"));
    ensure!(shown.contains(&place) && shown.contains(&person), "{shown}");
    ensure!(browser.evaluate("document.images.length")? == Value::from(0));
    pictures(&mut browser, "finished")?;

    // One that this page cannot read, before and behind one that it can.
    browser.evaluate(
        "{ const own = window.fetch; window.fetch = async (path, options) => {
             const answer = await own(path, options);
             if (path !== 'v1/sessions') return answer;
             const { sessions } = await answer.json();
             const changed = sessions.map((record) => ({ ...record, ordered_by: 'somebody else' }));
             const bad = (session) => ({ session, state: null });
             return Response.json({ sessions: [null, bad('bad-1'), ...changed, bad('bad-2')] });
           } }",
    )?;
    browser.wait_for(
        "a bad record beside a good one",
        "document.querySelectorAll('article[data-state=unknown]').length === 2
         && document.querySelector('article[data-state=finished]')?.innerText.includes('somebody else')
         && document.body.innerText.includes('cannot be shown')",
    )?;
    // The service does not know them.
    nothing_else(&mut browser, &url, "bad-")?;
    Instance::running_in(&target)?.stop("fast")
}
