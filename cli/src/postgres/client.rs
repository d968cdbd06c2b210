//! SQL to a running server, for code that is not asynchronous.
//!
//! Each [`Client`] owns a runtime on the calling thread; the connection only moves while a call of ours waits, which
//! is enough: between calls nobody speaks. A call can be given a limit and a question ("stop?") that is asked ten
//! times a second; when either says so, the server is told to cancel and the call returns.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use tokio_postgres::types::ToSql;
use tokio_postgres::{NoTls, Row};

use super::conninfo::Conninfo;
use crate::exit::{Exit, Failure};

/// What a plain query may take: everything that is not a checkpoint or a wait answers within milliseconds.
const QUERY_TIMEOUT: Duration = Duration::from_secs(60);
const STOP_POLL: Duration = Duration::from_millis(100);
/// A server that does not answer a cancel request within this time is left alone.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

/// What every session of ours begins with: no limit of the server's may end it while we copy, and results read the
/// same whatever the database's defaults are.
const SESSION: &str = "SET client_encoding = 'UTF8'; SET search_path = pg_catalog; SET DateStyle = 'ISO, YMD'; \
    SET TimeZone = 'UTC'; SET statement_timeout = 0; SET lock_timeout = 0; \
    SET idle_in_transaction_session_timeout = 0; SET standard_conforming_strings = on";
/// From PostgreSQL 14 on.
const IDLE_SESSION: &str = "SET idle_session_timeout = 0";
/// From PostgreSQL 17 on.
const TRANSACTION: &str = "SET transaction_timeout = 0";

/// One session.
#[derive(Debug)]
pub(crate) struct Client {
    runtime: tokio::runtime::Runtime,
    client: tokio_postgres::Client,
    version_num: u32,
}

impl Client {
    /// Connects and prepares the session.
    pub(crate) fn connect(conninfo: &Conninfo) -> Result<Self> {
        Self::connect_within(conninfo, Duration::MAX)
    }

    /// As [`Self::connect`], where it is no loss not to be connected: a database whose catalogs somebody has locked lets
    /// nobody in, for as long as that takes.
    pub(crate) fn connect_within(conninfo: &Conninfo, limit: Duration) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("cannot start a runtime for the connection")?;
        let connected = runtime.block_on(async {
            tokio::time::timeout(limit, async {
                let (client, connection) = conninfo.config().connect(NoTls).await?;
                tokio::spawn(connection);
                Ok::<_, tokio_postgres::Error>(client)
            })
            .await
        });
        let Ok(connected) = connected else { bail!("no answer from {conninfo} within {} s", limit.as_secs()) };
        let client = connected.map_err(|error| refused(conninfo, &error))?;
        let mut session = Self { runtime, client, version_num: 0 };
        session.batch(SESSION)?;
        let text: String = session.one("SELECT current_setting('server_version_num')", &[])?;
        session.version_num = text.parse().with_context(|| format!("server_version_num is \"{text}\""))?;
        if session.version_num >= 140_000 {
            session.batch(IDLE_SESSION)?;
        }
        if session.version_num >= 170_000 {
            session.batch(TRANSACTION)?;
        }
        Ok(session)
    }

    /// `server_version_num`: 150018.
    pub(crate) fn version_num(&self) -> u32 {
        self.version_num
    }

    /// Statements without results.
    pub(crate) fn batch(&self, sql: &str) -> Result<()> {
        self.wait(self.client.batch_execute(sql), sql, QUERY_TIMEOUT, &|| false)
    }

    /// All rows.
    pub(crate) fn query(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Vec<Row>> {
        self.query_until(sql, parameters, QUERY_TIMEOUT, &|| false)
    }

    /// All rows of something that takes its time; `stop` is asked ten times a second.
    pub(crate) fn query_until(
        &self,
        sql: &str,
        parameters: &[&(dyn ToSql + Sync)],
        limit: Duration,
        stop: &dyn Fn() -> bool,
    ) -> Result<Vec<Row>> {
        self.wait(self.client.query(sql, parameters), sql, limit, stop)
    }

    /// The one row.
    pub(crate) fn row(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<Row> {
        self.query(sql, parameters)?.into_iter().next().with_context(|| format!("no row from: {sql}"))
    }

    /// The one value.
    pub(crate) fn one<T>(&self, sql: &str, parameters: &[&(dyn ToSql + Sync)]) -> Result<T>
    where
        T: for<'a> tokio_postgres::types::FromSql<'a>,
    {
        value(&self.row(sql, parameters)?, 0)
    }

    fn wait<T>(
        &self,
        work: impl Future<Output = Result<T, tokio_postgres::Error>>,
        sql: &str,
        limit: Duration,
        stop: &dyn Fn() -> bool,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        self.runtime.block_on(async {
            let mut work = std::pin::pin!(work);
            loop {
                match tokio::time::timeout(STOP_POLL, &mut work).await {
                    Ok(result) => return result.map_err(|error| anyhow::anyhow!("{}: {sql}", describe(&error))),
                    Err(_) if stop() => {
                        self.cancel().await;
                        return Err(Failure::new(Exit::Interrupted, "interrupted").into());
                    }
                    Err(_) if Instant::now() >= deadline => {
                        self.cancel().await;
                        bail!("the server did not answer within {} s: {sql}", limit.as_secs());
                    }
                    Err(_) => {}
                }
            }
        })
    }

    /// Asks the server to give the statement up. If it cannot be reached, the session's end will do.
    async fn cancel(&self) {
        let token = self.client.cancel_token();
        let _ = tokio::time::timeout(CANCEL_TIMEOUT, token.cancel_query(NoTls)).await;
    }
}

/// A row's value, with the column's name in the error.
pub(crate) fn value<T>(row: &Row, index: usize) -> Result<T>
where
    T: for<'a> tokio_postgres::types::FromSql<'a>,
{
    row.try_get(index).map_err(|error| anyhow::anyhow!("column {index} of the server's answer: {}", describe(&error)))
}

/// The server's own words (`FATAL: …`, with detail and hint), or what the library and the kernel said.
fn describe(error: &tokio_postgres::Error) -> String {
    let Some(server) = error.as_db_error() else {
        let mut text = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(inner) = cause {
            let words = inner.to_string();
            if !text.contains(&words) {
                text = format!("{text}: {words}");
            }
            cause = inner.source();
        }
        return text;
    };
    let mut text = format!("{}: {}", server.severity(), server.message());
    for more in [server.detail(), server.hint()].into_iter().flatten() {
        text = format!("{text} ({more})");
    }
    text
}

fn refused(conninfo: &Conninfo, error: &tokio_postgres::Error) -> anyhow::Error {
    let failure = Failure::new(Exit::Failed, format!("cannot connect to {conninfo}: {}", describe(error)));
    let peer = error.as_db_error().is_some_and(|server| server.message().starts_with("Peer authentication failed"));
    if peer {
        let user = conninfo.user();
        return failure
            .hint(format!("run this as the operating system user \"{user}\", or log in with a password"))
            .into();
    }
    failure.into()
}
