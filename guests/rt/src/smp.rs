//! Starting the other processors and giving them work.

use crate::percpu::{self, MAX_CPUS};
use crate::{acpi, apic, boot, cpu, tsc};
use core::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};

/// A function that runs on another processor.
pub type Job = fn(usize);

struct Mailbox {
    job: AtomicUsize,
    argument: AtomicUsize,
    apic_id: AtomicU32,
    online: AtomicU32,
}

static MAILBOXES: [Mailbox; MAX_CPUS] = [const {
    Mailbox {
        job: AtomicUsize::new(0),
        argument: AtomicUsize::new(0),
        apic_id: AtomicU32::new(0),
        online: AtomicU32::new(0),
    }
}; MAX_CPUS];
static ROOT: AtomicU64 = AtomicU64::new(0);

/// Starts every processor of the MADT; gives how many run, this one included.
pub fn start() -> usize {
    boot::install_trampoline();
    ROOT.store(cpu::cr3(), Ordering::SeqCst);
    apic::enable(0xFF);
    let me = apic::id();
    MAILBOXES[0].apic_id.store(me, Ordering::SeqCst);
    MAILBOXES[0].online.store(1, Ordering::SeqCst);
    let mut running = 1;
    acpi::processors(|id| {
        if id != me && running < MAX_CPUS {
            start_one(id);
            if tsc::wait_until(1_000_000, || {
                MAILBOXES[running].online.load(Ordering::SeqCst) != 0
            }) {
                running += 1;
            }
        }
    });
    running
}

/// INIT, then start-up IPIs at the trampoline.
pub fn start_one(id: u32) {
    apic::send(id, apic::mode::INIT | apic::ASSERT);
    tsc::delay(200);
    let page = (boot::TRAMPOLINE >> 12) as u32;
    apic::send(id, apic::mode::STARTUP | apic::ASSERT | page);
    tsc::delay(200);
    apic::send(id, apic::mode::STARTUP | apic::ASSERT | page);
}

/// APIC ID of processor `index`.
pub fn apic_id(index: usize) -> u32 {
    MAILBOXES[index].apic_id.load(Ordering::SeqCst)
}

pub(crate) fn ap_main(index: usize) -> ! {
    cpu::set_cr3(ROOT.load(Ordering::SeqCst));
    apic::enable(0xFF);
    let mailbox = &MAILBOXES[index];
    mailbox.apic_id.store(apic::id(), Ordering::SeqCst);
    mailbox.online.store(1, Ordering::SeqCst);
    loop {
        let job = mailbox.job.load(Ordering::SeqCst);
        if job == 0 {
            cpu::pause();
            continue;
        }
        // SAFETY: only `submit` stores non-zero values, all `Job`s.
        let job: Job = unsafe { core::mem::transmute(job) };
        job(mailbox.argument.load(Ordering::SeqCst));
        mailbox.job.store(0, Ordering::SeqCst);
    }
}

/// Gives processor `index` a job; it must be idle.
pub fn submit(index: usize, job: Job, argument: usize) {
    assert!(index != percpu::this().index && !busy(index));
    MAILBOXES[index].argument.store(argument, Ordering::SeqCst);
    MAILBOXES[index].job.store(job as usize, Ordering::SeqCst);
}

/// Whether processor `index` still works on its job.
pub fn busy(index: usize) -> bool {
    MAILBOXES[index].job.load(Ordering::SeqCst) != 0
}

/// Waits until processor `index` is idle, at most `us` microseconds.
pub fn join(index: usize, us: u64) -> bool {
    tsc::wait_until(us, || !busy(index))
}

/// Runs a job on all of the first `count` processors, this one included, and
/// waits for all at most five seconds.
pub fn run_all(count: usize, job: Job, argument: usize) -> bool {
    for index in 1..count {
        submit(index, job, argument);
    }
    job(argument);
    (1..count).all(|index| join(index, 20_000_000))
}
