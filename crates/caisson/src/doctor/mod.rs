//! `caisson doctor`: what this host can do and what it cannot, each with the remedy.

mod backends;
mod cpu;
mod files;
mod limits;
mod memory;

use std::io::{self, Write};

use serde::Serialize;

use crate::cli::DoctorArgs;
use crate::exit::Exit;
use crate::terminal;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    /// It is as it should be.
    Ok,
    /// Something optional is missing or worth knowing.
    Note,
    /// Machines run, but something will be slow or fail.
    Warn,
    /// Machines do not run.
    Fail,
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Finding {
    /// What was looked at.
    topic: &'static str,
    status: Status,
    /// What was found.
    finding: String,
    /// What to do about it, where there is anything to do.
    #[serde(skip_serializing_if = "Option::is_none")]
    remedy: Option<String>,
}

impl Finding {
    fn new(topic: &'static str, status: Status, finding: impl Into<String>) -> Self {
        Self {
            topic,
            status,
            finding: finding.into(),
            remedy: None,
        }
    }

    fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.remedy = Some(remedy.into());
        self
    }
}

/// Looks at everything and prints the findings.
pub(crate) fn run(args: &DoctorArgs) -> anyhow::Result<Exit> {
    let mut findings = Vec::new();
    findings.extend(backends::findings());
    findings.extend(cpu::findings());
    findings.extend(memory::findings());
    findings.extend(limits::findings());
    findings.extend(files::findings());
    findings.push(terminal_finding());

    let mut out = io::stdout().lock();
    if args.json {
        serde_json::to_writer_pretty(&mut out, &findings)?;
        writeln!(out)?;
    } else {
        out.write_all(render(&findings, terminal::is_terminal(io::stdout())).as_bytes())?;
    }
    Ok(if findings.iter().any(|f| f.status == Status::Fail) {
        Exit::Failed
    } else {
        Exit::Clean
    })
}

fn render(findings: &[Finding], colour: bool) -> String {
    let width = findings.iter().map(|f| f.topic.len()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in findings {
        let (word, sgr) = match finding.status {
            Status::Ok => ("ok  ", "32"),
            Status::Note => ("note", "36"),
            Status::Warn => ("warn", "33"),
            Status::Fail => ("FAIL", "31;1"),
        };
        let word = if colour {
            format!("\x1b[{sgr}m{word}\x1b[0m")
        } else {
            word.to_owned()
        };
        text += &format!("{word}  {:width$}  {}\n", finding.topic, finding.finding);
        if let Some(remedy) = &finding.remedy {
            text += &format!("      {:width$}  remedy: {remedy}\n", "");
        }
    }
    let fails = findings.iter().filter(|f| f.status == Status::Fail).count();
    let warns = findings.iter().filter(|f| f.status == Status::Warn).count();
    text += &match (fails, warns) {
        (0, 0) => "Machines run on this host.\n".to_owned(),
        (0, n) => format!("Machines run on this host, with {n} warning(s).\n"),
        (n, _) => format!("Machines do not run on this host: {n} thing(s) to change.\n"),
    };
    text
}

fn terminal_finding() -> Finding {
    let (input, output) = (
        terminal::is_terminal(io::stdin()),
        terminal::is_terminal(io::stdout()),
    );
    match (input, output, terminal::size(io::stdout())) {
        (true, true, Some((columns, rows))) => Finding::new(
            "terminal",
            Status::Ok,
            format!("{columns} columns, {rows} rows"),
        ),
        (true, true, None) => Finding::new(
            "terminal",
            Status::Note,
            "it does not tell its size; guests assume 80 columns, 24 rows",
        )
        .remedy("stty cols 120 rows 40"),
        _ => Finding::new(
            "terminal",
            Status::Ok,
            "standard input and output are not both a terminal: bytes are passed through",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_line_up_and_the_last_line_sums_up() {
        let findings = [
            Finding::new("cpu", Status::Ok, "fine"),
            Finding::new("huge pages", Status::Warn, "none").remedy("reserve some"),
        ];
        assert_eq!(
            render(&findings, false),
            "ok    cpu         fine\n\
             warn  huge pages  none\n      \
             \x20           remedy: reserve some\n\
             Machines run on this host, with 1 warning(s).\n"
        );
        let fail = [Finding::new("x", Status::Fail, "broken")];
        assert!(render(&fail, true).starts_with("\x1b[31;1mFAIL\x1b[0m  x  broken\n"));
        assert!(
            render(&fail, true)
                .ends_with("Machines do not run on this host: 1 thing(s) to change.\n")
        );
    }

    #[test]
    fn json_has_stable_keys() {
        let finding = Finding::new("cpu", Status::Note, "x").remedy("y");
        assert_eq!(
            serde_json::to_string(&finding).unwrap(),
            r#"{"topic":"cpu","status":"note","finding":"x","remedy":"y"}"#
        );
    }
}
