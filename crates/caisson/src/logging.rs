//! Log lines for those who look for a fault, on standard error.

use std::env;
use std::io::{self, Write};

use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::terminal;

/// Starts logging: warnings, more with each `-v`, or what `CAISSON_LOG` says (the syntax of
/// `tracing_subscriber::filter::Targets`, such as `debug` or `warn,caisson_machine=trace`).
pub(crate) fn start(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let by_flags = || Targets::new().with_default(level);
    let filter = match env::var("CAISSON_LOG").map(|text| (text.parse::<Targets>(), text)) {
        Ok((Ok(filter), _)) => filter,
        Ok((Err(error), text)) => {
            terminal::say(&format!(
                "warning: CAISSON_LOG=\"{text}\" is ignored: {error}"
            ));
            by_flags()
        }
        Err(_) => by_flags(),
    };
    let lines = fmt::layer()
        .with_target(verbose > 1)
        .without_time()
        .with_ansi(terminal::is_terminal(io::stderr()))
        .with_writer(|| Lines);
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
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
