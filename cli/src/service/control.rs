//! The control port: HTTPS with JSON.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/version` | what answers; the only one without a token, beside the page itself |
//! | `POST /v1/commands` `{"arguments": ["list", …]}` | what the command says, an object a line, until `{"event": "exit"}` |
//! | `GET /v1/sessions`, `/v1/sessions/ID` | sessions, or one |
//! | `GET /v1/sessions/ID/events?from=BYTE` | its events, server-sent, from the beginning or from there; with `follow=false` those there are |
//! | `POST /v1/sessions/ID/ORDER` `{"arguments": […]}` | retry, cancel, promote or retarget; then its events as above |
//! | `GET /metrics` | for Prometheus |
//!
//! What is refused is `{"message", "hint", "exit"}` with the status that fits; a command's own refusal is an event.

use std::convert::Infallible;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State as Shared};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Json, Router};
use engine::units::SessionId;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::Command;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;

use super::commands::{self, Asked};
use super::https::{Place, Refused};
use super::plane::MountService;
use super::sessions::{Follower, Record, Sessions, State};
use super::tokens::Tokens;
use super::{metrics, page};
use crate::exit::{Exit, Failure};
use crate::human;
use crate::output::json_line;

/// Longer than any command line of ours.
const BODY_BYTES_MAX: usize = 256 << 10;
/// How long a body may take to come.
const BODY_WAIT: Duration = Duration::from_secs(10);
/// Commands on the repository at once: each is a process that reads it.
const COMMANDS_MAX: usize = 4;
/// How long one more waits for its turn.
const COMMAND_WAIT: Duration = Duration::from_secs(30);
/// Lines between a command and who reads them.
const LINES_MAX: usize = 64;

/// What the handlers share.
#[derive(Clone)]
pub(super) struct Control {
    pub(super) repository: PathBuf,
    pub(super) state: PathBuf,
    pub(super) tokens: Tokens,
    pub(super) sessions: Arc<Sessions>,
    pub(super) plane: Arc<MountService>,
    pub(super) refused: Arc<Refused>,
    /// Commands on the repository that may run beside those that do.
    pub(super) commands: Arc<Semaphore>,
}

/// As many as may run at once.
pub(super) fn commands_at_once() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(COMMANDS_MAX))
}

/// Whose token came with a request.
#[derive(Clone, Debug)]
struct Caller(String);

pub(super) fn router(control: Control) -> Router {
    let control = Arc::new(control);
    let guarded = Router::new()
        .route("/v1/commands", post(command))
        .route("/v1/sessions", get(sessions))
        .route("/v1/sessions/{id}", get(session))
        .route("/v1/sessions/{id}/events", get(events))
        .route("/v1/sessions/{id}/{order}", post(order))
        .route("/metrics", get(measured))
        .route_layer(from_fn_with_state(Arc::clone(&control), authorize));
    let open = Router::new().route("/v1/version", get(version)).merge(page::router());
    open.merge(guarded).layer(DefaultBodyLimit::max(BODY_BYTES_MAX)).with_state(control)
}

/// Lets a request with a good token through, and nothing else.
async fn authorize(Shared(control): Shared<Arc<Control>>, mut request: Request, next: Next) -> Response {
    let token = bearer(request.headers());
    let holder = token.map(|token| control.tokens.holder(&token));
    match holder {
        Some(Ok(Some(name))) => {
            // One place is kept for whoever has a good token.
            if let Some(place) = request.extensions().get::<Arc<Place>>() {
                place.keep();
            }
            request.extensions_mut().insert(Caller(name));
            match with_body(request).await {
                Some(request) => next.run(request).await,
                None => {
                    control.refused.requests.fetch_add(1, Ordering::Relaxed);
                    let failure = Failure::new(Exit::Usage, "the request is too long, or did not come in time");
                    answer(StatusCode::REQUEST_TIMEOUT, &failure.into())
                }
            }
        }
        Some(Err(error)) => refusal(&error),
        Some(Ok(None)) | None => {
            control.refused.unauthorized.fetch_add(1, Ordering::Relaxed);
            let failure = Failure::new(Exit::Failed, "the mount server does not know this token")
                .hint("`pghydrant serve --issue-token NAME` there makes one; give it with --token-file");
            answer(StatusCode::UNAUTHORIZED, &failure.into())
        }
    }
}

/// The request with all of its body, if that comes in time.
async fn with_body(request: Request) -> Option<Request> {
    let (head, body) = request.into_parts();
    let body = tokio::time::timeout(BODY_WAIT, axum::body::to_bytes(body, BODY_BYTES_MAX)).await.ok()?.ok()?;
    Some(Request::from_parts(head, Body::from(body)))
}

fn bearer(headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    Some(value.strip_prefix("Bearer ")?.trim().to_owned())
}

/// A refusal and its status.
fn answer(status: StatusCode, error: &anyhow::Error) -> Response {
    let object = json!({
        "message": format!("{error:#}"), "hint": Failure::hint_of(error), "exit": Failure::exit_of(error) as u8,
    });
    (status, Json(object)).into_response()
}

fn refusal(error: &anyhow::Error) -> Response {
    let status = match Failure::exit_of(error) {
        Exit::Usage => StatusCode::BAD_REQUEST,
        Exit::Refused => StatusCode::TOO_MANY_REQUESTS,
        _ if format!("{error:#}").contains("knows no session") => StatusCode::NOT_FOUND,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    };
    answer(status, error)
}

async fn version() -> Json<Value> {
    Json(json!({"version": env!("CARGO_PKG_VERSION")}))
}

/// A command line, or the options of an order.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(crate) struct Arguments {
    #[serde(default)]
    pub(crate) arguments: Vec<String>,
}

async fn command(
    Shared(control): Shared<Arc<Control>>,
    Extension(Caller(caller)): Extension<Caller>,
    Json(body): Json<Arguments>,
) -> Response {
    let done = match commands::read(&body.arguments, &caller) {
        Ok(Asked::Repository(words)) => control.run(&words).await,
        Ok(Asked::Sessions(all)) => Ok(lines_of(control.list(all))),
        Ok(Asked::Restore(ordered)) => {
            control.sessions.restore(*ordered).map(|(id, follower)| until_exit(&id, follower))
        }
        Ok(Asked::Order(id, order)) => control.sessions.order(&id, order).map(|follower| until_exit(&id, follower)),
        Err(error) => Err(error),
    };
    done.unwrap_or_else(|error| refusal(&error))
}

impl Control {
    /// A verb on the repository, in a process of its own, which ends with who asked.
    async fn run(&self, words: &[String]) -> anyhow::Result<Response> {
        let turn = tokio::time::timeout(COMMAND_WAIT, Arc::clone(&self.commands).acquire_owned()).await;
        let Ok(Ok(turn)) = turn else {
            let message = format!("{COMMANDS_MAX} commands on the repository run already");
            return Err(Failure::new(Exit::Refused, message).hint("try again when one of them has ended").into());
        };
        let mut command = Command::new("/proc/self/exe");
        // By a flag: this user's settings may name a mount server, and it would be this one.
        command.arg("--relay").arg("--state").arg(&self.state).args(words).arg("--repo").arg(&self.repository);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).current_dir("/").kill_on_drop(true);
        let mut child = command.spawn()?;
        let stdout = child.stdout.take().ok_or_else(|| anyhow::anyhow!("a process without output"))?;
        let (lines, receiver) = mpsc::channel(LINES_MAX);
        tokio::spawn(async move {
            let _turn = turn;
            let mut stdout = BufReader::new(stdout).lines();
            loop {
                let line = tokio::select! {
                    line = stdout.next_line() => line,
                    () = lines.closed() => return,
                };
                let Ok(Some(line)) = line else { break };
                if lines.send(Ok(Bytes::from(format!("{line}\n")))).await.is_err() {
                    return;
                }
            }
            let code = child.wait().await.ok().and_then(|status| status.code()).unwrap_or(Exit::Failed as i32);
            let _ = lines.send(Ok(Bytes::from(format!("{}\n", json!({"event": "exit", "code": code}))))).await;
        });
        Ok(lines_response(receiver))
    }

    /// What `sessions` says.
    fn list(&self, all: bool) -> Vec<Value> {
        let records: Vec<Record> =
            self.sessions.records().into_iter().filter(|record| all || !record.state.is_over()).collect();
        let mut text: Vec<String> = records.iter().map(line).collect();
        if text.is_empty() {
            text.push("no sessions".to_owned());
        }
        let objects: Vec<Value> = records.iter().map(Record::object).collect();
        vec![
            json!({"event": "result", "text": text.join("\n"), "sessions": objects}),
            json!({"event": "exit", "code": Exit::Done as u8}),
        ]
    }
}

/// One session for people.
fn line(record: &Record) -> String {
    let age = jiff::Timestamp::now().duration_since(record.updated_at);
    let age = human::duration(age.try_into().unwrap_or_default());
    let (id, host) = (&record.id, &record.target.host);
    let step = match (record.state, &record.step) {
        (State::Running, Some(step)) => format!(" ({step})"),
        _ => String::new(),
    };
    let data = record.data.display();
    let mut text = format!("{id}  {}{step}, {age} ago  {} to {data} on {host}", record.state.text(), record.cluster);
    if let (Some(message), false) = (&record.message, record.state.is_over()) {
        text.push_str(&format!("\n    {message}"));
    }
    match record.state {
        State::AtTarget => text.push_str(&format!("\n    pghydrant promote {id}, retarget {id}, or cancel {id}")),
        State::Waiting => text.push_str(&format!("\n    pghydrant retry {id}, or pghydrant cancel {id}")),
        _ => {}
    }
    text
}

fn lines_of(objects: Vec<Value>) -> Response {
    let text: String = objects.iter().map(|object| format!("{}\n", json_line(object))).collect();
    ([(header::CONTENT_TYPE, LINES)], text).into_response()
}

const LINES: &str = "application/x-ndjson";

fn lines_response(receiver: mpsc::Receiver<Result<Bytes, Infallible>>) -> Response {
    ([(header::CONTENT_TYPE, LINES)], Body::from_stream(ReceiverStream::new(receiver))).into_response()
}

/// The session whose events an answer is, and where in them it begins: whoever loses the connection goes on with
/// `/events?from=`.
pub(crate) const SESSION_HEADER: &str = "pghydrant-session";
pub(crate) const FROM_HEADER: &str = "pghydrant-events-from";

/// Events up to the one that ends what was ordered.
fn until_exit(id: &SessionId, mut follower: Follower) -> Response {
    let from = follower.position();
    let (lines, receiver) = mpsc::channel(LINES_MAX);
    tokio::spawn(async move {
        loop {
            let said = tokio::select! {
                said = follower.next() => said,
                () = lines.closed() => return,
            };
            let Some(said) = said else { return };
            let (said, ended) = up_to_exit(&said);
            if lines.send(Ok(Bytes::from(said))).await.is_err() || ended {
                return;
            }
        }
    });
    ([(SESSION_HEADER, id.to_string()), (FROM_HEADER, from.to_string())], lines_response(receiver)).into_response()
}

/// Cuts behind the first event that ends an order; whether there is one.
fn up_to_exit(said: &str) -> (String, bool) {
    let mut kept = String::new();
    for line in said.lines() {
        kept.push_str(line);
        kept.push('\n');
        let event: Option<Value> = serde_json::from_str(line).ok();
        if event.is_some_and(|event| event.get("event").and_then(Value::as_str) == Some("exit")) {
            return (kept, true);
        }
    }
    (kept, false)
}

async fn sessions(Shared(control): Shared<Arc<Control>>) -> Response {
    let objects: Vec<Value> = control.sessions.records().iter().map(Record::object).collect();
    object(&json!({"sessions": objects}))
}

fn object(object: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], json_line(object)).into_response()
}

fn identified(id: &str) -> anyhow::Result<SessionId> {
    SessionId::try_from(id.to_owned()).map_err(|refusal| Failure::new(Exit::Usage, refusal).into())
}

async fn session(Shared(control): Shared<Arc<Control>>, Path(id): Path<String>) -> Response {
    match identified(&id).and_then(|id| control.sessions.record(&id)) {
        Ok(record) => object(&record.object()),
        Err(error) => refusal(&error),
    }
}

#[derive(Debug, Default, Deserialize)]
struct From {
    #[serde(default)]
    from: u64,
    /// Wait for more, which is the default.
    follow: Option<bool>,
}

/// Server-sent events: `id` is where the next one begins, which a browser that lost the connection sends back.
async fn events(
    Shared(control): Shared<Arc<Control>>,
    Path(id): Path<String>,
    Query(From { from, follow }): Query<From>,
    headers: HeaderMap,
) -> Response {
    let again = headers.get("last-event-id").and_then(|value| value.to_str().ok()?.parse().ok());
    let from = again.unwrap_or(from);
    let follower = identified(&id).and_then(|id| control.sessions.follow(&id, from));
    let mut follower = match follower {
        Ok(follower) => follower,
        Err(error) => return refusal(&error),
    };
    let (lines, receiver) = mpsc::channel::<Result<Bytes, Infallible>>(LINES_MAX);
    tokio::spawn(async move {
        let mut position = from;
        while follow.unwrap_or(true) || !follower.is_at_end() {
            let said = tokio::select! {
                said = tokio::time::timeout(KEEP_ALIVE, follower.next()) => said,
                () = lines.closed() => return,
            };
            let text = match said {
                Ok(Some(said)) => said.lines().fold(String::new(), |text, line| {
                    position += line.len() as u64 + 1;
                    format!("{text}id: {position}\ndata: {line}\n\n")
                }),
                Ok(None) => return,
                // A comment: whoever is in between keeps the connection.
                Err(_) => ":\n\n".to_owned(),
            };
            if lines.send(Ok(Bytes::from(text))).await.is_err() {
                return;
            }
        }
    });
    let body = Body::from_stream(ReceiverStream::new(receiver));
    ([(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-store")], body).into_response()
}

const KEEP_ALIVE: Duration = Duration::from_secs(15);

async fn order(
    Shared(control): Shared<Arc<Control>>,
    Extension(Caller(caller)): Extension<Caller>,
    Path((id, order)): Path<(String, String)>,
    body: Option<Json<Arguments>>,
) -> Response {
    let options = body.map(|Json(body)| body.arguments).unwrap_or_default();
    let words = [vec![order, id], options].concat();
    let asked = commands::read(&words, &caller).and_then(|asked| match asked {
        Asked::Order(id, order) => Ok(until_exit(&id, control.sessions.order(&id, order)?)),
        _ => Err(Failure::new(Exit::Usage, "orders are retry, cancel, promote and retarget").into()),
    });
    asked.unwrap_or_else(|error| refusal(&error))
}

async fn measured(Shared(control): Shared<Arc<Control>>) -> Response {
    let text = metrics::text(&control.sessions.records(), &control.refused, &control.plane.measured());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_ends_with_what_ended_the_order() {
        let (said, ended) =
            up_to_exit("{\"event\":\"step\"}\n{\"event\":\"exit\",\"code\":0}\n{\"event\":\"later\"}\n");
        assert!(ended);
        assert_eq!(said.lines().count(), 2);
        assert!(!up_to_exit("{\"event\":\"note\",\"message\":\"exit\"}\n").1);
    }
}
