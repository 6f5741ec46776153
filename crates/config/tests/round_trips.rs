//! Property tests: every description survives each way of writing it.

use caisson_config::{
    Accel, Backing, BlockSize, ByteSize, CharBackend, Cpu, CpuModel, DebugExit, Disk, DiskBus,
    DiskCache, DiskFormat, Ephemeral, FileBackend, HostPath, HugePages, ImageName, MachineConfig,
    MachineName, Memory, Net, NetKind, OnReboot, SocketBackend, SoftTier, VirtioTransport, options,
};
use proptest::prelude::*;

fn path() -> impl Strategy<Value = HostPath> {
    // Everything that option strings treat specially, and some that they do not.
    proptest::collection::vec(
        prop_oneof![
            Just(','),
            Just('='),
            Just('"'),
            Just('\\'),
            Just(' '),
            Just('/'),
            any::<char>().prop_filter("no NUL in paths", |c| *c != '\0'),
        ],
        1..20,
    )
    .prop_map(|chars| HostPath::try_from(chars.into_iter().collect::<String>()).unwrap())
}

fn backend() -> impl Strategy<Value = CharBackend> {
    prop_oneof![
        Just(CharBackend::Stdio),
        Just(CharBackend::Null),
        (path(), any::<bool>())
            .prop_map(|(path, append)| CharBackend::File(FileBackend { path, append })),
        path().prop_map(|path| CharBackend::Socket(SocketBackend { path })),
    ]
}

fn cpu() -> impl Strategy<Value = Cpu> {
    prop_oneof![
        Just(Cpu::Host),
        Just(Cpu::Model(CpuModel::V1)),
        Just(Cpu::Model(CpuModel::V3)),
        path().prop_map(|path| Cpu::File(format!("{path}.toml").parse().unwrap())),
    ]
}

fn memory() -> impl Strategy<Value = Memory> {
    let hugepages = prop_oneof![
        Just(HugePages::Auto),
        Just(HugePages::On),
        Just(HugePages::Off)
    ];
    (any::<u64>(), hugepages).prop_map(|(bytes, hugepages)| Memory {
        size: ByteSize::from_bytes(bytes),
        hugepages,
    })
}

fn disk() -> impl Strategy<Value = Disk> {
    let folder = || path().prop_filter("not a word", |path| !matches!(path.as_str(), "on" | "off"));
    (
        (path(), any::<bool>(), any::<bool>()),
        proptest::option::of(Just(DiskFormat::Qcow2)),
        prop_oneof![
            Just(Ephemeral::Off),
            Just(Ephemeral::Memory),
            folder().prop_map(Ephemeral::Folder)
        ],
        prop_oneof![
            Just(Backing::Off),
            Just(Backing::On),
            folder().prop_map(Backing::Below)
        ],
        prop_oneof![Just(DiskCache::Writeback), Just(DiskCache::Unsafe)],
        proptest::option::of(any::<String>()),
        (any::<u64>(), proptest::option::of(0..=i64::MAX as u64)),
    )
        .prop_map(
            |((path, nvme, large), format, ephemeral, backing, cache, text, (rate, iops))| Disk {
                bus: if nvme { DiskBus::Nvme } else { DiskBus::Virtio },
                block: if large {
                    BlockSize::Bytes4096
                } else {
                    BlockSize::Bytes512
                },
                format,
                readonly: nvme,
                ephemeral,
                cache,
                backing,
                id: text.clone(),
                bandwidth: large.then_some(ByteSize::from_bytes(rate)),
                bandwidth_burst: nvme.then_some(ByteSize::from_bytes(rate)),
                iops,
                iops_burst: iops,
                limit_group: text,
                path,
            },
        )
}

fn net() -> impl Strategy<Value = Net> {
    let texts = || proptest::collection::vec(any::<String>(), 0..3);
    (
        (texts(), texts(), texts()),
        any::<bool>(),
        proptest::option::of(any::<String>()),
        proptest::option::of(any::<u16>()),
        proptest::option::of(path()),
    )
        .prop_map(|((forward, allow, deny), none, text, mtu, pcap)| Net {
            kind: if none { NetKind::None } else { NetKind::User },
            forward,
            allow,
            deny,
            host_access: none,
            dns: text.clone(),
            mtu,
            mac: text,
            pcap,
        })
}

fn config() -> impl Strategy<Value = MachineConfig> {
    let name = "[A-Za-z0-9][A-Za-z0-9._-]{0,20}";
    (
        (
            name.prop_map(|text| text.parse::<MachineName>().unwrap()),
            proptest::option::of(name.prop_map(|text| text.parse::<ImageName>().unwrap())),
            proptest::option::of(path()),
            proptest::option::of(path()),
            proptest::option::of(any::<String>()),
            any::<u32>(),
            cpu(),
        ),
        (
            prop_oneof![Just(Accel::Auto), Just(Accel::Kvm), Just(Accel::Soft)],
            prop_oneof![Just(SoftTier::Interpreted), Just(SoftTier::Native)],
            prop_oneof![Just(OnReboot::Restart), Just(OnReboot::Stop)],
            proptest::collection::vec(any::<String>(), 0..4),
            proptest::collection::vec(backend(), 0..5),
            memory(),
            proptest::option::of(backend()),
            proptest::option::of(any::<u16>().prop_map(|port| DebugExit { port })),
        ),
        (
            proptest::collection::vec(backend(), 0..3),
            proptest::collection::vec(disk(), 0..3),
            proptest::collection::vec(net(), 0..3),
            any::<bool>(),
            prop_oneof![Just(VirtioTransport::Pci), Just(VirtioTransport::Mmio)],
        ),
    )
        .prop_map(|(first, second, (console, disk, net, rng, virtio))| {
            let (name, image, kernel, initrd, cmdline, cpus, cpu) = first;
            let (accel, soft_tier, on_reboot, command, serial, memory, debugcon, debug_exit) =
                second;
            MachineConfig {
                name,
                image,
                kernel,
                initrd,
                cmdline,
                cpus,
                cpu,
                accel,
                soft_tier,
                on_reboot,
                command,
                serial,
                console,
                disk,
                net,
                rng,
                virtio,
                memory,
                debugcon,
                debug_exit,
            }
        })
}

proptest! {
    #[test]
    fn toml_and_json(config in config()) {
        let toml = config.to_toml().unwrap();
        prop_assert_eq!(&MachineConfig::from_toml(&toml).unwrap(), &config, "{}", toml);
        let json = config.to_json().unwrap();
        prop_assert_eq!(&MachineConfig::from_json(&json).unwrap(), &config, "{}", json);
    }

    #[test]
    fn option_strings(backend in backend(), disk in disk(), memory in memory(), port in any::<u16>()) {
        let text = options::to_string(&backend).unwrap();
        prop_assert_eq!(&text.parse::<CharBackend>().unwrap(), &backend, "{}", text);
        let text = options::to_string(&disk).unwrap();
        prop_assert_eq!(&text.parse::<Disk>().unwrap(), &disk, "{}", text);
        let text = options::to_string(&memory).unwrap();
        prop_assert_eq!(&text.parse::<Memory>().unwrap(), &memory, "{}", text);
        let text = options::to_string(&DebugExit { port }).unwrap();
        prop_assert_eq!(text.parse::<DebugExit>().unwrap(), DebugExit { port });
    }

    #[test]
    fn option_strings_inside_a_file(backend in backend()) {
        let text = options::to_string(&backend).unwrap();
        let json = serde_json::json!({ "serial": [text] }).to_string();
        prop_assert_eq!(&MachineConfig::from_json(&json).unwrap().serial[0], &backend);
    }

    #[test]
    fn any_text_is_read_or_refused_without_panic(text in any::<String>(), junk in "[a-z=,\"\\\\ 0-9]{0,40}") {
        for text in [text, junk] {
            let _ = text.parse::<CharBackend>();
            let _ = text.parse::<Disk>();
            let _ = text.parse::<Memory>();
            let _ = text.parse::<DebugExit>();
            let _ = text.parse::<Cpu>();
            let _ = caisson_config::CpuFile::from_toml(&text);
            let _ = text.parse::<ByteSize>();
            let _ = MachineConfig::from_toml(&text);
            let _ = MachineConfig::from_json(&text);
        }
    }
}
