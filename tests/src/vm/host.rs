//! The process of a test's machine: does what the test asks over its standard input, which is a socket.

use std::{
    io,
    os::{fd::AsFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use anyhow::{Context, Result, anyhow, bail};
use caisson_block::testing::RamDisk;
use caisson_config::{DiskBus, HugePages, OnReboot};
use caisson_hypervisor_soft::Tier;
use caisson_machine::{
    BootSpec, CpuSpec, DiskSpec, Elapsed, HostEnd, Input, Machine, MachineSpec, MemorySpec,
    NetSpec, OnCrash, SerialInput, Snapshot,
};
use caisson_net::{UserNetwork, UserNetworkSpec};
use caisson_user_net::Config;

use super::{
    all_backends, at_tier,
    compare::differences,
    wire::{Answer, Description, Frame, NetDescription, Port, Request},
};

const MIB: u64 = 1 << 20;
/// The largest file that a machine starts from, in bytes.
const LIMIT: u64 = 512 * MIB;

/// The stream to the test, for one frame at a time.
#[derive(Clone)]
struct Wire(Arc<Mutex<UnixStream>>);

impl Wire {
    fn send(&self, frame: &Frame) -> io::Result<()> {
        let mut stream = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        frame.send(&mut *stream)
    }
}

/// A port of the machine that leads to the test.
struct PortEnd {
    wire: Wire,
    port: Port,
    /// Where [`PortEnd::attach`] leaves the way in.
    input: Arc<Mutex<Option<SerialInput>>>,
}

impl HostEnd for PortEnd {
    fn attach(&mut self, input: SerialInput) {
        *self.input.lock().unwrap_or_else(PoisonError::into_inner) = Some(input);
    }

    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.wire.send(&Frame::Bytes(self.port, bytes.to_vec()))
    }
}

type Inputs = [(Port, Arc<Mutex<Option<SerialInput>>>); 4];

/// The process: what it has made, and how it speaks.
struct Host {
    wire: Wire,
    inputs: Inputs,
    machine: Option<Arc<Machine>>,
    /// Its disk, and where the content goes when it leaves.
    disk: Option<(PathBuf, Arc<RamDisk>)>,
    /// The machine goes on elsewhere: its end here is nobody's business.
    left: Arc<AtomicBool>,
}

/// Serves the test until it hangs up.
///
/// # Errors
/// Standard input is not a socket to a test.
pub fn serve() -> Result<()> {
    let control = UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?);
    let mut requests = control.try_clone()?;
    let ports = [Port::Com1, Port::Com2, Port::Debugcon, Port::Hvc0];
    let mut host = Host {
        wire: Wire(Arc::new(Mutex::new(control))),
        inputs: ports.map(|port| (port, Arc::default())),
        machine: None,
        disk: None,
        left: Arc::default(),
    };
    while let Some(frame) = Frame::receive(&mut requests)? {
        match frame {
            Frame::Bytes(port, bytes) => host.type_bytes(port, &bytes),
            Frame::Request(request) => {
                let answer = host
                    .answer(request)
                    .unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
                host.wire.send(&Frame::Answer(answer))?;
            }
            other => bail!("a test does not send {other:?}"),
        }
    }
    Ok(())
}

impl Host {
    fn type_bytes(&self, port: Port, bytes: &[u8]) {
        let input = self.inputs.iter().find(|(other, _)| *other == port);
        if let Some((_, input)) = input
            && let Some(input) = &*input.lock().unwrap_or_else(PoisonError::into_inner)
        {
            input.push_now(bytes);
        }
    }

    fn machine(&self) -> Result<&Arc<Machine>> {
        self.machine.as_ref().context("there is no machine yet")
    }

    fn answer(&mut self, request: Request) -> Result<Answer> {
        match request {
            Request::Make(description) => {
                self.machine = Some(Arc::new(Machine::new(self.spec(&description)?)?));
            }
            Request::Restore(description, folder) => self.restore(&description, &folder)?,
            Request::Start => self.start()?,
            Request::Pause => self.machine()?.pause()?,
            Request::Resume => self.machine()?.resume()?,
            Request::Leave(folder) => self.leave(&folder)?,
            Request::Stop => self.machine()?.stop(),
            Request::Now => return Ok(Answer::Now(self.machine()?.now_ns())),
            Request::Resize(columns, rows) => self.machine()?.resize_console(0, columns, rows),
            Request::Inspect => return Ok(Answer::Text(self.machine()?.inspect().to_string())),
        }
        Ok(Answer::Done)
    }

    fn spec(&mut self, description: &Description) -> Result<MachineSpec> {
        let disks = match &description.disk {
            Some(path) => vec![self.disk(path, description.disk_bus)?],
            None => Vec::new(),
        };
        let backend = all_backends()
            .into_iter()
            .find(|backend| backend.name() == description.backend)
            .ok_or_else(|| anyhow!("there is no backend \"{}\"", description.backend))?;
        let tier = if description.native {
            Tier::Native
        } else {
            Tier::Interpreted
        };
        let end = |port| -> Option<Box<dyn HostEnd>> {
            let (_, input) = self.inputs.iter().find(|(other, _)| *other == port)?;
            Some(Box::new(PortEnd {
                wire: self.wire.clone(),
                port,
                input: input.clone(),
            }))
        };
        let open = |what, path: &Path| Input::open(what, path, LIMIT);
        Ok(MachineSpec {
            name: "test".into(),
            hypervisor: at_tier(backend, tier),
            vcpus: description.cpus,
            cpu: CpuSpec::open(&description.cpu.parse()?)?,
            memory: MemorySpec {
                bytes: description.memory_mib * MIB,
                hugepages: HugePages::Auto,
            },
            boot: BootSpec {
                kernel: open("kernel", &description.kernel)?,
                initrd: description
                    .initrd
                    .as_ref()
                    .map(|path| open("initrd", path))
                    .transpose()?,
                modules: description
                    .modules
                    .iter()
                    .map(|(path, line)| Ok((open("module", path)?, line.clone())))
                    .collect::<Result<_>>()?,
                cmdline: description.cmdline.clone(),
            },
            serial: [
                end(Port::Com1),
                description.com2.then(|| end(Port::Com2)).flatten(),
                None,
                None,
            ],
            debugcon: end(Port::Debugcon),
            debug_exit: Some(0xf4),
            virtio: description.virtio.unwrap_or_default(),
            rng: description.virtio.is_some(),
            disks,
            nets: description
                .net
                .iter()
                .map(|net| card(net))
                .collect::<Result<_>>()?,
            consoles: description
                .virtio
                .and_then(|_| end(Port::Hvc0))
                .into_iter()
                .collect(),
            on_reboot: if description.restart_on_reboot {
                OnReboot::Restart
            } else {
                OnReboot::Stop
            },
            on_crash: if description.restart_on_crash {
                OnCrash::Restart
            } else {
                OnCrash::End
            },
        })
    }

    /// A disk in memory with the content of the file.
    fn disk(&mut self, path: &Path, bus: DiskBus) -> Result<DiskSpec> {
        let content = std::fs::read(path)?;
        let disk = Arc::new(RamDisk::new(content.len() as u64));
        disk.put(0, &content);
        self.disk = Some((path.to_owned(), disk.clone()));
        Ok(DiskSpec {
            id: "test-disk".into(),
            backend: disk,
            bus,
        })
    }

    /// Makes the machine from a snapshot, and checks that it has become the one that was saved.
    fn restore(&mut self, description: &Description, folder: &Path) -> Result<()> {
        let snapshot = Snapshot::open(folder)?;
        snapshot.verify_memory()?;
        let machine = Machine::restore(self.spec(description)?, &snapshot, Elapsed::Hidden)?;
        let changed = differences(
            snapshot.state(),
            &machine.save_state()?,
            snapshot.backend() == description.backend,
        );
        if !changed.is_empty() {
            bail!("the machine came back changed:\n{}", changed.join("\n"));
        }
        self.machine = Some(Arc::new(machine));
        Ok(())
    }

    fn start(&self) -> Result<()> {
        let machine = self.machine()?.clone();
        machine.start()?;
        let (wire, left) = (self.wire.clone(), self.left.clone());
        thread::Builder::new().name("end".into()).spawn(move || {
            let outcome = machine.wait();
            if !left.load(Ordering::SeqCst) {
                let _ = wire.send(&Frame::Ended(outcome));
            }
        })?;
        Ok(())
    }

    fn leave(&self, folder: &Path) -> Result<()> {
        let machine = self.machine()?;
        if machine.phase() != caisson_machine::Phase::Created {
            machine.pause()?;
        }
        machine.save(folder)?;
        if let Some((path, disk)) = &self.disk {
            std::fs::write(path, disk.content())?;
        }
        self.left.store(true, Ordering::SeqCst);
        machine.stop();
        // What the guest has printed is delivered before the answer.
        machine.wait();
        Ok(())
    }
}

/// A card in a user-mode network.
fn card(described: &NetDescription) -> Result<NetSpec> {
    let forwards = described.forwards.iter().map(|text| text.parse());
    let spec = UserNetworkSpec {
        router: Config {
            host_access: true,
            ..Config::default()
        },
        forwards: forwards.collect::<Result<_, _>>()?,
        resolver: described.resolver,
    };
    Ok(NetSpec {
        mac: spec.router.guest_mac,
        backend: UserNetwork::open(spec)?,
    })
}
