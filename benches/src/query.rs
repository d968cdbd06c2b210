//! Asking a server one question over its socket, by as much of PostgreSQL's protocol as that takes: a first query is
//! timed to milliseconds, and starting psql takes longer.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::bail;

/// A server that has not answered by then does not.
const PATIENCE: Duration = Duration::from_secs(600);
const RETRY: Duration = Duration::from_millis(5);
/// The longest message that an answer of one row has.
const MESSAGE_BYTES_MAX: usize = 1 << 16;

/// Waits until `sql` is answered with `wanted`.
pub(crate) fn wait_for(sockets: &Path, port: u16, sql: &str, wanted: &str) -> anyhow::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = ask(sockets, port, sql);
        if matches!(&answer, Ok(Some(value)) if value == wanted) {
            return Ok(());
        }
        if Instant::now() > deadline {
            bail!("{sql} on port {port} was not answered with {wanted} in time: {answer:?}");
        }
        std::thread::sleep(RETRY);
    }
}

/// The first column of the first row, as text.
fn ask(sockets: &Path, port: u16, sql: &str) -> io::Result<Option<String>> {
    let mut server = UnixStream::connect(sockets.join(format!(".s.PGSQL.{port}")))?;
    server.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut startup = 196_608_u32.to_be_bytes().to_vec();
    startup.extend_from_slice(b"user\0postgres\0database\0postgres\0\0");
    send(&mut server, None, &startup)?;
    let mut asked = false;
    let mut value = None;
    loop {
        let (kind, body) = receive(&mut server)?;
        match kind {
            b'E' => return Err(io::Error::other(String::from_utf8_lossy(&body).replace('\0', " "))),
            b'D' => value = first_column(&body),
            b'Z' if asked => {
                send(&mut server, Some(b'X'), &[])?;
                return Ok(value);
            }
            b'Z' => {
                send(&mut server, Some(b'Q'), &[sql.as_bytes(), b"\0"].concat())?;
                asked = true;
            }
            _ => {}
        }
    }
}

fn send(server: &mut UnixStream, kind: Option<u8>, body: &[u8]) -> io::Result<()> {
    let mut message: Vec<u8> = kind.into_iter().collect();
    let bytes = u32::try_from(body.len() + 4).map_err(io::Error::other)?;
    message.extend_from_slice(&bytes.to_be_bytes());
    message.extend_from_slice(body);
    server.write_all(&message)
}

fn receive(server: &mut UnixStream) -> io::Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    server.read_exact(&mut head)?;
    let bytes = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
    if !(4..=MESSAGE_BYTES_MAX).contains(&bytes) {
        return Err(io::Error::other(format!("a message of {bytes} bytes")));
    }
    let mut body = vec![0; bytes - 4];
    server.read_exact(&mut body)?;
    Ok((head[0], body))
}

/// A `DataRow`: number of columns, then the length of each before its bytes.
fn first_column(row: &[u8]) -> Option<String> {
    let bytes = u32::from_be_bytes(row.get(2..6)?.try_into().ok()?) as usize;
    String::from_utf8(row.get(6..)?.get(..bytes)?.to_vec()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_column_of_a_row_and_none_of_a_null() {
        assert_eq!(first_column(&[0, 1, 0, 0, 0, 1, b'f']).as_deref(), Some("f"));
        assert_eq!(first_column(&[0, 1, 255, 255, 255, 255]), None);
        assert_eq!(first_column(&[0, 1, 0, 0, 0, 9, b'f']), None);
    }
}
