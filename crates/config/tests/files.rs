//! Descriptions in files: what is accepted, and what a person is told when something is not.

use std::fs;

use caisson_config::{
    Accel, Backing, ByteSize, CharBackend, Cpu, CpuModel, DebugExit, Disk, DiskBus, DiskFormat,
    Ephemeral, FileBackend, HugePages, Limits, MachineConfig, Memory, OnReboot, SocketBackend,
    SoftTier, VirtioTransport,
};

const LIMITS: Limits = Limits {
    max_cpus: 64,
    host_memory: Some(ByteSize::from_mib(16384)),
};

fn full() -> MachineConfig {
    MachineConfig {
        name: "web".parse().unwrap(),
        image: None,
        kernel: Some("vmlinuz".parse().unwrap()),
        initrd: Some("/boot/initrd.img".parse().unwrap()),
        cmdline: Some("console=ttyS0 quiet".into()),
        cpus: 4,
        cpu: Cpu::Model(CpuModel::V2),
        memory: Memory {
            size: ByteSize::from_mib(1536),
            hugepages: HugePages::On,
        },
        accel: Accel::Soft,
        soft_tier: SoftTier::Native,
        serial: vec![
            CharBackend::Stdio,
            CharBackend::File(FileBackend {
                path: "com2.log".parse().unwrap(),
                append: true,
            }),
            CharBackend::Socket(SocketBackend {
                path: "com3.sock".parse().unwrap(),
            }),
            CharBackend::Null,
        ],
        console: vec![CharBackend::Null],
        disk: vec![
            Disk {
                ephemeral: Ephemeral::Memory,
                backing: Backing::Below("/images".parse().unwrap()),
                ..Disk::new("web.qcow2".parse().unwrap())
            },
            Disk {
                bus: DiskBus::Nvme,
                format: Some(DiskFormat::Raw),
                readonly: true,
                iops: Some(500),
                ..Disk::new("seed.img".parse().unwrap())
            },
        ],
        net: vec!["user,forward=tcp:8080:80,deny=*".parse().unwrap()],
        rng: true,
        virtio: VirtioTransport::Mmio,
        debugcon: Some(CharBackend::File(FileBackend {
            path: "debug.log".parse().unwrap(),
            append: false,
        })),
        debug_exit: Some(DebugExit { port: 0x501 }),
        command: vec![],
        on_reboot: OnReboot::Stop,
    }
}

#[test]
fn tables_and_option_strings_say_the_same() {
    let in_full = r#"
name = "web"
kernel = "vmlinuz"
initrd = "/boot/initrd.img"
cmdline = "console=ttyS0 quiet"
cpus = 4
cpu = "x86-64-v2"
accel = "soft"
soft-tier = 1
on-reboot = "stop"
serial = [
    "stdio",
    { file = { path = "com2.log", append = true } },
    { socket = { path = "com3.sock" } },
    "null",
]
console = ["null"]
disk = [
    { path = "web.qcow2", ephemeral = true, backing = "/images" },
    { path = "seed.img", bus = "nvme", format = "raw", readonly = true, iops = 500 },
]
net = [{ kind = "user", forward = ["tcp:8080:80"], deny = "*" }]
rng = true
virtio = "mmio"
debugcon = { file = "debug.log" }

[memory]
size = "1.5G"
hugepages = true

[debug-exit]
port = 0x501
"#;
    let in_short = r#"
name = "web"
kernel = "vmlinuz"
initrd = "/boot/initrd.img"
cmdline = "console=ttyS0 quiet"
cpus = 4
cpu = "x86-64-v2"
accel = "soft"
soft-tier = 1
on-reboot = "stop"
serial = ["stdio", "file=com2.log,append=on", "socket=com3.sock", "null"]
console = ["null"]
disk = ["web.qcow2,ephemeral,backing=/images", "path=seed.img,bus=nvme,format=raw,readonly,iops=500"]
net = ["user,forward=tcp:8080:80,deny=*"]
rng = true
virtio = "mmio"
debugcon = "file=debug.log"
memory = "1536M,hugepages"
debug-exit = "0x501"
"#;
    let in_json = r#"{
"name": "web", "kernel": "vmlinuz", "initrd": "/boot/initrd.img",
"cmdline": "console=ttyS0 quiet", "cpus": 4, "cpu": "v2", "accel": "soft",
"soft-tier": 1, "on-reboot": "stop",
"serial": ["stdio", {"file": "com2.log,append=on"}, {"socket": "com3.sock"}, {"null": null}],
"console": ["null"], "disk": ["web.qcow2,ephemeral=on,backing=/images", {"path": "seed.img", "bus": "nvme", "format": "raw", "readonly": true, "iops": 500}], "net": ["user,deny=*,forward=tcp:8080:80"], "rng": true, "virtio": "mmio",
"debugcon": {"file": {"path": "debug.log"}},
"memory": {"size": "1536M", "hugepages": "on"},
"debug-exit": 1281
}"#;
    assert_eq!(MachineConfig::from_toml(in_full).unwrap(), full());
    assert_eq!(MachineConfig::from_toml(in_short).unwrap(), full());
    assert_eq!(MachineConfig::from_json(in_json).unwrap(), full());
}

#[test]
fn what_is_written_reads_like_a_hand_made_file() {
    assert_eq!(
        full().to_toml().unwrap(),
        r#"name = "web"
kernel = "vmlinuz"
initrd = "/boot/initrd.img"
cmdline = "console=ttyS0 quiet"
cpus = 4
cpu = "x86-64-v2"
accel = "soft"
soft-tier = 1
on-reboot = "stop"
serial = ["stdio", { file = { path = "com2.log", append = true } }, { socket = { path = "com3.sock" } }, "null"]
console = ["null"]
rng = true
virtio = "mmio"

[[disk]]
path = "web.qcow2"
ephemeral = true
backing = "/images"

[[disk]]
path = "seed.img"
bus = "nvme"
format = "raw"
readonly = true
iops = 500

[[net]]
kind = "user"
forward = ["tcp:8080:80"]
deny = ["*"]

[memory]
size = "1536M"
hugepages = "on"

[debugcon.file]
path = "debug.log"

[debug-exit]
port = 1281
"#
    );
}

#[test]
fn an_empty_file_is_the_default_machine() {
    let config = MachineConfig::from_toml("").unwrap();
    assert_eq!(config, MachineConfig::default());
    assert_eq!(config, MachineConfig::from_json("{}").unwrap());
    assert_eq!(config.validate(&LIMITS), Ok(()));
    assert_eq!(config.effective_image().unwrap().as_str(), "mini");
}

#[test]
fn mistakes_are_shown_where_they_are_with_what_was_meant() {
    for (text, message) in [
        (
            "cpus = 2\nmemroy = \"1G\"\n",
            "TOML parse error at line 2, column 1
  |
2 | memroy = \"1G\"
  | ^^^^^^
unknown field `memroy`, expected one of `name`, `image`, `kernel`, `initrd`, `cmdline`, `cpus`, `cpu`, `accel`, `soft-tier`, `on-reboot`, `command`, `serial`, `console`, `disk`, `net`, `rng`, `virtio`, `memory`, `debugcon`, `debug-exit`
did you mean `memory`?",
        ),
        (
            "[memory]\nsize = \"1G\"\nhugepage = true\n",
            "TOML parse error at line 3, column 1
  |
3 | hugepage = true
  | ^^^^^^^^
unknown field `hugepage`, expected `size` or `hugepages`
did you mean `hugepages`?",
        ),
        (
            "memory = 512\n",
            "TOML parse error at line 1, column 10
  |
1 | memory = 512
  |          ^^^
size \"512\" has no unit; write 512M for MiB, 512G for GiB or 512B for bytes",
        ),
        (
            "accel = \"sotf\"\n",
            "TOML parse error at line 1, column 9
  |
1 | accel = \"sotf\"
  |         ^^^^^^
unknown value \"sotf\" (did you mean \"soft\"?); known: auto, kvm, soft",
        ),
        (
            "serial = [\"stdio\", \"fil=x\"]\n",
            "TOML parse error at line 1, column 20
  |
1 | serial = [\"stdio\", \"fil=x\"]
  |                    ^^^^^^^
unknown value \"fil\" (did you mean \"file\"?); known: stdio, null, file, socket",
        ),
        (
            "on-reboot = \"restrat\"\n",
            "TOML parse error at line 1, column 13
  |
1 | on-reboot = \"restrat\"
  |             ^^^^^^^^^
unknown variant `restrat`, expected `restart` or `stop`
did you mean `restart`?",
        ),
    ] {
        assert_eq!(
            MachineConfig::from_toml(text).unwrap_err().to_string(),
            message
        );
    }
    assert_eq!(
        MachineConfig::from_json("{\"vcpus\": 1}").unwrap_err().to_string(),
        "unknown field `vcpus`, expected one of `name`, `image`, `kernel`, `initrd`, `cmdline`, `cpus`, `cpu`, `accel`, `soft-tier`, `on-reboot`, `command`, `serial`, `console`, `disk`, `net`, `rng`, `virtio`, `memory`, `debugcon`, `debug-exit` at line 1 column 8
did you mean `cpus`?"
    );
}

#[test]
fn each_problem_names_the_thing_the_cause_and_the_way_out() {
    let check = |text: &str| {
        MachineConfig::from_toml(text)
            .unwrap()
            .validate(&LIMITS)
            .unwrap_err()
            .to_string()
    };
    for (text, message) in [
        (
            "cpus = 0",
            "cpus: 0 vCPUs cannot run anything; choose 1 to 64",
        ),
        (
            "cpus = 10000",
            "cpus: 10000 vCPUs are more than this backend runs; choose 1 to 64",
        ),
        (
            "memory = \"1M\"",
            "memory: 1M is too little for any kernel; give at least 2M (Debian wants 128M)",
        ),
        (
            "memory = \"17G\"",
            "memory: 17G is more than this host has, 16G; give less",
        ),
        (
            "memory = \"268435457B\"",
            "memory: 268435457B is not a multiple of the page size, 4K; use 262148K",
        ),
        (
            "memory = \"257M,hugepages=on\"",
            "memory: 257M is not a multiple of the page size, 2M; use 258M",
        ),
        (
            "kernel = \"k\"\nimage = \"mini\"",
            "kernel: an image brings its own kernel; give either an image or a kernel",
        ),
        (
            "kernel = \"k\"\ncommand = [\"ls\"]",
            "command: it is run by an image's init, and a kernel was given instead of an image; drop the kernel, or put the command into your initrd",
        ),
        (
            "command = [\"\"]",
            "command: the program's name is empty; name a program in the guest",
        ),
        (
            "serial = [\"stdio\", \"stdio\"]",
            "serial: stdio is given to more than one port; keep it for one and use file=PATH, socket=PATH or null for the others",
        ),
        (
            "serial = [\"file=a\"]\ndebugcon = \"file=a\"",
            "serial: \"a\" is given to more than one port; give each port its own",
        ),
        (
            "debug-exit = \"0xffff\"",
            "debug-exit: port 0xffff leaves no room for its four bytes; use one up to 0xfffc",
        ),
        (
            "cpus = 0\nmemory = \"1M\"",
            "cpus: 0 vCPUs cannot run anything; choose 1 to 64\nmemory: 1M is too little for any kernel; give at least 2M (Debian wants 128M)",
        ),
    ] {
        assert_eq!(check(text), message);
    }
    assert_eq!(
        check(&format!("cmdline = \"{}\"", "x".repeat(2048))),
        "cmdline: it has 2048 bytes and Linux takes at most 2047; shorten it"
    );
    assert!(check(&format!("serial = [{}]", "\"null\",".repeat(5))).contains("5 ports are given"));
    assert!(check("command = [\"ls\"]\nserial = [\"stdio\", \"null\"]").contains("COM2 carries"));
}

#[test]
fn a_file_is_loaded_with_paths_relative_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("web.toml");
    fs::write(
        &path,
        "kernel = \"vmlinuz\"\ninitrd = \"/x\"\ncpu = \"my.toml\"\nserial = [\"file=log\"]",
    )
    .unwrap();
    let config = MachineConfig::load(&path).unwrap();
    assert_eq!(config.kernel.unwrap().as_path(), dir.path().join("vmlinuz"));
    assert_eq!(config.initrd.unwrap().as_str(), "/x");
    let cpu = dir.path().join("my.toml").to_string_lossy().into_owned();
    assert_eq!(config.cpu.to_string(), cpu);
    assert_eq!(
        config.serial[0].path().unwrap().as_path(),
        dir.path().join("log")
    );
}

#[test]
fn files_that_are_no_description_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("none.toml");
    let message = |path: &std::path::Path| MachineConfig::load(path).unwrap_err().to_string();
    assert_eq!(
        message(&missing),
        format!(
            "cannot read config file \"{}\": No such file or directory (os error 2)",
            missing.display()
        )
    );
    assert!(message(dir.path()).ends_with("it is a directory; name a TOML or JSON file"));
    let binary = dir.path().join("binary.toml");
    fs::write(&binary, [0xff, 0xfe, 0]).unwrap();
    assert!(message(&binary).contains("not UTF-8"));
    let endless = std::path::Path::new("/dev/zero");
    assert!(message(endless).contains("longer than 1 MiB"));
    let json = dir.path().join("x.json");
    fs::write(&json, "cpus = 1").unwrap();
    assert!(message(&json).starts_with(&format!(
        "in config file \"{}\": expected value",
        json.display()
    )));
}
