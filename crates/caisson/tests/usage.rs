//! What the binary says when it is asked for the wrong thing, or only asked to explain itself.

mod support;

use std::fs;
use std::path::Path;
use std::process::Stdio;

use support::{Bench, golden};

#[test]
fn help_is_as_reviewed() {
    let bench = Bench::new();
    for words in [
        &["--help"][..],
        &["run", "--help"],
        &["image", "--help"],
        &["disk", "--help"],
        &["doctor", "--help"],
        &["completions", "--help"],
        &["man", "--help"],
    ] {
        let run = bench.run(words);
        assert_eq!(run.code, Some(0));
        let name = if words.len() == 1 {
            "caisson"
        } else {
            words[0]
        };
        golden(&format!("help/{name}.txt"), &run.stdout);
    }
}

#[test]
fn wrong_usage_exits_with_2_and_says_what_is_right() {
    let bench = Bench::new();
    for (line, said) in [
        ("", "Usage: caisson"),
        ("rnu", "unrecognized subcommand 'rnu'"),
        ("imgae", "'image'"),
        ("run --memroy 1G", "'--memory'"),
        ("run --memory 512", "write 512M for MiB"),
        ("run --memory 1G,hugepage=on", "did you mean \"hugepages\"?"),
        ("run --serial fil=x", "did you mean \"file\"?"),
        ("run --serial file", "\"file\" needs a value: write file=…"),
        ("run --accel hvf", "known: auto, kvm, soft"),
        ("run --cpus many", "invalid digit"),
        (
            "run --cpus 0",
            "cpus: 0 vCPUs cannot run anything; choose 1 to 64",
        ),
        (
            "run --cpus 10000",
            "cpus: 10000 vCPUs are more than this backend runs; choose 1 to 64",
        ),
        ("run --memory 1M", "memory: 1M is too little for any kernel"),
        (
            "run --memory 9000T",
            "memory: 9000T is more than this host has",
        ),
        (
            "run --memory 2100001B",
            "is not a multiple of the page size, 4K",
        ),
        ("run --name a/b", "may not contain '/'"),
        (
            "run --kernel k -- ls",
            "a kernel was given instead of an image",
        ),
        ("run mini --kernel k", "give either an image or a kernel"),
        (
            "run --net user,forward=80",
            "\"80\" is no forward; write tcp:HOST-PORT:GUEST-PORT",
        ),
        (
            "run --net user,deny=10.0.0.0/33",
            "\"10.0.0.0/33\" is no destination",
        ),
        ("run --net user,dns=here", "dns=\"here\" is no IPv4 address"),
        (
            "run --net user,mac=01:00:00:00:00:00",
            "is the address of a group",
        ),
        ("run --net bridge", "known: user, none"),
        (
            "man rnu",
            "there is no command \"rnu\" (did you mean \"run\"?)",
        ),
    ] {
        let run = bench.run(line.split_whitespace());
        assert_eq!(run.code, Some(2), "{line}: {run:?}");
        assert!(run.stderr.contains(said), "{line}: {run:?}");
        assert_eq!(run.stdout, "", "{line}");
    }
}

#[test]
fn config_files_that_make_no_sense_are_explained() {
    let bench = Bench::new();
    let typo = bench.file("typo.toml", "cpus = 2\nmemroy = \"1G\"\n");
    let run = bench.run(["run", "--config", &typo]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr.contains(&format!("in config file \"{typo}\"")),
        "{run:?}"
    );
    assert!(run.stderr.contains("2 | memroy"), "{run:?}");
    assert!(run.stderr.contains("did you mean `memory`?"), "{run:?}");

    let wrong = bench.file("wrong.toml", "cpus = 0\nmemory = \"1M\"\n");
    let run = bench.run(["run", "--config", &wrong]);
    assert_eq!(run.code, Some(2));
    assert!(
        run.stderr.contains("cpus: ") && run.stderr.contains("memory: "),
        "{run:?}"
    );
    // A flag can put it right.
    let run = bench.run([
        "run",
        "--config",
        &wrong,
        "--cpus",
        "1",
        "--memory",
        "64M",
        "--print-config",
    ]);
    assert_eq!(run.code, Some(0), "{run:?}");

    for (path, said) in [("none.toml", "No such file"), (".", "directory")] {
        let run = bench.run(["run", "--config", path]);
        assert_eq!(run.code, Some(1));
        assert!(
            run.stderr.contains(&format!("config file \"{path}\"")),
            "{run:?}"
        );
        assert!(run.stderr.contains(said), "{run:?}");
    }
}

#[test]
fn the_printed_description_runs_the_same() {
    let bench = Bench::new();
    let line = "run --name web --memory 1.5G,hugepages=off --serial stdio --serial file=a.log \
                --debugcon null --debug-exit=0x501 --no-reboot --kernel k --initrd i --print-config";
    let first = bench.run(line.split_whitespace().chain(["--cmdline", "a=b c"]));
    assert_eq!(first.code, Some(0), "{first:?}");
    let file = bench.file("printed.toml", &first.stdout);
    let second = bench.run(["run", "--config", &file, "--print-config"]);
    let absolute = |name: &str| bench.path(name).to_str().unwrap().to_owned();
    let expected = first
        .stdout
        .replace("\"k\"", &format!("\"{}\"", absolute("k")))
        .replace("\"i\"", &format!("\"{}\"", absolute("i")))
        .replace("\"a.log\"", &format!("\"{}\"", absolute("a.log")));
    assert_eq!(second.stdout, expected);
}

#[test]
fn files_that_cannot_be_a_kernel_are_named_with_the_way_out() {
    let bench = Bench::new();
    let empty = bench.file("empty", "");
    let text = bench.file("text", "This is no kernel.\n");
    for (path, said) in [
        (
            "none",
            "cannot read kernel \"none\": No such file or directory (os error 2); check the path",
        ),
        (".", "kernel \".\" is a directory; name the file in it"),
        (&empty, "is empty; was it downloaded to its end?"),
        (&text, "text"),
    ] {
        let run = bench.run(["run", "--kernel", path]);
        assert_eq!(run.code, Some(1), "{path}: {run:?}");
        assert!(run.stderr.contains(said), "{path}: {run:?}");
        assert_eq!(run.stderr.lines().count(), 1, "{path}: {run:?}");
    }
    let run = bench.run(["run", "--kernel", &text, "--initrd", "none"]);
    assert!(
        run.stderr.contains("cannot read initrd \"none\""),
        "{run:?}"
    );
}

#[test]
fn without_apt_one_is_told_what_to_give_instead() {
    let bench = Bench::new();
    for line in [&["run"][..], &["image", "pull"]] {
        let run = support::output(bench.command(line).env("PATH", "/nonexistent"));
        assert_eq!(run.code, Some(1), "{run:?}");
        for word in ["apt-get", "--kernel", "--initrd"] {
            assert!(run.stderr.contains(word), "{word}: {run:?}");
        }
    }
}

#[test]
fn images_that_do_not_exist_or_are_not_here() {
    let bench = Bench::new();
    let run = bench.run(["run", "mimi"]);
    assert_eq!(run.code, Some(1));
    assert!(
        run.stderr
            .contains("no image is named \"mimi\" (did you mean \"mini\"?)"),
        "{run:?}"
    );
    let run = bench.run(["image", "path"]);
    assert_eq!(run.code, Some(1));
    assert!(run.stderr.contains("caisson image pull mini"), "{run:?}");
    assert_eq!(bench.run(["image", "rm", "mini"]).code, Some(1));

    let listed = bench.run(["image", "ls", "--json"]);
    let rows: serde_json::Value = serde_json::from_str(&listed.stdout).unwrap();
    assert_eq!(rows[0]["name"], "mini");
    assert_eq!(rows[0]["pulled"], false);
}

#[test]
fn doctor_reports_each_topic_with_a_remedy_for_what_is_wrong() {
    let bench = Bench::new();
    let run = support::output(
        bench
            .command(["doctor", "--json"])
            .env("PATH", "/nonexistent")
            .env("XDG_CACHE_HOME", "/proc/nowhere"),
    );
    let findings: Vec<serde_json::Value> = serde_json::from_str(&run.stdout).unwrap();
    let find = |topic: &str| {
        let found = findings.iter().find(|finding| finding["topic"] == topic);
        found.unwrap_or_else(|| panic!("no {topic}"))
    };
    for topic in [
        "instruction sets",
        "backend",
        "memory",
        "huge pages",
        "limits",
        "terminal",
    ] {
        assert!(find(topic)["finding"].is_string());
    }
    for topic in ["apt", "image cache"] {
        assert_eq!(find(topic)["status"], "warn", "{topic}");
        assert!(find(topic)["remedy"].is_string(), "{topic}");
    }
    for finding in &findings {
        let bad = finding["status"] == "warn" || finding["status"] == "fail";
        assert!(!bad || finding["remedy"].is_string(), "{finding}");
    }
    let fails = findings.iter().any(|finding| finding["status"] == "fail");
    assert_eq!(run.code, Some(i32::from(fails)));
}

#[test]
fn completions_and_manual_pages_know_the_flags() {
    let bench = Bench::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let run = bench.run(["completions", shell]);
        assert_eq!(run.code, Some(0));
        assert!(
            run.stdout.contains("hugepages")
                || run.stdout.contains("--memory")
                || run.stdout.contains("memory"),
            "{shell}"
        );
    }
    let page = bench.run(["man", "image", "pull"]);
    assert!(
        page.stdout.contains(".TH caisson-image-pull 1"),
        "{}",
        page.stdout
    );
    assert!(bench.run(["man"]).stdout.contains(".TH caisson 1"));
}

#[test]
fn a_reader_that_goes_away_is_no_fault() {
    let bench = Bench::new();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let child = support::spawn(
        bench
            .command(["doctor"])
            .stdout(writer)
            .stderr(Stdio::piped()),
    );
    let run = support::finish(child.wait_with_output().unwrap());
    assert_eq!(run.stderr, "");
}

/// The manual has every flag and every key.
#[test]
fn the_manual_is_complete() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/src");
    let cli = fs::read_to_string(docs.join("cli.md")).unwrap();
    let bench = Bench::new();
    for command in [
        &["run"][..],
        &["image", "pull"],
        &["image", "ls"],
        &["doctor"],
    ] {
        let help = bench.run(command.iter().chain(&["--help"])).stdout;
        let flags = help
            .lines()
            .filter(|line| line.trim_start().starts_with('-'))
            .flat_map(|line| line.split([' ', ',', '=', '[']))
            .filter(|word| word.starts_with("--") && *word != "--help");
        for flag in flags {
            let flag = flag.trim_end_matches('.');
            assert!(
                cli.contains(&format!("`{flag}")),
                "{command:?}: {flag} is not in docs/src/cli.md"
            );
        }
    }
    let config = fs::read_to_string(docs.join("config.md")).unwrap();
    let file = bench.file("x.toml", "no-such-key = 1\n");
    let message = bench.run(["run", "--config", &file]).stderr;
    let expected = message.split("expected one of").nth(1).unwrap();
    let keys: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    assert!(keys.len() >= 13, "{keys:?}");
    for key in keys {
        assert!(
            config.contains(&format!("| `{key}` |")),
            "{key} is not in docs/src/config.md"
        );
    }
}
