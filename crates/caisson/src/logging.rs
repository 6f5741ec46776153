//! Log lines for those who look for a fault, on standard error.

use std::env;
use std::io::{self, Write};

use tracing_subscriber::EnvFilter;

use crate::terminal;

/// Starts logging: warnings, more with each `-v`, or what `CAISSON_LOG` says (the syntax of
/// `tracing_subscriber::EnvFilter`, such as `debug` or `caisson_machine=trace`).
pub(crate) fn start(verbose: u8) {
    let level = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = match env::var("CAISSON_LOG").map(|text| (EnvFilter::try_new(&text), text)) {
        Ok((Ok(filter), _)) => filter,
        Ok((Err(error), text)) => {
            terminal::say(&format!(
                "warning: CAISSON_LOG=\"{text}\" is ignored: {error}"
            ));
            EnvFilter::new(level)
        }
        Err(_) => EnvFilter::new(level),
    };
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_target(verbose > 1)
        .without_time()
        .with_ansi(terminal::is_terminal(io::stderr()))
        .with_writer(|| Lines)
        .init();
}

/// Standard error, with line ends that hold on a terminal in raw mode.
struct Lines;

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        terminal::write_lines(bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
