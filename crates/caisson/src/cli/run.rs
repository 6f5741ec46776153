//! `caisson run`: its flags, and the description that they make with a config file.

use std::path::PathBuf;

use caisson_config::{
    Accel, CharBackend, Cpu, DebugExit, Disk, HostPath, ImageName, MachineConfig, MachineName,
    Memory, Net, OnReboot, SoftTier, VirtioTransport,
};
use clap::Args;

use super::RestoreFrom;

const EXAMPLES: &str = "\
Examples:
  caisson run                                   a Debian shell; Ctrl-A x leaves it
  caisson run debian                            a whole Debian, made on the first use
  caisson run debian --keep web.qcow2           one that remembers
  caisson run --cpus 4 --memory 2G              with more room
  caisson run --cpu x86-64-v3                   the same processor on every host that can
  caisson run -- sh -c 'nproc; exit 3'          one command; exits with 3
  caisson run -- gzip -9 < log > log.gz         input and output are byte-exact
  caisson run --serial file=console.log         console to a file
  caisson run --serial stdio --serial socket=/tmp/com2.sock
                                                a second serial port, on a Unix socket
  caisson run --kernel vmlinux --initrd root.cpio.gz --cmdline 'console=ttyS0 quiet'
  caisson run --kernel hobby.elf --debugcon stdio --serial null --debug-exit
                                                a Multiboot kernel and its test ports
  caisson run --disk data.qcow2                 with a disk, /dev/vda in the guest
  caisson run --disk base.qcow2,ephemeral --disk seed.img,format=raw,bus=nvme,readonly
                                                what is written to the first is thrown away
  caisson run --net user,forward=tcp:8080:80    on the network, its web server at port 8080
  caisson run --net 'user,deny=*,allow=*.debian.org:443'
                                                where only this can be reached
  caisson run --config web.toml --memory 4G     a description, with one thing changed
  caisson run --save-on-exit nap                a machine that is saved when it is left,
  caisson run --restore nap                     and goes on here

On the console: Ctrl-A x leaves (the machine is stopped), Ctrl-A h lists the keys,
Ctrl-A Ctrl-A sends a Ctrl-A.

Options with commas take key=value items after the first value, as in
--memory 1G,hugepages=on. Put a value that contains a comma or an equals sign in double
quotes: --serial 'file=\"a,b.log\"'.";

/// Start a virtual machine and stay with it until it ends.
///
/// Without an image and without --kernel, it runs Debian's cloud kernel with a small root in
/// memory, fetched on the first use. Nothing that happens inside outlives it.
#[derive(Clone, Debug, Default, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RunArgs {
    /// The image to run [default: mini, unless --kernel is given]
    pub(crate) image: Option<ImageName>,

    /// Read the machine's description from a TOML file, or a JSON file if its name ends in
    /// .json. Flags given besides replace what it says
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,

    /// What to call the machine; the guest's host name too [default: caisson]
    #[arg(long, value_name = "NAME")]
    pub(crate) name: Option<MachineName>,

    /// Run this kernel instead of an image: a bzImage, an ELF vmlinux (or any PVH kernel), or a
    /// Multiboot 1 kernel
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub(crate) kernel: Option<HostPath>,

    /// The initial RAM disk (the first module of a Multiboot kernel)
    #[arg(long, value_name = "FILE", help_heading = "Boot")]
    pub(crate) initrd: Option<HostPath>,

    /// The kernel command line. With --kernel it is the whole line [default: console=ttyS0]; with
    /// an image it is added to the image's own
    #[arg(
        long,
        value_name = "TEXT",
        help_heading = "Boot",
        allow_hyphen_values = true
    )]
    pub(crate) cmdline: Option<String>,

    /// vCPUs, 1 to 64, with kvm to 254 [default: 1]
    #[arg(long, value_name = "N", help_heading = "Machine")]
    pub(crate) cpus: Option<u32>,

    /// The processor that the guest sees: host, the most that the backend can give here; a model
    /// that is the same on every host and backend, x86-64-v1 to x86-64-v4 (v1 to v4 for short); or
    /// a TOML file that says what is different, as in base = "v3", add = ["sha_ni"], remove =
    /// ["avx2"]. A file's path has a slash in it or ends in .toml [default: host]
    #[arg(long, value_name = "host|v1|v2|v3|v4|FILE", help_heading = "Machine")]
    pub(crate) cpu: Option<Cpu>,

    /// RAM, with its unit: 512M, 2G. With ,hugepages=on it comes from the host's reserve of huge
    /// pages [default: 512M]
    #[arg(
        long,
        value_name = "SIZE[,hugepages=auto|on|off]",
        help_heading = "Machine"
    )]
    pub(crate) memory: Option<Memory>,

    /// What runs the vCPUs: auto is the fastest that works here, kvm the host's hardware
    /// virtualisation, soft the software CPU [default: auto]
    #[arg(long, value_name = "auto|kvm|soft", help_heading = "Machine")]
    pub(crate) accel: Option<Accel>,

    /// How far the software CPU goes with code that runs often: 0 interprets it, 1 translates it to
    /// native code [default: 0]
    #[arg(long, value_name = "0|1", help_heading = "Machine")]
    pub(crate) soft_tier: Option<SoftTier>,

    /// At the end, say on standard error what each vCPU of the software CPU did: code built and
    /// translated, look-ups, TLB misses, how often translated code was left and why
    #[arg(long, help_heading = "Machine")]
    pub(crate) soft_stats: bool,

    /// End instead of starting again when the guest reboots
    #[arg(long, help_heading = "Machine")]
    pub(crate) no_reboot: bool,

    /// Where a serial port leads: stdio, null, file=PATH[,append=on] or socket=PATH. The first is
    /// COM1, the console; repeat it for COM2 to COM4 [default: one port, stdio]
    #[arg(long, value_name = "WHERE", help_heading = "Ports")]
    pub(crate) serial: Vec<CharBackend>,

    /// Have a virtio console and lead it like a serial port; Linux calls the first hvc0. Repeat it for more
    #[arg(long, value_name = "WHERE", help_heading = "Ports")]
    pub(crate) console: Vec<CharBackend>,

    /// Have a virtio entropy device, which gives the guest random numbers of the host's
    #[arg(long, help_heading = "Machine")]
    pub(crate) rng: bool,

    /// What carries virtio devices: pci, or mmio for kernels without PCI [default: pci]
    #[arg(long, value_name = "pci|mmio", help_heading = "Machine")]
    pub(crate) virtio: Option<VirtioTransport>,

    /// Have a disk: the image, then what it is to be. bus=virtio|nvme is the device that the guest
    /// sees, format=raw|qcow2|vhd the image's format where its name and content do not tell.
    /// readonly refuses writes; ephemeral throws away at the end what was written (ephemeral=DIR
    /// keeps it in a file there instead of in memory). cache=writeback|direct|writethrough|unsafe;
    /// backing=on or backing=DIR lets the image name files that it is based on; id=TEXT;
    /// block=512|4096; bandwidth=SIZE and iops=N are limits per second, with bandwidth-burst,
    /// iops-burst and limit-group=NAME. Repeat it for more disks
    #[arg(long, value_name = "PATH[,KEY=VALUE…]", help_heading = "Disks")]
    pub(crate) disk: Vec<Disk>,

    /// Keep what a guest with a disk of its own (debian) writes, in this qcow2 image: it is made as a
    /// copy of the clean one if there is none. Otherwise each run starts from the clean image
    #[arg(long, value_name = "FILE", help_heading = "Disks")]
    pub(crate) keep: Option<HostPath>,

    /// Have a network card: user puts it behind a router on the host's own sockets, which needs no
    /// privilege. forward=tcp:PORT:GUEST-PORT leads a port of the host to the guest (udp: too, and an
    /// address of the host with a colon may come before PORT). deny=WHERE refuses connections,
    /// allow=WHERE lets them pass all the same; WHERE is a name, *.NAME, an address, ADDRESS/BITS or *,
    /// with :PORT behind it for one port; both and forward can be there several times. host-access=on
    /// lets the guest reach this host, at the router's address; dns=ADDRESS or ADDRESS:PORT is whom to
    /// ask for names; mtu=N; mac=ADDRESS; pcap=FILE records every frame. none is no card. Repeat it for
    /// more [default: none]
    #[arg(long, value_name = "user|none[,KEY=VALUE…]", help_heading = "Network")]
    pub(crate) net: Vec<Net>,

    /// Have a debug console (I/O port 0xe9) and lead it like a serial port
    #[arg(long, value_name = "WHERE", help_heading = "Ports")]
    pub(crate) debugcon: Option<CharBackend>,

    /// Have the debug-exit device: a guest that writes V to the port ends caisson with status
    /// 2V + 1 [default port: 0xf4]
    #[arg(
        long,
        value_name = "PORT",
        help_heading = "Ports",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "0xf4"
    )]
    pub(crate) debug_exit: Option<DebugExit>,

    /// When the machine is left (Ctrl-A x, or a signal that would end caisson), save it to this
    /// folder instead of ending it
    #[arg(
        long,
        value_name = "DIR",
        help_heading = "Saved machines",
        conflicts_with = "command"
    )]
    pub(crate) save_on_exit: Option<PathBuf>,

    /// Go on with the machine that was saved to this folder, as it was described then. Its clock
    /// goes on where it stood; with ,time=jump as if it had run on. Its memory is read as the guest
    /// needs it; with ,verify=on all of it is checked first. The folder stays as it is
    #[arg(
        long,
        value_name = "DIR",
        help_heading = "Saved machines",
        conflicts_with_all = ["command", "config"]
    )]
    pub(crate) restore: Option<RestoreFrom>,

    /// Say nothing besides what the guest says, and errors
    #[arg(short, long)]
    pub(crate) quiet: bool,

    /// Print the description that would be run, as TOML, and end
    #[arg(long)]
    pub(crate) print_config: bool,

    /// Run this command in the machine instead of a shell, and exit with its status
    #[arg(last = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

impl RunArgs {
    /// Puts the flags over `config`. A flag replaces the file's value as a whole.
    pub(crate) fn apply(&self, config: &mut MachineConfig) {
        fn replace<T: Clone>(value: &mut T, flag: &Option<T>) {
            if let Some(flag) = flag {
                value.clone_from(flag);
            }
        }
        fn set<T: Clone>(value: &mut Option<T>, flag: &Option<T>) {
            if flag.is_some() {
                value.clone_from(flag);
            }
        }
        // Choosing what to boot on the command line overrules the file's choice, of either kind.
        if self.image.is_some() && self.kernel.is_none() {
            config.kernel = None;
        }
        if self.kernel.is_some() && self.image.is_none() {
            config.image = None;
        }
        set(&mut config.image, &self.image);
        set(&mut config.kernel, &self.kernel);
        set(&mut config.initrd, &self.initrd);
        set(&mut config.cmdline, &self.cmdline);
        set(&mut config.debugcon, &self.debugcon);
        set(&mut config.debug_exit, &self.debug_exit);
        replace(&mut config.name, &self.name);
        replace(&mut config.cpus, &self.cpus);
        replace(&mut config.cpu, &self.cpu);
        replace(&mut config.memory, &self.memory);
        replace(&mut config.accel, &self.accel);
        replace(&mut config.soft_tier, &self.soft_tier);
        replace(&mut config.virtio, &self.virtio);
        config.rng |= self.rng;
        if self.no_reboot {
            config.on_reboot = OnReboot::Stop;
        }
        if !self.serial.is_empty() {
            config.serial.clone_from(&self.serial);
        }
        if !self.net.is_empty() {
            config.net.clone_from(&self.net);
        }
        if !self.disk.is_empty() {
            config.disk.clone_from(&self.disk);
        }
        if !self.console.is_empty() {
            config.console.clone_from(&self.console);
        }
        if !self.command.is_empty() {
            config.command.clone_from(&self.command);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Cli, Command};
    use super::*;
    use clap::Parser;

    fn config(file: &str, line: &[&str]) -> MachineConfig {
        let mut config = MachineConfig::from_toml(file).unwrap();
        let cli = Cli::try_parse_from(["caisson", "run"].iter().chain(line)).unwrap();
        let Command::Run(args) = cli.command else {
            panic!("not run");
        };
        args.apply(&mut config);
        config
    }

    #[test]
    fn flags_say_what_a_file_would() {
        let by_flags = config(
            "",
            &[
                "--name",
                "web",
                "--kernel",
                "k",
                "--initrd",
                "i",
                "--cmdline",
                "-x y",
                "--cpus",
                "2",
                "--cpu",
                "v3",
                "--memory",
                "1G,hugepages=on",
                "--accel",
                "soft",
                "--soft-tier",
                "1",
                "--serial",
                "file=a,append=on",
                "--serial",
                "null",
                "--debugcon",
                "stdio",
                "--debug-exit",
                "--no-reboot",
                "--console",
                "socket=c",
                "--rng",
                "--virtio",
                "mmio",
                "--net",
                "user,forward=tcp:8080:80,forward=udp:0.0.0.0:5353:53,deny=*,allow=*.test:443,host-access,mtu=9000",
                "--net",
                "none",
                "--disk",
                "a.qcow2,backing=on,ephemeral=/tmp",
                "--disk",
                "path=b,format=raw,bus=nvme,readonly,cache=direct,id=b,block=4096,iops=9,iops-burst=8,bandwidth=1M,bandwidth-burst=64K,limit-group=g",
            ],
        );
        let by_file = MachineConfig::from_toml(
            r#"name = "web"
kernel = "k"
initrd = "i"
cmdline = "-x y"
cpus = 2
cpu = "x86-64-v3"
memory = { size = "1G", hugepages = true }
accel = "soft"
soft-tier = 1
serial = [{ file = { path = "a", append = true } }, "null"]
debugcon = "stdio"
debug-exit = {}
on-reboot = "stop"
console = [{ socket = "c" }]
rng = true
virtio = "mmio"
net = [{ kind = "user", forward = ["tcp:8080:80", "udp:0.0.0.0:5353:53"], deny = "*", allow = ["*.test:443"], host-access = true, mtu = 9000 }, "none"]
disk = [{ path = "a.qcow2", backing = true, ephemeral = "/tmp" }, { path = "b", format = "raw", bus = "nvme", readonly = true, cache = "direct", id = "b", block = 4096, iops = 9, iops-burst = 8, bandwidth = "1M", bandwidth-burst = "64K", limit-group = "g" }]
"#,
        )
        .unwrap();
        assert_eq!(by_flags, by_file);
    }

    #[test]
    fn flags_replace_and_silence_keeps() {
        let file = "kernel = \"k\"\ncpus = 3\nmemory = \"1G,hugepages=on\"\nserial = [\"null\", \"null\"]\n";
        assert_eq!(config(file, &[]), MachineConfig::from_toml(file).unwrap());
        let changed = config(file, &["--memory", "2G", "--serial", "stdio"]);
        assert_eq!(changed.cpus, 3);
        assert_eq!(changed.memory, "2G".parse().unwrap());
        assert_eq!(changed.serial, [CharBackend::Stdio]);
        let other = config(file, &["mini", "--", "ls", "-l"]);
        assert_eq!(other.kernel, None);
        assert_eq!(other.image.unwrap().as_str(), "mini");
        assert_eq!(other.command, ["ls", "-l"]);
    }
}
