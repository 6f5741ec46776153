//! The run loop: finds blocks, runs them, follows their links, delivers
//! exceptions.

use core::sync::atomic::Ordering;

use crate::{
    build,
    cache::{Block, CodeCache},
    fault::Fault,
    jit,
    mem::Privilege,
    mmu::{self, Intent},
    state::{Activity, Cpu, Shadow, mode, reg, request, seg},
    sys,
    uop::Next,
};

/// Why [`run`] returned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stop {
    /// [`Cpu::request`] has bits set.
    Request,
    /// The guest executed HLT.
    Halt,
    /// A device access waits for its answer; the instruction will be restarted.
    Parked,
    /// Triple fault.
    Shutdown,
    /// The engine cannot go on.
    Internal(&'static str),
}

/// Runs guest code until something must be decided outside. [`Cpu::env`] must
/// be set and [`Cpu::activity`] be running.
pub fn run(cpu: &mut Cpu, cache: &mut CodeCache) -> Stop {
    loop {
        if cpu.request.load(Ordering::Relaxed) != 0 && cpu.shadow == Shadow::None {
            return Stop::Request;
        }
        let stop = if cpu.shadow != Shadow::None || cpu.mode & mode::STEP != 0 {
            step(cpu, cache)
        } else if cache.translates() {
            chain::<true>(cpu, cache)
        } else {
            chain::<false>(cpu, cache)
        };
        if let Some(stop) = stop {
            return stop;
        }
    }
}

/// Runs one instruction, for instruction emulation on behalf of other backends
/// and for tests. `Ok` when it retired.
///
/// # Errors
/// The fault that it raises, undelivered.
pub fn run_one(cpu: &mut Cpu, cache: &mut CodeCache) -> Result<Activity, Fault> {
    let block = find(cpu, cache, cpu.mode | mode::STEP)?;
    match run_block(cpu, block) {
        Next::FAULT => Err(take_fault(cpu)),
        Next::HALT => Ok(Activity::Halted),
        code => {
            settle(cpu, block, code);
            Ok(Activity::Running)
        }
    }
}

fn take_fault(cpu: &mut Cpu) -> Fault {
    cpu.fault
        .take()
        .unwrap_or(Fault::Internal("a handler reported a fault and gave none"))
}

/// After a link code, RIP follows from the block.
fn settle(cpu: &mut Cpu, block: *const Block, code: u32) {
    if code <= Next::TAKEN {
        // SAFETY: the block is valid until the next flush.
        let target = unsafe { (*block).targets[code as usize] };
        cpu.rip = cpu.mask_ip(cpu.regs[reg::PAGE_RIP].wrapping_add(target as u64));
    }
}

#[inline(always)]
fn run_block(cpu: &mut Cpu, block: *const Block) -> u32 {
    cpu.break_block = false;
    // SAFETY: blocks found in the cache are valid until the next flush, which
    // only happens between blocks; `env` is set by contract of `run`.
    unsafe {
        let uops = Block::uops(block);
        cpu.retired += u64::from((*block).count);
        ((*uops).handler)(cpu, uops)
    }
}

/// Runs blocks one after another; with `NATIVE`, hot ones as host code.
fn chain<const NATIVE: bool>(cpu: &mut Cpu, cache: &mut CodeCache) -> Option<Stop> {
    let mut block = match lookup::<NATIVE>(cpu, cache) {
        Ok(b) => b,
        Err(f) => return raise(cpu, f),
    };
    if cpu.request.load(Ordering::Relaxed) != 0 {
        return Some(Stop::Request);
    }
    loop {
        let code;
        if NATIVE {
            (block, code) = jit::run(cpu, cache, block, run_block);
        } else {
            code = run_block(cpu, block);
        }
        if code <= Next::TAKEN {
            // SAFETY: as in `run_block`.
            let next = unsafe { (*block).links[code as usize] };
            if !next.is_null() && cpu.request.load(Ordering::Relaxed) == 0 {
                if NATIVE {
                    jit::connect(cache, block, code as usize, next);
                }
                block = next;
                continue;
            }
            settle(cpu, block, code);
            if cpu.request.load(Ordering::Relaxed) != 0 {
                return Some(Stop::Request);
            }
            let generation = cpu.generation();
            let flushes = cache.stats.flushes;
            let next = match lookup::<NATIVE>(cpu, cache) {
                Ok(b) => b,
                Err(f) => return raise(cpu, f),
            };
            if generation == cpu.generation() && flushes == cache.stats.flushes {
                cache.link(block, code as usize, next);
            }
            // Building may have waited for other vCPUs.
            if cpu.request.load(Ordering::Relaxed) != 0 {
                return Some(Stop::Request);
            }
            block = next;
            continue;
        }
        match code {
            Next::LOOKUP => {
                if cpu.request.load(Ordering::Relaxed) != 0
                    || cpu.shadow != Shadow::None
                    || cpu.mode & mode::STEP != 0
                {
                    return None;
                }
                if cpu.pending_db != 0 {
                    return after(cpu);
                }
                block = match lookup::<NATIVE>(cpu, cache) {
                    Ok(b) => b,
                    Err(f) => return raise(cpu, f),
                };
                if cpu.request.load(Ordering::Relaxed) != 0 {
                    return Some(Stop::Request);
                }
            }
            Next::HALT => return Some(Stop::Halt),
            _ => {
                let f = take_fault(cpu);
                return raise(cpu, f);
            }
        }
    }
}

/// Runs one instruction with debug checks and interrupt shadows.
fn step(cpu: &mut Cpu, cache: &mut CodeCache) -> Option<Stop> {
    let shadow = cpu.shadow;
    if let Err(f) = sys::debug::check_instruction(cpu) {
        return raise(cpu, f);
    }
    let block = match find(cpu, cache, cpu.mode | mode::STEP) {
        Ok(b) => b,
        Err(f) => return raise(cpu, f),
    };
    if cpu.request.load(Ordering::Relaxed) & request::CODE != 0 {
        // Building may have waited for other vCPUs, whose orders come first.
        cpu.shadow = shadow;
        return Some(Stop::Request);
    }
    let code = run_block(cpu, block);
    if code == Next::FAULT {
        let f = take_fault(cpu);
        if f == Fault::Parked {
            cpu.shadow = shadow;
        }
        return raise(cpu, f);
    }
    settle(cpu, block, code);
    // A debug trap after HLT is delivered first, and ends the halt.
    match sys::debug::after_instruction(cpu) {
        Ok(()) => (code == Next::HALT).then_some(Stop::Halt),
        Err(f) => raise(cpu, f),
    }
}

/// Delivers the debug trap that the last instruction earned.
fn after(cpu: &mut Cpu) -> Option<Stop> {
    match sys::debug::after_instruction(cpu) {
        Ok(()) => None,
        Err(f) => raise(cpu, f),
    }
}

/// Delivers a fault to the guest, or says why not.
fn raise(cpu: &mut Cpu, fault: Fault) -> Option<Stop> {
    let mut fault = fault;
    loop {
        match fault {
            Fault::Exception(e) => {
                match sys::deliver_exception(cpu, e) {
                    Ok(()) => return None,
                    Err(f) => fault = f,
                }
                if let Fault::Exception(_) = fault {
                    // Delivery folds nested faults by itself.
                    return Some(Stop::Internal("an exception escaped its delivery"));
                }
            }
            Fault::Parked => return Some(Stop::Parked),
            Fault::Shutdown => {
                cpu.activity = Activity::Shutdown;
                return Some(Stop::Shutdown);
            }
            Fault::Internal(what) => return Some(Stop::Internal(what)),
        }
    }
}

/// The block at RIP through the jump cache.
#[inline]
fn lookup<const NATIVE: bool>(cpu: &mut Cpu, cache: &mut CodeCache) -> Result<*const Block, Fault> {
    let base = cpu.regs[reg::SEG_BASE + seg::CS];
    let address = cpu.rip.wrapping_add(base);
    if let Some(b) = cache.jump(address, cpu.generation(), cpu.mode) {
        cache.stats.jump_hits += 1;
        cpu.regs[reg::PAGE_RIP] = (address & !0xfff).wrapping_sub(base);
        if NATIVE {
            cache.note_jump(cpu, b);
        }
        return Ok(b);
    }
    let b = find(cpu, cache, cpu.mode)?;
    // SAFETY: just found.
    if unsafe { (*b).second_page().is_none() } && cpu.is_64bit() {
        cache.set_jump(address, cpu.generation(), cpu.mode, b);
    }
    Ok(b)
}

/// The block at RIP, built if need be.
fn find(cpu: &mut Cpu, cache: &mut CodeCache, mode: u32) -> Result<*const Block, Fault> {
    let limit = u64::from(cpu.segments[seg::CS].limit);
    if !cpu.is_64bit() && cpu.rip > limit {
        return Err(Fault::gp(0));
    }
    let base = cpu.regs[reg::SEG_BASE + seg::CS];
    let address = cpu.wrap_linear(cpu.rip.wrapping_add(base));
    cpu.regs[reg::PAGE_RIP] = (address & !0xfff).wrapping_sub(base);
    let gpa = fetch(cpu, cache, address)?;
    if let Some(b) = cache.find(gpa, mode) {
        // SAFETY: just found.
        let (len, second) = unsafe { (u64::from((*b).len), (*b).second_page()) };
        let inside = cpu.is_64bit() || cpu.rip + len - 1 <= limit;
        let second_holds = match second {
            None => true,
            Some(page) => {
                let next = cpu.wrap_linear((address & !0xfff).wrapping_add(0x1000));
                fetch(cpu, cache, next)? >> 12 == page
            }
        };
        if inside && second_holds {
            return Ok(b);
        }
        if !inside && mode & mode::STEP == 0 {
            // Near the segment's end: instruction by instruction.
            return find(cpu, cache, mode | mode::STEP);
        }
        if !inside {
            return Err(Fault::gp(0));
        }
        cache.invalidate(cpu, gpa >> 12);
    }
    if cache.full() {
        cache.flush(cpu);
    }
    let b = build::build(cpu, cache, address, gpa, mode)?;
    // SAFETY: just built.
    if !cpu.is_64bit() && cpu.rip + u64::from(unsafe { (*b).len }) - 1 > limit {
        return find(cpu, cache, mode);
    }
    Ok(b)
}

/// Translates an instruction fetch.
pub(crate) fn fetch(cpu: &mut Cpu, cache: &mut CodeCache, address: u64) -> Result<u64, Fault> {
    let user = cpu.cpl == 3;
    if let Some(gpa) = cache.fetched(address, cpu.generation(), user) {
        return Ok(gpa);
    }
    let privilege = if user {
        Privilege::User
    } else {
        Privilege::Supervisor
    };
    let t = mmu::translate(cpu, address, Intent::Fetch, privilege)?;
    cpu.generations.note(user, address, t.large, t.global);
    cache.set_fetched(address, cpu.generation(), user, t.gpa);
    Ok(t.gpa)
}
