//! Reads rsync's pipes line by line.

use std::io::{self, BufRead, BufReader, Read};
use std::sync::mpsc::SyncSender;

/// A line of rsync has at most two paths and some words. A longer one is cut.
const LINE_BYTES_MAX: usize = 16 << 10;

/// A line of one of the pipes, without its end.
pub(super) enum Line {
    Out(Vec<u8>),
    Err(Vec<u8>),
}

/// Starts a thread that sends each line of `pipe`. The channel is bounded, so rsync waits if it prints
/// too fast.
pub(super) fn read_lines(
    name: &str,
    pipe: impl Read + Send + 'static,
    to: SyncSender<Line>,
    wrap: fn(Vec<u8>) -> Line,
) -> io::Result<()> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let mut pipe = BufReader::new(pipe);
            while let Ok(Some(line)) = next_line(&mut pipe) {
                if to.send(wrap(line)).is_err() {
                    return;
                }
            }
        })?;
    Ok(())
}

/// Reads up to a newline or carriage return. Keeps the first [`LINE_BYTES_MAX`] bytes of the line.
fn next_line(pipe: &mut impl BufRead) -> io::Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    let mut any = false;
    loop {
        let buffer = match pipe.fill_buf() {
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            other => other?,
        };
        if buffer.is_empty() {
            return Ok(any.then_some(line));
        }
        any = true;
        let end = buffer.iter().position(|b| matches!(b, b'\n' | b'\r'));
        let text = &buffer[..end.unwrap_or(buffer.len())];
        let room = LINE_BYTES_MAX - line.len();
        line.extend_from_slice(&text[..text.len().min(room)]);
        let used = text.len() + usize::from(end.is_some());
        pipe.consume(used);
        if end.is_some() {
            return Ok(Some(line));
        }
    }
}

/// A pipe that a child was started with.
pub(super) trait ExpectPipe<T> {
    /// The pipe.
    fn expect_pipe(self) -> io::Result<T>;
}

impl<T> ExpectPipe<T> for Option<T> {
    fn expect_pipe(self) -> io::Result<T> {
        self.ok_or_else(|| io::Error::other("rsync was started without a pipe"))
    }
}
