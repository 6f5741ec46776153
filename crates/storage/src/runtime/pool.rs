//! Threads that make blocking calls, where the host has no io_uring for us.

use std::{
    cell::RefCell,
    collections::VecDeque,
    fs::File,
    os::fd::AsRawFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use caisson_memory::Pinned;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    engine::{Call, Operation, Operations, Progress, finish},
    remote::Remote,
    ring::iovecs,
};

/// The most threads of a pool: beyond it, calls wait for each other.
const THREADS: usize = 16;

struct Job {
    key: usize,
    call: Call,
    file: Arc<File>,
    memory: Pinned,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    answers: Vec<(usize, i32)>,
    idle: usize,
    stop: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    remote: Arc<Remote>,
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self) {
        let mut queue = self.queue();
        loop {
            if let Some(job) = queue.jobs.pop_front() {
                drop(queue);
                let answer = perform(&job);
                queue = self.queue();
                queue.answers.push((job.key, answer));
                self.remote.ring();
            } else if queue.stop {
                return;
            } else {
                queue.idle += 1;
                queue = self
                    .work
                    .wait(queue)
                    .unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
    }
}

pub(super) struct Pool {
    shared: Arc<Shared>,
    operations: Operations,
    threads: RefCell<Vec<JoinHandle<()>>>,
}

impl Pool {
    pub(super) fn new(remote: Arc<Remote>) -> Self {
        Self {
            shared: Arc::new(Shared {
                queue: Mutex::default(),
                work: Condvar::new(),
                remote,
            }),
            operations: Operations::default(),
            threads: RefCell::default(),
        }
    }

    pub(super) fn operations(&self) -> &Operations {
        &self.operations
    }

    pub(super) fn start(&self, file: &Arc<File>, call: Call, memory: Pinned) -> usize {
        let key = self.operations.borrow_mut().insert_with(|_| Operation {
            progress: Progress::Waiting(None),
            _iovecs: Vec::new(),
            _file: file.clone(),
            _memory: memory.clone(),
        });
        let mut queue = self.shared.queue();
        queue.jobs.push_back(Job {
            key,
            call,
            file: file.clone(),
            memory,
        });
        let more = queue.jobs.len() > queue.idle;
        drop(queue);
        let mut threads = self.threads.borrow_mut();
        if more && threads.len() < THREADS {
            let shared = self.shared.clone();
            let name = format!("disk{}", threads.len());
            let started = thread::Builder::new()
                .name(name)
                .spawn(move || shared.serve());
            match started {
                Ok(thread) => threads.push(thread),
                // Without any thread nobody would ever do it.
                Err(_) if threads.is_empty() => {
                    let mut queue = self.shared.queue();
                    while let Some(job) = queue.jobs.pop_front() {
                        let answer = perform(&job);
                        queue.answers.push((job.key, answer));
                    }
                    self.shared.remote.ring();
                }
                Err(_) => {}
            }
        }
        self.shared.work.notify_one();
        key
    }

    pub(super) fn turn(&self, sleep: bool, timeout: Option<Duration>) {
        if sleep && self.shared.queue().answers.is_empty() {
            let timeout = timeout.map(|t| Timespec {
                tv_sec: t.as_secs().min(1 << 30) as i64,
                tv_nsec: t.subsec_nanos().into(),
            });
            let remote = &self.shared.remote;
            let mut bell = [PollFd::new(remote.bell(), PollFlags::IN)];
            // An interrupted sleep is a short one.
            let _ = poll(&mut bell, timeout.as_ref());
            remote.hush();
        }
        let answers = std::mem::take(&mut self.shared.queue().answers);
        for (key, answer) in answers {
            finish(&self.operations, key, answer);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.queue().stop = true;
        self.shared.work.notify_all();
        for thread in self.threads.get_mut().drain(..) {
            // A thread of ours does not panic; if it did, there is nobody to tell.
            let _ = thread.join();
        }
    }
}

fn perform(job: &Job) -> i32 {
    let fd = job.file.as_raw_fd();
    let iovecs = iovecs(&job.memory);
    let count = iovecs.len() as libc::c_int;
    // SAFETY: the descriptor and the memory behind the iovecs are the job's.
    let answer = unsafe {
        match job.call {
            Call::Read { at } => libc::preadv(fd, iovecs.as_ptr(), count, at as libc::off_t),
            Call::Write { at, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                libc::pwritev2(fd, iovecs.as_ptr(), count, at as libc::off_t, flags)
            }
            Call::Sync => libc::fdatasync(fd) as isize,
            Call::Punch { at, len } => libc::fallocate(
                fd,
                libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
                at as libc::off_t,
                len as libc::off_t,
            ) as isize,
            Call::Zero { at, len } => libc::fallocate(
                fd,
                libc::FALLOC_FL_ZERO_RANGE,
                at as libc::off_t,
                len as libc::off_t,
            ) as isize,
        }
    };
    if answer < 0 {
        let error = std::io::Error::last_os_error().raw_os_error();
        -error.unwrap_or(libc::EIO)
    } else {
        i32::try_from(answer).unwrap_or(i32::MAX)
    }
}
