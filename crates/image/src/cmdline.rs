//! The kernel command line of the small guest.

/// What the guest's init program does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestMode {
    /// A shell on the first serial port.
    Shell,
    /// One command for the host over the second serial port; the first carries the kernel's log.
    Command,
}

/// What the command line depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CmdlineOptions {
    /// Shell or command.
    pub mode: GuestMode,
    /// The guest's host name: the machine's name.
    pub hostname: Option<String>,
    /// The terminal type of the user's terminal.
    pub term: Option<String>,
    /// The size of the user's terminal, in columns and rows.
    pub size: Option<(u16, u16)>,
    /// Whether the kernel's log goes to the first serial port while it boots. Otherwise only
    /// errors do.
    pub boot_log: bool,
    /// Whether guest code runs on a processor that speculates. A software CPU does not, and there
    /// the kernel's defences against speculation only cost time.
    pub speculation: bool,
    /// Words to append, which win over those before them.
    pub extra: String,
}

impl Default for CmdlineOptions {
    /// A shell, quiet, with the kernel's own defences.
    fn default() -> Self {
        CmdlineOptions {
            mode: GuestMode::Shell,
            hostname: None,
            term: None,
            size: None,
            boot_log: false,
            speculation: true,
            extra: String::new(),
        }
    }
}

/// The command line for the small guest.
///
/// A word that could not be one (an empty or overlong name, one with spaces or quotes) is left out
/// rather than break the line apart.
#[must_use]
pub fn default_cmdline(options: &CmdlineOptions) -> String {
    let mut line = String::from("console=ttyS0 panic=-1 reboot=k tsc=reliable no_timer_check");
    line.push_str(" 8250.nr_uarts=2 i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd");
    if !options.boot_log {
        line.push_str(" quiet");
    }
    if !options.speculation {
        line.push_str(" mitigations=off");
    }
    if options.mode == GuestMode::Command {
        line.push_str(" caisson.exec=1");
    }
    for (key, value) in [
        ("caisson.hostname", &options.hostname),
        ("caisson.term", &options.term),
    ] {
        if let Some(word) = value.as_deref().filter(|value| is_word(value)) {
            line.push_str(&format!(" {key}={word}"));
        }
    }
    if let Some((columns, rows)) = options.size {
        line.push_str(&format!(" caisson.size={columns}x{rows}"));
    }
    if !options.extra.trim().is_empty() {
        line.push(' ');
        line.push_str(options.extra.trim());
    }
    line
}

fn is_word(text: &str) -> bool {
    !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_graphic() && b != b'"')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_option_shows() {
        let words = |options: &CmdlineOptions| {
            default_cmdline(options)
                .split(' ')
                .map(str::to_owned)
                .collect::<Vec<_>>()
        };
        let shell = words(&CmdlineOptions::default());
        assert!(shell.contains(&"console=ttyS0".into()) && shell.contains(&"quiet".into()));
        assert!(!shell.iter().any(|word| word.starts_with("caisson.")));
        let command = words(&CmdlineOptions {
            mode: GuestMode::Command,
            hostname: Some("web".into()),
            term: Some("xterm-256color".into()),
            size: Some((100, 40)),
            boot_log: true,
            speculation: false,
            extra: " foo=bar ".into(),
        });
        for word in [
            "caisson.exec=1",
            "caisson.hostname=web",
            "caisson.term=xterm-256color",
            "caisson.size=100x40",
            "mitigations=off",
        ] {
            assert!(command.contains(&word.into()), "{word}");
        }
        assert!(!command.contains(&"quiet".into()));
        assert_eq!(command.last().unwrap(), "foo=bar");
    }

    #[test]
    fn a_name_cannot_add_words() {
        let line = default_cmdline(&CmdlineOptions {
            hostname: Some("web init=/bin/evil".into()),
            term: Some("a\"b".into()),
            ..CmdlineOptions::default()
        });
        assert!(!line.contains("init=") && !line.contains("caisson."));
    }
}
