//! The instruction oracle: random instructions on random state, executed by
//! this host's processor and by the software CPU, all results compared.
//!
//! `CAISSON_ORACLE_CASES` sets the number of cases (default 400,000),
//! `CAISSON_ORACLE_SEED` the seed; `CAISSON_ORACLE_ONLY` restricts it to codes
//! whose name contains a string.

mod cases;
mod compare;
mod native;
mod rng;
mod soft;

use std::collections::BTreeMap;

use caisson_x86_cpu::{
    build,
    cpuid::{self, Features},
    fault::Fault,
    state::Cpu,
    sys, vector,
};
use cases::Case;
use iced_x86::{Code, Instruction, Mnemonic};
use native::{Native, Trap};
use rng::Rng;
use soft::{ARENA, ARENA_LEN, Machine};

/// In byte 2 of MXCSR: AMD's mode for misaligned operands, which is not offered to guests.
const MISALIGNED: u8 = 2;

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
        compare::compare(
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
            Mnemonic::Ldmxcsr | Mnemonic::Vldmxcsr => {
                if let Some(byte) = self.before.get_mut(at + 2) {
                    *byte &= !MISALIGNED;
                }
                return;
            }
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
        self.before[at + 26] &= !MISALIGNED;
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
    // AMD's processors read four bytes of its 16-bit operand, ours two, as Intel's.
    let other_size = code == Code::Movsxd_r16_rm16;
    op.mode64() && !system_dependent && !other_size && host.contains_all(code.cpuid_features())
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
