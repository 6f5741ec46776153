//! io_uring: one ring, entered once per round.

use std::{
    cell::{Cell, RefCell},
    fs::File,
    io,
    os::fd::AsRawFd,
    sync::Arc,
    time::Duration,
};

use caisson_memory::Pinned;
use io_uring::{IoUring, opcode, squeue, types};

use super::{
    engine::{Call, Operation, Operations, Progress, finish},
    remote::Remote,
};

/// Entries of the submission queue; the kernel makes the completion queue twice as long. More calls than that are
/// submitted in several goes.
const ENTRIES: u32 = 256;

/// The completion that says that the bell was rung.
const BELL: u64 = u64::MAX;

pub(super) struct Ring {
    uring: RefCell<IoUring>,
    operations: Operations,
    remote: Arc<Remote>,
    bell_armed: Cell<bool>,
    /// Whether the queue has entries that the kernel was not told of.
    queued: Cell<bool>,
}

impl Ring {
    pub(super) fn new(remote: Arc<Remote>) -> io::Result<Self> {
        let uring = IoUring::builder()
            .setup_coop_taskrun()
            .setup_single_issuer()
            .build(ENTRIES)
            // Kernels before 6.0 do not know these.
            .or_else(|_| IoUring::new(ENTRIES))?;
        if !uring.params().is_feature_ext_arg() || !uring.params().is_feature_nodrop() {
            return Err(io::ErrorKind::Unsupported.into());
        }
        Ok(Self {
            uring: RefCell::new(uring),
            operations: Operations::default(),
            remote,
            bell_armed: Cell::new(false),
            queued: Cell::new(false),
        })
    }

    pub(super) fn operations(&self) -> &Operations {
        &self.operations
    }

    pub(super) fn start(&self, file: &Arc<File>, call: Call, memory: Pinned) -> usize {
        let iovecs: Vec<libc::iovec> = iovecs(&memory);
        let fd = types::Fd(file.as_raw_fd());
        // The list's heap memory stays where it is when the list is moved.
        let (list, count) = (iovecs.as_ptr(), iovecs.len() as u32);
        let first = iovecs.first().map(|v| (v.iov_base.cast::<u8>(), v.iov_len));
        let entry = match call {
            Call::Read { at } => match first {
                Some((base, len)) if count == 1 => {
                    opcode::Read::new(fd, base, len as u32).offset(at).build()
                }
                _ => opcode::Readv::new(fd, list, count).offset(at).build(),
            },
            Call::Write { at, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                match first {
                    Some((base, len)) if count == 1 => opcode::Write::new(fd, base, len as u32)
                        .offset(at)
                        .rw_flags(flags)
                        .build(),
                    _ => opcode::Writev::new(fd, list, count)
                        .offset(at)
                        .rw_flags(flags)
                        .build(),
                }
            }
            Call::Sync => opcode::Fsync::new(fd)
                .flags(types::FsyncFlags::DATASYNC)
                .build(),
            Call::Punch { at, len } => opcode::Fallocate::new(fd, len)
                .offset(at)
                .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                .build(),
            Call::Zero { at, len } => opcode::Fallocate::new(fd, len)
                .offset(at)
                .mode(libc::FALLOC_FL_ZERO_RANGE)
                .build(),
        };
        let key = self.operations.borrow_mut().insert_with(|_| Operation {
            progress: Progress::Waiting(None),
            _iovecs: iovecs,
            _file: file.clone(),
            _memory: memory,
        });
        let entry = entry.user_data(key as u64);
        // SAFETY: descriptor, iovecs and memory are the operation's, which stays in the table until its completion was
        // taken (`Pending` only detaches it, and `Engine::drain` waits for it).
        unsafe { self.push(&entry) };
        key
    }

    /// # Safety
    /// What `entry` names must stay until its completion was taken.
    unsafe fn push(&self, entry: &squeue::Entry) {
        self.queued.set(true);
        loop {
            {
                let mut uring = self.uring.borrow_mut();
                // SAFETY: the caller's.
                if unsafe { uring.submission().push(entry) }.is_ok() {
                    return;
                }
                // Full: the kernel takes what is there, unless it has answers that must be taken first.
                let _ = uring.submit();
            }
            self.reap();
        }
    }

    pub(super) fn turn(&self, sleep: bool, timeout: Option<Duration>) {
        if sleep && !self.bell_armed.replace(true) {
            let bell = types::Fd(self.remote.bell().as_raw_fd());
            let entry = opcode::PollAdd::new(bell, libc::POLLIN as u32)
                .build()
                .user_data(BELL);
            // SAFETY: the bell is the remote's, which lives as long as the ring; the kernel holds the file besides.
            unsafe { self.push(&entry) };
        }
        let entered = {
            let uring = self.uring.borrow();
            let submitter = uring.submitter();
            if sleep {
                match timeout {
                    Some(timeout) => {
                        let time = types::Timespec::from(timeout);
                        let args = types::SubmitArgs::new().timespec(&time);
                        submitter.submit_with_args(1, &args)
                    }
                    None => submitter.submit_and_wait(1),
                }
            } else if self.queued.get() {
                submitter.submit()
            } else {
                Ok(0)
            }
        };
        match entered {
            Ok(_) => self.queued.set(false),
            Err(error) => match error.raw_os_error() {
                // The time is over; a signal; answers must be taken first.
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN) => {}
                _ => tracing::error!("io_uring_enter: {error}"),
            },
        }
        self.reap();
    }

    /// Takes all answers.
    fn reap(&self) {
        loop {
            let next = self.uring.borrow_mut().completion().next();
            let Some(entry) = next else {
                return;
            };
            if entry.user_data() == BELL {
                self.bell_armed.set(false);
                self.remote.hush();
            } else {
                finish(&self.operations, entry.user_data() as usize, entry.result());
            }
        }
    }
}

/// The runs of `memory` as the kernel wants them.
pub(super) fn iovecs(memory: &Pinned) -> Vec<libc::iovec> {
    memory
        .runs()
        .map(|(base, len)| libc::iovec {
            iov_base: base.as_ptr().cast(),
            iov_len: len,
        })
        .collect()
}
