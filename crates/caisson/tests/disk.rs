//! `caisson disk` as a person uses it.

mod support;

use std::fs;

use support::{Bench, Run};

fn disk(bench: &Bench, line: &str) -> Run {
    bench.run(["disk"].into_iter().chain(line.split_ascii_whitespace()))
}

fn done(bench: &Bench, line: &str) -> String {
    let run = disk(bench, line);
    assert_eq!(run.code, Some(0), "{line}: {}", run.stderr);
    run.stdout
}

fn refused(bench: &Bench, line: &str, code: i32, said: &str) {
    let run = disk(bench, line);
    assert_eq!(run.code, Some(code), "{line}: {}", run.stderr);
    assert!(run.stderr.contains(said), "{line}: {}", run.stderr);
}

#[test]
fn images_are_made_looked_at_grown_and_copied() {
    let bench = Bench::new();
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n / 70_000 * 3) as u8).collect();
    let content = &content[..2_999_808];
    bench.file("source.raw", content);
    done(&bench, "convert source.raw copy.qcow2");
    let info: serde_json::Value =
        serde_json::from_str(&done(&bench, "info copy.qcow2 --json")).unwrap();
    assert_eq!(info["format"], "qcow2");
    assert_eq!(info["size"], 2_999_808);
    assert_eq!(info["cluster"], 65_536);
    assert!(done(&bench, "check copy.qcow2").contains("nothing is wrong"));
    done(&bench, "convert copy.qcow2 back.raw --quiet");
    assert!(fs::read(bench.path("back.raw")).unwrap() == content);

    done(&bench, "convert copy.qcow2 copy.vhd");
    assert!(done(&bench, "info copy.vhd").contains("2999808 bytes"));
    done(&bench, "convert copy.vhd again.raw");
    assert!(fs::read(bench.path("again.raw")).unwrap() == content);
    done(&bench, "convert copy.qcow2 copy.vhdx --cluster 1M");
    let info: serde_json::Value =
        serde_json::from_str(&done(&bench, "info copy.vhdx --json")).unwrap();
    assert_eq!(info["format"], "vhdx");
    assert_eq!(info["size"], 2_999_808);
    assert_eq!(info["block"], 1 << 20);
    assert!(done(&bench, "check copy.vhdx").contains("nothing is wrong"));
    done(&bench, "resize copy.vhdx +1M");
    done(&bench, "convert copy.vhdx from-vhdx.raw");
    let grown = fs::read(bench.path("from-vhdx.raw")).unwrap();
    assert!(grown[..content.len()] == *content && grown.len() == content.len() + (1 << 20));
    done(&bench, "convert copy.qcow2 fixed.vhd --fixed");
    assert!(done(&bench, "info fixed.vhd").contains("all of the disk"));
    done(&bench, "resize copy.qcow2 +1M");
    done(&bench, "convert copy.qcow2 grown.img");
    let grown = fs::read(bench.path("grown.img")).unwrap();
    assert_eq!(grown.len(), content.len() + (1 << 20));
    assert!(grown[..content.len()] == *content);
    refused(&bench, "resize copy.qcow2 1M", 1, "--shrink");
    done(&bench, "resize copy.qcow2 1M --shrink");
    assert!(done(&bench, "info copy.qcow2").contains("1048576 bytes"));
}

#[test]
fn clones_snapshots_and_their_undoing() {
    let bench = Bench::new();
    bench.file("base.raw", vec![7; 1 << 20]);
    let clone = "create clone.qcow2 --backing base.raw --backing-format raw";
    done(&bench, clone);
    refused(&bench, "convert clone.qcow2 out.raw", 1, "--allow-backing");
    assert!(!bench.path("out.raw").exists(), "a failed copy stays");
    for format in ["vhd", "vhdx"] {
        done(&bench, &format!("convert base.raw base.{format}"));
        let backing = format!("--backing base.{format} --backing-format {format}");
        done(&bench, &format!("create clone.{format} {backing}"));
        assert!(done(&bench, &format!("info clone.{format}")).contains("parent"));
        let copy = format!("convert clone.{format} {format}.raw");
        refused(&bench, &copy, 1, "not allowed");
        done(&bench, &format!("{copy} --allow-backing"));
        let copied = fs::read(bench.path(&format!("{format}.raw"))).unwrap();
        assert!(copied == vec![7; 1 << 20]);
    }
    let mixed = "create mixed.vhdx --backing base.vhd --backing-format vhd";
    refused(&bench, mixed, 1, "one in vhdx only");
    done(&bench, "snapshot create clone.qcow2 clean");
    refused(&bench, "snapshot create clone.qcow2 clean", 1, "already");
    done(&bench, "resize clone.qcow2 2M --allow-backing");
    let list = done(&bench, "snapshot ls clone.qcow2 --json");
    let list: serde_json::Value = serde_json::from_str(&list).unwrap();
    assert_eq!(list[0]["name"], "clean");
    assert_eq!(list[0]["size"], 1 << 20);
    done(&bench, "snapshot apply clone.qcow2 clean");
    done(&bench, "convert clone.qcow2 out.raw --allow-backing");
    assert!(fs::read(bench.path("out.raw")).unwrap() == vec![7; 1 << 20]);
    done(&bench, "snapshot rm clone.qcow2 clean");
    refused(&bench, "snapshot rm clone.qcow2 clean", 1, "no snapshot");
    assert!(done(&bench, "check clone.qcow2").contains("nothing is wrong"));
}

#[test]
fn what_makes_no_sense_is_refused_and_nothing_is_overwritten() {
    let bench = Bench::new();
    bench.file("there.raw", [1; 512]);
    refused(&bench, "create there.raw 1M", 1, "File exists");
    refused(&bench, "create new.qcow2", 2, "size");
    refused(&bench, "create new.bin 1M", 2, "format=");
    refused(&bench, "create new.raw 1000B", 1, "multiple of 512");
    refused(&bench, "create new.vmdk 1M", 1, "only be read");
    refused(&bench, "create new.qcow2 1M --fixed", 1, "can be fixed");
    refused(&bench, "create new.vhd 1M --cluster 1M", 1, "clusters");
    assert!(!bench.path("new.raw").exists());
    refused(
        &bench,
        "create new.qcow2 1M --cluster 3K",
        1,
        "power of two",
    );
    refused(&bench, "create new.qcow2 5", 2, "unit");
    refused(&bench, "info nothing.raw", 1, "No such file");
    refused(
        &bench,
        "info there.raw --format vdi",
        2,
        "known are raw, qcow2, vhd, vhdx, vmdk",
    );
    refused(
        &bench,
        "snapshot ls there.raw",
        1,
        "only qcow2 has snapshots",
    );
    assert_eq!(fs::read(bench.path("there.raw")).unwrap(), [1; 512]);
}

#[test]
fn damage_is_found_and_repaired() {
    let bench = Bench::new();
    done(&bench, "create hurt.qcow2 1M --cluster 4K");
    let path = bench.path("hurt.qcow2");
    let mut bytes = fs::read(&path).unwrap();
    // A cluster that is counted and not used: the refcount block follows the table.
    let block = u64::from_be_bytes(bytes[4096..4104].try_into().unwrap()) as usize;
    bytes[block + 2 * 100 + 1] = 1;
    fs::write(&path, bytes).unwrap();
    let run = disk(&bench, "check hurt.qcow2 --json");
    assert_eq!(run.code, Some(1));
    let report: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(
        (&report["leaks"], &report["corruptions"]),
        (&1.into(), &0.into())
    );
    done(&bench, "check hurt.qcow2 --repair");
    assert!(done(&bench, "check hurt.qcow2").contains("nothing is wrong"));
}
