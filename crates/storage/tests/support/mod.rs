//! What several tests share.
#![allow(dead_code, unreachable_pub, reason = "each test takes what it needs")]

use std::{
    future::Future,
    path::{Path, PathBuf},
    pin::pin,
    process::Command,
    sync::{Arc, OnceLock},
    task::{Context, Poll, Wake, Waker},
    thread::Thread,
};

use caisson_block::{BlockBackend, BlockError, GuestBuffer, Operation, Request, Segment};
use caisson_image::{ImageStore, Silent};
use caisson_memory::{
    Gpa, GuestMemory, MemoryView, RegionKind,
    host::{HugePages, Mapping},
};

/// A program of QEMU's utilities: the host's, or out of Debian's packages.
fn tool(name: &str) -> Command {
    static FOUND: OnceLock<(PathBuf, String)> = OnceLock::new();
    let (folder, libraries) = FOUND.get_or_init(|| {
        let here = Command::new("qemu-img").arg("--version").output();
        if here.is_ok_and(|out| out.status.success()) {
            return Default::default();
        }
        let store = ImageStore::open_default().expect("the cache");
        let packages = store.packages_with_dependencies(&["qemu-utils"], &Silent);
        let packages = packages.expect("qemu-utils");
        let mut folders = packages.iter().map(|package| package.root.join("usr/bin"));
        let programs = folders.find(|folder| folder.join("qemu-img").exists());
        // The host's own loader and C library stay.
        let libraries = packages
            .iter()
            .filter(|package| !package.root.join("lib64").exists())
            .flat_map(|package| {
                ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"].map(|f| package.root.join(f))
            })
            .filter(|folder| folder.is_dir())
            .map(|folder| folder.display().to_string());
        let libraries: Vec<String> = libraries.collect();
        (programs.expect("qemu-img"), libraries.join(":"))
    });
    let mut command = Command::new(folder.join(name));
    if !libraries.is_empty() {
        command.env("LD_LIBRARY_PATH", libraries);
    }
    command
}

/// Runs a program of QEMU's utilities; its output.
pub fn qemu(name: &str, arguments: &[&str]) -> Result<String, String> {
    let out = tool(name).args(arguments).output();
    let out = out.expect("QEMU's utilities run");
    let text = String::from_utf8_lossy(&[out.stdout, out.stderr].concat()).into_owned();
    if out.status.success() {
        Ok(text)
    } else {
        Err(text)
    }
}

/// `qemu-img`, which must not fail.
pub fn qemu_img(arguments: &[&str]) -> String {
    qemu("qemu-img", arguments).unwrap_or_else(|text| panic!("qemu-img {arguments:?}: {text}"))
}

/// `qemu-io` commands on an image, which must not fail.
pub fn qemu_io(image: &Path, format: &str, commands: &[String]) {
    for chunk in commands.chunks(200) {
        let mut arguments = vec!["-f", format];
        for command in chunk {
            arguments.extend(["-c", command]);
        }
        arguments.push(text(image));
        let out = qemu("qemu-io", &arguments).unwrap_or_else(|text| panic!("qemu-io: {text}"));
        assert!(!out.contains("failed"), "{out}");
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are text")
}

/// SplitMix64.
pub fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Waits for a future on this thread.
pub fn wait<T>(future: impl Future<Output = T>) -> T {
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(value) => return value,
            Poll::Pending => std::thread::park(),
        }
    }
}

/// 16 MiB of guest memory in two regions that lie apart.
pub fn memory() -> MemoryView {
    let mapping = Mapping::new("test", 16 << 20, HugePages::Off).unwrap();
    let low = mapping.region("low", Gpa(0), 0, 8 << 20, RegionKind::Ram);
    let high = mapping.region("high", Gpa(1 << 32), 8 << 20, 8 << 20, RegionKind::Ram);
    MemoryView::new(GuestMemory::new(vec![low, high]).unwrap())
}

/// A buffer of `len` bytes at `gpa` in pieces that are not in order.
pub fn scattered(view: &MemoryView, gpa: u64, len: u32) -> GuestBuffer {
    let half = len / 2 / 512 * 512;
    let segments = [
        Segment {
            gpa: Gpa(gpa + u64::from(len - half)),
            len: half,
        },
        Segment {
            gpa: Gpa(gpa),
            len: len - half,
        },
    ];
    let segments = segments.into_iter().filter(|s| s.len > 0).collect();
    GuestBuffer::new(view.clone(), segments).unwrap()
}

/// Puts `bytes` where the buffer is.
pub fn fill(buffer: &GuestBuffer, mut bytes: &[u8]) {
    for segment in buffer.segments() {
        let (now, later) = bytes.split_at(segment.len as usize);
        buffer.view().write(segment.gpa, now).unwrap();
        bytes = later;
    }
}

/// What is where the buffer is.
pub fn content(buffer: &GuestBuffer) -> Vec<u8> {
    let mut bytes = vec![0; buffer.len() as usize];
    let mut at = 0;
    for segment in buffer.segments() {
        let to = &mut bytes[at..at + segment.len as usize];
        buffer.view().read(segment.gpa, to).unwrap();
        at += segment.len as usize;
    }
    bytes
}

/// One request, awaited.
pub fn ask(disk: &dyn BlockBackend, operation: Operation) -> Result<(), BlockError> {
    let (request, completion) = Request::new(operation);
    disk.submit(request);
    disk.kick();
    wait(completion)
}
