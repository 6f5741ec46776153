//! The instruction oracle: random instructions on random state, executed by
//! this host's processor and by the software CPU, all results compared.
//!
//! `CAISSON_ORACLE_CASES` sets the number of cases (default 400,000),
//! `CAISSON_ORACLE_SEED` the seed; `CAISSON_ORACLE_ONLY` restricts it to codes
//! whose name contains a string.

mod cases;
mod native;
mod rng;
mod soft;

use std::{collections::BTreeMap, fmt::Write};

use caisson_x86_cpu::{
    build,
    cpuid::{self, Features},
    fault::Fault,
    state::Cpu,
    sys,
    vector::{self, SoftOp},
};
use cases::Case;
use iced_x86::{Code, Instruction, Mnemonic};
use native::{Native, State, Trap};
use rng::Rng;
use soft::{ARENA, ARENA_LEN, Machine};

type Exec = fn(&mut Cpu, &Case) -> Result<(), Fault>;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name)
        .ok()
        .map(|v| {
            v.parse()
                .unwrap_or_else(|_| panic!("{name}={v}: not a number"))
        })
        .unwrap_or(default)
}

/// Parts of the results that cannot be compared.
struct Ignore {
    gpr: Option<usize>,
    flags: bool,
    memory: std::ops::Range<u64>,
    mxcsr: u32,
    /// Registers of a gather that faulted: bytes beyond the elements.
    gather: Option<usize>,
    x87: bool,
    pointers: bool,
    /// Where in the page the fault is.
    address: u64,
}

fn ignore(case: &Case, trap: Option<Trap>) -> Ignore {
    use Mnemonic as M;
    let mut i = Ignore {
        gpr: None,
        flags: false,
        memory: 0..0,
        mxcsr: 0,
        gather: None,
        x87: false,
        pointers: false,
        address: 0,
    };
    let page_fault = trap.is_some_and(|t| matches!(t.vector, 12..=14));
    let at = |r: std::ops::Range<u64>| case.target + r.start..case.target + r.end;
    match case.insn.mnemonic() {
        M::Rdrand | M::Rdseed => {
            i.gpr = Some(case.insn.op0_register().number());
            i.flags = true;
        }
        // Instruction and data pointers differ: the instruction runs elsewhere.
        M::Fnstenv | M::Fnsave => {
            i.address = 0xfff;
            let wide = matches!(case.insn.memory_size().size(), 28 | 108);
            i.memory = at(if wide { 12..28 } else { 6..14 });
        }
        M::Fxsave | M::Fxsave64 => {
            i.memory = at(6..24);
            i.address = 0xfff;
        }
        M::Xsave | M::Xsave64 | M::Xsaveopt | M::Xsaveopt64 | M::Xsavec | M::Xsavec64 => {
            i.memory = at(6..24);
            i.address = 0xfff;
        }
        M::Fldenv | M::Frstor | M::Fxrstor | M::Fxrstor64 | M::Xrstor | M::Xrstor64 => {
            i.pointers = true;
            i.address = 0xfff;
        }
        M::Maskmovq
        | M::Maskmovdqu
        | M::Vmaskmovdqu
        | M::Vmaskmovpd
        | M::Vmaskmovps
        | M::Vpmaskmovd
        | M::Vpmaskmovq => i.address = 0xfff,
        // What of it lands before the store faults is the model's.
        M::Fbstp | M::Fstp if page_fault => i.memory = at(0..10),
        // Flags are raised before the store faults.
        M::Vcvtps2ph if page_fault => i.mxcsr = 0x3f,
        _ => {}
    }
    if page_fault && SoftOp::of(case.insn.code()) == Some(SoftOp::Gather) {
        i.gather = Some(if case.insn.op0_register().is_ymm() {
            32
        } else {
            8
        });
    }
    // Whether the unit enters MMX mode before a store faults is the model's.
    i.x87 = page_fault && (0..case.insn.op_count()).any(|n| case.insn.op_register(n).is_mm());
    let unmasked = !(case.input.mxcsr() >> 7);
    if trap.is_some_and(|t| t.vector == 19) {
        // Whether an unmasked overflow or underflow is also inexact.
        if unmasked & 0x18 != 0 {
            i.mxcsr = 0x20;
        }
        // Which steps of a dot product come before the one that raises.
        if matches!(
            case.insn.mnemonic(),
            M::Dpps | M::Dppd | M::Vdpps | M::Vdppd
        ) {
            i.mxcsr = 0x3f;
        }
    }
    i
}

fn compare(
    case: &Case,
    (native, trap, native_memory): (&State, Option<Trap>, &[u8]),
    (soft, fault, soft_memory): (&State, Option<Trap>, &[u8]),
) -> Result<(), String> {
    let skip = ignore(case, trap);
    let mut out = String::new();
    let page = |t: Trap| Trap {
        address: t.address & !skip.address,
        ..t
    };
    let maskmov = matches!(
        SoftOp::of(case.insn.code()),
        Some(SoftOp::Maskmovq | SoftOp::Maskmovdqu | SoftOp::Vmaskmovdqu)
    );
    if maskmov && trap.is_some_and(|t| t.vector == 14) && fault.is_none() {
        // Whether bytes that are not selected fault is the model's.
        return Ok(());
    }
    // Hosts were seen to report #GP for such a store across into an absent page.
    // Which of a misaligned and a non-canonical address comes first is the model's.
    let either = matches!(
        case.insn.mnemonic(),
        Mnemonic::Vcvtps2ph | Mnemonic::Cmpxchg16b
    ) && trap.is_some()
        && fault.is_some()
        && trap.map(|t| t.vector) != fault.map(|t| t.vector);
    if !either && trap.map(page) != fault.map(page) {
        let gpr = case.input.gpr;
        let _ = writeln!(
            out,
            "  exception: host {trap:x?}, soft {fault:x?}; general registers {gpr:x?}"
        );
    }
    let restores = matches!(case.insn.mnemonic(), Mnemonic::Xrstor | Mnemonic::Xrstor64);
    if restores && out.is_empty() && trap.is_some() {
        // How much is loaded before a part of the image is found bad is the model's.
        return Ok(());
    }
    for n in 0..16 {
        if skip.gpr != Some(n) && native.gpr[n] != soft.gpr[n] {
            let (i, a, b) = (case.input.gpr[n], native.gpr[n], soft.gpr[n]);
            let _ = writeln!(out, "  r{n}: {i:#x} -> host {a:#x}, soft {b:#x}");
        }
        let gathered = [0, 2]
            .iter()
            .any(|&i| case.insn.op_register(i).number() == n);
        let len = skip.gather.filter(|_| gathered).unwrap_or(32);
        if native.ymm[n][..len] != soft.ymm[n][..len] {
            let (i, a, b) = (case.input.ymm[n], native.ymm[n], soft.ymm[n]);
            let _ = writeln!(
                out,
                "  ymm{n}:\n   in   {i:02x?}\n   host {a:02x?}\n   soft {b:02x?}"
            );
        }
    }
    let flags = 0x8d5 & !undefined(&case.insn);
    if !skip.flags && (native.rflags ^ soft.rflags) & flags != 0 {
        let (i, a, b) = (
            case.input.rflags,
            native.rflags & flags,
            soft.rflags & flags,
        );
        let _ = writeln!(out, "  flags: {i:#x} -> host {a:#x}, soft {b:#x}");
    }
    if !either && (native.mxcsr() ^ soft.mxcsr()) & !skip.mxcsr != 0 {
        let (i, a, b) = (case.input.mxcsr(), native.mxcsr(), soft.mxcsr());
        let _ = writeln!(out, "  mxcsr: {i:#x} -> host {a:#x}, soft {b:#x}");
    }
    if !skip.x87 && native.fx[..5] != soft.fx[..5] {
        let (i, a, b) = (&case.input.fx[..5], &native.fx[..5], &soft.fx[..5]);
        let _ = writeln!(
            out,
            "  x87 control: {i:02x?} -> host {a:02x?}, soft {b:02x?}"
        );
    }
    for r in 0..8 {
        let range = 32 + 16 * r..42 + 16 * r;
        let (a, b) = (&native.fx[range.clone()], &soft.fx[range.clone()]);
        if !skip.x87 && a != b {
            let i = &case.input.fx[range];
            let _ = writeln!(out, "  st{r}: {i:02x?} -> host {a:02x?}, soft {b:02x?}");
        }
    }
    for (i, (a, b)) in native_memory.iter().zip(soft_memory).enumerate() {
        let at = ARENA + i as u64;
        if a != b && !skip.memory.contains(&at) {
            let _ = writeln!(out, "  memory {at:#x}: host {a:02x}, soft {b:02x}");
        }
    }
    // No address of the engine shows in the x87 pointers.
    let fip = u64::from_le_bytes(soft.fx[8..16].try_into().unwrap());
    if !skip.pointers && fip != 0 && fip != RIP {
        let _ = writeln!(out, "  FIP is {fip:#x}");
    }
    if out.is_empty() { Ok(()) } else { Err(out) }
}

/// RFLAGS bits that the manual leaves open after `insn`.
fn undefined(insn: &Instruction) -> u64 {
    use iced_x86::RflagsBits as B;
    let open = insn.rflags_undefined();
    [
        (B::OF, 11),
        (B::SF, 7),
        (B::ZF, 6),
        (B::AF, 4),
        (B::CF, 0),
        (B::PF, 2),
    ]
    .into_iter()
    .filter(|&(bit, _)| open & bit != 0)
    .fold(0, |mask, (_, at)| mask | 1 << at)
}

/// The guest's RIP: the same for each case, and not the host's.
const RIP: u64 = soft::CODE;

struct Oracle {
    native: Native,
    machine: Box<Machine>,
    cpu: Box<Cpu>,
    exec: Exec,
    before: Vec<u8>,
    after: Vec<u8>,
}

impl Oracle {
    fn new(exec: Exec) -> Self {
        let mut machine = Box::new(Machine::new());
        let cpu = soft::vcpu(&mut machine);
        Self {
            native: Native::new(),
            machine,
            cpu,
            exec,
            before: vec![0; ARENA_LEN],
            after: vec![0; ARENA_LEN],
        }
    }

    /// Runs one case on both; `Ok` says whether it faulted.
    fn run(&mut self, rng: &mut Rng, case: &Case) -> Result<bool, String> {
        let at = (case.target.wrapping_sub(ARENA) as usize).min(ARENA_LEN);
        let window = at.saturating_sub(64)..(at + 128).min(ARENA_LEN);
        rng.fill(&mut self.before[window]);
        self.tidy_image(rng, case, at);
        self.machine.memory().copy_from_slice(&self.before);
        let (native, trap) = self.native.run(&case.bytes, &case.input);
        self.after.copy_from_slice(self.machine.memory());
        self.machine.memory().copy_from_slice(&self.before);

        self.machine.set_code(&case.bytes);
        soft::load(&mut self.cpu, &case.input, RIP);
        self.cpu.replay.begin_instruction();
        let fault = match (self.exec)(&mut self.cpu, case) {
            Ok(_) => None,
            Err(Fault::Exception(e)) => Some(Trap {
                vector: e.vector,
                error: e.error.unwrap_or(0),
                address: e.payload,
            }),
            Err(f) => return Err(format!("  {f:?}")),
        };
        let soft = soft::save(&self.cpu);
        let trap = trap.map(|t| Trap {
            address: if t.vector == 14 { t.address } else { 0 },
            ..t
        });
        compare(
            case,
            (&native, trap, &self.after),
            (&soft, fault, self.machine.memory()),
        )?;
        Ok(fault.is_some())
    }

    /// Makes the image that FXRSTOR or XRSTOR loads a valid one, mostly.
    fn tidy_image(&mut self, rng: &mut Rng, case: &Case, at: usize) {
        let header = match case.insn.mnemonic() {
            Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => false,
            Mnemonic::Xrstor
            | Mnemonic::Xrstor64
            | Mnemonic::Xsave
            | Mnemonic::Xsave64
            | Mnemonic::Xsaveopt
            | Mnemonic::Xsaveopt64 => true,
            _ => return,
        };
        let end = at + if header { 832 } else { 512 };
        if end > ARENA_LEN {
            return;
        }
        rng.fill(&mut self.before[at..end]);
        if !rng.one_in(4) {
            self.before[at + 26..at + 28].fill(0);
        }
        if header {
            // The host's XCR0 has more bits than the guest's.
            let h = &mut self.before[at + 512..at + 576];
            h.fill(0);
            h[0] = rng.next() as u8 & 7;
            match rng.below(8) {
                0 => {
                    h[15] = 0x80;
                    h[8] = rng.next() as u8 & 7;
                }
                1 => h[8 + rng.below(56)] = 1,
                _ => {}
            }
        }
    }

    fn sweep(&mut self, codes: &[Code]) {
        let seed = setting("CAISSON_ORACLE_SEED", 1);
        let total = setting("CAISSON_ORACLE_CASES", 400_000);
        let only = std::env::var("CAISSON_ORACLE_ONLY").unwrap_or_default();
        let codes: Vec<Code> = codes
            .iter()
            .copied()
            .filter(|c| format!("{c:?}").contains(&only))
            .collect();
        let each = (total / codes.len().max(1) as u64).max(4);
        let mut rng = Rng(seed);
        let mut failures: BTreeMap<String, (u64, String)> = BTreeMap::new();
        let (mut ran, mut faulted) = (0u64, 0u64);
        let mut silent = Vec::new();
        for &code in &codes {
            let (mut done, mut clean) = (0, 0);
            for _ in 0..each * 4 {
                if done == each {
                    break;
                }
                let Some(case) = cases::make(&mut rng, code, RIP) else {
                    continue;
                };
                done += 1;
                match self.run(&mut rng, &case) {
                    Ok(false) => clean += 1,
                    Ok(true) => faulted += 1,
                    Err(text) => {
                        clean += 1;
                        let f = failures
                            .entry(format!("{code:?}"))
                            .or_insert((0, String::new()));
                        f.0 += 1;
                        if f.1.is_empty() {
                            f.1 = format!("{:02x?} {:x?}\n{text}", case.bytes, case.insn);
                        }
                    }
                }
            }
            ran += done;
            if clean == 0 {
                silent.push(code);
            }
        }
        println!(
            "{ran} cases of {} codes, {faulted} raised an exception on both sides; {} bytes of thunks",
            codes.len(),
            self.machine.thunk_bytes()
        );
        for (code, (n, first)) in failures.iter().take(60) {
            println!("{code}: {n} of {each} differ; the first:\n{first}");
        }
        let names: Vec<&String> = failures.keys().collect();
        assert!(
            failures.is_empty(),
            "{} codes differ: {names:?}",
            names.len()
        );
        assert!(silent.is_empty(), "no case of {silent:?} could be run");
    }
}

/// Whether the host itself can execute `code`, in user mode, for comparison.
fn comparable(code: Code, host: &Features) -> bool {
    use Mnemonic as M;
    let op = code.op_code();
    let system_dependent = matches!(
        code.mnemonic(),
        // Privileged, or dependent on the operating system's XCR0.
        M::Xsaves
            | M::Xsaves64
            | M::Xrstors
            | M::Xrstors64
            | M::Xgetbv
            | M::Xsetbv
            // No-operations unless the host enables shadow stacks.
            | M::Rdsspd
            | M::Rdsspq
            // Assembler-only spellings and hints without a unique encoding.
            | M::Reservednop
            | M::Prefetchwt1
            | M::Prefetchit0
            | M::Prefetchit1
            | M::Cldemote
            | M::Fndisi
            | M::Fneni
            | M::Fnsetpm
    );
    op.mode64() && !system_dependent && host.contains_all(code.cpuid_features())
}

/// One test, since there is one arena in a process.
#[test]
fn instructions_match_the_host() {
    let mut oracle = Oracle::new(|cpu, case| vector::exec(cpu, &case.insn).map(|_| ()));
    vector_and_x87(&mut oracle);
    oracle.exec = soft::run_whole;
    whole(&mut oracle);
}

fn vector_and_x87(oracle: &mut Oracle) {
    let mut host = Features::from_cpuid(cpuid::host);
    host.insert(iced_x86::CpuidFeature::CET_IBT);
    let unit = vector::Unit::default();
    let codes: Vec<Code> = Code::values()
        .filter(|&c| unit.executes(c) && comparable(c, &host))
        .collect();
    assert!(codes.len() > 1000, "{} codes", codes.len());
    oracle.sweep(&codes);
}

/// From bytes to results: decoder, block builder, handlers.
fn whole(oracle: &mut Oracle) {
    let mut host = Features::from_cpuid(cpuid::host);
    host.insert(iced_x86::CpuidFeature::CET_IBT);
    let unit = vector::Unit::default();
    let codes: Vec<Code> = Code::values()
        .filter(|&c| {
            let mut insn = Instruction::default();
            insn.set_code(c);
            let plain = insn.flow_control() == iced_x86::FlowControl::Next
                && !insn.is_privileged()
                && !insn.is_stack_instruction()
                && !insn.is_string_instruction();
            let integer = build::handles_integer(&insn) && plain && !sys::handles(c);
            // The maker of cases has no absolute 64-bit addresses.
            let absolute = format!("{c:?}").contains("moffs");
            (integer || unit.executes(c)) && !absolute && comparable(c, &host)
        })
        .collect();
    assert!(codes.len() > 1200, "{} codes", codes.len());
    oracle.sweep(&codes);
}
