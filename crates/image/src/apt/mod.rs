//! Debian packages by name, through the host's apt.
//!
//! apt gets state and cache folders of its own and an empty list of installed packages, so that it
//! needs neither root nor an earlier `apt-get update` and leaves the host's package database
//! alone. The host's sources, keys, proxies and credentials are used as they are. What arrives is
//! checked against the size and SHA-256 of apt's signed package list once more by us.

mod fetch;
mod record;

pub(crate) use record::{Record, parse_records};

use crate::durable::{self, create_folder};
use crate::error::ImageError;
use crate::lock::Lock;
use crate::progress::Progress;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

/// The most that we read of what apt prints, in bytes.
const MAX_OUTPUT: u64 = 64 << 20;
/// Free space that a refresh of the package lists asks for, in bytes.
const LISTS_SPACE: u64 = 200 << 20;

/// The host's apt with folders of its own.
#[derive(Debug, Clone)]
pub(crate) struct Apt {
    root: PathBuf,
}

impl Apt {
    /// apt with its folders under `root`.
    pub(crate) fn new(root: PathBuf) -> Self {
        Apt { root }
    }

    /// Brings the package lists up to date if they are older than `max_age` or absent.
    pub(crate) fn refresh(
        &self,
        max_age: Duration,
        lock: &Lock,
        progress: &dyn Progress,
    ) -> Result<(), ImageError> {
        let stamp = self.root.join("refreshed");
        let age = std::fs::metadata(&stamp)
            .and_then(|found| found.modified())
            .ok()
            .and_then(|when| SystemTime::now().duration_since(when).ok());
        if age.is_some_and(|age| age < max_age) {
            return Ok(());
        }
        self.prepare(lock)?;
        durable::require_space(&self.root, LISTS_SPACE)?;
        progress.begin("refreshing the list of packages", None);
        let outcome = self.run("apt-get", &["--quiet", "update"], lock);
        progress.finish();
        match outcome {
            Ok(_) => {
                durable::write_whole(&stamp, 0, |_| Ok(()))?;
                Ok(())
            }
            // One broken source among several is the host's affair: what matters is whether the
            // packages can be found, and that is asked next. Lists from before serve, too.
            Err(ImageError::Apt { detail, .. }) if self.has_lists() => {
                tracing::warn!("apt-get update: {detail}");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// What apt knows of the candidates of the packages named, in no particular order; a package
    /// that does not exist is left out.
    pub(crate) fn records(&self, names: &[&str], lock: &Lock) -> Result<Vec<Record>, ImageError> {
        let mut arguments = vec!["show", "--no-all-versions"];
        arguments.extend(names);
        // apt-cache fails if it finds none of them and prints those that it finds.
        let printed = match self.run("apt-cache", &arguments, lock) {
            Err(ImageError::Apt { detail, .. }) if detail.contains("No packages found") => {
                return Ok(Vec::new());
            }
            Err(ImageError::Apt { detail, .. }) if detail.contains("Unable to locate") => {
                return Ok(Vec::new());
            }
            other => other?,
        };
        parse_records(&printed)
    }

    /// What apt knows of the candidate of one package.
    pub(crate) fn record(&self, name: &str, lock: &Lock) -> Result<Record, ImageError> {
        record::check_name(name)?;
        self.records(&[name], lock)?
            .into_iter()
            .find(|record| record.name == name)
            .ok_or_else(|| ImageError::NoSuchPackage {
                name: name.to_owned(),
            })
    }

    /// The packages named and all that they depend on, as apt would install them on an empty
    /// system, recommendations left out.
    pub(crate) fn closure(&self, names: &[&str], lock: &Lock) -> Result<Vec<Record>, ImageError> {
        for name in names {
            record::check_name(name)?;
        }
        let mut arguments = vec![
            "--quiet",
            "--simulate",
            "--no-install-recommends",
            "install",
        ];
        arguments.extend(names);
        let printed = match self.run("apt-get", &arguments, lock) {
            Err(ImageError::Apt { detail, .. }) if detail.contains("Unable to locate package") => {
                let name = detail.rsplit(' ').next().unwrap_or_default();
                return Err(ImageError::NoSuchPackage {
                    name: name.to_owned(),
                });
            }
            other => other?,
        };
        let chosen: Vec<&str> = printed
            .lines()
            .filter_map(|line| line.strip_prefix("Inst "))
            .filter_map(|rest| rest.split(' ').next())
            .collect();
        for name in &chosen {
            record::check_name(name)?;
        }
        let records = self.records(&chosen, lock)?;
        match chosen
            .iter()
            .find(|name| !records.iter().any(|record| record.name == **name))
        {
            Some(name) => Err(ImageError::NoSuchPackage {
                name: (*name).to_owned(),
            }),
            None => Ok(records),
        }
    }

    /// The host's sources of packages, as lines for a guest's `sources.list`.
    pub(crate) fn sources(&self, lock: &Lock) -> Result<String, ImageError> {
        let arguments = [
            "indextargets",
            "--format",
            "deb $(REPO_URI) $(RELEASE) $(COMPONENT)",
            "Created-By: Packages",
        ];
        let printed = self.run("apt-get", &arguments, lock)?;
        let mut lines: Vec<&str> = Vec::new();
        for line in printed.lines() {
            // Names and passwords of the host's are none of the guest's business.
            let plain = line.bytes().all(|b| b.is_ascii_graphic() || b == b' ');
            let public = line.starts_with("deb http") && !line.contains('@');
            if plain && public && !lines.contains(&line) {
                lines.push(line);
            }
        }
        Ok(lines.iter().map(|line| format!("{line}\n")).collect())
    }

    fn has_lists(&self) -> bool {
        std::fs::read_dir(self.root.join("state/lists")).is_ok_and(|mut entries| {
            entries.any(|entry| {
                entry.is_ok_and(|entry| entry.file_name().to_string_lossy().contains("_Packages"))
            })
        })
    }

    /// Writes apt's configuration and makes its folders.
    fn prepare(&self, lock: &Lock) -> Result<(), ImageError> {
        for folder in ["state/lists/partial", "cache/archives/partial"] {
            create_folder(&self.root.join(folder))?;
        }
        let status = self.root.join("state/status");
        durable::write_whole(&status, 0, |_| Ok(()))?;
        let dump = run_to_end(
            Command::new("apt-config").arg("dump"),
            "apt-config",
            lock.as_stdin(),
        )?;
        let text = self.configuration(&dump)?;
        durable::write_whole(&self.config_path(), 0, |out| out.write_all(text.as_bytes()))?;
        Ok(())
    }

    fn config_path(&self) -> PathBuf {
        self.root.join("apt.conf")
    }

    /// The options laid over the host's, of which `host` is a dump.
    fn configuration(&self, host: &str) -> Result<String, ImageError> {
        let root = self
            .root
            .to_str()
            .filter(|root| !root.contains(['"', '\n', '\\']))
            .ok_or_else(|| {
                ImageError::malformed(
                    &self.root,
                    "apt cannot work in a folder whose name has quotes, backslashes or is not UTF-8: set XDG_CACHE_HOME to another",
                )
            })?;
        let mut text = format!(
            "Dir::State \"{root}/state/\";\n\
             Dir::State::lists \"lists/\";\n\
             Dir::State::status \"{root}/state/status\";\n\
             Dir::State::extended_states \"extended_states\";\n\
             Dir::Cache \"{root}/cache/\";\n\
             Dir::Cache::archives \"archives/\";\n\
             Dir::Cache::pkgcache \"pkgcache.bin\";\n\
             Dir::Cache::srcpkgcache \"srcpkgcache.bin\";\n\
             Dir::Log \"{root}/log/\";\n\
             APT::Sandbox::User \"root\";\n\
             #clear APT::Update::Pre-Invoke;\n\
             #clear APT::Update::Post-Invoke;\n\
             #clear APT::Update::Post-Invoke-Success;\n\
             #clear APT::Architectures;\n\
             APT::Architecture \"amd64\";\n\
             APT::Architectures {{ \"amd64\"; }};\n\
             Acquire::Languages \"none\";\n\
             Acquire::Retries \"3\";\n"
        );
        // Of all the indexes that the host wants of each source, the package list is enough.
        const TARGETS: &str = "Acquire::IndexTargets::deb::";
        let mut targets: Vec<&str> = host
            .lines()
            .filter_map(|line| line.strip_prefix(TARGETS))
            .filter_map(|rest| rest.split("::").next())
            .filter(|name| {
                *name != "Packages"
                    && !name.is_empty()
                    && name
                        .bytes()
                        .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            })
            .collect();
        targets.sort_unstable();
        targets.dedup();
        for target in targets {
            text.push_str(&format!("{TARGETS}{target}::DefaultEnabled \"false\";\n"));
        }
        Ok(text)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .arg("--config-file")
            .arg(self.config_path())
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    fn run(
        &self,
        program: &'static str,
        arguments: &[&str],
        lock: &Lock,
    ) -> Result<String, ImageError> {
        let mut command = self.command(program);
        command.args(arguments);
        run_to_end(&mut command, program, lock.as_stdin()).map_err(|error| match error {
            ImageError::Apt { detail, .. } if is_full_disk(&detail) => ImageError::NoSpace {
                path: self.root.clone(),
                needed: LISTS_SPACE,
                available: None,
            },
            other => other,
        })
    }
}

/// Whether apt complains of a full file system.
fn is_full_disk(detail: &str) -> bool {
    detail.contains("No space left on device") || detail.contains("enough free space")
}

fn spawn(command: &mut Command, program: &'static str, stdin: Stdio) -> Result<Child, ImageError> {
    command
        .stdin(stdin)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => ImageError::NoApt { program },
            _ => ImageError::io("run", Path::new(program), 0)(error),
        })
}

/// Runs a program and gives what it printed; what it said on standard error if it fails.
fn run_to_end(
    command: &mut Command,
    program: &'static str,
    stdin: Stdio,
) -> Result<String, ImageError> {
    let mut child = spawn(command, program, stdin)?;
    let complaints = collect_errors(&mut child);
    let mut printed = Vec::new();
    let read = child.stdout.take().map_or(Ok(0), |stdout| {
        stdout.take(MAX_OUTPUT).read_to_end(&mut printed)
    });
    finish(child, complaints, program, verb(command))?;
    read.map_err(ImageError::io("read from", Path::new(program), 0))?;
    String::from_utf8(printed)
        .map_err(|_| ImageError::malformed(Path::new(program), "printed text that is not UTF-8"))
}

fn verb(command: &Command) -> String {
    const VERBS: [&str; 5] = ["update", "show", "install", "download", "dump"];
    command
        .get_args()
        .find(|argument| VERBS.iter().any(|verb| OsStr::new(verb) == *argument))
        .map(|argument| argument.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Gathers apt's complaints while its output is read elsewhere: the last of its `E:` lines, or of
/// all lines if it has none.
fn collect_errors(child: &mut Child) -> std::thread::JoinHandle<String> {
    let stderr = child.stderr.take();
    std::thread::spawn(move || {
        let (mut errors, mut others) = (Vec::new(), Vec::new());
        let lines = stderr.map(|stderr| BufReader::new(stderr.take(MAX_OUTPUT)).lines());
        for line in lines.into_iter().flatten().map_while(Result::ok) {
            let kept = if line.starts_with("E:") {
                &mut errors
            } else {
                &mut others
            };
            if kept.len() < 8 && !line.trim().is_empty() {
                kept.push(line.trim_start_matches("E: ").to_owned());
            }
        }
        if errors.is_empty() { others } else { errors }.join("; ")
    })
}

fn finish(
    mut child: Child,
    complaints: std::thread::JoinHandle<String>,
    program: &'static str,
    verb: String,
) -> Result<(), ImageError> {
    let status = child
        .wait()
        .map_err(ImageError::io("wait for", Path::new(program), 0))?;
    let detail = complaints.join().unwrap_or_default();
    if status.success() {
        return Ok(());
    }
    Err(ImageError::Apt {
        command: format!("{program} {verb}"),
        detail: if detail.is_empty() {
            status.to_string()
        } else {
            detail
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_package_lists_are_asked_for() {
        let apt = Apt::new("/cache/apt".into());
        let text = apt
            .configuration(
                "APT \"\";\n\
                 Acquire::IndexTargets::deb::Packages::MetaKey \"x\";\n\
                 Acquire::IndexTargets::deb::DEP-11::MetaKey \"y\";\n\
                 Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"true\";\n\
                 Acquire::IndexTargets::deb::bad name::MetaKey \"z\";\n\
                 Acquire::IndexTargets::deb-src::Sources::MetaKey \"w\";\n",
            )
            .unwrap();
        let targets: Vec<_> = text
            .lines()
            .filter(|l| l.contains("IndexTargets"))
            .collect();
        assert_eq!(
            targets,
            ["Acquire::IndexTargets::deb::DEP-11::DefaultEnabled \"false\";"]
        );
        assert!(text.contains("Dir::State::status \"/cache/apt/state/status\";"));
    }

    #[test]
    fn a_folder_that_apt_could_not_take_is_refused() {
        let apt = Apt::new("/cache/\"; Evil \"/apt".into());
        assert!(matches!(
            apt.configuration(""),
            Err(ImageError::Malformed { .. })
        ));
    }

    #[test]
    fn a_missing_program_tells_what_to_give_instead() {
        let error = run_to_end(
            &mut Command::new("/nonexistent/apt-get"),
            "apt-get",
            Stdio::null(),
        )
        .unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("`apt-get`") && text.contains("--kernel") && text.contains("--initrd")
        );
    }

    #[test]
    fn a_failure_reports_what_the_program_said() {
        let mut command = Command::new("sh");
        command.args([
            "-c",
            "echo noise >&2; echo 'E: it broke' >&2; exit 100",
            "update",
        ]);
        let error = run_to_end(&mut command, "apt-get", Stdio::null()).unwrap_err();
        assert!(matches!(error, ImageError::Apt { command, detail }
            if command == "apt-get update" && detail == "it broke"));
    }
}
